"""Copy: one round, that is one pass over each disk, going on where the last checkpoint was.

open the reader ─► same fingerprint as recorded? ─► go on at the checkpoint, else that disk's pass begins again
"""

from __future__ import annotations

import logging
import time

from tokvm.core.disk import DiskReader, DiskWriter
from tokvm.core.errors import ConnectionLost, TargetError, UnsafeTarget
from tokvm.core.machine import Disk, VirtualMachine
from tokvm.migration.records import DiskRecord, PassRecord, PassState, SnapshotRecord
from tokvm.migration.rounds import Round
from tokvm.migration.work import TRIES, Work
from tokvm.transfer.checkpoint import Checkpoint, PassStopped, TargetState
from tokvm.transfer.manifest import ManifestWriter
from tokvm.transfer.passes import run_pass
from tokvm.transfer.verify import canary

log = logging.getLogger(__name__)


def copy_round(work: Work, vm: VirtualMachine, at: SnapshotRecord, since: Round | None, *, in_downtime: bool = False) -> None:
    """Every disk as frozen in `at`, or what changed since `since`."""
    keys = {disk.key: disk for disk in vm.disks}
    for record in work.book.disks():
        _copy_patiently(work, record, keys[record.key], at, since, in_downtime=in_downtime)
    passes = [one for one in work.book.passes() if one.number == at.number]
    work.doors.observer.pass_end(at.number, at.kind, sum(p.bytes for p in passes), sum(p.seconds for p in passes))


def _copy_patiently(
    work: Work, record: DiskRecord, disk: Disk, at: SnapshotRecord, since: Round | None, *, in_downtime: bool
) -> None:
    """A connection that breaks is made again, as long as each one brings the pass further than any before it, and a few times
    when not: an export that can only be read from its start would be begun anew for ever."""
    tries, furthest = 0, _reached(work, record, at)
    while True:
        try:
            _copy_disk(work, record, disk, at, since, in_downtime=in_downtime)
            return
        except ConnectionLost as lost:
            reached = _reached(work, record, at)
            tries = 0 if reached > furthest else tries + 1
            furthest = max(furthest, reached)
            if tries >= TRIES or (in_downtime and work.over_budget()):
                raise
            work.doors.observer.note(f"disk {record.index}: connection lost ({lost.what}); going on")
            work.sleep(work.options.poll_s * 3**tries)


def _reached(work: Work, disk: DiskRecord, at: SnapshotRecord) -> int:
    """Bytes that this pass has brought to the target's medium, zeros too."""
    row = _row(work, disk, at)
    return 0 if row is None or row.checkpoint is None else row.checkpoint.data_bytes + row.checkpoint.zero_bytes


def _row(work: Work, disk: DiskRecord, at: SnapshotRecord) -> PassRecord | None:
    return next((one for one in work.book.passes() if (one.number, one.disk) == (at.number, disk.index)), None)


def _copy_disk(
    work: Work, record: DiskRecord, disk: Disk, at: SnapshotRecord, since: Round | None, *, in_downtime: bool
) -> None:
    row = _row(work, record, at)
    if row is not None and row.state is PassState.DONE:
        return
    before = None if since is None else since.snapshot.snapshot
    reader = work.doors.source.open_disk(disk, at.snapshot, before)
    try:
        writer = work.doors.open_target(record.index)
        try:
            _same_target(work, record, reader, writer)
            if since is not None:
                _holds_previous_pass(work, record, since, reader, writer)
            resume = _begin(work, record, at, since, reader, row)
            _run(work, record, at, since, reader, writer, resume, in_downtime=in_downtime)
        finally:
            writer.close()
    finally:
        reader.close()


