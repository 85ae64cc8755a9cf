"""The beginning of a VHD stream: everything that says which of the following bytes is what."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from uuid import UUID

import numpy as np

from tokvm.core.extents import Column
from tokvm.core.units import MiB
from tokvm.images.fields import bad_field
from tokvm.images.stream_cursor import StreamCursor
from tokvm.images.vhd.blocks import BlockTable, structures_of
from tokvm.images.vhd.structs import (
    FOOTER_SIZE,
    HEADER_SIZE,
    MAX_SPARSE_SIZE,
    NULL_ID,
    DiskType,
    DynamicHeader,
    Footer,
    check_batmap,
)

_MAX_PREFIX = 16 * MiB  # header and BAT begin before this; XAPI: 512 and 2048
_FAR = 2 * MAX_SPARSE_SIZE  # no block begins behind 2 TiB


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """footer: the copy at the start (of a fixed disk: what the caller expects of it).

    order: numbers of the blocks as they come. blocks_end: the byte behind the last one, where the trailing footer begins.
    """

    footer: Footer
    fingerprint: str
    table: BlockTable | None
    parent_identity: str | None
    order: Column
    blocks_end: int

    def resume_at(self, position: int) -> int:
        """Where a stream must be opened to go on behind `position`: there, or at the bitmap of the block it is in."""
        if self.table is None:
            return position
        left = self.blocks_behind(position)
        return int(self.table.start[left[0]]) if len(left) else self.blocks_end

    def blocks_behind(self, position: int) -> Column:
        """The blocks, in order, that end behind `position`."""
        if self.table is None:
            return self.order
        start = self.table.start[self.order]
        ends = start + self.table.bitmap_bytes + self.table.block_size
        return self.order[int(np.searchsorted(ends, position, side="right")) :]


def fixed_prefix(size: int) -> Prefix:
    """Of a fixed disk, whose stream begins with the guest's first byte: nothing is read, the caller knows the size."""
    footer = Footer(DiskType.FIXED, size, NULL_ID)
    return Prefix(footer, f"vhd-fixed-{size}", None, None, np.empty(0, np.int64), size)


def read_prefix(cursor: StreamCursor, name: str) -> Prefix:
    """Read up to the BAT's end (and the batmap's header, where there is one), or ImageError."""
    raw = cursor.read_bytes(FOOTER_SIZE, "the footer's copy")
    footer = Footer.parse(raw, name=name, offset=0)
    if footer.type is DiskType.FIXED:
        raise bad_field(name, 60, "footer disk type", "2 (fixed)", "3 or 4 in a stream that begins with a footer")
    header, raw = _read_header(cursor, name, footer, raw)
    structures = structures_of(footer, header, name=name)
    bat = _read_bat(cursor, name, footer, header, raw)
    table = BlockTable.parse(
        bat, kind=footer.type, size=footer.current_size, block_size=header.block_size, name=name,
        bat_offset=header.bat_offset, limit=_FAR, structures=structures, whole=True,
    )  # fmt: skip
    present = table.present()
    order = present[np.argsort(table.start[present], kind="stable")]
    first = int(table.start[order[0]]) if len(order) else cursor.position
    if first < cursor.position:
        place = header.bat_offset + 4 * int(order[0])
        allowed = f"at least sector {-(-cursor.position // 512):#x}: a stream cannot go back"
        raise bad_field(name, place, f"BAT[{int(order[0])}]", f"sector {first // 512:#x}", allowed)
    if len(order) and cursor.position <= header.batmap_offset <= first - FOOTER_SIZE:
        cursor.skip_to(header.batmap_offset, "the BAT")
        check_batmap(cursor.read_bytes(FOOTER_SIZE, "the batmap"), name=name, offset=header.batmap_offset)
    end = int(table.start[order[-1]]) + table.bitmap_bytes + table.block_size if len(order) else cursor.position
    parent = header.parent_id if footer.type is DiskType.DIFFERENCING else None
    return Prefix(footer, _fingerprint(footer, header, parent, bat), table, None if parent is None else str(parent), order, end)


def _read_header(cursor: StreamCursor, name: str, footer: Footer, raw: bytearray) -> tuple[DynamicHeader, bytearray]:
    """The header, and the stream from its beginning up to the header's end."""
    at = footer.data_offset
    if not FOOTER_SIZE <= at <= _MAX_PREFIX:
        raise bad_field(name, 16, "footer data offset", f"{at:#x}", f"{FOOTER_SIZE:#x} to {_MAX_PREFIX:#x} in a stream")
    raw += cursor.read_bytes(at + HEADER_SIZE - FOOTER_SIZE, "the header")
    return DynamicHeader.parse(raw[at:], footer=footer, name=name, offset=at), raw


def _read_bat(cursor: StreamCursor, name: str, footer: Footer, header: DynamicHeader, raw: bytearray) -> bytearray:
    """The entries that the disk's size needs. They may lie before the header, which was read already."""
    at, length = header.bat_offset, 4 * header.blocks(footer.current_size)
    if at < len(raw):
        return raw[at : at + length]
    if at > _MAX_PREFIX:
        raise bad_field(name, footer.data_offset + 16, "BAT offset", f"{at:#x}", f"at most {_MAX_PREFIX:#x} in a stream")
    cursor.skip_to(at, "the bytes before the BAT")
    return cursor.read_bytes(length, "the BAT")


def _fingerprint(footer: Footer, header: DynamicHeader, parent: UUID | None, bat: bytearray) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{footer.type.name} {footer.current_size} {header.block_size} {parent} ".encode())
    digest.update(bat)
    return f"vhd-{digest.hexdigest()}"
