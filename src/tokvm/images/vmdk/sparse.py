"""Hosted sparse extents, "KDMV": monolithicSparse, twoGbMaxExtentSparse, streamOptimized.

    header 512 | descriptor | redundant directory, its tables | directory, its tables | grains …
    streamOptimized:  header 512 | descriptor | (grain marker, zlib …) … grain table … | directory | footer | end of stream

    directory: u32 per table, 0: no table, else its sector      table: 512 u32, little-endian, per grain
    0: ABSENT   1, with the zeroed-grain flag: ZERO   else the grain's sector

Which directory: the one at 56, which QEMU and VirtualBox read; its redundant copy when that one cannot be, with a warning. An
entry of 1 without the flag points into the header's neighbour and is refused; libvmdk and DiscUtils read it as a grain.
Specification: VMware, "Virtual Disk Format 5.0" (2011); header: `header`, compressed grains: `inflate`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tokvm.core.errors import ImageError
from tokvm.core.extents import Column
from tokvm.core.units import SECTOR
from tokvm.images.base import ReadAt
from tokvm.images.claims import Claims
from tokvm.images.fields import bad_field, read_exact
from tokvm.images.vmdk.descriptor import Descriptor, ExtentType, parse_descriptor
from tokvm.images.vmdk.grains import Directory, Entries, GrainTables, Mask, Region, Structures, check_regions, check_tables
from tokvm.images.vmdk.header import AT_END, ENTRIES, HEADER_SIZE, TABLE_BYTES, Flags, SparseHeader
from tokvm.images.vmdk.inflate import InflatedFile, Keys, slot_keys
from tokvm.images.vmdk.parts import UNCLEAN, size_of

ZERO_GRAIN = 1
_FOOTER_FROM_END = 1536  # footer marker, footer, end-of-stream marker: a sector each
_FOOTER_MARKER = 3
_CUT = "copy it again: the stream that made this file was cut short, or wait until its export is done"


@dataclass(frozen=True, slots=True)
class SparseFile:
    """A KDMV file whose header is believed. header: with the footer's places, where it has one."""

    file: ReadAt
    header: SparseHeader
    descriptor: Descriptor | None
    footer_at: int | None


class SparsePart(GrainTables):
    """Implements `parts.Part`."""

    entry_type = "<u4"
    entries = ENTRIES

    def __init__(
        self, found: SparseFile, directory: Directory, *, size: int, structures: Structures, warnings: tuple[str, ...]
    ) -> None:
        header = found.header
        super().__init__(found.file, directory, size=size, grain_bytes=header.grain_bytes, structures=structures)
        self.header = header
        self.warnings = warnings

    def meaning(self, entries: Entries, grain: Column) -> Column:
        where = entries.astype(np.int64) * SECTOR
        if Flags.ZEROED_GRAINS in self.header.flags:
            where[entries == ZERO_GRAIN] = -1
        return where

    def faults(self, entries: Entries, where: Column) -> Iterable[tuple[Mask, str]]:
        yield (entries == ZERO_GRAIN) & (where > 0), "0, or a grain's sector; 1 only with the zeroed-grain flag"

    def describe(self) -> dict[str, object]:
        header = self.header
        return {
            "kind": "stream-optimized" if header.compressed else "sparse",
            "version": header.version,
            "grain_size": header.grain_bytes,
            "compressed": header.compressed,
            "zeroed_grains": Flags.ZEROED_GRAINS in header.flags,
            "unclean": header.unclean,
            "tables": len(self.directory.place),
            "tables_present": len(self.directory.present),
        }


