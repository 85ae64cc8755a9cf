"""tokvm prestage, from the command line to the journal, on a migration of a fake world with a guest behind a real sshd."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tests.cli.conftest import tokvm  # noqa: F401 - a fixture
from tests.prestage.guest_tree import MAC, VERSION, GuestTree

from tokvm.app.prestage import Prestage
from tokvm.core.errors import GuestError, JournalError, UsageError
from tokvm.core.machine import Nic
from tokvm.migration.doors import Silent
from tokvm.migration.journal import Journal
from tokvm.migration.phases import Event
from tokvm.remote.ssh import SshHost
from tokvm.testing.fakes import World
from tokvm.testing.sshd import Sshd

Login = Callable[[GuestTree | str], SshHost]
MODULES = "etc/initramfs-tools/modules"


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def step(self, name: str, /) -> None:
        self.lines.append(name)

    def note(self, text: str, /) -> None:
        self.lines.append(text)


@dataclass
class Setting:
    """A migration that was begun; `run` prestages its guest."""

    journal: Journal
    guest: GuestTree
    host: SshHost
    heard: Heard

    def run(self, *, dry_run: bool = False) -> dict[str, object]:
        return Prestage(self.journal, self.host, self.heard).run("guest", dry_run=dry_run)

    @property
    def notes(self) -> list[str]:
        return [event.note for event in self.journal.book(self.journal.find("guest").id).events() if event.event == "note"]


def begin(journal: Journal, *macs: str, guest_os: str = "") -> None:
    vm = replace(World.make().machine(), nics=tuple(Nic(n, mac) for n, mac in enumerate(macs)), extra={"guest_os": guest_os})
    journal.create(vm=vm, source="fake://source", plan={}, targets=["/fake/target-0"])


@pytest.fixture
def setting(tmp_path: Path, dash_guest: GuestTree, logs_into: Login) -> Iterator[Setting]:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    with Journal.open(state) as journal:
        yield Setting(journal, dash_guest, logs_into(dash_guest), Heard())


@pytest.mark.slow
def test_a_guest_is_prestaged_once_and_the_journal_tells_it(setting: Setting) -> None:
    begin(setting.journal, "02:16:3e:00:00:99", MAC.upper())
    document = setting.run()
    assert document["outcome"] == "prestaged"
    assert document["config"] == [{"path": f"/{MODULES}", "state": "written"}]
    assert "tokvm rehearse guest" in str(document["next"])
    begun, ended = setting.notes
    assert begun.startswith(f"prestage begins: virtio into {VERSION} by initramfs-tools of ")
    assert ended.startswith(f"prestaged: virtio in the initramfs of {VERSION} by initramfs-tools")
    assert f"Generating /boot/initrd.img-{VERSION}" in setting.heard.lines
    assert setting.run()["outcome"] == "nothing-to-do"
    assert len(setting.guest.calls) == 1
    assert len(setting.notes) == 2


def test_a_dry_run_says_what_would_be_done_and_does_nothing(setting: Setting) -> None:
    begin(setting.journal, MAC)
    old = setting.guest.read(MODULES)
    document = setting.run(dry_run=True)
    assert "update-initramfs -u -k all" in str(document["steps"])
    assert (setting.guest.calls, setting.notes, setting.guest.read(MODULES)) == ([], [], old)


def test_a_rebuild_that_failed_is_an_error_and_in_the_journal(setting: Setting) -> None:
    begin(setting.journal, MAC)
    old = setting.guest.read(MODULES)
    setting.guest.program("update-initramfs", "echo 'gzip: No space left on device'; exit 1\n")
    with pytest.raises(GuestError, match="exit code 1: gzip: No space left on device; its configuration is as it was"):
        setting.run()
    assert setting.notes[1].startswith("prestage failed: initramfs-tools failed with exit code 1")
    assert setting.guest.read(MODULES) == old


def test_a_full_boot_is_refused_before_anything_is_done(setting: Setting) -> None:
    begin(setting.journal, MAC)
    setting.guest.program(
        "df", "echo 'Filesystem 1024-blocks Used Available Capacity Mounted on'\necho '/dev/sda1 100 99 1 99% /boot'\n"
    )
    with pytest.raises(GuestError, match="1 KiB free in /boot"):
        setting.run()
    assert (setting.guest.calls, setting.notes) == ([], [])


def test_the_guest_of_another_vm_is_refused(setting: Setting) -> None:
    begin(setting.journal, "02:16:3e:00:00:99")
    with pytest.raises(UsageError, match="another machine"):
        setting.run()
    assert setting.guest.calls == []


def test_a_vm_without_nics_is_believed_and_that_is_said(setting: Setting) -> None:
    begin(setting.journal)
    assert setting.run()["outcome"] == "prestaged"
    assert any("is believed" in line for line in setting.heard.lines)


@pytest.mark.parametrize("guest_os", ["windows 2022", "Windows Server"])
def test_windows_is_refused_without_being_asked(setting: Setting, guest_os: str) -> None:
    begin(setting.journal, MAC, guest_os=guest_os)
    with pytest.raises(GuestError, match="is Windows") as refused:
        setting.run()
    assert "--virtio-win" in refused.value.fix


def test_after_the_cutover_began_it_is_too_late(setting: Setting) -> None:
    begin(setting.journal, MAC)
    setting.journal.book(setting.journal.find("guest").id).advance(Event.CUT_OVER)
    with pytest.raises(UsageError, match="a cutover is under way"):
        setting.run()
    assert setting.guest.calls == []


def test_nobody_cuts_over_meanwhile(setting: Setting) -> None:
    begin(setting.journal, MAC)
    with (
        Journal.open(setting.journal.path.parent) as another,
        another.lock(another.find("guest").id),
        pytest.raises(JournalError, match="another run"),
    ):
        setting.run()
    assert setting.guest.calls == []


@pytest.mark.slow
def test_the_command(setting: Setting, shared_sshd: Sshd, tokvm: Callable[..., subprocess.CompletedProcess[str]]) -> None:  # noqa: F811
    begin(setting.journal, MAC)
    ssh = ["--guest-ssh", shared_sshd.netloc, "--ssh-config", shared_sshd.config_file]
    looked = tokvm("prestage", "guest", *ssh, "--dry-run")
    assert (looked.returncode, looked.stdout.splitlines()[-1]) == (0, "nothing was changed"), looked.stderr
    done = tokvm("prestage", "guest", *ssh, "--json")
    assert (done.returncode, json.loads(done.stdout)["outcome"]) == (0, "prestaged"), done.stderr
    again = tokvm("prestage", "guest", *ssh)
    assert "every initramfs has virtio already; next: tokvm sync guest" in again.stdout
    _, told = json.loads(tokvm("report", "guest", "--json").stdout)["notes"]
    assert told["text"].startswith(f"prestaged: virtio in the initramfs of {VERSION}")
    setting.guest.program("update-initramfs", "exit 1\n")
    setting.guest.kernel("6.9")
    assert tokvm("prestage", "guest", *ssh).returncode == GuestError.exit_code
    assert tokvm("prestage", "guest", "--guest-ssh", "-oProxyCommand=x").returncode == UsageError.exit_code
