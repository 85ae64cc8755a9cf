"""Writes seSparse extents: the `-sesparse.vmdk` of ESXi's snapshots on VMFS 6 and of disks above 2 TiB.

    constant header 1 | volatile header 1 | journal header 2 | … journal at 2048 | GD at 4096 | tables | free bitmap |
    backmap | grains             every region begins and ends at a MiB; the header lists (offset, size) of each, in sectors

Little-endian u64. Grains are 8 sectors, tables 4096 entries.
GD entry: 0 absent, else 1 << 60 | table number: tables are numbered in the order in which they came into use.
GT entry: kind << 60 | grain number, split: its low 12 bits in bits 48-59, the rest in bits 0-47.
    kind 0 absent (the parent's) | 1 unmapped by the guest (zeros; a number may remain) | 2 zeros | 3 data
Backmap: grain number -> 1 << 60 | the guest's grain, split likewise. Free bitmap: a set bit is a grain in use.
Undocumented by VMware; QEMU, block/vmdk.c (2019) reads it, and the numbers here are those of a file that ESXi wrote.
Imports no numpy: it runs inside short-lived commands.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tokvm.core.units import SECTOR, KiB, MiB, round_up
from tokvm.testing.vmdk_descriptor import ESXI, Dialect, ExtentLine, Identity, extent_path, write_descriptor
from tokvm.testing.vmdk_grains import (
    Kind,
    Part,
    Places,
    Range,
    ReadBelow,
    Run,
    below,
    end_at,
    little_endian,
    nothing_below,
    parts_of,
    pieces_of,
    u64_table,
    write_at,
)

GRAIN_SIZE = 4 * KiB
ENTRIES_PER_TABLE = 4096
TABLE_SIZE = 8 * ENTRIES_PER_TABLE
_REGION = MiB // SECTOR
_JOURNAL, _DIRECTORY = 2048, 4096
_MAGIC, _VERSION = 0xCAFE_BABE, 0x2_0000_0001
_VOLATILE_MAGIC, _JOURNAL_MAGIC = 0xCAFE_CAFE, 0xDEAF_C0DE
_TRANSACTION = 0x24
_TABLE_IN_USE = _GRAIN_IN_USE = 1 << 60
_KINDS = {Kind.UNMAPPED: 1 << 60, Kind.ZERO: 2 << 60, Kind.DATA: 3 << 60}


@dataclass(frozen=True, slots=True)
class SesparseLayout:
    """Where the regions are, in sectors. `slots`: how many grains the file has room for."""

    capacity: int
    slots: int

    @classmethod
    def of(cls, size: int, first_grain: int) -> SesparseLayout:
        return cls(size // SECTOR, -(-size // GRAIN_SIZE) + first_grain)

    @property
    def tables(self) -> int:
        return -(-self.capacity * SECTOR // (ENTRIES_PER_TABLE * GRAIN_SIZE))

    @property
    def regions(self) -> list[tuple[int, int]]:
        """(offset, size) of directory, tables, free bitmap, backmap, grains."""
        found, at = [], _DIRECTORY
        for needed in (8 * self.tables, TABLE_SIZE * self.tables, -(-self.slots // 8), 8 * self.slots, GRAIN_SIZE * self.slots):
            sectors = round_up(-(-needed // SECTOR), _REGION)
            found.append((at, sectors))
            at += sectors
        return found

    def start(self, region: int) -> int:
        """Where it begins in the file, bytes."""
        return self.regions[region][0] * SECTOR

    def headers(self, tables_in_use: int, replay_journal: int) -> bytes:
        """The first four sectors."""
        regions = [(1, 1), (2, 2), (_JOURNAL, _JOURNAL), *self.regions]
        flat = [number for region in regions for number in region]
        sizes = self.capacity, GRAIN_SIZE // SECTOR, TABLE_SIZE // SECTOR
        constant = struct.pack("<26Q", _MAGIC, _VERSION, *sizes, 0, 0, 0, 0, 0, *flat)  # no flags, four reserved
        volatile = struct.pack("<4Q", _VOLATILE_MAGIC, tables_in_use, _TRANSACTION, replay_journal)
        journal = struct.pack("<3Q", _JOURNAL_MAGIC, _TRANSACTION, 1)
        return constant.ljust(SECTOR, b"\0") + volatile.ljust(SECTOR, b"\0") + journal.ljust(2 * SECTOR, b"\0")


DIRECTORY, TABLES, FREE_BITMAP, BACKMAP, GRAINS = range(5)


@dataclass(frozen=True, slots=True)
class SesparseOptions:
    """How a seSparse extent is made.

    seed: shuffles grains and tables and leaves some places empty; entries of unmapped grains keep a number.
    first_grain: the lowest grain number; above 4095 a reader that decodes the split number wrongly is found out.
    replay_journal: not 0 in a disk that was not closed; nobody but ESXi can read it.
    """

    first_grain: int = 0
    seed: int | None = None
    replay_journal: int = 0


_DEFAULT = SesparseOptions()


def write_sesparse(
    path: Path,
    *,
    size: int,
    runs: Iterable[Run],
    zeros: Iterable[Range] = (),
    unmapped: Iterable[Range] = (),
    identity: Identity | None = None,
    read_parent: ReadBelow | None = None,
    options: SesparseOptions = _DEFAULT,
    dialect: Dialect = ESXI,
) -> list[Path]:
    """Write a seSparse descriptor and its `-sesparse.vmdk`; returns both. Arguments as of `write_sparse`.

    unmapped: (offset, length) that the guest trimmed: zeros too, by another kind of entry. Parts of grains become data.
    """
    identity = identity or Identity()
    path, extent = _descriptor(path, size, identity, dialect)
    fill = below(read_parent, has_parent=identity.has_parent)
    with extent.open("wb") as out:
        write_sesparse_extent(out, size=size, runs=runs, zeros=zeros, unmapped=unmapped, read_parent=fill, options=options)
    return [path, extent]


def _descriptor(path: Path, size: int, identity: Identity, dialect: Dialect) -> tuple[Path, Path]:
    extent = extent_path(path, "sesparse")
    line = ExtentLine(size, "SESPARSE", extent.name)
    path.write_bytes(write_descriptor("seSparse", [line], identity=identity, dialect=dialect))
    return path, extent


def write_sesparse_extent(
    out: BinaryIO,
    *,
    size: int,
    runs: Iterable[Run],
    zeros: Iterable[Range] = (),
    unmapped: Iterable[Range] = (),
    read_parent: ReadBelow | None = nothing_below,
    options: SesparseOptions = _DEFAULT,
) -> None:
    """Write one extent to an empty seekable file. read_parent None: grains must be whole."""
    pieces = pieces_of(size, runs, zeros, unmapped)
    writer = _Writer(out, SesparseLayout.of(size, options.first_grain), options)
    for part in parts_of(pieces, size, GRAIN_SIZE, ENTRIES_PER_TABLE, read_parent):
        writer.add(part)
    writer.finish()


def entries_of(kind: int, first: int, count: int) -> array[int]:
    """Entries for consecutive numbers. `kind` is in place already, in the top four bits."""
    return array("Q", [kind | (number & 0xFFF) << 48 | number >> 12 for number in range(first, first + count)])


class _Writer:
    """Guest order is table order, so one table at a time is kept."""

    def __init__(self, out: BinaryIO, layout: SesparseLayout, options: SesparseOptions) -> None:
        self._out = out
        self._layout = layout
        self._options = options
        self._starts = [offset * SECTOR for offset, _ in layout.regions]
        self._grains = Places(options.first_grain, 1, limit=layout.slots, seed=options.seed)
        self._tables = Places(0, 1, limit=layout.tables, seed=options.seed)
        self._directory = u64_table(layout.tables)
        self._in_use = FreeBitmap()
        self._table, self._current, self._number = u64_table(0), -1, -1

    def add(self, part: Part) -> None:
        if part.table != self._current:
            self._finish_table()
            self._table, self._current = u64_table(ENTRIES_PER_TABLE), part.table
            ((self._number, _),) = self._tables.take(1)
            self._directory[part.table] = _TABLE_IN_USE | self._number
        if part.kind is Kind.DATA:
            self._add_data(part)
        else:
            self._table[part.entry : part.entry + part.grains] = self._empty_entries(part)

    def _empty_entries(self, part: Part) -> array[int]:
        if part.kind is Kind.UNMAPPED and self._options.seed is not None:
            return entries_of(_KINDS[part.kind], self._options.first_grain + part.entry, part.grains)
        return array("Q", [_KINDS[part.kind]]) * part.grains

    def _add_data(self, part: Part) -> None:
        at, guest = 0, part.table * ENTRIES_PER_TABLE + part.entry
        for place, taken in self._grains.take(part.grains):
            first = part.entry + at
            self._table[first : first + taken] = entries_of(_KINDS[Kind.DATA], place, taken)
            back = entries_of(_GRAIN_IN_USE, guest + at, taken)
            write_at(self._out, self._starts[BACKMAP] + 8 * place, little_endian(back))
            data = part.data[at * GRAIN_SIZE : (at + taken) * GRAIN_SIZE]
            write_at(self._out, self._starts[GRAINS] + place * GRAIN_SIZE, data)
            self._in_use.mark(place, taken)
            at += taken

    def _finish_table(self) -> None:
        if self._current >= 0:
            write_at(self._out, self._starts[TABLES] + self._number * TABLE_SIZE, little_endian(self._table))

    def finish(self) -> None:
        self._finish_table()
        write_at(self._out, 0, self._layout.headers(self._tables.end, self._options.replay_journal))
        write_at(self._out, self._starts[DIRECTORY], little_endian(self._directory))
        self._in_use.write(self._out, self._starts[FREE_BITMAP])
        end_at(self._out, self._starts[GRAINS])


class FreeBitmap:
    """Bits of grains in use, kept in pages, for there may be billions and few of them set."""

    def __init__(self) -> None:
        self._pages: dict[int, bytearray] = {}

    def mark(self, first: int, count: int) -> None:
        while count:
            page, bit = divmod(first, 8 * GRAIN_SIZE)
            take = min(count, 8 * GRAIN_SIZE - bit)
            bits = self._pages.setdefault(page, bytearray(GRAIN_SIZE))
            start, stop = bit // 8, -(-(bit + take) // 8)
            known = int.from_bytes(bits[start:stop], "little")
            bits[start:stop] = (known | ((1 << take) - 1) << bit % 8).to_bytes(stop - start, "little")
            first, count = first + take, count - take

    def write(self, out: BinaryIO, file_offset: int) -> None:
        for page, bits in self._pages.items():
            write_at(out, file_offset + page * GRAIN_SIZE, bits)
