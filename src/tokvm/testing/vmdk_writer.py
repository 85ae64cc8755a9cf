"""Writes hosted sparse VMDKs: VMware Workstation's growing disks and their snapshots, as one file or split.

    header 1 | descriptor 20 (one file) | [redundant GD, GTs] | GD, GTs | … overhead, a multiple of the grain | grain … grain

Little-endian, offsets in sectors of 512 bytes. A GD entry names a grain table of 512 entries, which name grains. Entry 0 is
absent; 1 is a zero grain if flag 4 is set. All tables are there from the start, as VMware makes them; `all_tables=False`
leaves the directory entries of unused ones 0.
Format: VMware, "Virtual Disk Format 5.0" (2011).
Imports no numpy: it runs inside short-lived commands.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntFlag
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from tokvm.core.units import SECTOR, KiB, round_up
from tokvm.testing.vmdk_descriptor import ESXI, Dialect, ExtentLine, Identity, extent_path, write_descriptor
from tokvm.testing.vmdk_grains import (
    Kind,
    Piece,
    Places,
    Range,
    ReadBelow,
    Run,
    below,
    end_at,
    little_endian,
    materialised,
    nothing_below,
    parts_of,
    per_extent,
    pieces_of,
    u32_table,
    write_at,
)

GRAIN_SIZE = 64 * KiB
ENTRIES_PER_TABLE = 512
TABLE_SECTORS = 4 * ENTRIES_PER_TABLE // SECTOR
DESCRIPTOR_SECTORS = 20
AT_END = 0xFFFF_FFFF_FFFF_FFFF
MAX_SECTORS = 1 << 32
_HEADER = struct.Struct("<4sIIQQQQIQQQB4sH")
_ZERO_GRAIN = 1


class Flags(IntFlag):
    NEWLINE_TEST = 1
    REDUNDANT = 2
    ZEROED_GRAINS = 4
    COMPRESSED = 0x1_0000
    MARKERS = 0x2_0000


@dataclass(frozen=True, slots=True)
class SparseLayout:
    """Where the parts of a hosted sparse extent are, in sectors, and the header that says so."""

    capacity: int
    grain: int
    descriptor: int
    version: int
    flags: Flags
    unclean: bool = False

    def __post_init__(self) -> None:
        if self.grain < 8 or self.grain & (self.grain - 1):
            raise ValueError(f"grains of {self.grain * SECTOR} bytes: not a power of two from 4096 on")

    @property
    def tables(self) -> int:
        return -(-self.capacity // (ENTRIES_PER_TABLE * self.grain))

    @property
    def directory_sectors(self) -> int:
        return -(-4 * self.tables // SECTOR)

    @property
    def directories(self) -> tuple[int, ...]:
        """The redundant directory, if any, and the directory. A directory's tables follow it."""
        first = 1 + self.descriptor
        step = self.directory_sectors + self.tables * TABLE_SECTORS
        return (first, first + step) if self.flags & Flags.REDUNDANT else (first,)

    @property
    def overhead(self) -> int:
        last = self.directories[-1] + self.directory_sectors + self.tables * TABLE_SECTORS
        return round_up(last, self.grain)

    def header(self, *, directory: int | None = None, overhead: int | None = None) -> bytes:
        return _HEADER.pack(
            b"KDMV", self.version, self.flags, self.capacity, self.grain, 1 if self.descriptor else 0, self.descriptor,
            ENTRIES_PER_TABLE, self.directories[0] if self.flags & Flags.REDUNDANT else 0,
            self.directories[-1] if directory is None else directory, self.overhead if overhead is None else overhead,
            self.unclean, b"\n \r\n", 1 if self.flags & Flags.COMPRESSED else 0,
        ).ljust(SECTOR, b"\0")  # fmt: skip

    def table_sector(self, directory: int, number: int) -> int:
        return directory + self.directory_sectors + number * TABLE_SECTORS


@dataclass(frozen=True, slots=True)
class SparseOptions:
    """How a hosted sparse extent is made. seed: shuffles the grains in the file and leaves some places empty.

    zeroed_grains: version 2, whole zeroed grains are entries of 1; otherwise zeros are written as grains of zeros.
    """

    grain_size: int = GRAIN_SIZE
    redundant: bool = True
    zeroed_grains: bool = False
    all_tables: bool = True
    unclean: bool = False
    seed: int | None = None


_DEFAULT = SparseOptions()


