"""Which record of several manifests speaks for a byte: the newest that covers it.

old   |-------- A --------|---- B ----|
new         |- C -|
now   | A*  |  C  | A*    |     B     |        C and B are whole; A is only there in parts, so its hash proves nothing any more
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokvm.transfer.manifest import ManifestReader, RecordKind, Records

Column = npt.NDArray[np.int64]
WINDOW = 1 << 32  # of guest disk at a time: 65 536 cells, so some MiB of records


@dataclass(frozen=True, slots=True, eq=False)
class Resolved:
    """Of the window [start, stop): `whole` records still speak for every byte of theirs; `zeros` are (offset, length) rows that
    must read as zeros; `stale` bytes have a record that is only there in parts; `silent` bytes have none."""

    whole: Records
    zeros: list[tuple[int, int]]
    stale: int
    silent: int


def windows(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, WINDOW):
        yield start, min(size, start + WINDOW)


def resolve(manifests: list[ManifestReader], start: int, stop: int) -> Resolved:
    """Lay the manifests' records (oldest first) over one another. Cells divide a window: only ZERO is clipped."""
    rows = np.concatenate([manifest.records(start, stop) for manifest in manifests])
    begin = np.maximum(rows["offset"].astype(np.int64), start)
    end = np.minimum((rows["offset"] + rows["length"]).astype(np.int64), stop)
    cuts = np.unique(np.concatenate((begin, end)))
    if len(cuts) < 2:
        return Resolved(rows[:0], [], 0, stop - start)
    owner = _paint(np.searchsorted(cuts, begin), np.searchsorted(cuts, end), len(cuts) - 1)
    length = np.diff(cuts)
    named = owner >= 0
    held = np.bincount(owner[named], weights=length[named], minlength=len(rows)).astype(np.int64)
    zero_row = rows["kind"] == RecordKind.ZERO
    is_zero = named & zero_row[np.maximum(owner, 0)]
    whole = ~zero_row & (held == end - begin) & (held > 0)
    stale = int(held[~zero_row & ~whole].sum())
    silent = stop - start - int(length[named].sum())
    return Resolved(rows[whole], _joined(cuts[:-1][is_zero], length[is_zero]), stale, silent)


def _paint(first: Column, last: Column, count: int) -> Column:
    """For each stretch between two cuts the newest record over it, -1 where there is none."""
    owner = np.full(count, -1, np.int64)
    for row, (low, high) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        owner[low:high] = row
    return owner


def _joined(offset: Column, length: Column) -> list[tuple[int, int]]:
    """Neighbours made one."""
    if not len(offset):
        return []
    head = np.concatenate(([True], offset[1:] != offset[:-1] + length[:-1]))
    first = np.flatnonzero(head)
    return list(zip(offset[first].tolist(), np.add.reduceat(length, first).tolist(), strict=True))
