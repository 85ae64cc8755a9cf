"""seSparse: the "-sesparse.vmdk" of snapshots on VMFS6, and of disks above 2 TiB.

    sector 0   constant header, little-endian u64: magic CAFEBABE | version 2.1 | capacity | grain 8 | table 64 | flags 0 |
               0, 0, 0, 0 | (sector, sectors) of: volatile header, journal header, journal, grain directory, grain tables,
               free bitmap, backmap, grains | zeros
    volatile   magic CAFECAFE | free table | next transaction | replay_journal: not 0 while the layer is in use
    directory  u64 per table: 0: none, else 0x1 in the top nibble and the table's index in the low 32 bits
    tables     of 4096 u64, in the order they were needed; per 4 KiB grain, by the top nibble:
               0 ABSENT   1 ZERO, unmapped by the guest   2 ZERO   3 the grain at index ((e >> 48) & 0xFFF) | (e & 2^48-1) << 12

Units are sectors in the header, tables and grains in the entries. There is no id of the parent: linkage is in the descriptor
alone. Index bits may remain under types 1 and 2. Newer ESXi has 0x200 in a reserved word (storpool/any2kvm, PR 1), which QEMU
refuses. Nobody has described the journal, so a file that wants it replayed is refused.
Sources: QEMU block/vmdk.c and the mail that brought it there (Eiderman, 2019); no specification was published.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tokvm.core.extents import Column
from tokvm.core.units import SECTOR
from tokvm.images.base import ReadAt
from tokvm.images.fields import bad_field, read_exact
from tokvm.images.vmdk.descriptor import MAX_SIZE
from tokvm.images.vmdk.grains import Directory, Entries, GrainTables, Mask, Region, Structures, check_regions, check_tables
from tokvm.images.vmdk.parts import size_of

MAGIC = 0xCAFEBABE
VOLATILE_MAGIC = 0xCAFECAFE
VERSION = 0x0000000200000001
GRAIN_SECTORS = 8
GRAIN_BYTES = GRAIN_SECTORS * SECTOR
TABLE_SECTORS = 64
TABLE_BYTES = TABLE_SECTORS * SECTOR
ENTRIES = TABLE_BYTES // 8
_REGIONS = (
    "volatile header",
    "journal header",
    "journal",
    "grain directory",
    "grain tables",
    "free bitmap",
    "backmap",
    "grains",
)
_FIXED = (
    ("magic", MAGIC), ("version", VERSION), ("capacity", None), ("grain size", GRAIN_SECTORS),
    ("grain table size", TABLE_SECTORS), ("flags", 0), ("reserved 1", 0), ("reserved 2", 0), ("reserved 3", 0),
    ("reserved 4", 0),
)  # fmt: skip
_SEEN_RESERVED = 0x200  # newer ESXi writes it into reserved words; QEMU refuses such a file
_FIXED_WORDS = len(_FIXED)
_MAX_SECTOR = 1 << 54  # of a byte offset below 2^63
_CLOSE_IT = (
    "let ESXi close it: power the VM off, or take a snapshot so that this layer is no longer written; then copy it again"
)


@dataclass(frozen=True, slots=True)
class SesparseHeader:
    """capacity: sectors. regions: by name, first byte and the byte after the last."""

    capacity: int
    regions: dict[str, Region]

    @classmethod
    def parse(cls, raw: bytes | bytearray, *, name: str) -> SesparseHeader:
        words = struct.unpack_from(f"<{_FIXED_WORDS + 2 * len(_REGIONS)}Q", raw)
        for place, ((field, wanted), read) in enumerate(zip(_FIXED, words, strict=False)):
            if wanted is not None and read != wanted and not (field.startswith("reserved") and read == _SEEN_RESERVED):
                raise bad_field(name, 8 * place, f"seSparse {field}", f"{read:#x}", f"{wanted:#x}")
        if not 1 <= words[2] <= MAX_SIZE // SECTOR:
            raise bad_field(name, 16, "seSparse capacity", words[2], f"1 to {MAX_SIZE // SECTOR} sectors")
        padding = 8 * (_FIXED_WORDS + 2 * len(_REGIONS))
        if any(raw[padding:SECTOR]):
            raise bad_field(name, padding, "seSparse padding", "not all zeros", "zeros")
        return cls(words[2], {what: cls._region(words, place, what, name) for place, what in enumerate(_REGIONS)})

    @staticmethod
    def _region(words: tuple[int, ...], place: int, what: str, name: str) -> Region:
        at = _FIXED_WORDS + 2 * place
        sector, sectors = words[at : at + 2]
        if not 1 <= sector <= _MAX_SECTOR or sectors > _MAX_SECTOR:
            raise bad_field(name, 8 * at, f"seSparse {what}", f"{sectors} sectors at {sector:#x}", "a place behind the header")
        return what, sector * SECTOR, (sector + sectors) * SECTOR


class SesparsePart(GrainTables):
    """Implements `parts.Part`."""

    entry_type = "<u8"
    entries = ENTRIES

    def __init__(self, file: ReadAt, directory: Directory, *, size: int, grains: Region, structures: Structures) -> None:
        super().__init__(file, directory, size=size, grain_bytes=GRAIN_BYTES, structures=structures)
        self._grains_at = grains[1]
        self._last_index = max((file.size - 1 - grains[1]) // GRAIN_BYTES, -1)

    def meaning(self, entries: Entries, grain: Column) -> Column:
        index = ((entries >> np.uint64(48)) & np.uint64(0xFFF)) | ((entries & np.uint64(0xFFFF_FFFF_FFFF)) << np.uint64(12))
        where = np.minimum(index, np.uint64(self._last_index + 1)).astype(np.int64)  # behind the end: a fault, below
        where *= GRAIN_BYTES
        where += self._grains_at
        where[(entries >> np.uint64(60)) != 3] = -1
        return where

    def faults(self, entries: Entries, where: Column) -> Iterable[tuple[Mask, str]]:
        types = entries >> np.uint64(60)
        yield (types == 0) | (types > 3), "0, or a type of 1 to 3 in the top four bits"
        end = self._grains_at + (self._last_index + 1) * GRAIN_BYTES
        yield where >= end, f"the index of a grain in the file, at most {self._last_index:#x}"

    def describe(self) -> dict[str, object]:
        return {
            "kind": "sesparse",
            "grain_size": self.grain_bytes,
            "tables": len(self.directory.place),
            "tables_present": len(self.directory.present),
        }


def open_sesparse(file: ReadAt, stated: int | None) -> SesparsePart:
    """Parse and check a seSparse extent. `stated`: its sectors as its descriptor has them."""
    header = SesparseHeader.parse(read_exact(file, 0, SECTOR), name=file.name)
    regions = _checked_regions(file, header)
    _check_clean(file, header.regions["volatile header"])
    size = size_of(header.capacity, stated, name=file.name, offset=16)
    directory = _read_directory(file, header, size)
    tables = header.regions["grain tables"]
    others = [region for region in regions if region[0] != "grain tables"]
    check_tables(directory, table_bytes=TABLE_BYTES, limit=min(tables[2], file.size), regions=others, name=file.name)
    structures = Structures(regions, np.empty(0, np.int64), 0)
    return SesparsePart(file, directory, size=size, grains=header.regions["grains"], structures=structures)


def _checked_regions(file: ReadAt, header: SesparseHeader) -> list[Region]:
    """All but the grains, which a file has as far as they were needed."""
    regions: list[Region] = [("header", 0, SECTOR), *header.regions.values()]
    check_regions(regions[:-1], size=file.size, name=file.name)
    what, grains, _ = regions.pop()
    for other, begin, end in regions:
        if begin <= grains < end:
            raise bad_field(file.name, 192, f"seSparse {what}", f"at {grains:#x}", f"a place outside the {other} at {begin:#x}")
    return regions


def _check_clean(file: ReadAt, region: Region) -> None:
    at = region[1]
    magic, _, _, replay = struct.unpack("<4Q", read_exact(file, at, 32))
    if magic != VOLATILE_MAGIC:
        raise bad_field(file.name, at, "seSparse volatile magic", f"{magic:#x}", f"{VOLATILE_MAGIC:#x}")
    if replay:
        allowed = "0: a file whose journal is empty"
        raise bad_field(file.name, at + 24, "seSparse replay_journal", replay, allowed, fix=_CLOSE_IT)


def _read_directory(file: ReadAt, header: SesparseHeader, size: int) -> Directory:
    """Its u64 entries as u32: the table's index plus one, so that 0 is none."""
    _, at, end = header.regions["grain directory"]
    needed = -(-size // (ENTRIES * GRAIN_BYTES))
    if 8 * needed > end - at:
        allowed = f"at least {8 * needed} bytes for {size // SECTOR} sectors"
        raise bad_field(file.name, 136, "seSparse grain directory size", end - at, allowed)
    entries = np.frombuffer(read_exact(file, at, 8 * needed), "<u8")
    wrong = (entries != 0) & ((entries >> np.uint64(32) != 0x10000000) | (entries & np.uint64(0xFFFFFFFF) == 0xFFFFFFFF))
    if wrong.any():
        table = int(np.argmax(wrong))
        read, allowed = f"{int(entries[table]):#x}", "0, or 0x10000000 and the index of a table"
        raise bad_field(file.name, at + 8 * table, f"grain directory entry {table}", read, allowed)
    place = np.where(entries != 0, (entries & np.uint64(0xFFFFFFFF)) + np.uint64(1), np.uint64(0)).astype(np.uint32)
    origin = header.regions["grain tables"][1] - TABLE_BYTES
    return Directory(place, entries_at=at, entry_bytes=8, origin=origin, step=TABLE_BYTES)
