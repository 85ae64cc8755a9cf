"""Writes streamOptimized VMDKs: compressed grains one after another, as OVF exports hold them.

    header | descriptor 20 | … overhead | grain, grain, …, [GT marker, GT], grain … | [GD marker, GD] | [footer marker, footer]
    | EOS          a grain: LBA u64, size u32, zlib stream, padded to a sector; a marker: size u64, 0 u32, type u32, one sector

Little-endian, offsets in sectors. `Tables.BEHIND` needs no seeking: the header says that the directory is at the end, and the
footer is the header again with its place (ovftool, ESXi's exports). `Tables.FRONT` is what vmware-vdiskmanager writes: the
directory and tables before the grains, no footer. Absent grains are zeros: such disks have no parent.
Format: VMware, "Virtual Disk Format 5.0" (2011). It knows compressed grains with their markers only; without them readers
disagree: QEMU takes the zlib stream to begin at once, dissect takes a u32 size to come first (see GrainHeader).
Imports no numpy: it runs inside short-lived commands.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum
from pathlib import Path
from random import Random
from typing import BinaryIO

from tokvm.core.units import SECTOR
from tokvm.testing.vmdk_descriptor import ESXI, Dialect, ExtentLine, Identity, write_descriptor
from tokvm.testing.vmdk_grains import Bytes, Run, little_endian, nothing_below, pieces_of, spans_of, u32_table
from tokvm.testing.vmdk_writer import (
    AT_END,
    ENTRIES_PER_TABLE,
    GRAIN_SIZE,
    MAX_SECTORS,
    TABLE_SECTORS,
    Flags,
    SparseLayout,
    padded_descriptor,
    write_tables,
)

_POOL = 32


class Tables(Enum):
    BEHIND = "behind"
    FRONT = "front"


class GrainHeader(Enum):
    """What comes before a grain's zlib stream. LBA sets the header's marker flag."""

    LBA = "lba and size"
    SIZE = "size"
    NONE = "nothing"


class Marker(IntEnum):
    END_OF_STREAM = 0
    TABLE = 1
    DIRECTORY = 2
    FOOTER = 3


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How a stream is made. seed: shuffles the grains, a few dozen at a time.

    short_last_grain: the last grain of a disk that ends inside it holds the disk's bytes only, not a whole grain.
    """

    grain_size: int = GRAIN_SIZE
    level: int = 6
    tables: Tables = Tables.BEHIND
    grain_header: GrainHeader = GrainHeader.LBA
    short_last_grain: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.tables is Tables.BEHIND and self.grain_header is not GrainHeader.LBA:
            raise ValueError("tables behind the grains are found by their markers")

    @property
    def flags(self) -> Flags:
        marked = self.grain_header is GrainHeader.LBA
        return Flags.NEWLINE_TEST | Flags.COMPRESSED | (Flags.MARKERS if marked else Flags(0))


_DEFAULT = StreamOptions()


def write_stream_file(
    path: Path,
    *,
    size: int,
    runs: Iterable[Run],
    identity: Identity | None = None,
    options: StreamOptions = _DEFAULT,
    dialect: Dialect = ESXI,
) -> list[Path]:
    """`write_stream` to a file; returns it."""
    with path.open("wb") as out:
        write_stream(out, size=size, runs=runs, name=path.name, identity=identity, options=options, dialect=dialect)
    return [path]