class CompressedPart(SparsePart):
    """The same with compressed grains: rows' file offsets are good in an InflatedFile. All tables are read at once, because
    only all of them say which grain is the how manieth of the file; every grain's place is checked then."""

    file: ReadAt

    def __init__(
        self, found: SparseFile, directory: Directory, *, size: int, structures: Structures, warnings: tuple[str, ...]
    ) -> None:
        super().__init__(found, directory, size=size, structures=structures, warnings=warnings)
        if self.grains > 1 << 32:
            raise bad_field(found.file.name, 20, "KDMV grain size", self.grain_bytes, "larger grains on so large a disk")
        keys = self._all_keys()
        self._inflated = InflatedFile(
            found.file, keys, grain_bytes=self.grain_bytes, disk_size=size, markers=found.header.markers,
            structures=structures.begin,
        )  # fmt: skip
        self.file = self._inflated

    def meaning(self, entries: Entries, grain: Column) -> Column:
        slot = self._inflated.slots(entries.astype(np.uint64), grain)
        where = slot * self.grain_bytes
        where[slot < 0] = -2
        if Flags.ZEROED_GRAINS in self.header.flags:
            where[entries == ZERO_GRAIN] = -1
        return where

    def faults(self, entries: Entries, where: Column) -> Iterable[tuple[Mask, str]]:
        yield where == -2, "what it was when the file was opened"

    def check_grains(self, entries: Entries, grain: Column, where: Column, claims: Claims | None) -> None:
        """Done when the file was opened."""

    def claims(self) -> Claims | None:
        return None

    def _all_keys(self) -> Keys:
        found: list[Keys] = []
        room = self._table_file.size // SECTOR  # a grain takes a sector at the least
        for tables in self.batches(self.directory.present):
            entries, grain = self.used_entries(tables)
            data = super().meaning(entries, grain) >= 0
            entries, grain = entries[data], grain[data]
            self._check_places(entries, grain)
            room -= len(entries)
            if room < 0:
                raise self.bad_entry(int(grain[-1]), int(entries[-1]), "no more grains than the file has sectors")
            found.append(slot_keys(entries.astype(np.uint64), grain))
        keys = np.concatenate(found) if found else np.empty(0, np.uint64)
        found.clear()
        keys.sort()
        sector = (keys >> np.uint64(32)).astype(np.uint32)
        same = sector[1:] == sector[:-1]
        if same.any():
            key = int(keys[int(np.argmax(same)) + 1])
            raise self.bad_entry(key & 0xFFFFFFFF, key >> 32, "a place of the file that no other grain takes")
        return keys

    def _check_places(self, entries: Entries, grain: Column) -> None:
        where = entries.astype(np.int64) * SECTOR
        self._refuse(
            where >= self._table_file.size,
            entries,
            grain,
            f"a grain that begins before the file's end at {self._table_file.size:#x}",
        )
        self._refuse((entries == ZERO_GRAIN), entries, grain, "0, or a grain's sector; 1 only with the zeroed-grain flag")
        inside = self.structures.hits(where, where + 1)
        self._refuse(inside, entries, grain, "a grain outside of headers, descriptor, directories and tables")


def read_sparse(file: ReadAt) -> SparseFile:
    """The header, the footer that it refers to, and the embedded descriptor."""
    header = SparseHeader.parse(read_exact(file, 0, HEADER_SIZE), name=file.name, offset=0)
    descriptor = read_embedded(file, header)
    if header.directory_sector != AT_END:
        return SparseFile(file, header, descriptor, None)
    at = file.size - _FOOTER_FROM_END
    if at < HEADER_SIZE:
        raise bad_field(file.name, 56, "KDMV grain directory", "in a footer", "a file that is long enough for one", fix=_CUT)
    raw = read_exact(file, at, _FOOTER_FROM_END)
    _, size, type_ = struct.unpack_from("<QII", raw)
    if size != 0 or type_ != _FOOTER_MARKER or any(raw[2 * SECTOR :]):
        read, allowed = f"type {type_}, size {size}", "a footer's, and an end-of-stream marker behind the footer"
        raise bad_field(file.name, at, "marker near the end", read, allowed, fix=_CUT)
    footer = SparseHeader.parse(raw[SECTOR : 2 * SECTOR], name=file.name, offset=at + SECTOR)
    if footer.directory_sector == AT_END:
        raise bad_field(file.name, at + SECTOR + 56, "KDMV grain directory", "in a footer", "a sector, in the footer")
    if not footer.same_disk(header):
        raise bad_field(file.name, at + SECTOR, "the footer", "another disk's", "what the header says, but for the directory")
    return SparseFile(file, footer, descriptor, at)


