"""The Hyper-V source over a real ssh and sshd when things break: what is raised, and that the next try is right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tokvm.core.disk import DiskReader
from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.core.machine import Disk, Snapshot, VirtualMachine
from tokvm.core.units import MiB
from tokvm.remote.ssh import SshConfig, SshHost
from tokvm.sources.hyperv import power, snapshots
from tokvm.sources.hyperv.source import HyperVSource
from tokvm.testing.hyperv.host import DiskSpec, HostOptions, HyperVHost, MachineSpec, build_host

pytestmark = pytest.mark.slow

SIZE = 32 * MiB
NAME = "wéb [1] 'x’ $(y)"
MARK = "tokvm-ab12cd34-"


@pytest.fixture
def hyperv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HyperVHost]:
    monkeypatch.setattr(power, "POLL_S", 0.05)
    monkeypatch.setattr(snapshots, "POLL_S", 0.05)
    options = HostOptions(default_shell="powershell", banner=True, wrap=120, merge_s=0.5, orphans=True, limits=True)
    with build_host(tmp_path / "host", machines=[MachineSpec(NAME, disks=[DiskSpec(SIZE)])], options=options) as host:
        yield host
        assert host.violations() == []


@pytest.fixture
def source(hyperv: HyperVHost) -> Iterator[HyperVSource]:
    made = connect(hyperv)
    yield made
    made.close()


def connect(hyperv: HyperVHost) -> HyperVSource:
    sshd = hyperv.sshd
    config = SshConfig.parse(
        sshd.netloc, config_file=str(sshd.config_file), known_hosts=str(sshd.known_hosts), progress_deadline_s=6.0
    )
    return HyperVSource(SshHost(config))


def machine(hyperv: HyperVHost) -> VirtualMachine:
    disk = Disk(0, hyperv.disk_key(NAME), SIZE, device="SCSI 0:0")
    return VirtualMachine(hyperv.id(NAME), NAME, 1, 1, (disk,))


def take(source: HyperVSource, hyperv: HyperVHost, number: int) -> Snapshot:
    return source.snapshot(machine(hyperv), f"{MARK}{number}")


def apply(reader: DiskReader, target: bytearray) -> None:
    try:
        for chunk in reader.chunks():
            target[chunk.offset : chunk.offset + chunk.length] = bytes(chunk.length) if chunk.data is None else chunk.data
            chunk.release()
    finally:
        reader.close()


def fill(hyperv: HyperVHost, seed: int) -> None:
    for number in range(0, SIZE // MiB, 2):
        hyperv.write_disk(NAME, offset=number * MiB, data=bytes([seed, number]) * (MiB // 2))


def test_somebody_removes_a_checkpoint_in_mid_copy(hyperv: HyperVHost, source: HyperVSource) -> None:
    disk = machine(hyperv).disks[0]
    foreign = hyperv.foreign_checkpoint(NAME)
    fill(hyperv, 1)
    made = take(source, hyperv, 1)
    expected = hyperv.read_disk(NAME)
    reader = source.open_disk(disk, made, None)
    before = reader.fingerprint
    hyperv.delete_checkpoint(NAME, foreign["id"])
    hyperv.finish_merges()
    target = bytearray(SIZE)
    with pytest.raises(SourceError):
        apply(reader, target)
    again = source.open_disk(disk, made, None)
    assert again.fingerprint != before
    apply(again, target)
    assert bytes(target) == expected


def test_a_connection_that_breaks_leaves_nothing_that_stops_the_merge(hyperv: HyperVHost, source: HyperVSource) -> None:
    disk = machine(hyperv).disks[0]
    fill(hyperv, 1)
    made = take(source, hyperv, 1)
    expected = hyperv.read_disk(NAME)
    hyperv.set_sftp(die_after=6 * MiB)
    target = bytearray(SIZE)
    with pytest.raises(ConnectionLost):
        apply(source.open_disk(disk, made, None), target)
    hyperv.set_sftp(die_after=-1)
    for _ in range(3):  # a connection that was made in the meantime dies like the others
        with contextlib.suppress(ConnectionLost):
            apply(source.open_disk(disk, made, None), target)
            break
    assert bytes(target) == expected
    source.remove_snapshot(hyperv.id(NAME), made)
    assert hyperv.checkpoints(NAME) == []
    assert len(hyperv.chain(NAME)) == 1
    assert [holder for holder in hyperv.holders() if holder["paths"]] == []
