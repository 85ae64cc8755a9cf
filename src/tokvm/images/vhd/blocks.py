"""VHD's BAT and sector bitmaps as numpy columns.

    BAT: u32 big-endian per block: the sector where the block's bitmap begins; 0xFFFFFFFF: not in the file
    block: sector bitmap (padded to 512) | block_size bytes
    bitmap, most significant bit first: sector s is  byte[s >> 3] & (0x80 >> (s & 7))

                   bit 1    bit 0                          block not in the file
    dynamic        DATA     ZERO (the bytes are garbage)   ABSENT
    differencing   DATA     ABSENT                         ABSENT

Entries are in no order and data has no alignment but the sector. Nothing of a table is believed before every block is known
to lie inside the file, apart from the file's structures and from all other blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokvm.core.extents import Column, ExtentKind
from tokvm.core.units import SECTOR
from tokvm.images.fields import bad_field
from tokvm.images.rows import Bits, Rows, bitmap_runs
from tokvm.images.vhd.structs import (
    FOOTER_SIZE,
    HEADER_SIZE,
    NO_BLOCK,
    DiskType,
    DynamicHeader,
    Footer,
    bitmap_size,
)

Region = tuple[str, int, int]  # a structure of the file: what it is, its first byte, the byte after its last


@dataclass(frozen=True, slots=True, eq=False)
class BlockTable:
    """A BAT that was checked. `start` has the file offset of each block's bitmap, -1 where the block is not in the file."""

    kind: DiskType
    size: int
    block_size: int
    start: Column

    @classmethod
    def parse(
        cls,
        raw: bytes | bytearray | memoryview,
        *,
        kind: DiskType,
        size: int,
        block_size: int,
        name: str,
        bat_offset: int,
        limit: int,
        structures: Sequence[Region],
        whole: bool = False,
    ) -> BlockTable:
        """Check the entries of a disk of `size` bytes. `limit`: the byte after the last one a block may use.

        whole: the disk's last block must have room for all of its bytes, not only for those that the disk has.
        """
        entries = np.frombuffer(raw, ">u4").astype(np.int64)
        start = np.where(entries == NO_BLOCK, -1, entries * SECTOR)
        reach = cls(kind, len(start) * block_size if whole else size, block_size, start)
        reach._check_bounds(name, bat_offset, limit, structures)
        reach._check_overlap(name, bat_offset)
        return cls(kind, size, block_size, start)

    @property
    def bitmap_bytes(self) -> int:
        return bitmap_size(self.block_size)

    @property
    def sectors(self) -> int:
        """Sectors of a block."""
        return self.block_size // SECTOR

    def present(self, first: int = 0, last: int | None = None) -> Column:
        """Numbers of the blocks in the file, ascending, out of [first, last)."""
        return first + np.flatnonzero(self.start[first:last] >= 0)

    def length(self, blocks: Column) -> Column:
        """Guest bytes of each block: the disk's last one may be cut short."""
        return np.minimum(blocks * self.block_size + self.block_size, self.size) - blocks * self.block_size

    def end(self, blocks: Column) -> Column:
        """File offset behind each block's data, as far as the disk needs it."""
        return self.start[blocks] + self.bitmap_bytes + self.length(blocks)

    def _check_bounds(self, name: str, bat_offset: int, limit: int, structures: Sequence[Region]) -> None:
        blocks = self.present()
        begin, end = self.start[blocks], self.end(blocks)
        tests = [(end > limit, f"blocks that end at or before {limit:#x}")]
        tests += [
            ((begin < to) & (end > at), f"blocks outside the {what} at {at:#x} to {to:#x}") for what, at, to in structures
        ]
        for wrong, allowed in tests:
            if wrong.any():
                raise self._bad_entry(name, bat_offset, int(blocks[np.argmax(wrong)]), allowed)

    def _check_overlap(self, name: str, bat_offset: int) -> None:
        blocks = self.present()
        blocks = blocks[np.argsort(self.start[blocks], kind="stable")]
        wrong = self.start[blocks[1:]] < self.end(blocks[:-1])
        if wrong.any():
            place = int(np.argmax(wrong))
            allowed = f"blocks that do not overlap block {int(blocks[place])} at {int(self.start[blocks[place]]):#x}"
            raise self._bad_entry(name, bat_offset, int(blocks[place + 1]), allowed)

    def _bad_entry(self, name: str, bat_offset: int, block: int, allowed: str) -> Exception:
        sector = int(self.start[block]) // SECTOR
        return bad_field(name, bat_offset + 4 * block, f"BAT[{block}]", f"sector {sector:#x}", allowed)

    def rows(self, blocks: Column, bitmaps: Bits) -> Rows:
        """(offset, length, kind, file_offset) of these blocks, whose bitmaps are the rows of `bitmaps`; ascending.

        What is ABSENT has no row. The last block of the disk may reach over its end; the caller clips.
        """
        bits = bitmaps[:, : -(-self.sectors // 8)]
        full = np.all(bits == np.packbits(np.ones(self.sectors, np.uint8)), axis=1)
        clear = ~np.any(bits, axis=1)
        mixed = ~(full | clear)
        parts = [self._whole(blocks[full], ExtentKind.DATA), self._whole(blocks[clear], self._clear_kind)]
        if mixed.any():
            parts.append(self._runs(blocks[mixed], bits[mixed]))
        at, length, kind, file_offset = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(at, kind="stable")
        order = order[kind[order] != ExtentKind.ABSENT]
        return at[order], length[order], kind[order], file_offset[order]

    @property
    def _clear_kind(self) -> ExtentKind:
        """What a clear bit means."""
        return ExtentKind.ZERO if self.kind is DiskType.DYNAMIC else ExtentKind.ABSENT

    def _whole(self, blocks: Column, kind: ExtentKind) -> Rows:
        """Blocks whose bits are all the same: nothing to unpack."""
        same = np.full(len(blocks), self.block_size, np.int64), np.full(len(blocks), int(kind), np.int64)
        return blocks * self.block_size, *same, self.start[blocks] + self.bitmap_bytes

    def _runs(self, blocks: Column, bits: Bits) -> Rows:
        head, length, value = bitmap_runs(bits, self.sectors)
        kind = np.where(value, int(ExtentKind.DATA), int(self._clear_kind))
        row, sector = np.divmod(head, self.sectors)
        inside, block = sector * SECTOR, blocks[row]
        return block * self.block_size + inside, length * SECTOR, kind, self.start[block] + self.bitmap_bytes + inside


def structures_of(footer: Footer, header: DynamicHeader, *, name: str) -> list[Region]:
    """Where no block may be: the footer's copy, the header and the BAT, which must lie apart from one another."""
    at, end = header.bat_offset, header.bat_offset + header.bat_bytes
    found: list[Region] = [
        ("footer's copy", 0, FOOTER_SIZE),
        ("header", footer.data_offset, footer.data_offset + HEADER_SIZE),
    ]
    for what, other, other_end in found:
        if at < other_end and other < end:
            allowed = f"a place outside the {what} at {other:#x} to {other_end:#x}"
            raise bad_field(name, footer.data_offset + 16, "BAT offset", f"{at:#x}", allowed)
    return [*found, ("BAT", at, end)]
