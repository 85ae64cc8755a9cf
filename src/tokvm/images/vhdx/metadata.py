"""VHDX metadata: what kind of disk this is.

    region   table 64 KiB | items …
    table    0 "metadata"   8 0 u16   10 items u16, at most 2047   32 items of 32:
             guid [16], offset u32 (from the region's start, at least 64 KiB), length u32 (at most 1 MiB),
             flags u32 (1 user, 2 of the virtual disk, 4 required), 0 u32

    file parameters        block size u32, 2^n, 1 to 256 MiB; u32: 1 leave blocks allocated ("fixed"), 2 has a parent
    virtual disk size      u64, whole logical sectors, at most 64 TiB
    virtual disk id        [16], the SCSI page 83 id; a child has its parent's, so it links nothing
    logical sector size    u32, 512 or 4096: decides the chunk ratio and what a bit of a bitmap stands for
    physical sector size   u32, 512 or 4096
    parent locator         in a child, and nowhere else: `locator`

Little-endian. An unknown item is refused only if it is required.
Spec: [MS-VHDX] 2.6. Flags of known items are not compared with the specification's: writers differ.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from uuid import UUID

from tokvm.core.units import KiB, MiB
from tokvm.images.base import ReadAt
from tokvm.images.fields import bad_field, read_exact
from tokvm.images.vhdx.locator import HEADER_SIZE as LOCATOR_HEADER_SIZE
from tokvm.images.vhdx.locator import ParentLocator
from tokvm.images.vhdx.structs import MAX_ENTRIES, MAX_SIZE, Region, guid

SIGNATURE = b"metadata"
TABLE_SIZE = 64 * KiB
MAX_ITEM = MiB
MIN_BLOCK_SIZE = MiB
MAX_BLOCK_SIZE = 256 * MiB
SECTOR_SIZES = (512, 4096)

FILE_PARAMETERS = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
DISK_SIZE = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
DISK_ID = UUID("beca12ab-b2e6-4523-93ef-c309e000c746")
LOGICAL_SECTOR = UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL_SECTOR = UUID("cda348c7-445d-4471-9cc9-e9885251c556")
PARENT_LOCATOR = UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")

IS_USER, IS_VIRTUAL_DISK, IS_REQUIRED = 1, 2, 4
LEAVE_ALLOCATED, HAS_PARENT = 1, 2

_LENGTHS = {FILE_PARAMETERS: 8, DISK_SIZE: 8, DISK_ID: 16, LOGICAL_SECTOR: 4, PHYSICAL_SECTOR: 4, PARENT_LOCATOR: None}
_NAMES = {
    FILE_PARAMETERS: "file parameters",
    DISK_SIZE: "virtual disk size",
    DISK_ID: "virtual disk id",
    LOGICAL_SECTOR: "logical sector size",
    PHYSICAL_SECTOR: "physical sector size",
    PARENT_LOCATOR: "parent locator",
}
_ITEM = struct.Struct("<16sIIII")


@dataclass(frozen=True, slots=True)
class _Item:
    """An entry of the table. at: where in the file it says so. offset: of its content, in the file."""

    guid: UUID
    at: int
    offset: int
    length: int
    flags: int


@dataclass(frozen=True, slots=True)
class Metadata:
    """Items whose values were checked. Sizes in bytes. `locator` is there in a child and nowhere else."""

    block_size: int
    leave_allocated: bool
    size: int
    disk_id: UUID
    logical_sector: int
    physical_sector: int
    locator: ParentLocator | None

    @property
    def kind(self) -> str:
        if self.locator is not None:
            return "differencing"
        return "fixed" if self.leave_allocated else "dynamic"

    @classmethod
    def read(cls, file: ReadAt, region: Region) -> Metadata:
        """The items of this region, or ImageError."""
        items = _read_table(file, region)
        for wanted, length in _LENGTHS.items():
            if wanted not in items and length is not None:
                read = f"without a {_NAMES[wanted]}"
                raise bad_field(file.name, region.offset + 10, "metadata table", read, f"an item {wanted}")
        logical = _sector_size(file, items[LOGICAL_SECTOR])
        physical = _sector_size(file, items[PHYSICAL_SECTOR])
        size = _disk_size(file, items[DISK_SIZE], logical)
        block_size, flags = _file_parameters(file, items[FILE_PARAMETERS])
        locator = _locator(file, items, bool(flags & HAS_PARENT))
        disk_id = guid(_content(file, items[DISK_ID]))
        return cls(block_size, bool(flags & LEAVE_ALLOCATED), size, disk_id, logical, physical, locator)


def _read_table(file: ReadAt, region: Region) -> dict[UUID, _Item]:
    """The known items; unknown ones are only looked at for being required."""
    name, base = file.name, region.offset
    raw = bytes(read_exact(file, base, TABLE_SIZE))
    if raw[:8] != SIGNATURE:
        raise bad_field(name, base, "metadata signature", raw[:8], SIGNATURE.decode())
    count = int.from_bytes(raw[10:12], "little")
    if count > MAX_ENTRIES:
        raise bad_field(name, base + 10, "metadata items", count, f"at most {MAX_ENTRIES}")
    found: dict[tuple[UUID, bool], _Item] = {}
    for at in range(32, 32 + 32 * count, 32):
        item = _parse_item(raw[at : at + 32], name, base + at, region)
        key = item.guid, bool(item.flags & IS_USER)
        if key in found:
            raise bad_field(name, item.at, "metadata item", item.guid, "each item once")
        found[key] = item
    _check_apart(found.values(), name)
    return {kind: item for (kind, is_user), item in found.items() if kind in _LENGTHS and not is_user}


def _parse_item(raw: bytes, name: str, at: int, region: Region) -> _Item:
    kind, offset, length, flags, _ = _ITEM.unpack(raw)
    item = _Item(guid(kind), at, region.offset + offset, length, flags)
    title = _NAMES.get(item.guid, f"metadata item {item.guid}")
    if flags & ~(IS_USER | IS_VIRTUAL_DISK | IS_REQUIRED):
        raise bad_field(name, at + 24, f"{title}'s flags", f"{flags:#x}", "1, 2 and 4")
    is_known = item.guid in _LENGTHS and not flags & IS_USER
    if flags & IS_REQUIRED and not is_known:
        raise bad_field(name, at, "required metadata item", item.guid, ", ".join(_NAMES.values()))
    wanted = _LENGTHS[item.guid] if is_known else None
    if length > MAX_ITEM or (wanted is not None and length != wanted):
        raise bad_field(name, at + 20, f"{title}'s length", length, str(wanted or f"at most {MAX_ITEM}"))
    if length and not TABLE_SIZE <= offset <= region.length - length:
        allowed = f"{TABLE_SIZE:#x} to {region.length - length:#x}"
        raise bad_field(name, at + 16, f"{title}'s offset", f"{offset:#x}", allowed)
    return item


def _check_apart(items: Iterable[_Item], name: str) -> None:
    placed = sorted((item for item in items if item.length), key=lambda item: item.offset)
    for before, item in pairwise(placed):
        if item.offset < before.offset + before.length:
            allowed = f"a place outside the item at {before.offset:#x}"
            raise bad_field(name, item.at + 16, "metadata item's offset", f"{item.offset:#x} of the file", allowed)


def _content(file: ReadAt, item: _Item) -> bytes:
    return bytes(read_exact(file, item.offset, item.length))


def _sector_size(file: ReadAt, item: _Item) -> int:
    size = int.from_bytes(_content(file, item), "little")
    if size not in SECTOR_SIZES:
        raise bad_field(file.name, item.offset, _NAMES[item.guid], size, "512, 4096")
    return size


def _disk_size(file: ReadAt, item: _Item, sector: int) -> int:
    size = int.from_bytes(_content(file, item), "little")
    if not 0 < size <= MAX_SIZE or size % sector:
        raise bad_field(file.name, item.offset, "virtual disk size", size, f"whole sectors of {sector}, up to {MAX_SIZE}")
    return size


def _file_parameters(file: ReadAt, item: _Item) -> tuple[int, int]:
    raw = _content(file, item)
    block_size, flags = int.from_bytes(raw[:4], "little"), int.from_bytes(raw[4:], "little")
    if not MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE or block_size & (block_size - 1):
        allowed = f"a power of two, {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}"
        raise bad_field(file.name, item.offset, "block size", block_size, allowed)
    if flags & ~(LEAVE_ALLOCATED | HAS_PARENT):
        raise bad_field(file.name, item.offset + 4, "file parameter flags", f"{flags:#x}", "1 and 2")
    return block_size, flags


def _locator(file: ReadAt, items: dict[UUID, _Item], has_parent: bool) -> ParentLocator | None:  # noqa: FBT001
    item, parameters = items.get(PARENT_LOCATOR), items[FILE_PARAMETERS]
    if (item is not None) != has_parent:
        read = "has a parent, but there is no parent locator" if has_parent else "has no parent, but there is a parent locator"
        raise bad_field(file.name, parameters.offset + 4, "file parameter flags", read, "both or neither")
    if item is None:
        return None
    if item.length < LOCATOR_HEADER_SIZE:
        raise bad_field(file.name, item.at + 20, "parent locator's length", item.length, f"at least {LOCATOR_HEADER_SIZE}")
    return ParentLocator.parse(_content(file, item), name=file.name, offset=item.offset)
