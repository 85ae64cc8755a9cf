"""Sync: passes until there are enough, going on after any interruption, to the same bytes as the source's snapshot."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.disk import Chunk
from tokvm.core.errors import Blocked, ConnectionLost, JournalError, TargetError, TokvmError, UnsafeTarget
from tokvm.core.machine import Snapshot
from tokvm.migration.book import sealed
from tokvm.migration.journal import Journal
from tokvm.migration.phases import Phase
from tokvm.migration.records import PassState, SnapshotState
from tokvm.migration.reports import StopCause
from tokvm.migration.runner import Converge
from tokvm.testing.fakes import BLOCK, Death, FakeReader, FakeSource, FakeTarget, Fault
from tokvm.transfer.manifest import ManifestWriter, RecordKind, read_manifest

MakeRig = Callable[..., Any]


def target_is_newest_snapshot(rig: Any) -> bool:
    """The target's medium holds what the newest complete snapshot froze."""
    passes = rig.book.passes()
    done = max(one.number for one in passes if one.state is PassState.DONE)
    mark = next(one.mark for one in rig.book.snapshots() if one.number == done)
    frozen = rig.world.snapshots[mark][1]
    return all(bytes(target) == content for target, content in zip(rig.world.targets, frozen, strict=True))


def base_blocks(rig: Any) -> int:
    """Blocks with data in the first snapshot."""
    frozen = next(iter(rig.world.snapshots.values()))[1][0]
    return sum(any(frozen[at : at + BLOCK]) for at in range(0, len(frozen), BLOCK))


def test_a_base_and_deltas(make_rig: MakeRig) -> None:
    rig = make_rig(disks=2)
    rig.begin()
    report = rig.migration().sync(passes=3)
    assert [(one.number, one.kind, one.done) for one in report.passes] == [
        (1, "base", True),
        (2, "delta", True),
        (3, "delta", True),
    ]
    assert report.stopped_by is StopCause.ASKED
    assert report.predicted_downtime_s is not None
    assert target_is_newest_snapshot(rig)
    assert report.to_dict()["outcome"] == "synced"


def test_old_bytes_of_the_target_do_not_survive_a_base(rig: Any) -> None:
    rig.begin()
    rig.migration().sync(passes=1)
    assert b"\x53" * 512 not in bytes(rig.world.targets[0])
    assert target_is_newest_snapshot(rig)


def test_done_already_makes_one_more_pass(rig: Any) -> None:
    rig.begin()
    rig.migration().sync(passes=2)
    assert [one.number for one in rig.migration().sync(passes=2).passes] == [3]


def test_without_a_number_it_ends_when_a_delta_is_small(rig: Any) -> None:
    rig.begin()
    report = rig.migration().sync()
    assert report.stopped_by is StopCause.SMALL
    assert len(report.passes) == 2


def test_deltas_that_do_not_shrink_end_it(rig: Any) -> None:
    rig.begin()
    report = rig.migration().sync(converge=Converge(small_bytes=0))
    assert report.stopped_by is StopCause.FLAT


def test_a_budget_ends_it_when_the_cutover_fits(rig: Any) -> None:
    rig.begin()
    assert rig.migration().sync(budget_s=60.0).stopped_by is StopCause.BUDGET
    report = rig.migration().sync(budget_s=0.001)
    assert report.stopped_by is StopCause.LIMIT
    assert len(report.passes) == 6


@pytest.mark.slow
def test_death_anywhere_and_again_goes_on_to_the_same_bytes(make_rig: MakeRig) -> None:
    """At every call, before or after it; every third one dies a second time on the way back."""
    for fault in (Fault.DIE_BEFORE, Fault.DIE_AFTER):
        number = 0
        while True:
            rig = make_rig(disks=1 + number % 2, blocks=4)
            rig.begin()
            rig.world.plan = {number: fault}
            if number % 3 == 0:
                rig.world.plan[number + 5] = fault
            deaths = 0
            while True:
                try:
                    rig.migration().sync(passes=2)
                    break
                except Death:
                    deaths += 1
                    rig.world.lose_power()
            assert target_is_newest_snapshot(rig), f"{fault} at {number}"
            if not deaths:
                break
            number += 1
        assert number > 15


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.slow
def test_death_at_any_journal_write(make_rig: MakeRig, *, after: bool) -> None:
    number = 0
    while True:
        rig = make_rig(blocks=6)
        rig.begin()
        try:
            rig.migration(die_at=number, after=after).sync(passes=2)
            break
        except Death:
            rig.world.lose_power()
        rig.migration().sync(passes=2)
        assert target_is_newest_snapshot(rig), f"journal write {number}"
        marks = [one.mark for one in rig.book.snapshots() if one.state is SnapshotState.MADE]
        assert sorted(marks) == sorted(rig.world.snapshots)
        number += 1
    assert number > 12


