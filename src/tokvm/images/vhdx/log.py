"""VHDX's log, replayed in memory: which entries were under way when the host lost power, and the file as it is with them.

    ring   |… old |  E5  |  E6  |  E7  | torn E8 | old …|      E6's and E7's tails say where replay begins: at E6, say
                            ▲ tail   ▲ head

The log must be replayed when the header's log guid is not 0, before anything but the headers is believed: region table,
metadata, BAT and blocks may all be in it. The active sequence is the run of good entries, each with the next sequence number
and where the one before ends, whose last entry (the head) has the highest number and has its tail inside the run. Entries from
the tail to the head are replayed in order. After that the file is at least as long as the head says, rounded up to whole MiB;
new space is zeros.

The source is never written. What cannot be replayed is refused: without its log a dirty file is an old or torn disk.
Spec: [MS-VHDX] 2.3.2, 2.3.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tokvm.core.errors import ImageError
from tokvm.core.text import readable
from tokvm.core.units import MiB, round_up
from tokvm.images.base import ReadAt
from tokvm.images.fields import bad_field
from tokvm.images.vhdx.log_entries import (
    LOG_SECTOR,
    Descriptors,
    LogEntry,
    Ring,
    descriptor_sectors,
    descriptors,
    is_data_descriptor,
    log_entries,
)
from tokvm.images.vhdx.patched import PatchedFile, Write
from tokvm.images.vhdx.structs import MAX_FILE, REGION_OFFSETS, Header

MAX_LOG = 256 * MiB  # Windows' and QEMU's have 1 MiB
MAX_WRITES = 1 << 14  # that are replayed: 64 MiB of pages. A log of 1 MiB holds 255
_FIX = "let the host open the disk once (Mount-VHD, then Dismount-VHD): that replays its log; then copy it again"
_DATA_SLICE = 256  # data sectors read at once


@dataclass(frozen=True, slots=True)
class Replay:
    """file: the image as it is with the log. entries, writes: how many were replayed."""

    file: PatchedFile
    entries: int
    writes: int


def replay(file: ReadAt, header: Header, *, offset: int) -> Replay:
    """Replay the log of this header, read at `offset`, in memory; or ImageError with the reason why it cannot be."""
    if header.log_length > MAX_LOG:
        raise bad_field(file.name, offset + 68, "length of a log to replay", header.log_length, f"at most {MAX_LOG}", fix=_FIX)
    ring = Ring(file, header.log_offset, header.log_length)
    sequence = active_sequence(ring, header)
    head = sequence[-1]
    at = ring.start + head.place
    if file.size < head.flushed_file_offset:
        allowed = f"at most the file's {file.size} bytes: the file was cut short"
        raise bad_field(file.name, at + 48, "log entry's flushed file offset", head.flushed_file_offset, allowed)
    if head.last_file_offset > MAX_FILE:
        raise bad_field(file.name, at + 56, "log entry's last file offset", head.last_file_offset, f"at most {MAX_FILE}")
    if sum(entry.count for entry in sequence) > MAX_WRITES:
        raise bad_field(file.name, at, "log", f"of more than {MAX_WRITES} writes", f"at most {MAX_WRITES}", fix=_FIX)
    writes = [write for entry in sequence for write in _writes(ring, entry)]
    return Replay(PatchedFile(file, writes, round_up(head.last_file_offset, MiB)), len(sequence), len(writes))


def active_sequence(ring: Ring, header: Header) -> list[LogEntry]:
    """The entries to replay, from the head's tail to the head."""
    entries, reasons = log_entries(ring, header.log_guid)
    best: list[LogEntry] = []
    stray, tied = "", False
    for run in _runs(entries, ring.length):
        head = run[-1]
        tail = next((index for index, entry in enumerate(run) if entry.place == head.tail), None)
        if tail is None:
            stray = f"the entry at {ring.start + head.place:#x} has tail {head.tail:#x}, where no entry of its sequence begins"
        elif not best or head.sequence > best[-1].sequence:
            best, tied = run[tail:], False
        else:
            tied |= head.sequence == best[-1].sequence
    if tied:
        what = f"two sequences end with number {best[-1].sequence}"
        raise ImageError(f"the log cannot be replayed: {what}", where=f"{ring.file.name}@{ring.start:#x}", fix=_FIX)
    if not best:
        reason = stray or (reasons[-1] if reasons else f"no entry bears its guid {header.log_guid}")
        what = f"the log cannot be replayed: it has no active sequence; {readable(reason)}"
        raise ImageError(what, where=f"{ring.file.name}@{ring.start:#x}", fix=_FIX)
    return best


def _runs(entries: dict[int, LogEntry], ring_length: int) -> Iterator[list[LogEntry]]:
    """Entries that follow one another in the ring and by number, in runs as long as can be. No entry is in two."""

    def after(entry: LogEntry) -> LogEntry | None:
        found = entries.get((entry.place + entry.length) % ring_length)
        return found if found is not None and found.sequence == entry.sequence + 1 else None

    followers = {found.place for entry in entries.values() if (found := after(entry)) is not None}
    for entry in entries.values():
        if entry.place not in followers:
            run, found = [entry], after(entry)
            while found is not None:
                run.append(found)
                found = after(found)
            yield run


def _writes(ring: Ring, entry: LogEntry) -> Iterator[Write]:
    pages = _pages(ring, entry)
    none = memoryview(b"")
    number = 0
    for found in descriptors(ring, entry):
        is_data = is_data_descriptor(found).tolist()
        columns = found["offset"].tolist(), found["leading"].tolist(), is_data, range(len(found))
        for offset, leading, with_data, row in zip(*columns, strict=True):
            length = LOG_SECTOR if with_data else leading
            _check_target(ring, entry, number, offset, length)
            yield Write(offset, length, _page(ring, found, row, next(pages, none)) if with_data else None)
            number += 1


def _page(ring: Ring, found: Descriptors, row: int, sector: memoryview) -> bytes:
    """The page, put together: its first and last bytes made way for the sector's own marks."""
    if not sector:
        raise ImageError("the log changed while it was read", where=ring.file.name, fix="see who writes to the image")
    descriptor = found[row : row + 1].tobytes()
    return descriptor[8:16] + sector[8 : LOG_SECTOR - 4].tobytes() + descriptor[4:8]


def _pages(ring: Ring, entry: LogEntry) -> Iterator[memoryview]:
    """The data sectors of an entry, in order."""
    step = _DATA_SLICE * LOG_SECTOR
    for place in range(descriptor_sectors(entry.count) * LOG_SECTOR, entry.length, step):
        raw = memoryview(ring.read(entry.place + place, min(step, entry.length - place)))
        for at in range(0, len(raw), LOG_SECTOR):
            yield raw[at : at + LOG_SECTOR]


def _check_target(ring: Ring, entry: LogEntry, number: int, offset: int, length: int) -> None:
    """Nothing is logged for the headers, nor for the log itself."""
    end = offset + length
    in_log = offset < ring.start + ring.length and ring.start < end
    if REGION_OFFSETS[0] <= offset and end <= MAX_FILE and not in_log:
        return
    allowed = f"a range behind the headers ({REGION_OFFSETS[0]:#x}), outside the log and before {MAX_FILE:#x}"
    at = ring.start + entry.place
    raise bad_field(ring.file.name, at, f"target of log descriptor {number}", f"{length:#x} bytes at {offset:#x}", allowed)
