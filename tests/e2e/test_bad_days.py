"""What goes wrong on a bad day, with the real command: no false success, a true message, and the next command gets home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tokvm.testing.xenserver.host import DiskSpec, MachineSpec, XenHost, build_host

pytestmark = pytest.mark.slow

MiB = 1 << 20
SIZE = 12 * MiB
NAMES = ("-oProxyCommand=x", "$(id)", "a'b", "two\nlines, \\one comma", "[x] \x1b[31m“ü")


@dataclass
class Operator:
    """Somebody at a shell: a host to migrate from, a state directory, a target directory."""

    host: XenHost
    folder: Path

    def tokvm(self, *argv: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TOKVM_STATE_DIR": str(self.folder / "state")}
        return subprocess.run(
            [sys.executable, "-m", "tokvm", *argv],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )

    def sync(self, *more: str, name: str = "web") -> subprocess.CompletedProcess[str]:
        ssh = ("--ssh-config", str(self.host.sshd.config_file), "--silence", "2s")
        where = () if "--to" in more else ("--to", str(self.target))
        return self.tokvm("sync", *ssh, "--passes", "1", "--network", "*=user", *where, *more, "--", self.host.url, name)

    @property
    def target(self) -> Path:
        return self.folder / "target"

    def written(self) -> bytes:
        (path,) = self.target.glob("*.raw")
        return path.read_bytes()

    def assert_home(self, name: str = "web") -> None:
        """The same command again, and the target is the disk."""
        again = self.sync(name=name)
        assert again.returncode == 0, again.stderr
        assert self.written() == self.host.read_disk(name)


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    machines = [MachineSpec("web", disks=[DiskSpec(SIZE)])]
    with build_host(tmp_path / "host", machines=machines) as host:
        host.write_disk("web", 0, offset=MiB, data=os.urandom(5 * MiB))
        (tmp_path / "target").mkdir()
        yield Operator(host, tmp_path)


@pytest.mark.parametrize(
    ("kind", "settings", "code", "says"),
    [
        ("short", {"at": 3 * MiB}, 3, "before the end of guest data"),
        ("http_500", {}, 3, "before the end of the footer"),
        ("fail", {"at": 3 * MiB}, 4, "vdi-export"),
        ("refuse", {"text": "SR_BACKEND_FAILURE_46 The VDI is not available"}, 4, "SR"),
    ],
)
def test_a_bad_stream_is_no_success(operator: Operator, kind: str, settings: dict[str, object], code: int, says: str) -> None:
    operator.host.fault("vdi-export", kind, times=0, **settings)  # type: ignore[arg-type]
    ended = operator.sync()
    assert ended.returncode == code, ended.stderr
    assert says in ended.stderr
    assert "next:" in ended.stderr
    assert operator.tokvm("cutover", "web").returncode == 2, "nothing whole was copied, so there is nothing to cut over"
    operator.host.clear_faults()
    operator.assert_home()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), [("cut", {"at": 3 * MiB}), ("stall", {"at": 3 * MiB})])
def test_a_connection_that_breaks_once_is_gone_on_with(operator: Operator, kind: str, settings: dict[str, object]) -> None:
    operator.host.fault("vdi-export", kind, **settings)  # type: ignore[arg-type]
    ended = operator.sync()
    assert ended.returncode == 0, ended.stderr
    assert "connection lost" in ended.stderr
    assert operator.written() == operator.host.read_disk("web")


@pytest.mark.slow
def test_a_host_that_stays_silent_is_said_to_be(operator: Operator) -> None:
    operator.host.fault("vdi-export", "stall", times=0, at=0)
    ended = operator.sync()
    assert ended.returncode == 5, ended.stderr
    assert "run the same command again" in ended.stderr
    operator.host.clear_faults()
    operator.assert_home()


def test_an_unknown_host_key_is_shown_and_not_believed(operator: Operator) -> None:
    operator.host.sshd.known_hosts.write_text("")
    ended = operator.sync()
    assert ended.returncode == 6, ended.stderr
    assert "SHA256:" in ended.stderr
    assert "--accept-new-host-key" in ended.stderr
    assert operator.host.commands() == []
    learnt = operator.sync("--accept-new-host-key")
    assert learnt.returncode == 0, learnt.stderr
    assert "SHA256:" in learnt.stderr


def test_a_changed_host_key_is_never_believed(operator: Operator) -> None:
    operator.host.sshd.new_host_key()
    for more in ((), ("--accept-new-host-key",)):
        ended = operator.sync(*more)
        assert ended.returncode == 6, ended.stderr
        assert "ssh-keygen -R" in ended.stderr
    assert operator.host.commands() == []


@pytest.mark.root
def test_a_full_filesystem_is_no_success(operator: Operator) -> None:
    operator.target.rmdir()
    operator.target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(operator.target)], check=True)
    try:
        ended = operator.sync()
        assert ended.returncode == 8, ended.stderr
        assert "space" in ended.stderr
        subprocess.run(["mount", "-o", "remount,size=32m", str(operator.target)], check=True)
        operator.assert_home()
    finally:
        subprocess.run(["umount", str(operator.target)], check=True)


def test_a_target_with_content_is_left_alone(operator: Operator) -> None:
    precious = operator.folder / "precious.raw"
    precious.write_bytes(b"somebody's data" * 1000)
    before = precious.read_bytes()
    ended = operator.sync("--to", str(precious))
    assert ended.returncode == 10, ended.stderr
    assert str(precious) in ended.stderr or "there already" in ended.stderr
    assert precious.read_bytes() == before


def test_rot_on_the_target_is_found(operator: Operator) -> None:
    assert operator.sync().returncode == 0
    assert operator.tokvm("verify", "web").returncode == 0
    (path,) = operator.target.glob("*.raw")
    with path.open("r+b") as file:
        file.seek(3 * MiB + 77)
        byte = file.read(1)
        file.seek(3 * MiB + 77)
        file.write(bytes([byte[0] ^ 4]))
    found = operator.tokvm("verify", "web", "--json")
    assert found.returncode == 14, found.stderr
    assert "do not start this copy" in found.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_only_a_name(operator: Operator, name: str) -> None:
    with operator.host.edit() as state:
        state["vms"][operator.host.uuid("web")]["name"] = name
    listed = operator.tokvm("ls", operator.host.url, "--json", "--ssh-config", str(operator.host.sshd.config_file))
    assert [one["name"] for one in json.loads(listed.stdout)] == [name]
    operator.assert_home(name)
    assert operator.host.violations() == []
    status = operator.tokvm("status")
    assert status.returncode == 0
    assert "\x1b" not in status.stdout


def test_errors_are_documents_too(operator: Operator) -> None:
    ended = operator.sync("--json", name="nobody")
    document = json.loads(ended.stdout)
    assert (ended.returncode, document["error"]["class"], document["error"]["exit_code"]) == (2, "UsageError", 2)
    assert "nobody" in document["error"]["what"]


def test_a_source_that_is_not_there_is_explained(operator: Operator) -> None:
    ended = operator.tokvm("ls", "xenserver://root@127.0.0.1:1")
    assert ended.returncode == 5, ended.stderr
    assert operator.tokvm("ls", "vmware://x").returncode == 2
    assert operator.tokvm("ls", "xenserver://-oProxyCommand=x").returncode == 2