def write_stream(
    out: BinaryIO,
    *,
    size: int,
    runs: Iterable[Run],
    name: str = "disk.vmdk",
    identity: Identity | None = None,
    options: StreamOptions = _DEFAULT,
    dialect: Dialect = ESXI,
) -> None:
    """Write a disk front to back. `out` need not seek, except for Tables.FRONT.

    runs: (guest offset, data), ascending, disjoint, whole sectors, taken as they are written. name: in the extent's line.
    """
    line = ExtentLine(size, "SPARSE", name)
    text = padded_descriptor(write_descriptor("streamOptimized", [line], identity=identity, dialect=dialect))
    layout = SparseLayout(size // SECTOR, options.grain_size // SECTOR, len(text) // SECTOR, 3, options.flags)
    packed = _packed_grains(size, runs, options)
    if options.tables is Tables.FRONT:
        _write_front(out, layout, text, packed)
    else:
        _write_behind(out, layout, text, packed, shuffled=options.seed is not None)


Packed = tuple[int, bytes]


def _packed_grains(size: int, runs: Iterable[Run], options: StreamOptions) -> Iterator[Packed]:
    """(grain number, its compressed bytes with what comes before and the padding)."""
    grains = _compressed(size, runs, options)
    if options.seed is None:
        yield from grains
        return
    rng, pool = Random(options.seed), list[Packed]()
    for grain in grains:
        pool.append(grain)
        if len(pool) > _POOL:
            yield pool.pop(rng.randrange(len(pool)))
    rng.shuffle(pool)
    yield from pool


def _compressed(size: int, runs: Iterable[Run], options: StreamOptions) -> Iterator[Packed]:
    grain_size = options.grain_size
    for span in spans_of(pieces_of(size, runs), size, grain_size, nothing_below):
        for index in range(span.grains):
            number = span.first + index
            data = span.data[index * grain_size : (index + 1) * grain_size]
            if options.short_last_grain:
                data = data[: size - number * grain_size]
            packed = zlib.compress(data, options.level)
            yield number, _header(options.grain_header, number * grain_size // SECTOR, len(packed)) + packed


def _header(kind: GrainHeader, lba: int, length: int) -> bytes:
    if kind is GrainHeader.LBA:
        return struct.pack("<QI", lba, length)
    return struct.pack("<I", length) if kind is GrainHeader.SIZE else b""


class _Output:
    """Where the stream is, in sectors."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self.sector = 0

    def write(self, data: Bytes) -> int:
        """Write and fill up the sector; returns where it began."""
        start = self.sector
        self._out.write(data)
        self._out.write(bytes(-len(data) % SECTOR))
        self.sector += -(-len(data) // SECTOR)
        if self.sector > MAX_SECTORS:
            raise ValueError("the stream is longer than the 2 TiB that its tables can point to")
        return start

    def mark(self, marker: Marker, sectors: int) -> None:
        self.write(struct.pack("<QII", sectors, 0, marker))

    def pad_to(self, sector: int) -> None:
        self.write(bytes((sector - self.sector) * SECTOR))


def _write_behind(out: BinaryIO, layout: SparseLayout, text: bytes, packed: Iterator[Packed], *, shuffled: bool) -> None:
    to = _Output(out)
    overhead = -(-(1 + layout.descriptor) // layout.grain) * layout.grain
    to.write(layout.header(directory=AT_END, overhead=overhead) + text)
    to.pad_to(overhead)
    directory = u32_table(layout.tables)
    tables: dict[int, array[int]] = {}
    for grain, data in packed:
        number, entry = divmod(grain, ENTRIES_PER_TABLE)
        if not shuffled and number not in tables:  # ascending: the table before is complete
            _write_tables_behind(to, directory, tables)
        tables.setdefault(number, u32_table(ENTRIES_PER_TABLE))[entry] = to.write(data)
    _write_tables_behind(to, directory, tables)
    to.mark(Marker.DIRECTORY, layout.directory_sectors)
    at = to.write(little_endian(directory))
    to.mark(Marker.FOOTER, 1)
    to.write(layout.header(directory=at, overhead=overhead))
    to.mark(Marker.END_OF_STREAM, 0)


def _write_tables_behind(to: _Output, directory: array[int], tables: dict[int, array[int]]) -> None:
    for number, table in sorted(tables.items()):
        to.mark(Marker.TABLE, TABLE_SECTORS)
        directory[number] = to.write(little_endian(table))
    tables.clear()


def _write_front(out: BinaryIO, layout: SparseLayout, text: bytes, packed: Iterator[Packed]) -> None:
    to = _Output(out)
    to.write(layout.header() + text)
    to.pad_to(layout.overhead)
    tables: dict[int, array[int]] = {}
    for grain, data in packed:
        number, entry = divmod(grain, ENTRIES_PER_TABLE)
        tables.setdefault(number, u32_table(ENTRIES_PER_TABLE))[entry] = to.write(data)
    if layout.flags & Flags.MARKERS:
        to.mark(Marker.END_OF_STREAM, 0)
    write_tables(out, layout, tables, all_tables=False)
