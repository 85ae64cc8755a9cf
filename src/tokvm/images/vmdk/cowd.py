"""COWD, the descriptor's VMFSSPARSE: the "-delta.vmdk" of snapshots on VMFS5 and of disks below 2 TiB.

    0      header 2048, little-endian u32: COWD | version 1 | flags 3 | capacity | grain sectors | directory's sector, entries |
           free sector | …; 1648: unclean shutdown, a byte
    4 * 512  grain directory: u32 per table, 0: no table, else its sector
    …      grain tables of 4096 u32, and grains, as they were needed
           0: ABSENT (the parent's)   1: ZERO   else the grain's sector

All offsets are sectors, so a file ends at 2 TiB. The header has no checksum and no id of the parent: linkage is in the
descriptor alone. Most readers fetch sector 1 for an entry of 1, and find zeros there because the field that it lies in is
empty; that it means zeros is what the writers meant.
Sources: libyal, "VMware Virtual Disk Format"; QEMU block/vmdk.c; no specification was published.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tokvm.core.extents import Column
from tokvm.core.units import SECTOR, KiB
from tokvm.images.base import ReadAt
from tokvm.images.fields import bad_field, read_exact
from tokvm.images.vmdk.descriptor import MAX_SIZE
from tokvm.images.vmdk.grains import Directory, Entries, GrainTables, Mask, Region, Structures, check_regions, check_tables
from tokvm.images.vmdk.parts import UNCLEAN, size_of

MAGIC = b"COWD"
HEADER_SIZE = 2048
ENTRIES = 4096
TABLE_BYTES = 4 * ENTRIES
ZERO_GRAIN = 1
_MAX_GRAIN = 16 * KiB  # sectors
_UNCLEAN_AT = 1648
_FLAGS = 3


@dataclass(frozen=True, slots=True)
class CowdHeader:
    """capacity, grain_sectors, gd_sector: sectors. gd_entries: as many as the directory has."""

    capacity: int
    grain_sectors: int
    gd_sector: int
    gd_entries: int
    unclean: bool

    @classmethod
    def parse(cls, raw: bytes | bytearray, *, name: str) -> CowdHeader:
        magic, version, flags, capacity, grain, gd_sector, gd_entries = struct.unpack_from("<4s6I", raw)
        if magic != MAGIC:
            raise bad_field(name, 0, "COWD magic", repr(magic)[1:], "'COWD'")
        if version != 1:
            raise bad_field(name, 4, "COWD version", version, "1")
        if flags & ~_FLAGS:
            raise bad_field(name, 8, "COWD flags", f"{flags:#x}", "no other bits than 1 and 2")
        if not 1 <= capacity <= MAX_SIZE // SECTOR:
            raise bad_field(name, 12, "COWD capacity", capacity, "at least 1 sector")
        if not 1 <= grain <= _MAX_GRAIN or grain & (grain - 1):
            raise bad_field(name, 16, "COWD grain size", grain, f"a power of two, 1 to {_MAX_GRAIN} sectors")
        if gd_sector * SECTOR < HEADER_SIZE:
            raise bad_field(name, 20, "COWD grain directory sector", gd_sector, f"at least {HEADER_SIZE // SECTOR}")
        needed = -(-capacity // (ENTRIES * grain))
        if gd_entries < needed:
            raise bad_field(name, 24, "COWD grain directory entries", gd_entries, f"at least {needed} for {capacity} sectors")
        return cls(capacity, grain, gd_sector, gd_entries, bool(raw[_UNCLEAN_AT]))


class CowdPart(GrainTables):
    """Implements `parts.Part`."""

    entry_type = "<u4"
    entries = ENTRIES

    def __init__(self, file: ReadAt, header: CowdHeader, directory: Directory, *, size: int, structures: Structures) -> None:
        super().__init__(file, directory, size=size, grain_bytes=header.grain_sectors * SECTOR, structures=structures)
        self._header = header
        if header.unclean:
            self.warnings = (UNCLEAN,)

    def meaning(self, entries: Entries, grain: Column) -> Column:
        return np.where(entries == ZERO_GRAIN, -1, entries.astype(np.int64) * SECTOR)

    def faults(self, entries: Entries, where: Column) -> Iterable[tuple[Mask, str]]:
        return ()  # sectors 2 and 3 are the header's

    def describe(self) -> dict[str, object]:
        return {
            "kind": "cowd",
            "grain_size": self.grain_bytes,
            "unclean": self._header.unclean,
            "tables": len(self.directory.place),
            "tables_present": len(self.directory.present),
        }


def open_cowd(file: ReadAt, stated: int | None) -> CowdPart:
    """Parse and check a COWD extent. `stated`: its sectors as its descriptor has them."""
    header = CowdHeader.parse(read_exact(file, 0, HEADER_SIZE), name=file.name)
    at, length = header.gd_sector * SECTOR, 4 * header.gd_entries
    if at + length > file.size:
        allowed = f"a directory of {header.gd_entries} entries that ends at or before {file.size:#x}"
        raise bad_field(file.name, 20, "COWD grain directory sector", header.gd_sector, allowed)
    regions: list[Region] = [("header", 0, HEADER_SIZE), ("grain directory", at, at + length)]
    check_regions(regions, size=file.size, name=file.name)
    size = size_of(header.capacity, stated, name=file.name, offset=12)
    needed = -(-size // (ENTRIES * header.grain_sectors * SECTOR))
    place = np.frombuffer(read_exact(file, at, 4 * needed), "<u4")
    directory = Directory(place, entries_at=at, entry_bytes=4, origin=0, step=SECTOR)
    check_tables(directory, table_bytes=TABLE_BYTES, limit=file.size, regions=regions, name=file.name)
    structures = Structures(regions, directory.offset(directory.present), TABLE_BYTES)
    return CowdPart(file, header, directory, size=size, structures=structures)