def write_sparse(
    path: Path,
    *,
    size: int,
    runs: Iterable[Run],
    zeros: Iterable[Range] = (),
    identity: Identity | None = None,
    read_parent: ReadBelow | None = None,
    options: SparseOptions = _DEFAULT,
    split: int | None = None,
    dialect: Dialect = ESXI,
) -> list[Path]:
    """Write monolithicSparse (the descriptor inside), or with `split` twoGbMaxExtentSparse of extents of so many bytes.

    runs: (guest offset, data), ascending, disjoint, whole sectors, taken as they are written. zeros: (offset, length), ditto.
    read_parent(offset, length): fills up grains that a child writes only in part; a base's are filled up with zeros.
    Returns the files, the descriptor's first.
    """
    identity = identity or Identity()
    pieces = pieces_of(size, runs, zeros)
    fill = below(read_parent, has_parent=identity.has_parent)
    if split is None:
        line = ExtentLine(size, "SPARSE", path.name)
        descriptor = write_descriptor("monolithicSparse", [line], identity=identity, dialect=dialect)
        with path.open("wb") as out:
            _write_extent(out, size, pieces, fill, options, descriptor)
        return [path]
    lengths = split_lengths(size, split)
    names = [extent_path(path, f"s{number:03}") for number in range(1, len(lengths) + 1)]
    lines = [ExtentLine(length, "SPARSE", name.name) for length, name in zip(lengths, names, strict=True)]
    path.write_bytes(write_descriptor("twoGbMaxExtentSparse", lines, identity=identity, dialect=dialect))
    ends = list(accumulate(lengths))
    for number, own in per_extent(pieces, ends):
        with names[number].open("wb") as out:
            _write_extent(out, lengths[number], own, _shifted(fill, ends[number] - lengths[number]), options, b"")
    return [path, *names]


def write_sparse_extent(
    out: BinaryIO,
    *,
    size: int,
    runs: Iterable[Run],
    zeros: Iterable[Range] = (),
    read_parent: ReadBelow | None = nothing_below,
    options: SparseOptions = _DEFAULT,
    descriptor: bytes = b"",
) -> None:
    """Write one extent to an empty seekable file, with this descriptor inside. read_parent None: grains must be whole."""
    _write_extent(out, size, pieces_of(size, runs, zeros), read_parent, options, descriptor)


def split_lengths(size: int, split: int) -> list[int]:
    if split < SECTOR or split % SECTOR:
        raise ValueError(f"extents of {split} bytes are not made of whole sectors")
    return [min(split, size - start) for start in range(0, size, split)]


def padded_descriptor(descriptor: bytes) -> bytes:
    """With room to grow, as VMware leaves it: 20 sectors, or whatever more it needs."""
    return descriptor.ljust(max(DESCRIPTOR_SECTORS * SECTOR, round_up(len(descriptor), SECTOR)), b"\0") if descriptor else b""


def _shifted(read_below: ReadBelow | None, start: int) -> ReadBelow | None:
    if read_below is None:
        return None
    return lambda offset, length: read_below(start + offset, length)


def _write_extent(
    out: BinaryIO, size: int, pieces: Iterator[Piece], read_below: ReadBelow | None, options: SparseOptions, descriptor: bytes
) -> None:
    text = padded_descriptor(descriptor)
    flags = Flags.NEWLINE_TEST
    if options.redundant:
        flags |= Flags.REDUNDANT
    if options.zeroed_grains:
        flags |= Flags.ZEROED_GRAINS
    layout = SparseLayout(
        size // SECTOR, options.grain_size // SECTOR, len(text) // SECTOR, 2 if options.zeroed_grains else 1, flags,
        options.unclean,
    )  # fmt: skip
    out.write(layout.header() + text)
    places = Places(layout.overhead, layout.grain, limit=MAX_SECTORS, seed=options.seed)
    if not options.zeroed_grains:
        pieces = materialised(pieces)
    tables = _write_grains(out, layout, places, pieces, read_below)
    write_tables(out, layout, tables, all_tables=options.all_tables)
    end_at(out, places.end * SECTOR)


def _write_grains(
    out: BinaryIO, layout: SparseLayout, places: Places, pieces: Iterable[Piece], read_below: ReadBelow | None
) -> dict[int, array[int]]:
    tables: dict[int, array[int]] = {}
    grain, grain_size = layout.grain, layout.grain * SECTOR
    for part in parts_of(pieces, layout.capacity * SECTOR, grain_size, ENTRIES_PER_TABLE, read_below):
        table = tables.setdefault(part.table, u32_table(ENTRIES_PER_TABLE))
        if part.kind is Kind.ZERO:
            table[part.entry : part.entry + part.grains] = array("I", [_ZERO_GRAIN]) * part.grains
            continue
        at = 0
        for place, taken in places.take(part.grains):
            first = part.entry + at
            table[first : first + taken] = array("I", range(place, place + taken * grain, grain))
            write_at(out, place * SECTOR, part.data[at * grain_size : (at + taken) * grain_size])
            at += taken
    return tables


def write_tables(out: BinaryIO, layout: SparseLayout, tables: dict[int, array[int]], *, all_tables: bool) -> None:
    """The directories and the tables in use; the other tables are holes in the file, zeros to a reader."""
    for directory in layout.directories:
        numbers: Iterable[int] = range(layout.tables) if all_tables else tables
        entries = u32_table(layout.tables)
        for number in numbers:
            entries[number] = layout.table_sector(directory, number)
        write_at(out, directory * SECTOR, little_endian(entries))
        for number, table in tables.items():
            write_at(out, layout.table_sector(directory, number) * SECTOR, little_endian(table))
