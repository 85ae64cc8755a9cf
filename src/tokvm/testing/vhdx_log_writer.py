"""Makes a clean VHDX dirty: its last writes are then only in its log, as after a host's crash.

Pages of structures are moved into the log and become zeros in the file, zeros of blocks become zero descriptors and garbage in
the file, and zeros at the file's end are cut off. So the file is wrong without replay and right with it.
The log itself: `vhdx_log_ring`. Shares no code with the reader in `images/vhdx`. Imports no numpy.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import BinaryIO
from uuid import UUID

from tokvm.core.units import MiB, round_up
from tokvm.testing.vhdx_log_ring import GARBAGE_PAGE, PAGE, Damage, Ring, Write
from tokvm.testing.vhdx_structs import (
    BAT_REGION,
    BITMAP_SIZE,
    FILE_PARAMETERS,
    HEADER_OFFSETS,
    HEADER_SIZE,
    LOGICAL_SECTOR_SIZE,
    METADATA_REGION,
    METADATA_TABLE_SIZE,
    REGION_TABLE_OFFSETS,
    REGION_TABLE_SIZE,
    VIRTUAL_DISK_SIZE,
    BlockState,
    Geometry,
    Header,
)
from tokvm.testing.vhdx_writer import Range

LOG_GUID = UUID("6c6f6700-0000-4000-8000-000000000001")
_ZEROS = bytes(PAGE)


class Part(Enum):
    """What may be moved into the log."""

    REGIONS = "both region tables"
    METADATA = "the metadata's table and items"
    BAT = "BAT entries"
    BITMAPS = "sector bitmaps"
    PAYLOAD = "zeros in FULLY_PRESENT blocks"


@dataclass(frozen=True, slots=True)
class DirtyLog:
    """What was done. pages: file offsets of what is only in the log; zeros: (file offset, length) of what is garbage in the
    file; cut: bytes taken from the file's end; entries: file offsets of the sequence, tail to head."""

    log_guid: UUID
    pages: tuple[int, ...]
    zeros: tuple[Range, ...]
    cut: int
    entries: tuple[int, ...]
    wrapped: bool


def make_dirty(
    out: BinaryIO | str | Path,
    *,
    log_guid: UUID = LOG_GUID,
    seed: int = 0,
    entries: int = 3,
    pages: int = 24,
    parts: frozenset[Part] = frozenset(Part),
    empty_head: bool = False,
    before_tail: bool = False,
    crowded: bool = False,
    wrap: bool = False,
    noise: bool = True,
    shrink: bool = True,
    damage: Damage | None = None,
) -> DirtyLog:
    """Move writes of the clean image into `entries` log entries. With the same seed, the same file becomes the same.

    pages: at most so many, some of each part. empty_head: one more entry, without descriptors. before_tail: valid entries that
    were done with before the tail; replaying them loses guest data. crowded: 200 more descriptors in the tail entry.
    wrap: one entry goes over the ring's end. noise: entries of other logs, older sequences of this one. shrink: cut off zeros.
    """
    if before_tail and damage in (Damage.CHECKSUM, Damage.TORN):
        raise ValueError("entries before a damaged tail are a sequence of their own, which may be replayed")
    rng = random.Random(seed)
    with _opened(out) as file:
        image = _Image(file)
        old_size = image.size
        new_size = image.shrunk_size() if shrink else old_size
        writes = _moved(image, parts, pages, new_size, rng)
        batches = _batches(writes, entries, rng)
        if crowded:
            batches[0] += [Write(image.metadata[0] + 16 * PAGE + PAGE * at) for at in range(1, 201)]
        if empty_head:
            batches.append([])
        done = [[_lost(image, writes)], []] if before_tail else []
        for write in writes:
            _write_pages(file, write.offset, GARBAGE_PAGE if write.data is None else _ZEROS, write.length)
        ring = Ring(image.header, log_guid, damage, rng)
        ring.lay_out(done, batches, wrap=wrap)
        ring.seal(new_size + (MiB if damage is Damage.TRUNCATED else 0), old_size)
        if noise:
            ring.fill(image.bat[0])
        ring.write(file)
        file.truncate(new_size)
        image.write_header(log_guid)
    return DirtyLog(
        log_guid, tuple(sorted({w.offset for w in writes if w.data is not None})),
        tuple(sorted((w.offset, w.length) for w in writes if w.data is None)), old_size - new_size,
        tuple(image.header.log_offset + at for at in ring.places[len(done) :]), ring.wrapped,
    )  # fmt: skip


