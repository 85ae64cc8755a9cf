"""VHDX's log: a ring of entries, each a whole or nothing.

    sector 0        0 "loge"  4 checksum u32  8 entry length u32  12 tail u32  16 sequence number u64  24 descriptors u32
                    32 log guid [16]  48 flushed file offset u64  56 last file offset u64  64 126 descriptors of 32
    sectors 1 …     128 descriptors each, as many as are needed
    then            a data sector for each "desc", in their order

    "zero"  8 length u64         16 file offset u64  24 sequence u64       the range becomes zeros
    "desc"  4 last 4 bytes  8 first 8 bytes  16 file offset u64  24 sequence u64
    "data"  4 sequence, high u32  8 bytes 8 to 4091  4092 sequence, low u32

Sectors of 4 KiB. Lengths, offsets and the tail are whole sectors, bytes. An entry may run over the ring's end to its start. It
counts only if all of it is as it should be; anything else is what is left of an older entry, or of a write that lost power.

No sector of a good entry but its first begins with "loge". So entries that could be good never overlap, and all the checks
together read the log twice at most, whatever a hostile one says.
Spec: [MS-VHDX] 2.3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from uuid import UUID

import numpy as np
import numpy.typing as npt

from tokvm.core.extents import Column
from tokvm.core.units import KiB, MiB
from tokvm.images.base import ReadAt
from tokvm.images.fields import read_exact
from tokvm.images.vhdx.crc import joined, row_registers
from tokvm.images.vhdx.structs import guid

LOG_SECTOR = 4 * KiB
_SLICE = 4 * MiB
_FIRST_DESCRIPTORS, _MORE_DESCRIPTORS = 126, 128
_HEADER_SIZE = 64
_HEADER = struct.Struct("<4sIIIQI4x16sQQ")
_LOGE, _ZERO, _DESC, _DATA = (int.from_bytes(name, "little") for name in (b"loge", b"zero", b"desc", b"data"))
Descriptors = npt.NDArray[np.void]
_DESCRIPTOR = np.dtype([("kind", "<u4"), ("trailing", "V4"), ("leading", "<u8"), ("offset", "<u8"), ("sequence", "<u8")])


@dataclass(frozen=True, slots=True)
class LogEntry:
    """An entry all of which was checked. place: in the ring, bytes. count: of descriptors."""

    place: int
    length: int
    tail: int
    sequence: int
    count: int
    flushed_file_offset: int
    last_file_offset: int


@dataclass(frozen=True, slots=True)
class Ring:
    """The log's bytes; what runs over the end goes on at the start."""

    file: ReadAt
    start: int
    length: int

    def read(self, place: int, length: int) -> bytes:
        """Less than MAX_READ bytes, and at most the ring's length."""
        place %= self.length
        head = min(length, self.length - place)
        raw = read_exact(self.file, self.start + place, head)
        return bytes(raw if head == length else raw + read_exact(self.file, self.start, length - head))


