"""VHD files: XenServer disks and old Hyper-V disks, fixed, dynamic and differencing.

    fixed:         guest disk, byte for byte | footer 512
    the others:    footer copy 512 | dynamic header 1024 | BAT 4 * n | locators, batmap | blocks … | footer 512
                   (only the two footers have fixed places)

The footer at the end is believed; the copy at the start only when the one at the end is damaged, with a warning: after an
interrupted inflate on an LVM volume, the end of the volume is garbage. The virtual size is the footer's current size; CHS is
a rounded-down view of it. On a block device the footer is at the end of the device.
Spec: Microsoft, "Virtual Hard Disk Image Format Specification" (2006); structures: `structs`, blocks: `blocks`.
"""

from __future__ import annotations

import logging

import numpy as np

from tokvm.core.extents import Column, ExtentMap
from tokvm.images.base import Linkage, MappedLayer, ReadAt, announcer
from tokvm.images.fields import bad_field, read_exact
from tokvm.images.raw import linear_map
from tokvm.images.rows import Bits, bounded_map
from tokvm.images.vhd.blocks import BlockTable, structures_of
from tokvm.images.vhd.footer import FoundFooter, find_footer
from tokvm.images.vhd.structs import (
    FOOTER_SIZE,
    HEADER_SIZE,
    MAX_LOCATOR,
    DiskType,
    DynamicHeader,
    Footer,
    check_batmap,
)

log = logging.getLogger(__name__)

_BATCH_SECTORS = 1 << 19  # bitmaps unpacked at once: 512 KiB of bits, and at worst as many rows


class VhdLayer(MappedLayer):
    """A parsed VHD. Implements `images.base.Layer`; made by `open_vhd`."""

    format = "vhd"

    def __init__(
        self,
        file: ReadAt,
        footer: Footer,
        header: DynamicHeader | None,
        table: BlockTable | None,
        warnings: tuple[str, ...],
    ) -> None:
        super().__init__(file, size=footer.current_size, linkage=_linkage(footer, header), warnings=warnings)
        self.footer = footer
        self.header = header
        self._table = table

    def map_part(self, start: int, stop: int, max_rows: int | None) -> ExtentMap:
        table = self._table
        if table is None:
            return linear_map(start, stop, file=self.file, max_rows=max_rows)
        blocks = table.present(start // table.block_size, -(-stop // table.block_size))
        step = max(1, _BATCH_SECTORS // table.sectors)
        batches = (blocks[place : place + step] for place in range(0, len(blocks), step))
        parts = (table.rows(batch, self._bitmaps(table, batch)) for batch in batches)
        return bounded_map(start, stop, parts, block_size=table.block_size, max_rows=max_rows)

    def _bitmaps(self, table: BlockTable, blocks: Column) -> Bits:
        width = table.bitmap_bytes
        raw = bytearray(width * len(blocks))
        view = memoryview(raw)
        places, announce, read_into = table.start[blocks].tolist(), announcer(self.file), self.file.read_into
        for at in places:
            announce(at, width)
        for place, at in zip(range(0, len(raw), width), places, strict=True):
            read_into(at, view[place : place + width])
        return np.frombuffer(raw, np.uint8).reshape(len(blocks), width)

    def describe(self) -> dict[str, object]:
        footer = self.footer
        found: dict[str, object] = {
            "format": self.format,
            "type": footer.type.name.lower(),
            "virtual_size": footer.current_size,
            "chs_size": footer.chs_size,
            "original_size": footer.original_size,
            "identity": self.identity,
            "parent_identity": self.parent_identity,
            "creator": footer.creator,
            "created": footer.created,
            "hidden": bool(footer.hidden),
        }
        if self.header is not None and self._table is not None:
            found |= {
                "block_size": self.header.block_size,
                "blocks": len(self._table.start),
                "blocks_present": len(self._table.present()),
                "parent_name": self.header.parent_name,
                "parent_locators": self._locators(self.header),
            }
        return found | {"warnings": list(self.warnings)}

    def _locators(self, header: DynamicHeader) -> list[dict[str, str | None]]:
        """What the writer noted about the parent's place; unreadable ones are shown without their text."""
        found = []
        for locator in header.locators:
            text = None
            if locator.length <= MAX_LOCATOR and locator.offset + locator.length <= self.file.size:
                text = locator.decode(read_exact(self.file, locator.offset, locator.length))
            found.append({"code": locator.code.decode("latin-1").strip("\0 "), "path": text})
        return found


def _linkage(footer: Footer, header: DynamicHeader | None) -> Linkage:
    """The null id (`images.raw.RAW_IDENTITY`) as parent means that the parent is a raw file."""
    is_child = header is not None and footer.type is DiskType.DIFFERENCING
    return Linkage((str(footer.unique_id),), (str(header.parent_id),) if header is not None and is_child else ())


def open_vhd(file: ReadAt) -> VhdLayer:
    """Parse and check a VHD, or ImageError naming file, offset, field, the value read and the values allowed."""
    found = find_footer(file)
    footer, warnings = found.footer, list(found.warnings)
    if footer.saved_state:
        warnings.append("the footer says that the VM was suspended: its memory holds writes that this disk lacks")
    for warning in warnings:
        log.warning("%s: %s", file.name, warning)
    if footer.type is DiskType.FIXED:
        _check_fixed(file, found)
        return VhdLayer(file, footer, None, None, tuple(warnings))
    header = _read_header(file, found)
    return VhdLayer(file, footer, header, _read_table(file, found, header), tuple(warnings))


def _check_fixed(file: ReadAt, found: FoundFooter) -> None:
    if found.footer.current_size > found.end:
        allowed = f"at most {found.end}, what the file holds before its footer"
        raise bad_field(file.name, found.offset + 48, "footer current size", found.footer.current_size, allowed)


def _read_header(file: ReadAt, found: FoundFooter) -> DynamicHeader:
    at = found.footer.data_offset
    if not FOOTER_SIZE <= at <= found.end - HEADER_SIZE:
        allowed = f"{FOOTER_SIZE:#x} to {found.end - HEADER_SIZE:#x}"
        raise bad_field(file.name, found.offset + 16, "footer data offset", f"{at:#x}", allowed)
    return DynamicHeader.parse(read_exact(file, at, HEADER_SIZE), footer=found.footer, name=file.name, offset=at)


def _read_table(file: ReadAt, found: FoundFooter, header: DynamicHeader) -> BlockTable:
    footer, at = found.footer, header.bat_offset
    structures = structures_of(footer, header, name=file.name)
    if header.bat_bytes > found.end:
        allowed = f"at most {found.end // 4} in a file of this size"
        raise bad_field(file.name, footer.data_offset + 28, "BAT entries", header.entries, allowed)
    if at + header.bat_bytes > found.end:
        allowed = f"at most {found.end - header.bat_bytes:#x} for {header.entries} entries in this file"
        raise bad_field(file.name, footer.data_offset + 16, "BAT offset", f"{at:#x}", allowed)
    if header.batmap_offset + FOOTER_SIZE <= file.size:
        batmap = read_exact(file, header.batmap_offset, FOOTER_SIZE)
        check_batmap(batmap, name=file.name, offset=header.batmap_offset)
    return BlockTable.parse(
        read_exact(file, at, 4 * header.blocks(footer.current_size)),
        kind=footer.type,
        size=footer.current_size,
        block_size=header.block_size,
        name=file.name,
        bat_offset=at,
        limit=found.end,
        structures=structures,
    )