def _opened(out: BinaryIO | str | Path) -> AbstractContextManager[BinaryIO]:
    return open(out, "r+b") if isinstance(out, str | Path) else nullcontext(out)


def _write_pages(file: BinaryIO, offset: int, page: bytes, length: int) -> None:
    file.seek(offset)
    file.write(page * (length // PAGE))


class _Image:
    """The clean file: where its structures are. Believes it, as only tests' files come here."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        headers = [Header.unpack(self.read(offset, HEADER_SIZE)) for offset in HEADER_OFFSETS]
        self.header = max(headers, key=lambda header: header.sequence)
        self._stale = HEADER_OFFSETS[headers.index(self.header) ^ 1]
        regions = self._table(REGION_TABLE_OFFSETS[0], 8, "<16sQI")
        self.bat = regions[BAT_REGION]
        self.metadata = regions[METADATA_REGION]
        items = self._table(self.metadata[0], 10, "<16sII")
        block_size, flags = struct.unpack("<II", self._item(items[FILE_PARAMETERS]))
        (size,) = struct.unpack("<Q", self._item(items[VIRTUAL_DISK_SIZE]))
        (sector,) = struct.unpack("<I", self._item(items[LOGICAL_SECTOR_SIZE]))
        self.geometry = Geometry(size, block_size, sector, bool(flags & 2))

    @property
    def size(self) -> int:
        return self.file.seek(0, 2)

    def read(self, offset: int, length: int) -> bytes:
        self.file.seek(offset)
        return self.file.read(length)

    def _table(self, offset: int, count_at: int, entry: str) -> dict[UUID, Range]:
        """A table's (offset, length) by GUID: region table (16 bytes of head) or metadata table (32 bytes), 32 per entry."""
        raw = self.read(offset, REGION_TABLE_SIZE)
        (count,) = struct.unpack_from("<H", raw, count_at)
        start = 32 if raw.startswith(b"metadata") else 16
        rows = (struct.unpack_from(entry, raw, start + 32 * index) for index in range(count))
        return {UUID(bytes_le=guid): (at, length) for guid, at, length in rows}

    def _item(self, item: Range) -> bytes:
        return self.read(self.metadata[0] + item[0], item[1])

    @cached_property
    def bat_entries(self) -> tuple[int, ...]:
        raw = self.read(self.bat[0], 8 * self.geometry.bat_entries)
        return struct.unpack(f"<{len(raw) // 8}Q", raw)

    @property
    def bitmaps(self) -> list[int]:
        """File offsets of the bitmap blocks."""
        last = (len(self.bat_entries) - 1) // (self.geometry.chunk_ratio + 1) if self.geometry.differencing else -1
        found = (self.bat_entries[self.geometry.bitmap_entry(chunk)] for chunk in range(last + 1))
        return [entry >> 20 << 20 for entry in found if entry >> 20]

    @property
    def full_blocks(self) -> list[Range]:
        """(file offset, bytes of the disk) of the FULLY_PRESENT blocks."""
        size, found = self.geometry.block_size, []
        for block in range(self.geometry.blocks):
            entry = self.bat_entries[self.geometry.payload_entry(block)]
            if entry & 7 == BlockState.FULLY_PRESENT:
                found.append((entry >> 20 << 20, min(size, self.geometry.size - block * size)))
        return found

    def structure_pages(self, part: Part) -> list[int]:
        """Pages of it that hold anything."""
        ranges = {
            Part.REGIONS: [(offset, PAGE) for offset in REGION_TABLE_OFFSETS],
            Part.METADATA: [(self.metadata[0], METADATA_TABLE_SIZE + PAGE)],
            Part.BAT: [(self.bat[0], round_up(8 * self.geometry.bat_entries, PAGE))],
            Part.BITMAPS: [(offset, BITMAP_SIZE) for offset in self.bitmaps],
        }[part]
        return [at for offset, length in ranges for at in range(offset, offset + length, PAGE) if self.read(at, PAGE) != _ZEROS]

    def payload_pages(self, rng: random.Random, *, zero: bool) -> Iterator[int]:
        """File offsets of pages of FULLY_PRESENT blocks that are zero, or not; a sample."""
        for at, length in rng.sample(found := self.full_blocks, min(len(found), 16)):
            for page in rng.sample(whole := range(at, at + length - PAGE + 1, PAGE), min(len(whole), 64)):
                if (self.read(page, PAGE) == _ZEROS) == zero:
                    yield page

    def shrunk_size(self) -> int:
        """Without the zeros at the end that are no part of a region, in whole MiB."""
        keep = max(at + length for at, length in (self.bat, self.metadata, (self.header.log_offset, self.header.log_length)))
        at = size = self.size
        while at > keep and not self.read(max(at - MiB, keep), min(MiB, at - keep)).strip(b"\0"):
            at = max(at - MiB, keep)
        return min(size, round_up(at, MiB))

    def write_header(self, log_guid: UUID) -> None:
        """As Windows does: over the older one; the other one stays and still says that the log is empty."""
        self.file.seek(self._stale)
        self.file.write(replace(self.header, sequence=self.header.sequence + 1, log_guid=log_guid).pack())


def _moved(image: _Image, parts: frozenset[Part], count: int, limit: int, rng: random.Random) -> list[Write]:
    """The writes that the log shall hold, with the bytes that the file has now. Nothing from `limit` on, which is cut off."""
    writes: list[Write] = []
    for part in sorted(parts - {Part.PAYLOAD}, key=lambda part: part.name):
        found = image.structure_pages(part)
        chosen = rng.sample(found, min(len(found), max(1, count // len(parts))))
        writes += [Write(at, image.read(at, PAGE)) for at in chosen]
    if Part.PAYLOAD in parts:
        found_zeros = (at for at in image.payload_pages(rng, zero=True) if at < limit)
        starts = islice(found_zeros, max(1, count // len(parts)))
        writes += [Write(at) for at in sorted(set(starts))]
    if not any(write.data for write in writes):
        raise ValueError("there is nothing to move into the log: the image has none of the parts")
    return _joined(writes)


def _joined(writes: list[Write]) -> list[Write]:
    """Zeros beside one another become one descriptor."""
    found: list[Write] = []
    for write in writes:
        last = found[-1] if found else None
        if last is not None and write.data is None and last.data is None and last.offset + last.length == write.offset:
            found[-1] = Write(last.offset, None, last.length + PAGE)
        else:
            found.append(write)
    return found


def _batches(writes: Sequence[Write], count: int, rng: random.Random) -> list[list[Write]]:
    """The writes of each entry. Some pages are written twice, so that the order of entries matters."""
    if count < 1:
        raise ValueError("a log has at least one entry")
    batches: list[list[Write]] = [[] for _ in range(count)]
    ordered = sorted(writes, key=lambda write: write.data is None)  # bytes first: the tail entry has a data sector
    for index, write in enumerate(ordered):
        place = index % count
        batches[place].append(write)
        if place and rng.random() < 0.5:
            older = GARBAGE_PAGE if write.data is None else rng.choice((None, GARBAGE_PAGE))
            batches[rng.randrange(place)].append(Write(write.offset, older))
    return batches


def _lost(image: _Image, writes: Sequence[Write]) -> Write:
    """A write that is long done, and whose place the guest has written to since."""
    moved = {write.offset for write in writes}
    found = next((at for at in image.payload_pages(random.Random(0), zero=False) if at not in moved), None)
    if found is None:
        raise ValueError("no FULLY_PRESENT block holds guest data that an old entry could destroy")
    return Write(found)
