"""--record with the real command against a played XenServer: what was sent and answered, and never at the migration's cost."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tokvm.cli.main import cli
from tokvm.sources.xenserver.source import XenServerSource
from tokvm.testing.transcripts import ReplayHost, Transcript, read_transcript
from tokvm.testing.xenserver.host import DiskSpec, MachineSpec, NicSpec, XenHost, build_host

MiB = 1 << 20
CANARY = "canary-Xy9-"
VERBS = {"check", "ls", "sync", "rehearse", "cutover", "migrate", "rollback", "finish"}
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def xen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[XenHost]:
    machine = MachineSpec("web", disks=[DiskSpec(2 * MiB)], nics=[NicSpec("02:16:3e:00:00:01")])
    with build_host(tmp_path_factory.mktemp("host"), machines=[machine]) as host:
        host.write_disk("web", 0, offset=MiB, data=b"Q" * 4096)
        yield host
        assert host.violations() == []


@pytest.fixture
def migrate(tmp_path: Path, tokvm: Run, xen: XenHost) -> Run:
    """The real command, with --record."""

    def run(verb: str, *argv: str, record: Path = tmp_path / "transcripts", **more: object) -> subprocess.CompletedProcess[str]:
        ssh = ["--ssh-config", str(xen.sshd.config_file)] if verb in ("ls", "check", "sync") else []
        source = [xen.url] if verb in ("ls", "check", "sync") else []
        return tokvm(verb, *ssh, "--record", record, *source, *argv, **more)

    return run


def transcripts(folder: Path) -> dict[str, Transcript]:
    """By verb."""
    return {path.stem.split("-")[1]: read_transcript(path) for path in sorted(folder.iterdir())}


def to(tmp_path: Path) -> list[str]:
    (tmp_path / "target").mkdir(exist_ok=True)
    return ["--to", str(tmp_path / "target"), "--network", "*=user"]


def test_every_verb_that_talks_to_a_source_can_be_recorded() -> None:
    having = {
        command.callback.__name__
        for command in cli.registered_commands
        if command.callback is not None and "record" in inspect.signature(command.callback).parameters
    }
    assert having == VERBS


@pytest.mark.slow
def test_a_migration_is_recorded_from_the_first_look_to_the_last(migrate: Run, xen: XenHost, tmp_path: Path) -> None:
    before = len(sent(xen))
    for verb, *argv in (
        ["ls"],
        ["check", "--vm", "web"],
        ["sync", "web", "--passes", "1", *to(tmp_path)],
        ["rollback", "web", "--dry-run"],
        ["finish", "web"],
    ):
        ended = migrate(verb, *argv)
        assert ended.returncode == 0, ended.stderr
    found = transcripts(tmp_path / "transcripts")
    assert found.keys() == {"ls", "check", "sync", "rollback", "finish"}
    assert all(one.end is not None and not one.torn for one in found.values())
    recorded = [command for one in found.values() for command in one.commands]
    assert sorted(single(recorded)) == sorted(sent(xen)[before:]), "all that the host was sent, and nothing else"
    (export,) = (one for one in found["sync"].exchanges if one.kind == "stream")
    assert "vdi-export" in export.command
    assert export.code == 0
    assert export.end is not None
    assert export.end["received"] > 4096
    text = "".join(path.read_text() for path in (tmp_path / "transcripts").iterdir())
    assert "QQQQ" not in text
    assert "REMOVED" not in text, "nothing here is a secret"


def sent(xen: XenHost) -> list[str]:
    return xen.commands()


def single(lines: list[str]) -> list[str]:
    """Batches taken apart, as the host sees them."""
    return [one.strip("; ") for line in lines for one in line.split("; printf '\\0%d\\0' $?") if one.strip("; ")]


@pytest.mark.slow
def test_a_transcript_is_a_golden_file(migrate: Run, xen: XenHost, tmp_path: Path) -> None:
    ended = migrate("check", "--vm", "web", "--json")
    assert ended.returncode == 0, ended.stderr
    source = XenServerSource(ReplayHost(transcripts(tmp_path / "transcripts")["check"]))
    vm = source.inspect(source.find("web"))
    said = json.loads(ended.stdout)["vm"]
    assert (vm.uuid, vm.name, vm.memory, vm.vcpus) == (said["uuid"], said["name"], said["memory"], said["vcpus"])
    assert [disk.key for disk in vm.disks] == [xen.vdi("web")]
    assert [finding.what for finding in source.check(vm)] == [one["what"] for one in json.loads(ended.stdout)["findings"]]


@pytest.mark.slow
def test_secrets_are_in_no_transcript_and_in_no_journal(
    migrate: Run, xen: XenHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XE_PASSWORD", f"{CANARY}environment")
    monkeypatch.setenv("VAULT_TOKEN", f"{CANARY}only-here")
    uuid = xen.uuid("web")
    described = f"login root, password: {CANARY}description; see {CANARY}environment"
    try:
        _rename(xen, uuid, f"db password={CANARY}name", described)
        assert migrate("ls").returncode == 0
        ended = migrate("sync", uuid, "--passes", "1", *to(tmp_path))
        assert ended.returncode == 0, ended.stderr
        assert migrate("finish", uuid).returncode == 0
    finally:
        _rename(xen, uuid, "web", "")
    text = "".join(path.read_text() for path in (tmp_path / "transcripts").iterdir())
    assert CANARY not in text
    assert "REMOVED-password-" in text
    state_dir = b"".join(path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file())
    assert f"{CANARY}only-here".encode() not in state_dir
    assert str(tmp_path / "transcripts").encode() not in state_dir, "recording is a choice of each run"


@pytest.mark.slow
def test_what_a_host_refuses_is_recorded_with_the_error(migrate: Run, xen: XenHost, tmp_path: Path) -> None:
    ended = migrate("check", "--vm", "nobody")
    assert ended.returncode == 2
    found = transcripts(tmp_path / "transcripts")["check"]
    assert found.end is not None
    assert found.end["error"]["class"] == "UsageError"
    assert found.begin["typed"].startswith("tokvm check ")


def _rename(xen: XenHost, uuid: str, name: str, description: str) -> None:
    with xen.edit() as state:
        vm = state["vms"][uuid]
        vm["name"] = name
        vm["fields"]["name-description"] = description


@pytest.mark.parametrize("kind", ["link", "file", "everybody's"])
@pytest.mark.slow
def test_a_wrong_directory_is_refused_before_anything_is_sent(migrate: Run, xen: XenHost, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    match kind:
        case "link":
            (tmp_path / "real").mkdir()
            place.symlink_to(tmp_path / "real")
        case "file":
            place.touch()
        case _:
            place.mkdir()
            place.chmod(0o777)
    before = len(sent(xen))
    ended = migrate("ls", record=place)
    assert ended.returncode == 2, ended.stderr
    assert "next: give --record a directory of your own" in ended.stderr
    assert len(sent(xen)) == before


def test_a_directory_without_the_right_to_write_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("root may write anywhere")
    place = tmp_path / "place"
    place.mkdir(mode=0o500)
    code = "import sys, pathlib, tokvm.remote.recording as r; r.Recorder.open(pathlib.Path(sys.argv[1]), verb='ls')"
    lesser = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"] if os.geteuid() == 0 else []
    ended = subprocess.run([*lesser, sys.executable, "-c", code, str(place)], capture_output=True, text=True)
    assert "UsageError" in ended.stderr
    assert "Permission denied" in ended.stderr


@pytest.mark.slow
def test_a_disk_that_gets_full_costs_one_warning_and_not_the_answer(xen: XenHost, tmp_path: Path) -> None:
    """The limit of a file's size is a full disk that needs no root."""
    argv = [
        sys.executable,
        "-m",
        "tokvm",
        "check",
        "--ssh-config",
        str(xen.sshd.config_file),
        "--record",
        str(tmp_path / "transcripts"),
    ]
    limited = ["prlimit", "--fsize=1500", *argv, "--vm", "web", xen.url]
    ended = subprocess.run(limited, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert "nothing is in the way" in ended.stdout
    assert ended.stderr.count("the recording ended early, the run goes on without it") == 1
    (path,) = (tmp_path / "transcripts").iterdir()
    found = read_transcript(path)
    assert not found.torn
    assert found.commands


@pytest.mark.slow
@pytest.mark.root
def test_a_sync_with_a_full_disk_for_its_transcript_is_a_whole_sync(migrate: Run, xen: XenHost, tmp_path: Path) -> None:
    place = tmp_path / "transcripts"
    place.mkdir(mode=0o700)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,mode=700", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        ended = migrate("sync", "web", "--passes", "1", *to(tmp_path))
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr.count("the run goes on without it") == 1
        (target,) = (tmp_path / "target").glob("*.raw")
        assert target.read_bytes() == xen.read_disk("web")
        assert migrate("finish", "web").returncode == 0
    finally:
        subprocess.run(["umount", str(place)], check=True)


CUTOVER = """
import errno, sys
from pathlib import Path
import tokvm.app.workshop, tokvm.cli.main
from tests.e2e.nursery import FileDomainHost
from tokvm.remote import recording
domains, room = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
vars(tokvm.app.workshop)["LibvirtHost"] = lambda _url: FileDomainHost(domains)
append, lines = recording._File.append, []
def appended(self, line):
    lines.append(line)
    if len(lines) > room:
        raise OSError(errno.ENOSPC, "No space left on device")
    append(self, line)
recording._File.append = appended
sys.argv[0] = "tokvm"
tokvm.cli.main.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "room", [pytest.param(1 << 30, marks=pytest.mark.nightly), 7, pytest.param(0, marks=pytest.mark.nightly)]
)
def test_a_cutover_and_its_rollback_with_room_for_so_many_lines(
    migrate: Run, xen: XenHost, tmp_path: Path, request: pytest.FixtureRequest, room: int
) -> None:
    def tokvm(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-c",
            CUTOVER,
            str(tmp_path / "domains"),
            str(room),
            *argv,
            "--record",
            str(tmp_path / "transcripts"),
        ]
        environment = {**os.environ, "TOKVM_STATE_DIR": str(tmp_path / "state")}
        root = request.config.rootpath
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, cwd=root)

    assert migrate("sync", "web", "--passes", "1", *to(tmp_path), record=tmp_path / "other").returncode == 0
    for argv in (["cutover", "web"], ["rollback", "web", "--accept-data-loss"], ["finish", "web"]):
        ended = tokvm(*argv)
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr.count("the run goes on without it") == (0 if room > 1000 else 1)
    assert xen.is_running("web")
    found = transcripts(tmp_path / "transcripts")
    if room > 1000:
        sent_then = single([command for one in found.values() for command in one.commands])
        uuid = xen.uuid("web")
        assert f"xe vm-shutdown uuid={uuid}" in sent_then
        assert f"xe vm-start uuid={uuid}" in sent_then
    else:
        assert all(not one.torn and one.end is None for one in found.values())
