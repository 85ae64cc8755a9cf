"""The real command against an ESXi host: ls, sync of a base and deltas while the VM runs, by snapshots over SFTP."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tokvm.testing.esxi.host import DatastoreSpec, DiskSpec, EsxHost, HostOptions, MachineSpec, build_host

pytestmark = pytest.mark.slow

MiB = 1 << 20
SIZE = 16 * MiB
NAME = "wéb [1] 'x’ $(y)"
STORE = "Store [1] $(z)"


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., EsxHost]]:
    """A host with one running VM that has written 5 MiB; nothing outside of the contract may be asked of it."""
    made: list[EsxHost] = []

    def build(options: HostOptions) -> EsxHost:
        made.append(build_host(tmp_path / "host", machines=[MachineSpec(NAME, disks=[DiskSpec(SIZE)])], options=options))
        made[-1].write_disk(NAME, 0, offset=MiB, data=os.urandom(5 * MiB))
        return made[-1]

    yield build
    for host in made:
        host.close()
        assert host.violations() == []


def tokvm(host: EsxHost, folder: Path, verb: str, *argv: str) -> subprocess.CompletedProcess[str]:
    ssh = ("--ssh-config", str(host.sshd.config_file))
    environment = {**os.environ, "TOKVM_STATE_DIR": str(folder / "state")}
    command = [sys.executable, "-m", "tokvm", verb, *ssh, *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


def sync(host: EsxHost, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    target = folder / "target"
    target.mkdir(exist_ok=True)
    argv = ("--passes", "1", "--network", "*=user", "--to", str(target), *more, "--", host.url, NAME)
    return tokvm(host, folder, "sync", *argv)


def on_target(folder: Path) -> bytes:
    (path,) = (folder / "target").glob("*.raw")
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["VMFS-6", "VMFS-5"])
def test_a_running_vm_is_synced_pass_by_pass(build: Callable[..., EsxHost], tmp_path: Path, kind: str) -> None:
    host = build(HostOptions(datastores=[DatastoreSpec(STORE, type=kind)], merge_s=0.5))
    listed = tokvm(host, tmp_path, "ls", "--", host.url)
    assert listed.returncode == 0, listed.stderr
    assert host.vm(NAME)["uuid"] in listed.stdout
    for number in range(3):
        done = sync(host, tmp_path)
        assert done.returncode == 0, done.stderr
        assert on_target(tmp_path) == host.read_disk(NAME)
        assert host.is_running(NAME)
        host.write_disk(NAME, 0, offset=(3 * number + 2) * MiB + 512, data=os.urandom(137 * 512))
        host.trim_disk(NAME, 0, offset=4 * MiB, length=2 * MiB)


def test_a_base_that_stays_locked_is_refused_and_then_cloned(build: Callable[..., EsxHost], tmp_path: Path) -> None:
    host = build(HostOptions(base_stays_locked="files"))
    refused = sync(host, tmp_path)
    assert refused.returncode == 4
    assert "locked" in refused.stderr
    assert "--clone-base" in refused.stderr
    done = sync(host, tmp_path, "--clone-base")
    assert done.returncode == 0, done.stderr
    assert on_target(tmp_path) == host.read_disk(NAME)
    host.write_disk(NAME, 0, offset=7 * MiB, data=os.urandom(MiB))
    delta = sync(host, tmp_path)
    assert delta.returncode == 0, delta.stderr
    assert on_target(tmp_path) == host.read_disk(NAME)
    assert not host.local(f"{host.directory(NAME)}/tokvm-clone").exists()


def test_a_base_that_nobody_gets_is_refused_with_what_is_left_to_do(build: Callable[..., EsxHost], tmp_path: Path) -> None:
    host = build(HostOptions(base_stays_locked="all"))
    refused = sync(host, tmp_path, "--clone-base")
    assert refused.returncode == 4
    assert "16392" in refused.stderr or "lock" in refused.stderr