def test_a_resumed_pass_goes_on_at_its_checkpoint(make_rig: MakeRig) -> None:
    rig = make_rig(blocks=64)
    rig.begin()
    rig.world.plan = {30: Fault.DIE_BEFORE}
    with pytest.raises(Death):
        rig.migration().sync(passes=1)
    rig.world.lose_power()
    rig.world.log.clear()
    row = rig.book.passes()[0]
    assert row.checkpoint is not None
    rig.migration().sync(passes=1)
    sent = sum("chunk" in line for line in rig.world.log)
    assert sent == base_blocks(rig) - row.checkpoint.position
    assert target_is_newest_snapshot(rig)


def test_a_source_that_presents_it_in_another_way_begins_that_disk_again(make_rig: MakeRig) -> None:
    rig = make_rig(blocks=64)
    rig.begin()
    rig.world.plan = {30: Fault.DIE_BEFORE}
    with pytest.raises(Death):
        rig.migration().sync(passes=1)
    rig.world.lose_power()
    with rig.journal().transaction() as connection:
        connection.execute("UPDATE pass SET fingerprint = 'another'")
        sealed(connection, rig.journals[0].read("SELECT id FROM migration")[0][0])
    rig.world.log.clear()
    rig.migration().sync(passes=1)
    assert sum("chunk" in line for line in rig.world.log) == base_blocks(rig)
    assert target_is_newest_snapshot(rig)


def test_a_connection_that_breaks_now_and_then_is_made_again(make_rig: MakeRig) -> None:
    rig = make_rig(blocks=32)
    rig.begin()
    chance = random.Random(3)
    rig.world.plan = {number: Fault.LOSE_REQUEST for number in range(6, 200) if chance.random() < 0.15}
    rig.migration().sync(passes=2)
    assert target_is_newest_snapshot(rig)


def test_a_connection_that_stays_away_ends_it_and_the_next_run_goes_on(rig: Any) -> None:
    rig.begin()
    rig.world.always = {"chunk": Fault.LOSE_REQUEST}
    with pytest.raises(ConnectionLost):
        rig.migration().sync(passes=1)
    rig.world.always = {}
    rig.migration().sync(passes=1)
    assert len(rig.world.snapshots) == 1
    assert target_is_newest_snapshot(rig)