def _begin(
    work: Work, disk: DiskRecord, at: SnapshotRecord, since: Round | None, reader: DiskReader, row: PassRecord | None
) -> Checkpoint | None:
    """The checkpoint to go on from; None (and the pass noted down as begun) when it starts from its beginning."""
    number = None if since is None else since.number
    if row is not None and row.fingerprint == reader.fingerprint and row.since == number and row.state is PassState.RUNNING:
        return row.checkpoint
    if row is not None:
        work.doors.observer.note(
            f"disk {disk.index}: the source presents pass {at.number} in another way; its pass begins again"
        )
    work.book.pass_begun(
        PassRecord(at.number, disk.index, at.kind, number, reader.fingerprint, PassState.RUNNING, size=reader.size)
    )
    return None


def _same_target(work: Work, disk: DiskRecord, reader: DiskReader, writer: DiskWriter) -> None:
    if disk.identity and writer.identity != disk.identity:
        raise TargetError(
            f"this is not the target of the passes before (it says {writer.identity}, not {disk.identity})",
            where=disk.path,
            fix="bring the old target back; or `tokvm finish` this migration and begin another",
        )
    if writer.size < reader.size:
        raise TargetError(
            f"the target has {writer.size} bytes, the disk {reader.size}", where=disk.path, fix="grow the target, then go on"
        )
    other = work.book.also_holds(disk.index, writer.identity)
    if other is not None:
        raise UnsafeTarget(
            f"this is the target of another disk already ({writer.identity}, known as {other.path})",
            where=disk.path,
            fix="give each disk a target of its own; `tokvm status` shows the migrations that are not finished",
        )
    if not disk.identity:
        work.book.disk_identity(disk.index, writer.identity)


def _holds_previous_pass(work: Work, disk: DiskRecord, since: Round, reader: DiskReader, writer: DiskWriter) -> None:
    """A delta over something else than the pass before it would be neither; asked before the first byte of it is written.

    A later pass that was broken off may have written already, and what it wrote is in what this one will write.
    """
    path = work.doors.manifest_path(since.number, disk.index)
    if not path.exists():
        log.warning("%s is gone: disk %d is not compared with pass %d before the next one", path, disk.index, since.number)
        return
    written = any(one.disk == disk.index and one.number > since.number for one in work.book.passes())
    canary(writer, path, rewritten=reader.covered() if written else None)


def _grown_from(since: Round | None, disk: DiskRecord, reader: DiskReader) -> int | None:
    """The disk's size at the previous pass, where it was smaller."""
    before = () if since is None else tuple(one.size for one in since.passes if one.disk == disk.index)
    return next((size for size in before if size < reader.size), None)


def _run(
    work: Work,
    disk: DiskRecord,
    at: SnapshotRecord,
    since: Round | None,
    reader: DiskReader,
    writer: DiskWriter,
    resume: Checkpoint | None,
    *,
    in_downtime: bool,
) -> None:
    observer = work.doors.observer
    observer.pass_begin(at.number, at.kind, disk.index, reader.total)
    if resume is not None:
        observer.advance(disk.index, resume.data_bytes)
    left = work.left() if in_downtime else None
    path = work.doors.manifest_path(at.number, disk.index)
    manifest = ManifestWriter.open(path, number=at.number, disk=disk.index, size=reader.size)
    began = work.doors.clock.monotonic()
    try:
        result = run_pass(
            reader,
            writer,
            state=TargetState.UNKNOWN if since is None else TargetState.PREVIOUS_PASS,
            resume=resume,
            record=lambda checkpoint: work.book.checkpoint(at.number, disk.index, checkpoint),
            progress=lambda count: observer.advance(disk.index, count),
            manifest=manifest,
            limits=work.doors.limits,
            cancelled=work.over_budget if left is not None else None,
            total_deadline=None if left is None else time.monotonic() + left,
            grown_from=_grown_from(since, disk, reader),
        )
    except PassStopped as stopped:
        raise work.too_long("during the final delta") from stopped
    except ConnectionLost:
        work.book.pass_seconds(at.number, disk.index, work.doors.clock.monotonic() - began)
        raise
    finally:
        manifest.close()
    work.book.pass_done(at.number, disk.index, result.data_bytes, work.doors.clock.monotonic() - began)
    log.info("pass %d (%s) of disk %d: %d bytes", at.number, at.kind, disk.index, result.data_bytes)
