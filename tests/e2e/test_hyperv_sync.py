"""The real command against a Hyper-V host: ls, sync of a base and deltas while the VM runs, by checkpoints and AVHDX layers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokvm.testing.hyperv.host import DiskSpec, HyperVHost, MachineSpec, build_host

pytestmark = pytest.mark.slow

MiB = 1 << 20
SIZE = 16 * MiB
NAME = "wéb [1] 'x’ $(y)"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HyperVHost]:
    with build_host(tmp_path / "host", machines=[MachineSpec(NAME, disks=[DiskSpec(SIZE)])]) as made:
        made.write_disk(NAME, 0, offset=MiB, data=os.urandom(5 * MiB))
        yield made
        assert made.violations() == []


def tokvm(host: HyperVHost, folder: Path, verb: str, *argv: str) -> subprocess.CompletedProcess[str]:
    ssh = ("--ssh-config", str(host.sshd.config_file))
    environment = {**os.environ, "TOKVM_STATE_DIR": str(folder / "state")}
    command = [sys.executable, "-m", "tokvm", verb, *ssh, *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


def test_a_running_vm_is_synced_pass_by_pass(host: HyperVHost, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    listed = tokvm(host, tmp_path, "ls", "--", host.url)
    assert listed.returncode == 0, listed.stderr
    assert host.id(NAME) in listed.stdout
    argv = ("--passes", "1", "--network", "*=user", "--to", str(target), "--", host.url, NAME)
    for number in range(3):
        done = tokvm(host, tmp_path, "sync", *argv)
        assert done.returncode == 0, done.stderr
        (path,) = target.glob("*.raw")
        assert path.read_bytes() == host.read_disk(NAME)
        assert host.is_running(NAME)
        host.write_disk(NAME, 0, offset=(3 * number + 2) * MiB + 512, data=os.urandom(137 * 512))
        host.trim_disk(NAME, 0, offset=4 * MiB, length=2 * MiB)