@dataclass(frozen=True, slots=True, eq=False)
class Sectors:
    """What is to be known of every sector of the ring, as columns; and the first bytes of those that begin an entry."""

    register: npt.NDArray[np.uint32]  # of the CRC; with the checksum of a first sector as 0
    is_data: npt.NDArray[np.bool_]
    sequence: npt.NDArray[np.uint64]  # of a data sector
    heads: dict[int, bytes]

    @classmethod
    def of(cls, ring: Ring) -> Sectors:
        count = ring.length // LOG_SECTOR
        found = cls(np.zeros(count, np.uint32), np.zeros(count, np.bool_), np.zeros(count, np.uint64), {})
        for place in range(0, ring.length, _SLICE):
            raw = np.frombuffer(ring.read(place, min(_SLICE, ring.length - place)), np.uint8)
            found._look(place // LOG_SECTOR, raw.reshape(-1, LOG_SECTOR).copy())
        return found

    def _look(self, first: int, rows: npt.NDArray[np.uint8]) -> None:
        words = rows.view("<u4")
        rows_here = slice(first, first + len(rows))
        self.is_data[rows_here] = words[:, 0] == _DATA
        self.sequence[rows_here] = words[:, 1].astype(np.uint64) << np.uint64(32) | words[:, -1]
        begins = np.flatnonzero(words[:, 0] == _LOGE)
        for row in begins.tolist():
            self.heads[first + row] = rows[row, :_HEADER_SIZE].tobytes()
        words[begins, 1] = 0
        self.register[rows_here] = row_registers(rows)


def log_entries(ring: Ring, log_guid: UUID) -> tuple[dict[int, LogEntry], list[str]]:
    """The good entries of this log by their place in the ring; and why those that bear its guid and are not good are not."""
    sectors = Sectors.of(ring)
    count = ring.length // LOG_SECTOR
    begins = sorted(sectors.heads)
    entries: dict[int, LogEntry] = {}
    reasons: list[str] = []
    for first, following in pairwise([*begins, begins[0] + count] if begins else []):
        head = sectors.heads[first]
        if guid(head[32:48]) != log_guid:
            continue
        found = _entry(ring, sectors, first, head, room=following - first)
        if isinstance(found, LogEntry):
            entries[found.place] = found
        else:
            reasons.append(f"the entry at {ring.start + first * LOG_SECTOR:#x} has {found}")
    return entries, reasons


def _entry(ring: Ring, sectors: Sectors, first: int, head: bytes, *, room: int) -> LogEntry | str:
    """The entry that begins in this sector and may take `room` sectors, or what is wrong with it."""
    _, stored, length, tail, sequence, count, _, flushed, last = _HEADER.unpack(head)
    size = length // LOG_SECTOR
    table = descriptor_sectors(count)
    if length % LOG_SECTOR or not 1 <= size <= room:
        return f"a length of {length}, where at most {room * LOG_SECTOR} are its own"
    if tail % LOG_SECTOR or tail >= ring.length or not sequence:
        return f"tail {tail:#x} and sequence number {sequence}"
    if table > size:
        return f"{count} descriptors in {size} sectors"
    places = np.arange(first, first + size) % len(sectors.register)
    right = joined(sectors.register[places].tolist(), LOG_SECTOR)
    if stored != right:
        return f"checksum {stored:#010x} and not {right:#010x}"
    entry = LogEntry(first * LOG_SECTOR, length, tail, sequence, count, flushed, last)
    return _wrong_inside(ring, sectors, entry, places[table:]) or entry


def _wrong_inside(ring: Ring, sectors: Sectors, entry: LogEntry, data: Column) -> str:
    """Descriptors and data sectors are as many as they should be, and all of this entry."""
    is_data = 0
    for found in descriptors(ring, entry):
        data_here = found["kind"] == _DESC
        is_zero = found["kind"] == _ZERO
        odd = found["offset"] % LOG_SECTOR | np.where(is_zero, found["leading"] % LOG_SECTOR, 0)
        good = (data_here | is_zero) & (found["sequence"] == entry.sequence) & (odd == 0)
        if not good.all():
            return "a descriptor of another entry, of no known kind, or not of whole sectors"
        is_data += int(np.count_nonzero(data_here))
    if is_data != len(data):
        return f"{is_data} data descriptors for {len(data)} data sectors"
    if not (sectors.is_data[data] & (sectors.sequence[data] == entry.sequence)).all():
        return "a data sector of another entry"
    return ""


def descriptor_sectors(count: int) -> int:
    """Sectors that a header and this many descriptors take."""
    return 1 + -(-max(0, count - _FIRST_DESCRIPTORS) // _MORE_DESCRIPTORS)


def descriptors(ring: Ring, entry: LogEntry) -> Iterator[Descriptors]:
    """All descriptors of an entry in order, some MiB at a time. `leading` of a zero descriptor is its length."""
    if not entry.count:
        return
    end = _HEADER_SIZE + entry.count * _DESCRIPTOR.itemsize
    for place in range(0, end, _SLICE):
        head = _HEADER_SIZE if place == 0 else 0
        raw = ring.read(entry.place + place, min(_SLICE, end - place))
        yield np.frombuffer(raw, _DESCRIPTOR, offset=head)


def is_data_descriptor(found: Descriptors) -> npt.NDArray[np.bool_]:
    kinds: npt.NDArray[np.bool_] = found["kind"] == _DESC
    return kinds
