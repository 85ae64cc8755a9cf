"""Writes COWD extents: the `-delta.vmdk` of ESXi's snapshots on VMFS 5 and below 2 TiB (createType vmfsSparse).

    header 4 sectors | GD at 4 | … GT 32, grain, grain, GT 32, grain … in the order of the first writes

Little-endian u32, in sectors. A GD entry names a table of 4096 entries, which name grains, usually of one sector. 0 is absent.
Tables are made when the first grain of theirs is written, so they lie between the grains.
Layout: libyal, "VMware Virtual Disk Format (VMDK)" (2009-2024). Entry 1 as a zero grain is what Xen Orchestra's reader knows;
nobody is known to write it, so it is an option. Other readers fetch the file's sector 1 for it: zeros, but with grains of more
than 3 sectors also the directory.
Imports no numpy: it runs inside short-lived commands.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tokvm.core.units import SECTOR, round_up
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
    materialised,
    nothing_below,
    parts_of,
    pieces_of,
    u32_table,
    write_at,
)

ENTRIES_PER_TABLE = 4096
TABLE_SECTORS = 4 * ENTRIES_PER_TABLE // SECTOR
DIRECTORY_SECTOR = 4
HEADER_SIZE = 4 * SECTOR
MAX_SECTORS = (1 << 32) - 1
_HEAD = struct.Struct("<4s7I")
_ZERO_GRAIN = 1
_UNCLEAN_AT = 1648


@dataclass(frozen=True, slots=True)
class CowdOptions:
    """How a COWD extent is made. seed: shuffles the grains in the file and leaves some places empty.

    zero_grains: whole zeroed grains are entries of 1; otherwise zeros are written as grains of zeros.
    """

    grain_size: int = SECTOR
    zero_grains: bool = False
    unclean: bool = False
    seed: int | None = None


_DEFAULT = CowdOptions()


def write_cowd(
    path: Path,
    *,
    size: int,
    runs: Iterable[Run],
    zeros: Iterable[Range] = (),
    identity: Identity | None = None,
    read_parent: ReadBelow | None = None,
    options: CowdOptions = _DEFAULT,
    dialect: Dialect = ESXI,
) -> list[Path]:
    """Write a vmfsSparse descriptor and its `-delta.vmdk`; returns both. Arguments as of `write_sparse`."""
    identity = identity or Identity()
    extent = extent_path(path, "delta")
    line = ExtentLine(size, "VMFSSPARSE", extent.name)
    path.write_bytes(write_descriptor("vmfsSparse", [line], identity=identity, dialect=dialect))
    fill = below(read_parent, has_parent=identity.has_parent)
    with extent.open("wb") as out:
        write_cowd_extent(out, size=size, runs=runs, zeros=zeros, read_parent=fill, options=options)
    return [path, extent]


def write_cowd_extent(
    out: BinaryIO,
    *,
    size: int,
    runs: Iterable[Run],
    zeros: Iterable[Range] = (),
    read_parent: ReadBelow | None = nothing_below,
    options: CowdOptions = _DEFAULT,
) -> None:
    """Write one extent to an empty seekable file. read_parent None: grains must be whole."""
    capacity, grain = size // SECTOR, options.grain_size // SECTOR
    if grain < 1 or options.grain_size % SECTOR:
        raise ValueError(f"grains of {options.grain_size} bytes are not made of whole sectors")
    if capacity > MAX_SECTORS:
        raise ValueError(f"{size} bytes are more than the 2 TiB that COWD can hold")
    directory = u32_table(-(-capacity // (ENTRIES_PER_TABLE * grain)))
    first_free = DIRECTORY_SECTOR + round_up(4 * len(directory), SECTOR) // SECTOR
    places = Places(first_free, grain, limit=MAX_SECTORS, seed=options.seed)
    pieces = pieces_of(size, runs, zeros)
    if not options.zero_grains:
        pieces = materialised(pieces)
    parts = parts_of(pieces, size, options.grain_size, ENTRIES_PER_TABLE, read_parent)
    _write_grains(out, directory, places, parts, grain)
    write_at(out, 0, _header(capacity, grain, len(directory), places.end, unclean=options.unclean))
    write_at(out, DIRECTORY_SECTOR * SECTOR, little_endian(directory))
    end_at(out, places.end * SECTOR)


def _header(capacity: int, grain: int, directory_entries: int, next_free: int, *, unclean: bool) -> bytes:
    raw = bytearray(HEADER_SIZE)
    raw[: _HEAD.size] = _HEAD.pack(b"COWD", 1, 3, capacity, grain, DIRECTORY_SECTOR, directory_entries, next_free)
    raw[_UNCLEAN_AT] = unclean
    return bytes(raw)


def _write_grains(out: BinaryIO, directory: array[int], places: Places, parts: Iterable[Part], grain: int) -> None:
    """Guest order is table order, so one table at a time is kept."""
    table, current = u32_table(0), -1
    for part in parts:
        if part.table != current:
            _finish(out, directory, current, table)
            table, current = u32_table(ENTRIES_PER_TABLE), part.table
            directory[current] = places.reserve(TABLE_SECTORS)
        if part.kind is Kind.ZERO:
            table[part.entry : part.entry + part.grains] = array("I", [_ZERO_GRAIN]) * part.grains
            continue
        at = 0
        for place, taken in places.take(part.grains):
            first = part.entry + at
            table[first : first + taken] = array("I", range(place, place + taken * grain, grain))
            write_at(out, place * SECTOR, part.data[at * grain * SECTOR : (at + taken) * grain * SECTOR])
            at += taken
    _finish(out, directory, current, table)


def _finish(out: BinaryIO, directory: array[int], number: int, table: array[int]) -> None:
    if number >= 0:
        write_at(out, directory[number] * SECTOR, little_endian(table))
