"""The script through a real sshd: who becomes root, what a hostile or silent guest can do, what is no guest at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.prestage.guest_tree import GuestTree

from tokvm.core.errors import HostKeyError, UsageError
from tokvm.guest.base import GuestError
from tokvm.guest.prestage.talk import Task, ask, command
from tokvm.remote.ssh import SshConfig, SshHost
from tokvm.testing.sshd import Sshd

LogsInto = Callable[[GuestTree | str], SshHost]
USER = "case ${BECAME-} in root) echo 0 ;; *) echo 1000 ;; esac\n"
SUDO = '[ "$1" = -n ] || exit 9\nshift\necho "sudo $*" >>/log\n'


def silent(line: str) -> None:
    raise AssertionError(line)


@pytest.mark.slow
def test_a_guest_is_prepared_and_its_rebuild_heard_line_by_line(guest: GuestTree, logs_into: LogsInto) -> None:
    said: list[str] = []
    host = logs_into(guest)
    assert ask(host, Task.LOOK, on_said=silent).before[0].lacks
    assert ask(host, Task.PREPARE, on_said=said.append).after[0].ready
    assert said == ["Generating /boot/initrd.img-6.1.0-18-amd64"]
    assert ask(host, Task.LOOK, on_said=silent).before[0].ready
    assert guest.left_over == []


def test_a_user_with_sudo_becomes_root_without_being_asked_anything(dash_guest: GuestTree, logs_into: LogsInto) -> None:
    dash_guest.program("id", USER)
    dash_guest.program("sudo", f'{SUDO}BECAME=root exec "$@"\n')
    assert ask(logs_into(dash_guest), Task.PREPARE, on_said=lambda line: None).after[0].ready
    assert dash_guest.calls[:2] == ["sudo sh -c :", "sudo sh -s prepare"]


def test_a_sudo_that_reads_on_does_not_eat_the_script(dash_guest: GuestTree, logs_into: LogsInto) -> None:
    dash_guest.program("id", USER)
    dash_guest.program("sudo", f'{SUDO}[ "$1" != sh ] || [ "$2" != -c ] || cat >>/eaten\nBECAME=root exec "$@"\n')
    assert ask(logs_into(dash_guest), Task.LOOK, on_said=silent).refused == ""
    assert dash_guest.read("eaten") == ""


@pytest.mark.parametrize("sudo", [None, "echo 'sudo: a password is required' >&2; exit 1\n"])
def test_without_root_nothing_is_touched(dash_guest: GuestTree, logs_into: LogsInto, sudo: str | None) -> None:
    dash_guest.program("id", USER)
    if sudo:
        dash_guest.program("sudo", sudo)
    found = ask(logs_into(dash_guest), Task.PREPARE, on_said=silent)
    assert (found.refused, found.before, dash_guest.calls) == ("no-root", (), [])


@pytest.mark.parametrize(
    ("login", "why"),
    [
        ("yes 'said all is well' | head -c 10000000", "more than 4 MiB"),
        ("echo tokvm-prestage 1; yes 'said all is well' | head -c 10000000; echo end", "more than 4 MiB"),
        ("head -c 10000000 /dev/zero", "a line has more than"),
        ("echo tokvm-prestage 1; printf '\\033]0;title\\007\\n'; echo end", r"`\\x1b\]0;title"),
        ("echo tokvm-prestage 1; exit 3", "ended in the middle"),
        ("echo tokvm-prestage 1; echo end", "0 lines `system`"),
        ("echo 'sh is not recognized as an internal or external command' >&2; exit 1", "is not recognized"),
    ],
)
@pytest.mark.slow
def test_a_guest_that_answers_oddly_is_refused(logs_into: LogsInto, login: str, why: str) -> None:
    with pytest.raises(GuestError, match=why) as refused:
        ask(logs_into(login), Task.LOOK, on_said=lambda line: None)
    assert "\x1b" not in str(refused.value)


def test_what_is_no_posix_shell_is_told_what_windows_needs(logs_into: LogsInto) -> None:
    with pytest.raises(GuestError) as refused:
        ask(logs_into("echo \"'sh' is not recognized\" >&2; exit 1"), Task.LOOK, on_said=silent)
    assert "pnputil" in refused.value.fix
    assert "--virtio-win" in refused.value.fix


def test_the_host_key_of_a_guest_is_checked(shared_sshd: Sshd) -> None:
    config = SshConfig.parse(shared_sshd.netloc, config_file=str(shared_sshd.config_file), known_hosts="/dev/null")
    host = SshHost(config)
    try:
        with pytest.raises(HostKeyError):
            ask(host, Task.LOOK, on_said=silent)
    finally:
        host.close()


@pytest.mark.parametrize("place", ["-oProxyCommand=reboot", "root@-x", "a b", "host;reboot", ""])
def test_a_place_that_ssh_could_take_for_something_else_is_refused(place: str) -> None:
    with pytest.raises(UsageError):
        SshConfig.parse(place)


def test_the_command_lines_are_constant() -> None:
    for task in Task:
        assert command(task).startswith("sh -c ")
        assert command(task).count(f"sh -s {task}") == 2
