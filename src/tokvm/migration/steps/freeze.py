"""Freeze: our snapshots on the source. Each is intended in the journal first, and found again by its mark after a crash."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tokvm.core.errors import Blocked, ConnectionLost, SourceError
from tokvm.core.machine import Snapshot, VirtualMachine
from tokvm.migration.records import PassKind, SnapshotRecord, SnapshotState
from tokvm.migration.rounds import newest_done, rounds_of, unfinished
from tokvm.migration.work import TRIES, Work
from tokvm.sources.base import NoLiveDelta

log = logging.getLogger(__name__)

KEPT = 8
"""Removing a snapshot of a running VM makes XenServer coalesce its parent as we read: ours stay until the end, up to here."""


def freeze(work: Work, vm: VirtualMachine, kind: PassKind) -> SnapshotRecord:
    """A new snapshot of all disks. For a new base none of ours is needed: where one that stands is in its way, all go first."""
    try:
        return make(work, vm, work.book.snapshot_intended(kind))
    except NoLiveDelta:
        useless = [one for one in work.book.snapshots() if one.state is SnapshotState.MADE]
        if kind is not PassKind.BASE or not useless:
            raise
    for one in useless:
        remove(work, one)
    return make(work, vm, work.book.snapshot_intended(kind))


def make(work: Work, vm: VirtualMachine, intended: SnapshotRecord) -> SnapshotRecord:
    """The snapshot with that mark; asked for again with the same mark when a reply is lost."""
    for attempt in range(1, TRIES + 1):
        try:
            snapshot = work.doors.source.snapshot(vm, intended.mark)
            break
        except NoLiveDelta:
            work.book.snapshot_removed(intended.number)  # it was not made, and will not be
            raise
        except ConnectionLost as lost:
            if attempt == TRIES:
                raise
            log.warning("migration %s: reply to snapshot %s lost: %s", work.id, intended.mark, lost.what)
            work.sleep(work.options.poll_s)
    work.book.snapshot_made(intended.number, snapshot)
    changed = {disk.key for disk in work.book.disks()} ^ snapshot.disks.keys()
    if changed:
        what = f"the snapshot {intended.mark} has other disks than the migration: {sorted(changed)[0]} came or went"
        raise Blocked(what, where=work.name, fix="were the VM's disks changed? `tokvm check` shows them")
    return next(one for one in work.book.snapshots() if one.number == intended.number)


def reconcile(work: Work) -> None:
    """Compare the journal's snapshots with the source's: adopt what was made but not written down, void what is gone."""
    there = work.ask(lambda uuid: work.doors.source.snapshots(uuid, work.mark_prefix))
    for record in work.book.snapshots():
        _settle(work, record, _same(record, there))
    rounds = rounds_of(work.book)
    base = newest_done(rounds)
    if base is not None and base.snapshot.state is SnapshotState.REMOVED:
        work.note(f"snapshot {base.snapshot.mark} is gone from the source: the disks are copied anew")
        work.book.void_passes()


def _same(record: SnapshotRecord, there: Sequence[Snapshot]) -> Snapshot | None:
    """One that is known is the one with its key: another with the same mark (of two requests that landed) was taken at another
    moment. A VM that was registered anew may have new keys for the old ones; nobody can tell that, so they are others, too."""
    found = [one for one in there if one.mark == record.mark]
    if record.state is SnapshotState.MADE:
        found = [one for one in found if one.key == record.snapshot.key]
    return found[0] if found else None


def _settle(work: Work, record: SnapshotRecord, found: Snapshot | None) -> None:
    """A snapshot that has lost a disk (removed by hand, or half removed) is as good as gone: nothing can be read from it."""
    if found is not None and {disk.key for disk in work.book.disks()} - found.disks.keys():
        found = None
    match record.state, found:
        case SnapshotState.INTENDED, Snapshot():
            work.book.snapshot_made(record.number, found)
        case SnapshotState.INTENDED, None if record.kind is PassKind.FINAL:
            work.book.snapshot_removed(record.number)
        case SnapshotState.MADE, None:
            if any(one.number == record.number and one.open and one.passes for one in rounds_of(work.book)):
                # What was copied of it stays on the target, and it cannot be finished any more. When the VM was taken back to
                # an older snapshot no later delta brings these blocks again, so none may be built over them.
                work.note(f"snapshot {record.mark} is gone and was copied in part: the disks are copied anew")
                work.book.void_passes()
            work.book.snapshot_removed(record.number)


def prune(work: Work) -> None:
    """Above KEPT, remove the oldest snapshots that nothing is read from any more. A refusal is tried again next time."""
    rounds = rounds_of(work.book)
    needed = {one.number for one in (newest_done(rounds), unfinished(rounds)) if one is not None}
    made = [one.snapshot for one in rounds if one.snapshot.state is SnapshotState.MADE]
    spare = [snapshot for snapshot in made if snapshot.number not in needed]
    for snapshot in spare[: max(0, len(made) - KEPT)]:
        try:
            remove(work, snapshot)
        except SourceError as refused:
            work.note(f"snapshot {snapshot.mark} could not be removed yet: {refused.what}")


def remove(work: Work, snapshot: SnapshotRecord) -> None:
    work.doors.source.remove_snapshot(work.uuid, snapshot.snapshot)
    work.book.snapshot_removed(snapshot.number)


def remove_all(work: Work) -> int:
    """Every snapshot of this migration, also those the journal did not get to know; how many there were."""
    there = work.ask(lambda uuid: work.doors.source.snapshots(uuid, work.mark_prefix))
    for snapshot in there:
        work.doors.source.remove_snapshot(work.uuid, snapshot)
    for record in work.book.snapshots():
        if record.state is SnapshotState.MADE:
            # Again, though it is listed no more: a removal that was interrupted may have left its disks behind.
            remove(work, record)
        elif record.state is SnapshotState.INTENDED:
            work.book.snapshot_removed(record.number)
    return len(there)
