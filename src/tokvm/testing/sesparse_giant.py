"""Writes giant seSparse extents from a column of grain numbers: tens of millions of grains on a disk of 62 TiB.

The layout is that of `sesparse_writer`; here the tables are numpy columns, written in windows, and the grains' bytes are holes
in the file (they read as zeros), so a benchmark of the metadata costs the tables' disk space only: 32 KiB for each 16 MiB of
guest space that has a grain. numpy is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from tokvm.core.units import SECTOR
from tokvm.testing.sesparse_writer import (
    BACKMAP,
    DIRECTORY,
    ENTRIES_PER_TABLE,
    FREE_BITMAP,
    GRAIN_SIZE,
    GRAINS,
    TABLE_SIZE,
    TABLES,
    SesparseLayout,
)
from tokvm.testing.vmdk_descriptor import ESXI, Dialect, ExtentLine, Identity, extent_path, write_descriptor
from tokvm.testing.vmdk_grains import write_at

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Column = npt.NDArray[np.int64]
    Words = npt.NDArray[np.uint64]

_WINDOW = 512
_DATA, _IN_USE = 3 << 60, 1 << 60


def write_giant_sesparse(
    path: Path,
    *,
    size: int,
    grains: Column,
    identity: Identity | None = None,
    first_grain: int = 0,
    seed: int | None = None,
    dialect: Dialect = ESXI,
) -> list[Path]:
    """Write a seSparse descriptor and extent in which these guest grains (ascending, once each) are DATA; returns both files.

    seed: shuffles the grains in the file, and the tables. Several GiB of tables take as long as the disk takes to hold them.
    """
    import numpy as np

    if grains.size and (grains[0] < 0 or grains[-1] * GRAIN_SIZE >= size or not bool((np.diff(grains) > 0).all())):
        raise ValueError("grain numbers must ascend and lie inside the disk")
    extent = extent_path(path, "sesparse")
    line = ExtentLine(size, "SESPARSE", extent.name)
    path.write_bytes(write_descriptor("seSparse", [line], identity=identity, dialect=dialect))
    layout = SesparseLayout.of(size, first_grain)
    rng = None if seed is None else np.random.default_rng(seed)
    number = np.arange(grains.size, dtype=np.int64) if rng is None else rng.permutation(grains.size)
    with extent.open("wb", buffering=0) as out:
        tables = _write_tables(out, layout, grains, number + first_grain, rng)
        _write_maps(out, layout, grains, number, first_grain)
        write_at(out, 0, layout.headers(tables, 0))
        out.truncate(layout.start(GRAINS) + (first_grain + grains.size) * GRAIN_SIZE)
    return [path, extent]


def scattered_grains(*, size: int, count: int, tables: int, seed: int) -> Column:
    """About `count` grain numbers: `tables` random grain tables of the disk, and random grains of each."""
    import numpy as np

    rng = np.random.default_rng(seed)
    all_tables = -(-size // (ENTRIES_PER_TABLE * GRAIN_SIZE))
    chosen = np.sort(rng.choice(all_tables, size=min(tables, all_tables), replace=False)).astype(np.int64)
    share = min(1.0, count / (chosen.size * ENTRIES_PER_TABLE))
    found = []
    for start in range(0, chosen.size, _WINDOW):
        window = chosen[start : start + _WINDOW]
        row, entry = np.nonzero(rng.random((window.size, ENTRIES_PER_TABLE), dtype=np.float32) < share)
        found.append(window[row] * ENTRIES_PER_TABLE + entry)
    grains = np.concatenate(found)
    return grains[grains < -(-size // GRAIN_SIZE)]


def _split(kind: int, number: Column) -> Words:
    """Entries: the number's low 12 bits in bits 48-59, the rest at the bottom."""
    import numpy as np

    words = number.astype(np.uint64)
    return np.uint64(kind) | (words & np.uint64(0xFFF)) << np.uint64(48) | words >> np.uint64(12)


def _write_tables(
    out: BinaryIO, layout: SesparseLayout, grains: Column, number: Column, rng: np.random.Generator | None
) -> int:
    """Directory and tables; returns how many tables there are."""
    import numpy as np

    table_of = grains // ENTRIES_PER_TABLE
    first = np.flatnonzero(np.diff(table_of, prepend=-1))
    place = np.arange(first.size, dtype=np.int64) if rng is None else rng.permutation(first.size)
    directory = np.zeros(layout.tables, dtype="<u8")
    directory[table_of[first]] = np.uint64(_IN_USE) | place.astype(np.uint64)
    write_at(out, layout.start(DIRECTORY), directory.tobytes())
    bounds = np.append(first, grains.size)
    for start in range(0, first.size, _WINDOW):
        rows = place[start : start + _WINDOW]
        low, high = int(bounds[start]), int(bounds[start + rows.size])
        row = np.repeat(np.arange(rows.size), np.diff(bounds[start : start + rows.size + 1]))
        window = np.zeros((rows.size, ENTRIES_PER_TABLE), dtype="<u8")
        window[row, grains[low:high] % ENTRIES_PER_TABLE] = _split(_DATA, number[low:high])
        for at, data in _stretches(rows, window):
            write_at(out, layout.start(TABLES) + at * TABLE_SIZE, data)
    return int(first.size)


def _stretches(rows: Column, window: Words) -> Iterator[tuple[int, bytes]]:
    """(place of the first table, tables) for tables that are consecutive in the file."""
    import numpy as np

    borders = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), rows.size]
    for low, high in pairwise(borders):
        yield int(rows[low]), window[low:high].tobytes()


def _write_maps(out: BinaryIO, layout: SesparseLayout, grains: Column, number: Column, first_grain: int) -> None:
    import numpy as np

    back = np.empty(grains.size, dtype="<u8")
    back[number] = _split(_IN_USE, grains)
    for start in range(0, back.size, 1 << 24):
        write_at(out, layout.start(BACKMAP) + 8 * (first_grain + start), back[start : start + (1 << 24)].tobytes())
    in_use = np.zeros(first_grain % (8 * SECTOR) + grains.size, dtype=np.uint8)
    in_use[first_grain % (8 * SECTOR) :] = 1
    packed = np.packbits(in_use, bitorder="little").tobytes()
    write_at(out, layout.start(FREE_BITMAP) + first_grain // (8 * SECTOR) * SECTOR, packed)
