"""tokvm's own source on the played Hyper-V host, when things go wrong on it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest
from tests.persona.conftest import BuildHyperV, MiB

from tokvm.core.disk import Chunk
from tokvm.core.errors import ConnectionLost, TokvmError
from tokvm.core.extents import ExtentKind
from tokvm.core.machine import Severity, Snapshot, VirtualMachine
from tokvm.remote.ssh import SshConfig, SshHost
from tokvm.sources.hyperv import power, snapshots
from tokvm.sources.hyperv.source import HyperVSource
from tokvm.testing.hyperv.host import DiskSpec, HyperVHost, MachineSpec
from tokvm.testing.hyperv.state import RECOVERY

pytestmark = pytest.mark.slow
NAME = "web \u2018[1]\u2019 $(x)\n'\""


class Day:
    """A host with one VM, a source, the snapshots that it made."""

    def __init__(self, host: HyperVHost) -> None:
        self.host = host
        self.sources: list[HyperVSource] = []
        self.source = self.connect()
        self.uuid = host.id(NAME)
        self.vm: VirtualMachine = self.source.inspect(self.uuid)

    def connect(self, *, progress_deadline_s: float = 5.0) -> HyperVSource:
        sshd = self.host.sshd
        config = SshConfig.parse(
            sshd.netloc,
            config_file=str(sshd.config_file),
            known_hosts=str(sshd.known_hosts),
            progress_deadline_s=progress_deadline_s,
        )
        self.sources.append(HyperVSource(SshHost(config)))
        return self.sources[-1]

    def snapshot(self, number: int) -> Snapshot:
        return self.source.snapshot(self.vm, f"tokvm-ab12-{number}")

    def copy(self, at: Snapshot, since: Snapshot | None, target: bytearray, *, source: HyperVSource | None = None) -> None:
        reader = (source or self.source).open_disk(self.vm.disks[0], at, since)
        try:
            drain(reader.chunks(), target)
        finally:
            reader.close()

    def write(self, offset: int, data: bytes) -> None:
        self.host.write_disk(NAME, offset=offset, data=data)

    def blank(self) -> bytearray:
        return bytearray(self.vm.disks[0].size)


def drain(chunks: Iterator[Chunk], target: bytearray) -> None:
    for chunk in chunks:
        blank = chunk.kind is ExtentKind.ZERO
        target[chunk.offset : chunk.offset + chunk.length] = bytes(chunk.length) if blank else bytes(chunk.data or b"")
        chunk.release()


@pytest.fixture
def day(build_hyperv: BuildHyperV, monkeypatch: pytest.MonkeyPatch) -> Iterator[Day]:
    monkeypatch.setattr(power, "POLL_S", 0.05)
    monkeypatch.setattr(snapshots, "POLL_S", 0.05)
    host = build_hyperv(MachineSpec(NAME, disks=[DiskSpec(32 * MiB)]), orphans=True, banner=True)
    made = Day(host)
    try:
        yield made
        assert host.violations() == []
    finally:
        for source in made.sources:
            source.close()


def test_a_whole_story_with_trims_and_merges(day: Day) -> None:
    target = day.blank()
    day.write(0, b"base" * MiB)
    one = day.snapshot(1)
    day.copy(one, None, target)
    day.host.trim_disk(NAME, offset=MiB, length=5 * MiB)
    day.write(20 * MiB, b"x" * 512)
    two = day.snapshot(2)
    day.copy(two, one, target)
    day.source.remove_snapshot(day.uuid, one)
    day.source.shut_down(day.uuid, deadline_s=10, force=False)
    day.host.trim_disk(NAME, offset=0, length=2 * MiB, kind="zero")
    day.write(2 * MiB + 512, b"last" * 128)
    three = day.snapshot(3)
    day.copy(three, two, target)
    assert bytes(target) == day.host.read_disk(NAME)
    for left in (two, three):
        day.source.remove_snapshot(day.uuid, left)
    assert [path.rpartition(".")[2] for path in day.host.chain(NAME)] == ["vhdx"]
    assert all(not holder["paths"] for holder in day.host.holders())


def test_only_frozen_files_are_opened_and_all_are_closed(day: Day) -> None:
    day.write(0, b"base" * 512)
    one, top = day.snapshot(1), day.host.chain(NAME)[0]
    day.copy(one, None, day.blank())
    assert day.host.opened()
    assert all(path != top and not refused for path, refused in day.host.opened())
    assert all(not holder["paths"] for holder in day.host.holders())


@pytest.mark.parametrize("settings", [{"die_after": MiB}, {"freeze_after": MiB}])
def test_a_copy_that_breaks_is_done_again(day: Day, settings: dict[str, int]) -> None:
    day.write(0, b"base" * MiB)
    one = day.snapshot(1)
    day.host.set_sftp(**settings)
    with pytest.raises(ConnectionLost):
        day.copy(one, None, day.blank(), source=day.connect(progress_deadline_s=1.0))
    day.host.set_sftp(die_after=-1, freeze_after=-1, shuffle=True)
    target = day.blank()
    day.copy(one, None, target, source=day.connect())
    assert bytes(target) == day.host.read_disk(NAME)


def test_orphans_of_ours_are_ended_before_a_checkpoint_goes(day: Day) -> None:
    day.write(0, b"base" * MiB)
    one = day.snapshot(1)
    day.host.set_sftp(die_after=MiB)
    with pytest.raises(ConnectionLost):
        day.copy(one, None, day.blank())
    assert any(holder["paths"] for holder in day.host.holders())
    day.connect().remove_snapshot(day.uuid, one)
    assert len(day.host.chain(NAME)) == 1
    assert not any(holder["paths"] for holder in day.host.holders())


def test_a_merge_under_a_copy_voids_the_pass(day: Day) -> None:
    """Somebody deletes his checkpoint below ours: the layers that the copy reads are about to change. A copy that had opened
    them on all of its connections by then holds up the merge and is whole; any other is refused the files."""
    day.write(0, b"old" * 512)
    foreign = day.host.foreign_checkpoint(NAME)
    day.write(0, b"base" * MiB)
    one = day.snapshot(1)
    reader = day.source.open_disk(day.vm.disks[0], one, None)
    chunks, target = reader.chunks(), day.blank()
    drain(itertools.islice(chunks, 1), target)
    day.host.delete_checkpoint(NAME, foreign["id"])
    with contextlib.suppress(TokvmError):
        drain(chunks, target)
        assert bytes(target) == day.host.read_disk(NAME)
    reader.close()
    day.host.finish_merges()
    target = day.blank()
    day.copy(one, None, target, source=day.connect())
    assert bytes(target) == day.host.read_disk(NAME)


def test_a_checkpoint_that_lands_late_is_found_under_its_mark(day: Day) -> None:
    day.host.fault("checkpoint", "late", seconds=0.5)
    with pytest.raises(ConnectionLost):
        day.snapshot(1)
    with day.host.edit() as state:
        state["later"][0]["due"] = 0.0
    day.snapshot(1)
    assert len(day.host.checkpoints(NAME)) == 1


def test_a_shutdown_that_is_still_under_way_is_pending(day: Day) -> None:
    day.host.set_guest(NAME, shutdown_s=3600)
    with day.host.edit() as state:
        state["vms"][day.uuid]["since"] -= 60  # whole seconds cannot tell a guest that just booted from one that booted since
    with pytest.raises(TokvmError):
        day.source.shut_down(day.uuid, deadline_s=0.5, force=False)
    assert day.connect().stop_pending(day.uuid) is True
    day.host.guest_stops(NAME)
    assert day.connect().stop_pending(day.uuid) is False


def test_a_guest_that_cannot_be_asked_keeps_running(day: Day) -> None:
    day.host.set_fields(NAME, ShutdownContact=False)
    with pytest.raises(TokvmError):
        day.source.shut_down(day.uuid, deadline_s=1, force=False)
    assert day.host.is_running(NAME)


def test_the_fence_keeps_the_host_from_starting_it_and_leaves_nothing(day: Day) -> None:
    assert day.source.claim(day.uuid, "me") == "me"
    day.source.fence(day.uuid, "moved")
    day.source.shut_down(day.uuid, deadline_s=10, force=False)
    day.host.host_restarts()
    assert not day.host.is_running(NAME)
    day.source.unfence(day.uuid)
    assert day.host.vm(NAME)["fields"]["AutomaticStartAction"] == "StartIfRunning"
    day.source.start(day.uuid)
    day.source.release(day.uuid, "me")
    assert day.host.vm(NAME)["notes"] == ""


def test_a_backup_in_progress_is_in_the_way(day: Day) -> None:
    day.host.foreign_checkpoint(NAME, "backup", kind=RECOVERY)
    found = [one for one in day.source.check(day.source.inspect(day.uuid)) if one.severity is Severity.BLOCKER]
    assert found
