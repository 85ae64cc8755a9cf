"""The real command against a Hyper-V host over WinRM and SMB: ls, check, sync of a base and deltas, a transcript of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokvm.testing.hyperv import samba
from tokvm.testing.hyperv.host import DiskSpec, HyperVHost, MachineSpec, build_host
from tokvm.testing.hyperv.winrm_side import WinrmSide

pytestmark = pytest.mark.slow

MiB = 1 << 20
SIZE = 16 * MiB
NAME = "wéb [1] 'x’ $(y)"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HyperVHost]:
    if why := samba.unavailable():
        pytest.skip(why)
    with build_host(tmp_path / "host", machines=[MachineSpec(NAME, disks=[DiskSpec(SIZE)])]) as made:
        made.write_disk(NAME, 0, offset=MiB, data=os.urandom(5 * MiB))
        yield made
        assert made.violations() == []


@pytest.fixture
def side(host: HyperVHost, tmp_path: Path) -> Iterator[WinrmSide]:
    with WinrmSide(host, tmp_path / "winrm") as made:
        yield made


def tokvm(
    folder: Path, verb: str, *argv: str, password: str | None = None, expect: int = 0
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TOKVM_STATE_DIR": str(folder / "state"), "TOKVM_PASSWORD": password or ""}
    command = [sys.executable, "-m", "tokvm", verb, *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == expect, done.stderr
    assert samba.PASSWORD not in done.stdout + done.stderr
    return done


def test_a_running_vm_is_synced_pass_by_pass(host: HyperVHost, side: WinrmSide, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    assert host.id(NAME) in tokvm(tmp_path, "ls", *side.arguments, "--", side.url).stdout
    tokvm(tmp_path, "check", *side.arguments, "--vm", NAME, "--network", "*=user", "--", side.url)
    record = ("--record", str(tmp_path / "T"))
    argv = ("--passes", "1", "--network", "*=user", "--to", str(target), *record, "--", side.url, NAME)
    for number in range(3):
        tokvm(tmp_path, "sync", *side.arguments, *argv)
        (path,) = target.glob("*.raw")
        assert path.read_bytes() == host.read_disk(NAME)
        assert host.is_running(NAME)
        host.write_disk(NAME, 0, offset=(3 * number + 2) * MiB + 512, data=os.urandom(137 * 512))
        host.trim_disk(NAME, 0, offset=4 * MiB, length=2 * MiB)
    tokvm(tmp_path, "finish", NAME)  # the journal knows where the password is, not what it is
    assert host.checkpoints(NAME) == []
    events = [json.loads(line) for path in (tmp_path / "T").iterdir() for line in path.read_text(encoding="ascii").splitlines()]
    assert {event["kind"] for event in events if event["event"] == "sent"} == {"request", "smb"}
    assert sum(event["bytes"] for event in events if event.get("op") == "close") > 5 * MiB
    kept = b"".join(path.read_bytes() for path in (*(tmp_path / "T").iterdir(), *(tmp_path / "state").glob("*.db*")))
    assert json.dumps(samba.PASSWORD)[1:-1].encode() not in kept
    assert samba.PASSWORD.encode() not in kept


def test_what_is_missing_is_said(side: WinrmSide, tmp_path: Path) -> None:
    ca = side.arguments[:2]
    assert "TOKVM_PASSWORD" in tokvm(tmp_path, "ls", *ca, "--", side.url, expect=2).stderr
    tokvm(tmp_path, "ls", *ca, "--", side.url, password=samba.PASSWORD)
    assert "refused the login" in tokvm(tmp_path, "ls", *ca, "--", side.url, password="wrong", expect=4).stderr
    untrusted = tokvm(tmp_path, "ls", "--", side.url, password=samba.PASSWORD, expect=6).stderr
    assert "--tls-fingerprint" in untrusted
    shown = untrusted.partition("SHA-256 ")[2].split()[0]
    tokvm(tmp_path, "ls", "--tls-fingerprint", shown, "--", side.url, password=samba.PASSWORD)


def test_without_the_packages_the_command_says_which(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['pypsrp'] = sys.modules['smbprotocol'] = None\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "tokvm", "ls", "--", "hyperv+winrm://hv1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 2, done.stderr
    assert "pip install 'tokvm[winrm]'" in done.stderr
