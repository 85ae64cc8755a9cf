"""VHDX's BAT as numpy columns: what of the guest disk is where in the file.

    chunk 0                                  chunk 1                                 a chunk: 2^23 logical sectors of the disk
    | block | block | … | block | bitmap |   | block | … | block | bitmap |   …      u64 entries, `ratio` blocks and one bitmap
    entry: bits 0-2 state, 3-19 zero, 20-63 file offset in MiB

    state                    in a base (dynamic, fixed)      in a child (differencing)
    0 NOT_PRESENT            ABSENT (zeros)                  ABSENT: the parent's
    1 UNDEFINED              ZERO                            ZERO: hides the parent
    2 ZERO                   ZERO                            ZERO: hides the parent
    3 UNMAPPED               ZERO                            ZERO: hides the parent
    6 FULLY_PRESENT          DATA                            DATA, whatever the bitmap says
    7 PARTIALLY_PRESENT      refused                         by sector: bit 1 DATA, bit 0 ABSENT
    4, 5                     refused                         refused

The bitmap block of a chunk has 1 MiB: a bit per sector, least significant bit first. Its entry's state is 6, or 0 where no
block of the chunk is partial. Little-endian. Entries behind the last that the disk needs are not read: QEMU leaves some there.
Spec: [MS-VHDX] 2.5. A table for 64 TiB in blocks of 1 MiB has 512 MiB: it is read in slices, and kept only when it is small.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokvm.core.errors import ImageError
from tokvm.core.extents import Column
from tokvm.core.units import MiB
from tokvm.images.base import ReadAt
from tokvm.images.fields import bad_field, read_exact
from tokvm.images.vhdx.metadata import Metadata
from tokvm.images.vhdx.places import Places
from tokvm.images.vhdx.structs import BitmapState, BlockState, Region, Structure

ENTRY = 8
CHUNK_SECTORS = 1 << 23
_KEEP = 4 * MiB  # a table of up to this size is read once
_CHECK_ENTRIES = 1 << 19  # 4 MiB at a time
_RESERVED = 0xF_FFF8


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a disk is divided. Sizes in bytes; `ratio`: blocks of a chunk."""

    size: int
    block_size: int
    sector_size: int
    is_child: bool

    @classmethod
    def of(cls, metadata: Metadata) -> Geometry:
        return cls(metadata.size, metadata.block_size, metadata.logical_sector, metadata.locator is not None)

    @property
    def ratio(self) -> int:
        return CHUNK_SECTORS * self.sector_size // self.block_size

    @property
    def blocks(self) -> int:
        return -(-self.size // self.block_size)

    @property
    def chunks(self) -> int:
        return -(-self.blocks // self.ratio)

    @property
    def entries(self) -> int:
        """That the table must have. A child's last chunk is whole, so that its bitmap has a place."""
        return self.chunks * (self.ratio + 1) if self.is_child else self.blocks + (self.blocks - 1) // self.ratio

    @property
    def sectors(self) -> int:
        """Of a block."""
        return self.block_size // self.sector_size

    @property
    def bitmap_bytes(self) -> int:
        """Of a block, in its chunk's bitmap."""
        return self.sectors // 8

    def index(self, block: int) -> int:
        """Of a block's entry."""
        return block + block // self.ratio


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """Blocks from `first` on, which begins a chunk. start: file offset of DATA, else -1. bitmap: of each chunk, -1: none."""

    first: int
    state: npt.NDArray[np.uint8]
    start: Column
    bitmap: Column

    @property
    def is_data(self) -> npt.NDArray[np.bool_]:
        return self.state >= BlockState.FULLY_PRESENT


class BlockTable:
    """A BAT that was checked: every block and bitmap lies inside the file, apart from the structures and from all others."""

    def __init__(self, file: ReadAt, region: Region, geometry: Geometry) -> None:
        self.geometry = geometry
        self._file = file
        self._at = region.offset
        self._kept: bytes | None = None
        self.counts: dict[str, int] = {}

    @classmethod
    def read(cls, file: ReadAt, region: Region, geometry: Geometry, structures: Sequence[Structure]) -> BlockTable:
        """The table in this region, or ImageError. structures: where no block may be."""
        if geometry.entries * ENTRY > region.length:
            allowed = f"at least {geometry.entries * ENTRY} for {geometry.blocks} blocks"
            raise bad_field(file.name, region.offset, "BAT region's length", region.length, allowed)
        table = cls(file, region, geometry)
        if geometry.entries * ENTRY <= _KEEP:
            table._kept = bytes(read_exact(file, region.offset, geometry.entries * ENTRY))
        table._check(structures)
        return table

    def slices(self, first_chunk: int, last_chunk: int, *, entries: int) -> Iterator[Slice]:
        """Chunks [first_chunk, last_chunk), about this many entries at a time."""
        step = max(1, entries // (self.geometry.ratio + 1))
        for chunk in range(first_chunk, last_chunk, step):
            yield self._slice(chunk, min(step, last_chunk - chunk))

    def _slice(self, chunk: int, count: int) -> Slice:
        geometry, width = self.geometry, self.geometry.ratio + 1
        first = chunk * geometry.ratio
        length = min(count * geometry.ratio, geometry.blocks - first)
        raw = np.zeros(count * width, "<u8")
        here = raw[: min(count * width, geometry.entries - chunk * width)]
        self._load(chunk * width * ENTRY, here.data.cast("B"))
        if not here.any():
            nothing = np.full(length, -1, np.int64)
            return Slice(first, np.zeros(length, np.uint8), nothing, np.full(count, -1, np.int64))
        rows = raw.reshape(count, width)
        blocks = rows[:, :-1].ravel()[:length]
        state, start = self._parse_blocks(blocks, first)
        bitmap = self._parse_bitmaps(rows[:, -1], chunk) if geometry.is_child else np.full(count, -1, np.int64)
        found = Slice(first, state, start, bitmap)
        self._check_partial(found)
        return found

    def _load(self, place: int, buffer: memoryview) -> None:
        if self._kept is not None:
            buffer[:] = self._kept[place : place + len(buffer)]
        else:
            self._file.read_into(self._at + place, buffer)

    def _parse_blocks(self, entries: npt.NDArray[np.uint64], first: int) -> tuple[npt.NDArray[np.uint8], Column]:
        geometry = self.geometry
        state = (entries & 7).astype(np.uint8)
        is_odd = (state == 4) | (state == 5) | ((state == BlockState.PARTIALLY_PRESENT) & (not geometry.is_child))
        self._refuse(is_odd, entries, first, "states 0, 1, 2, 3, 6" + (", 7" if geometry.is_child else ""))
        self._refuse((entries & _RESERVED) != 0, entries, first, "0 in bits 3 to 19")
        is_data = state >= BlockState.FULLY_PRESENT
        place = (entries >> 20).astype(np.int64)
        limit = self._file.size
        past = place > (limit - geometry.block_size) // MiB
        if past[-1:].any() and first + len(entries) == geometry.blocks:  # the last block need not be whole
            past[-1] = int(place[-1]) * MiB + (geometry.size - (geometry.blocks - 1) * geometry.block_size) > limit
        self._refuse(is_data & past, entries, first, f"blocks that end at or before {limit:#x}")
        return state, np.where(is_data, place, 0) * MiB - ~is_data

    def _parse_bitmaps(self, entries: npt.NDArray[np.uint64], chunk: int) -> Column:
        state, place = entries & 7, (entries >> 20).astype(np.int64)
        is_present = state == BitmapState.PRESENT
        limit = self._file.size
        for wrong, allowed in (
            (~is_present & (state != BitmapState.NOT_PRESENT), "states 0 and 6"),
            ((entries & _RESERVED) != 0, "0 in bits 3 to 19"),
            (is_present & (place > limit // MiB - 1), f"bitmaps that end at or before {limit:#x}"),
        ):
            if wrong.any():
                number = int(np.argmax(wrong))
                raise self._bad_entry(self._bitmap_index(chunk + number), "bitmap", int(entries[number]), allowed)
        start: Column = np.where(is_present, place, 0) * MiB - ~is_present
        return start

    def _check_partial(self, found: Slice) -> None:
        """A partial block needs its chunk's bitmap."""
        chunk = np.flatnonzero(found.state == BlockState.PARTIALLY_PRESENT) // self.geometry.ratio
        missing = chunk[found.bitmap[chunk] < 0]
        if len(missing):
            number = found.first // self.geometry.ratio + int(missing[0])
            raise self._bad_entry(self._bitmap_index(number), "bitmap", 0, "state 6, as a block of its chunk has state 7")

    def _check(self, structures: Sequence[Structure]) -> None:
        """Walk over all of it once: nothing overlaps; count the states."""
        geometry = self.geometry
        places = Places(self._file.size, structures, geometry.block_size)
        last_length = geometry.size - (geometry.blocks - 1) * geometry.block_size
        counts = np.zeros(8, np.int64)
        for found in self.slices(0, geometry.chunks, entries=_CHECK_ENTRIES):
            counts += np.bincount(found.state, minlength=8)
            blocks = np.flatnonzero(found.is_data)
            has_last = len(blocks) and found.first + int(blocks[-1]) == geometry.blocks - 1
            whole = blocks[:-1] if has_last else blocks
            for part, length in ((whole, geometry.block_size), (blocks[len(whole) :], last_length)):
                wrong = places.take(found.start[part], length)
                if wrong is not None:
                    raise self._overlap(structures, found, int(part[wrong]))
            chunks = np.flatnonzero(found.bitmap >= 0)
            wrong = places.take(found.bitmap[chunks], MiB)
            if wrong is not None:
                raise self._overlap_of_bitmap(structures, found, int(chunks[wrong]))
        self.counts = Counter({state.name: int(counts[state]) for state in BlockState if counts[state]})

    def _refuse(self, wrong: npt.NDArray[np.bool_], entries: npt.NDArray[np.uint64], first: int, allowed: str) -> None:
        if wrong.any():
            number = int(np.argmax(wrong))
            block = first + number
            raise self._bad_entry(self.geometry.index(block), f"block {block}", int(entries[number]), allowed)

    def _overlap(self, structures: Sequence[Structure], found: Slice, number: int) -> ImageError:
        block, start = found.first + number, int(found.start[number])
        length = min(self.geometry.block_size, self.geometry.size - block * self.geometry.block_size)
        allowed = _free_place(structures, start, length)
        return self._bad_entry(self.geometry.index(block), f"block {block}", start | int(found.state[number]), allowed)

    def _overlap_of_bitmap(self, structures: Sequence[Structure], found: Slice, number: int) -> ImageError:
        start = int(found.bitmap[number])
        index = self._bitmap_index(found.first // self.geometry.ratio + number)
        return self._bad_entry(index, "bitmap", start | BitmapState.PRESENT, _free_place(structures, start, MiB))

    def _bitmap_index(self, chunk: int) -> int:
        return (chunk + 1) * (self.geometry.ratio + 1) - 1

    def _bad_entry(self, index: int, what: str, entry: int, allowed: str) -> ImageError:
        read = f"state {entry & 7} at {entry >> 20 << 20:#x}"
        if entry & _RESERVED:
            read += f" with bits {entry & _RESERVED:#x}"
        return bad_field(self._file.name, self._at + ENTRY * index, f"BAT[{index}] ({what})", read, allowed)


def _free_place(structures: Sequence[Structure], start: int, length: int) -> str:
    for what, at, end in structures:
        if start < end and at < start + length:
            return f"a place outside the {what} at {at:#x} to {end:#x}"
    return "a place that no other block or bitmap has"