def test_an_export_that_always_begins_anew_is_given_up_at_last(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reader has a fingerprint of its own, as an export lease has, and breaks at another place."""
    rig = make_rig(blocks=64)
    rig.begin()
    opened: list[FakeReader] = []

    def breaks(self: FakeReader, position: int = 0) -> Iterator[Chunk]:
        for number, chunk in enumerate(whole(self, position)):
            if number == (16, 12, 8)[len(opened) % 3]:
                raise ConnectionLost("the export broke off")
            yield chunk

    def anew(self: FakeReader, *args: Any) -> None:
        begin(self, *args)
        opened.append(self)
        assert len(opened) < 20, "it goes on for ever"
        self.fingerprint += f" {len(opened)}"

    whole, begin = FakeReader.chunks, FakeReader.__init__
    monkeypatch.setattr(FakeReader, "chunks", breaks)
    monkeypatch.setattr(FakeReader, "__init__", anew)
    with pytest.raises(ConnectionLost, match="broke off"):
        rig.migration().sync(passes=1)
    monkeypatch.setattr(FakeReader, "chunks", whole)
    rig.migration().sync(passes=1)
    assert target_is_newest_snapshot(rig)


def test_another_snapshot_with_a_mark_of_ours_is_not_the_one_that_was_copied(rig: Any) -> None:
    """Of two requests that landed somebody removed the one that was copied; the other was made later."""
    rig.begin()
    rig.migration().sync(passes=2)
    mark, (made, *_) = list(rig.world.snapshots.items())[-1]
    rig.world.guests_write()
    del rig.world.snapshots[mark]
    FakeSource(rig.world).snapshot(rig.world.machine(), mark)
    rig.world.snapshots[mark] = (replace(made, key="a later one"), *rig.world.snapshots[mark][1:])
    report = rig.migration().sync(passes=1)
    assert [one.kind for one in report.passes] == ["base"]
    assert target_is_newest_snapshot(rig)
    rig.migration().finish()
    assert rig.world.snapshots == {}


def test_a_snapshot_that_somebody_removed_means_a_new_base(rig: Any) -> None:
    rig.begin()
    rig.migration().sync(passes=2)
    rig.world.snapshots.clear()
    report = rig.migration().sync(passes=1)
    assert [one.kind for one in report.passes] == ["base"]
    assert target_is_newest_snapshot(rig)


def test_no_more_than_eight_snapshots_are_kept(rig: Any) -> None:
    rig.begin()
    rig.migration().sync(passes=12)
    assert len(rig.world.snapshots) == 8
    assert all(mark.endswith(("-1", "-2", "-3", "-4")) for mark in rig.world.removed)
    assert target_is_newest_snapshot(rig)


def test_a_snapshot_that_cannot_be_removed_yet_stops_nothing(rig: Any) -> None:
    rig.begin()
    rig.world.always = {"remove_snapshot": Fault.REFUSE}
    rig.migration().sync(passes=10)
    assert len(rig.world.snapshots) == 10
    rig.world.always = {}
    rig.migration().sync(passes=1)
    assert len(rig.world.snapshots) == 8


def test_another_tokvm_s_vm_is_blocked(rig: Any) -> None:
    rig.begin()
    rig.world.owner = "otherhost 12345678 2026-01-01T00:00:00Z"
    with pytest.raises(Blocked, match="otherhost 12345678"):
        rig.migration().sync(passes=1)
    assert rig.world.snapshots == {}


def test_a_disk_that_came_is_blocked(make_rig: MakeRig) -> None:
    rig = make_rig(disks=1)
    rig.begin()
    rig.migration().sync(passes=1)
    world = rig.world
    world.disks.append(bytearray(4 * BLOCK))
    world.targets.append(bytearray(4 * BLOCK))
    world.changed.append({})
    world.unsynced.append([])
    with pytest.raises(Blocked, match="vdi-1"):
        rig.migration().sync(passes=1)


def test_a_disk_that_shrank_is_blocked(rig: Any) -> None:
    rig.begin()
    rig.migration().sync(passes=1)
    del rig.world.disks[0][-BLOCK:]
    with pytest.raises(Blocked, match="shrank"):
        rig.migration().sync(passes=1)


def test_a_disk_that_grew_needs_a_target_that_grew(rig: Any) -> None:
    rig.begin()
    rig.migration().sync(passes=1)
    rig.world.disks[0] += bytes([7]) * 2 * BLOCK
    rig.world.changed[0].update({16: -1, 17: -1})
    with pytest.raises(TargetError, match="grow the target"):
        rig.migration().sync(passes=1)
    rig.world.targets[0] += b"\x53" * 2 * BLOCK
    rig.migration().sync(passes=1)
    assert target_is_newest_snapshot(rig)


@pytest.mark.slow
def test_what_a_larger_target_held_behind_a_disk_that_grew_is_zeroed(make_rig: MakeRig) -> None:
    """A delta names the blocks that were written; the rest of the new part was never written, and reads as zeros."""
    for fault in (None, *range(40)):
        rig = make_rig()
        rig.begin()
        world = rig.world
        world.targets[0] += b"\x53" * 3 * BLOCK
        rig.migration().sync(passes=1)
        world.disks[0] += bytes(2 * BLOCK) + bytes([7]) * BLOCK
        world.changed[0][18] = -1
        if fault is not None:
            try:
                rig.migration(die_at=fault // 2, after=bool(fault % 2)).sync(passes=2)
            except Death:
                world.lose_power()
            rig.migration().sync(passes=2)
        else:
            rig.migration().sync(passes=2)
        assert target_is_newest_snapshot(rig)


def test_the_zeros_behind_a_disk_that_grew_are_in_the_manifest(rig: Any) -> None:
    rig.begin()
    rig.world.targets[0] += b"\x53" * 2 * BLOCK
    rig.migration().sync(passes=1)
    rig.world.disks[0] += bytes(2 * BLOCK)
    rig.migration().sync(passes=2)
    rows = read_manifest(rig.path / "manifests" / "2-0")
    zeros = [(int(row["offset"]), int(row["length"])) for row in rows if row["kind"] == RecordKind.ZERO]
    assert zeros == [(16 * BLOCK, 2 * BLOCK)]


def test_a_target_swapped_between_passes_is_noticed_each_time(rig: Any) -> None:
    """Of the same identity and size, but with other content: nothing is written to it, however often it is tried."""
    rig.begin()
    rig.migration().sync(passes=1)
    kept = bytes(rig.world.targets[0])
    rig.world.targets[0][:] = b"\x99" * len(kept)
    for _ in range(2):
        with pytest.raises(TargetError, match="no longer holds"):
            rig.migration().sync(passes=2)
        assert set(rig.world.targets[0]) == {0x99}
    rig.world.targets[0][:] = kept
    rig.migration().sync(passes=2)
    assert target_is_newest_snapshot(rig)


def test_what_an_abandoned_pass_wrote_is_no_swapped_target(rig: Any) -> None:
    """Pass 2 wrote a part and its snapshot vanished: pass 3 is a delta to pass 1 again."""
    rig.begin()
    rig.migration().sync(passes=1)
    for block in range(16):
        rig.world.changed[0][block] = 1000 + block
        rig.world.disks[0][block * BLOCK : (block + 1) * BLOCK] = bytes([block + 1]) * BLOCK
    with pytest.raises(Death):
        rig.migration(die_at=6).sync(passes=2)
    assert any(one.number == 2 and one.checkpoint for one in rig.book.passes())
    del rig.world.snapshots[list(rig.world.snapshots)[-1]]
    rig.migration().sync(passes=2)
    assert target_is_newest_snapshot(rig)


def test_two_disks_on_one_target_are_refused(make_rig: MakeRig) -> None:
    rig = make_rig(disks=2)
    rig.begin()

    def the_same(index: int) -> FakeTarget:
        target = FakeTarget(rig.world, index)
        target.identity = "one device by two names"
        return target

    rig.open_target = the_same
    with pytest.raises(UnsafeTarget, match="target of another disk already"):
        rig.migration().sync(passes=1)
    assert not any(rig.world.unsynced[1])


def test_the_target_of_another_unfinished_migration_is_refused(rig: Any) -> None:
    rig.begin()
    rig.world.clock.sleep(1.0)
    journal = rig.journal()
    other = journal.create(vm=replace(rig.world.machine(), uuid="other"), source="fake://source", plan={}, targets=["/dev/x"])
    journal.book(other.id).disk_identity(0, "target-0")
    with pytest.raises(UnsafeTarget, match="/dev/x"):
        rig.migration().sync(passes=1)
    rig.journals[0].book(other.id).finished()
    rig.migration().sync(passes=1)
    assert target_is_newest_snapshot(rig)


def test_another_target_than_before_is_refused(rig: Any) -> None:
    rig.begin()
    rig.migration().sync(passes=1)

    def another(index: int) -> FakeTarget:
        target = FakeTarget(rig.world, index)
        target.identity = "another disk"
        return target

    rig.open_target = another
    with pytest.raises(TargetError, match="another disk"):
        rig.migration().sync(passes=1)


def test_the_manifests_fit_the_target(rig: Any) -> None:
    rig.begin()
    rig.migration().sync(passes=2)
    for number in (1, 2):
        ManifestWriter.open(Path(rig.path) / "manifests" / f"{number}-0", number=number, disk=0, size=16 * BLOCK).close()
    with pytest.raises(JournalError, match="another pass"):
        ManifestWriter.open(Path(rig.path) / "manifests" / "2-0", number=1, disk=0, size=16 * BLOCK)


def test_a_snapshot_without_one_of_the_disks_is_blocked(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.begin()
    monkeypatch.setattr(FakeSource, "snapshot", lambda _self, _vm, mark: Snapshot("s", mark, {}))
    with pytest.raises(Blocked, match="came or went"):
        rig.migration().sync(passes=1)


def test_a_second_run_names_the_first(rig: Any) -> None:
    rig.begin()
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with Journal.open(rig.path) as journal, journal.lock(journal.migrations()[0].id):
            os.write(ready[1], b"x")
            os.read(go[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        with pytest.raises(JournalError, match=f"process {child} on"):
            rig.migration().sync(passes=1)
        with pytest.raises(JournalError, match=f"process {child} on"):
            rig.migration().cutover()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for fd in (*ready, *go):
            os.close(fd)
    assert rig.world.calls == 0
    rig.migration().sync(passes=1)
    assert target_is_newest_snapshot(rig)


def test_a_sync_after_a_rollback_goes_on_with_a_delta(make_synced: Callable[[], Any]) -> None:
    rig = make_synced()
    rig.world.always = {"host.start": Fault.REFUSE}
    with pytest.raises(TokvmError):
        rig.migration().cutover(deadline_s=5.0)
    assert rig.phase is Phase.ROLLED_BACK
    report = rig.migration().sync(passes=1)
    assert [one.kind for one in report.passes] == ["delta"]
    assert target_is_newest_snapshot(rig)


def test_status_says_what_comes_next(make_synced: Callable[[], Any]) -> None:
    rig = make_synced()
    status = rig.migration().status()
    assert status.passes_done == 2
    assert status.snapshots == 2
    assert "tokvm cutover" in status.next
    assert status.to_dict()["phase"] == "COPY"
