"""What every Source does, whatever is behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
from tests.contract.conftest import World, XenWorld

from tokvm.core.disk import DiskReader
from tokvm.core.errors import ConnectionLost, NotOff, SourceError, UsageError
from tokvm.core.extents import ExtentKind
from tokvm.core.machine import Disk, PowerState, Severity, Snapshot
from tokvm.sources.base import Source

PREFIX = "tokvm-ab12cd34-"
T = TypeVar("T")


def patiently(act: Callable[[], T]) -> T:
    """A source may bridge a lost reply itself or raise; asked again, it does not do it twice."""
    try:
        return act()
    except ConnectionLost:
        return act()


def copy(source: Source, disk: Disk, at: Snapshot, since: Snapshot | None, target: bytearray) -> int:
    """Apply a pass; returns its data bytes. What a base leaves out reads as zeros."""
    reader = source.open_disk(disk, at, since)
    try:
        assert isinstance(reader, DiskReader)
        assert reader.size == disk.size == len(target)
        if since is None:
            target[:] = bytes(len(target))
        count, position = 0, -1
        for chunk in reader.chunks():
            assert chunk.position > position
            position = chunk.position
            target[chunk.offset : chunk.offset + chunk.length] = bytes(chunk.length) if chunk.data is None else chunk.data
            count += chunk.length if chunk.kind is ExtentKind.DATA else 0
            chunk.release()
        return count
    finally:
        reader.close()


def test_a_source_is_one(world: World) -> None:
    assert isinstance(world.source, Source)
    assert "@" in world.source.url or ":" in world.source.url


def test_machines_are_found_by_name_and_uuid_byte_for_byte(world: World) -> None:
    machines = world.source.list_machines()
    assert [(machine.uuid, machine.name, machine.power) for machine in machines] == [(world.vm, world.name, PowerState.RUNNING)]
    assert world.source.find(world.name) == world.vm
    assert world.source.find(world.vm) == world.vm
    with pytest.raises(UsageError):
        world.source.find("nobody")


def test_a_machine_is_described(world: World) -> None:
    vm = world.source.inspect(world.vm)
    assert (vm.uuid, vm.name, vm.vcpus, vm.power) == (world.vm, world.name, 2, PowerState.RUNNING)
    assert [(disk.index, disk.key, disk.size) for disk in vm.disks] == [
        (disk.index, disk.key, disk.size) for disk in world.described().disks
    ]


@pytest.mark.slow
def test_every_text_of_a_xen_machine_comes_through(xen_world: XenWorld) -> None:
    vm = xen_world.source.inspect(xen_world.vm)
    assert [nic.mac for nic in vm.nics] == ["02:16:3e:0a:0b:0c", "02:16:3e:0a:0b:0d"]
    assert vm.nics[0].network == "LAN, the\nfirst"
    assert vm.description == "-oProxyCommand=x"


def test_nothing_is_in_the_way(world: World) -> None:
    found = world.source.check(world.source.inspect(world.vm))
    assert [finding for finding in found if finding.severity is Severity.BLOCKER] == []


def test_the_first_claim_wins(world: World) -> None:
    assert world.source.claim(world.vm, "one@host 1") == "one@host 1"
    assert world.source.claim(world.vm, "one@host 1") == "one@host 1"
    other = world.connect()
    assert other.claim(world.vm, "two@host 2") == "one@host 1"
    other.release(world.vm, "two@host 2")
    assert other.claim(world.vm, "two@host 2") == "one@host 1"
    world.source.release(world.vm, "one@host 1")
    assert other.claim(world.vm, "two@host 2") == "two@host 2"
    other.release(world.vm, "two@host 2")


def test_base_and_deltas_are_the_disk_at_that_moment(world: World) -> None:
    source, vm = world.source, world.described()
    targets = [bytearray(b"old" * disk.size)[: disk.size] for disk in vm.disks]
    before: Snapshot | None = None
    for number in range(1, 4):
        for disk in vm.disks:
            world.write(disk.index, 512 * number, bytes([number]) * 1024)
            world.write(disk.index, disk.size - 512, bytes([number]) * 512)
        now = source.snapshot(vm, f"{PREFIX}{number}")
        frozen = [world.read(disk.index) for disk in vm.disks]
        world.write(0, 0, bytes([0xEE]) * 512)  # too late for this one
        counts = [copy(source, disk, now, before, targets[disk.index]) for disk in vm.disks]
        assert [bytes(target) for target in targets] == frozen
        most = 64 * 1024 if before else max(64 * 1024, 2 * world.grain)
        assert all(0 < count <= most for count in counts)
        before = now


def pieces(reader: DiskReader, position: int) -> list[tuple[int, bytes, int]]:
    """(offset, data, position) of all chunks behind `position`; closes the reader."""
    found = []
    for chunk in reader.chunks(position):
        found.append((chunk.offset, bytes(chunk.data or b""), chunk.position))
        chunk.release()
    reader.close()
    return found


def test_a_reader_goes_on_from_any_position(world: World) -> None:
    source, vm = world.source, world.described()
    for block in range(4):
        world.write(0, block * (vm.disks[0].size // 4), bytes([block + 1]) * 4096)
    at = source.snapshot(vm, f"{PREFIX}1")
    reader = source.open_disk(vm.disks[0], at, None)
    fingerprint = reader.fingerprint
    whole = pieces(reader, 0)
    assert len(whole) >= 4
    for done in (0, len(whole) // 2, len(whole) - 1):
        again = world.connect().open_disk(vm.disks[0], at, None)
        assert again.fingerprint == fingerprint
        assert pieces(again, whole[done][2]) == whole[done + 1 :]


def test_a_mark_makes_one_snapshot(world: World) -> None:
    vm = world.described()
    first = world.source.snapshot(vm, f"{PREFIX}1")
    assert world.source.snapshot(vm, f"{PREFIX}1") == first
    assert world.connect().snapshot(vm, f"{PREFIX}1") == first
    assert set(first.disks) == {disk.key for disk in vm.disks}
    assert world.snapshot_count() == 1


def test_a_lost_reply_makes_one_snapshot(world: World) -> None:
    vm = world.described()
    world.lose_reply("snapshot")
    snapshot = patiently(lambda: world.source.snapshot(vm, f"{PREFIX}1"))
    assert world.snapshot_count() == 1
    assert world.source.snapshots(world.vm, PREFIX) == [snapshot]


def test_only_ours_are_listed_and_removed(world: World) -> None:
    vm = world.described()
    world.foreign_snapshot()
    made = [world.source.snapshot(vm, f"{PREFIX}{number}") for number in (9, 10)]
    world.source.snapshot(vm, "tokvm-ab12cd345-1")
    assert world.source.snapshots(world.vm, PREFIX) == made
    for snapshot in made:
        world.source.remove_snapshot(world.vm, snapshot)
        world.source.remove_snapshot(world.vm, snapshot)  # already gone
    assert world.source.snapshots(world.vm, PREFIX) == []
    assert world.snapshot_count() == 2


def test_it_stops_and_starts_and_both_witnesses_see_it(world: World) -> None:
    source = world.source
    assert source.off_evidence(world.vm).proved is False
    source.shut_down(world.vm, deadline_s=20, force=False)
    assert source.power(world.vm) is PowerState.OFF
    assert source.off_evidence(world.vm).proved is True
    assert source.stop_pending(world.vm) is False
    source.shut_down(world.vm, deadline_s=20, force=False)  # already off
    source.start(world.vm)
    source.start(world.vm)  # already runs
    assert source.power(world.vm) is PowerState.RUNNING
    assert source.off_evidence(world.vm).proved is False


def test_lost_replies_to_stop_and_start(world: World) -> None:
    world.lose_reply("stop")
    patiently(lambda: world.source.shut_down(world.vm, deadline_s=20, force=False))
    assert world.source.off_evidence(world.vm).proved is True
    world.lose_reply("start")
    patiently(lambda: world.source.start(world.vm))
    assert world.source.power(world.vm) is PowerState.RUNNING


def test_a_guest_that_ignores_us_keeps_running_unless_forced(world: World) -> None:
    world.ignore_shutdown()
    with pytest.raises(NotOff):
        world.source.shut_down(world.vm, deadline_s=3, force=False)
    assert world.source.power(world.vm) is PowerState.RUNNING
    world.source.shut_down(world.vm, deadline_s=3, force=True)
    assert world.source.off_evidence(world.vm).proved is True


def test_a_fence_holds_and_goes(world: World) -> None:
    source = world.source
    assert source.is_fenced(world.vm) is False
    source.fence(world.vm, "tokvm: a cutover, by 'me'; $(id)")
    source.fence(world.vm, "tokvm: again")
    assert world.connect().is_fenced(world.vm) is True
    source.shut_down(world.vm, deadline_s=20, force=False)
    with pytest.raises(SourceError, match="block"):
        source.start(world.vm)
    assert source.power(world.vm) is PowerState.OFF
    source.unfence(world.vm)
    source.unfence(world.vm)
    assert source.is_fenced(world.vm) is False
    source.start(world.vm)
    assert source.power(world.vm) is PowerState.RUNNING


def test_the_last_delta_of_a_vm_that_is_off(world: World) -> None:
    source, vm = world.source, world.described()
    target = bytearray(vm.disks[0].size)
    world.write(0, 0, b"a" * 512)
    first = source.snapshot(vm, f"{PREFIX}1")
    copy(source, vm.disks[0], first, None, target)
    source.shut_down(world.vm, deadline_s=20, force=False)
    world.write(0, 8192, b"last words" * 51 + b"..")
    source.fence(world.vm, "tokvm")
    last = source.snapshot(vm, f"{PREFIX}final-2")
    copy(source, vm.disks[0], last, first, target)
    assert bytes(target) == world.read(0)
    assert source.snapshots(world.vm, PREFIX) == [first, last]