def read_embedded(file: ReadAt, header: SparseHeader) -> Descriptor | None:
    """The embedded descriptor: of a disk that is one file. It must be of this file alone."""
    if not header.descriptor_sector:
        return None
    at = header.descriptor_sector * SECTOR
    raw = bytes(read_exact(file, at, header.descriptor_sectors * SECTOR))
    if not raw.strip(b"\0"):
        return None
    descriptor = parse_descriptor(raw, file.name, offset=at)
    if [extent.type for extent in descriptor.extents] != [ExtentType.SPARSE]:
        read = ", ".join(extent.type.value for extent in descriptor.extents[:4])
        raise bad_field(file.name, at, "extents of the embedded descriptor", read, "one, SPARSE: this file")
    return descriptor


def open_sparse(found: SparseFile, stated: int | None) -> SparsePart:
    """Check the directories of a KDMV extent. `stated`: its sectors as its descriptor has them."""
    size = size_of(found.header.capacity, stated, name=found.file.name, offset=12)
    return read_directories(found, size, CompressedPart if found.header.compressed else SparsePart)


def read_directories(found: SparseFile, size: int, cls: type[SparsePart] = SparsePart) -> SparsePart:
    """The tables of a disk of `size` bytes."""
    file, header = found.file, found.header
    regions: list[Region] = [("header", 0, HEADER_SIZE)]
    if header.descriptor_sector:
        at = header.descriptor_sector * SECTOR
        regions.append(("descriptor", at, at + header.descriptor_sectors * SECTOR))
    if found.footer_at is not None:
        regions.append(("footer", found.footer_at, found.footer_at + _FOOTER_FROM_END))
    check_regions(regions, size=file.size, name=file.name)
    directory, tables, warnings = _Directories(found, size, regions).read()
    if header.unclean:
        warnings.append(UNCLEAN)
    structures = Structures(regions, tables, TABLE_BYTES)
    return cls(found, directory, size=size, structures=structures, warnings=tuple(warnings))


class _Directories:
    """The directory and its redundant copy, whose places are added to `regions`."""

    def __init__(self, found: SparseFile, size: int, regions: list[Region]) -> None:
        self._file = found.file
        self._header = found.header
        self._header_at = 0 if found.footer_at is None else found.footer_at + SECTOR
        self._count = -(-size // found.header.span)
        self._regions = regions

    def read(self) -> tuple[Directory, Column, list[str]]:
        """(the directory to use, the places of all tables, warnings)"""
        header = self._header
        has_copy = header.redundant_sector not in (0, header.directory_sector)
        try:
            directory = self._one("grain directory", header.directory_sector, 56)
        except ImageError as exc:
            if not has_copy:
                raise
            return self._fall_back(exc)
        tables = directory.offset(directory.present)
        if not has_copy:
            return directory, tables, []
        try:
            copy = self._one("redundant grain directory", header.redundant_sector, 48)
        except ImageError as exc:
            return directory, tables, [f"the redundant grain directory is damaged ({exc.what})"]
        return directory, np.concatenate((tables, copy.offset(copy.present))), []

    def _fall_back(self, error: ImageError) -> tuple[Directory, Column, list[str]]:
        try:
            directory = self._one("redundant grain directory", self._header.redundant_sector, 48)
        except ImageError:
            raise error from None
        warning = f"the grain directory is damaged ({error.what}); its redundant copy is used"
        return directory, directory.offset(directory.present), [warning]

    def _one(self, what: str, sector: int, field_at: int) -> Directory:
        name, at, length = self._file.name, sector * SECTOR, 4 * self._count
        end = at + length
        if end > self._file.size:
            allowed = f"a directory of {self._count} entries that ends at or before {self._file.size:#x}"
            raise bad_field(name, self._header_at + field_at, f"KDMV {what}", f"sector {sector:#x}", allowed)
        for other, begin, behind in self._regions:
            if at < behind and end > begin:
                allowed = f"a place outside the {other} at {begin:#x} to {behind:#x}"
                raise bad_field(name, self._header_at + field_at, f"KDMV {what}", f"sector {sector:#x}", allowed)
        place = np.frombuffer(read_exact(self._file, at, length), "<u4")
        directory = Directory(place, entries_at=at, entry_bytes=4, origin=0, step=SECTOR)
        self._regions.append((what, at, end))  # even if its entries are damaged, nothing else is there
        check_tables(directory, table_bytes=TABLE_BYTES, limit=self._file.size, regions=self._regions, name=name)
        return directory
