"""From a window's map to buffers: in which order rows are handed out, and which reads fill which buffer.

    guest   |---- base ----|c1|------ base ------|c2|-- base --|    a unit: 2 MiB of the guest disk, here of several layers
    reads   |--------------------------------------------------|    one of the base, through the holes,
                           |c1|                  |c2|               then what lies above it
    chunk   |==================================================|    one, so one large write instead of five small ones

Order: rows go by (layer, file offset); the rows of a unit that has several layers stay together, by guest offset, at the place
of its lowest layer's first row. It depends on the map alone, never on the buffers' size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tokvm.core.extents import Column, ExtentMap
from tokvm.core.units import KiB, MiB
from tokvm.images.buffers import PAGE

UNIT = 2 * MiB
_GAP = 32 * KiB  # reading through a gap of this size costs less than a second read
_FAR = np.iinfo(np.int64).max


class Rows(NamedTuple):
    """DATA rows as columns. offset: in the guest disk."""

    layer: Column
    file_offset: Column
    offset: Column
    length: Column

    def take(self, which: Column | slice) -> Rows:
        return Rows(*(column[which] for column in self))

    def skip(self, count: int) -> Rows:
        """Without the first `count` bytes."""
        first = int(np.searchsorted(np.cumsum(self.length), count, side="right"))
        rest = self.take(slice(first, None))
        if not len(rest.length):
            return rest
        done = count - int(self.length[:first].sum())
        head = np.zeros_like(rest.length)
        head[0] = done
        return Rows(rest.layer, rest.file_offset + head, rest.offset + head, rest.length - head)


Read = tuple[int, int, int, int]  # layer, file offset, place in the buffer, length


@dataclass(slots=True)
class Fill:
    """What goes into one buffer. reads: in this order, because a later one may lie over an earlier one. pieces: (guest offset,
    length, place in the buffer) of each chunk."""

    reads: list[Read] = field(default_factory=list)
    pieces: list[tuple[int, int, int]] = field(default_factory=list)


def in_order(data: ExtentMap) -> Rows:
    """A map of nothing but DATA, cut at the units' lines, in the order of hand-out."""
    rows = _cut(Rows(data.layer, data.file_offset, data.offset, data.length), data.offset, UNIT)
    if not len(rows.offset):
        return rows
    first = np.flatnonzero(np.diff(rows.offset // UNIT, prepend=-1))
    unit = np.repeat(np.arange(len(first)), np.diff(first, append=len(rows.offset)))
    lowest, highest = np.minimum.reduceat(rows.layer, first), np.maximum.reduceat(rows.layer, first)
    begin = np.minimum.reduceat(np.where(rows.layer == lowest[unit], rows.file_offset, _FAR), first)
    place = np.where((lowest != highest)[unit], begin[unit], rows.file_offset)
    return rows.take(np.lexsort((rows.offset, place, lowest[unit])))


def fills(rows: Rows, size: int) -> Iterator[Fill]:
    """Pack ordered rows into buffers of `size` bytes."""
    if not len(rows.offset):
        return
    align = PAGE if size >= PAGE else 1
    cell = min(UNIT, size // align * align)
    rows = _cut(rows, rows.offset % UNIT, cell)
    plan = _Plan.of(rows, rows.offset // UNIT * UNIT + rows.offset % UNIT // cell, align)
    fill, used = Fill(), 0
    for start, span, reads, pieces in plan.clusters():
        at = -(-used // align) * align
        if at + span > size:
            yield fill
            fill, at = Fill(), 0
        fill.reads += [(layer, file_offset, at + offset - start, length) for layer, file_offset, offset, length in reads]
        fill.pieces += [(offset, length, at + offset - start) for offset, length in pieces]
        used = at + span
    yield fill


@dataclass(frozen=True, slots=True)
class _Plan:
    """Clusters: rows that lie near one another in the guest, and so go into one stretch of a buffer, page upon page.

    begin, end: guest bytes of each cluster. reads, pieces: all of them, by cluster; *_from: where each cluster's begin.
    """

    begin: Column
    end: Column
    reads: Rows
    reads_from: Column
    pieces: tuple[Column, Column]
    pieces_from: Column

    @classmethod
    def of(cls, rows: Rows, cell: Column, align: int) -> _Plan:
        end = rows.offset + rows.length
        gap = rows.offset[1:] - end[:-1]
        opens = np.ones(len(end), np.bool_)
        opens[1:] = (cell[1:] != cell[:-1]) | (gap < 0) | (gap > _GAP)
        first = np.flatnonzero(opens)
        last = np.append(first[1:], len(end)) - 1
        cluster = np.cumsum(opens) - 1
        apart = opens.copy()
        apart[1:] |= gap != 0
        piece = np.flatnonzero(apart)
        piece_end = end[np.append(piece[1:], len(end)) - 1]
        reads, of_cluster = _reads(rows, end, cluster)
        numbers = np.arange(len(first) + 1)
        return cls(
            begin=rows.offset[first] // align * align,
            end=end[last],
            reads=reads,
            reads_from=np.searchsorted(of_cluster, numbers),
            pieces=(rows.offset[piece], piece_end - rows.offset[piece]),
            pieces_from=np.searchsorted(cluster[piece], numbers),
        )

    def clusters(self) -> Iterator[tuple[int, int, list[tuple[int, int, int, int]], list[tuple[int, int]]]]:
        """(guest offset of the stretch, its length, reads as (layer, file offset, guest offset, length), pieces)."""
        reads = list(zip(*(column.tolist() for column in self.reads), strict=True))
        pieces = list(zip(*(column.tolist() for column in self.pieces), strict=True))
        reads_from, pieces_from = self.reads_from.tolist(), self.pieces_from.tolist()
        for number, (begin, end) in enumerate(zip(self.begin.tolist(), self.end.tolist(), strict=True)):
            mine = slice(reads_from[number], reads_from[number + 1])
            yield begin, end - begin, reads[mine], pieces[pieces_from[number] : pieces_from[number + 1]]


def _reads(rows: Rows, end: Column, cluster: Column) -> tuple[Rows, Column]:
    """The reads of all clusters and the cluster of each; within a cluster lower layers first.

    A read goes on through a gap when the file does too, and nothing in the gap is of a lower layer: that was read before.
    """
    found: list[Rows] = []
    owner: list[Column] = []
    for layer in np.unique(rows.layer):
        mine = np.flatnonzero(rows.layer == layer)
        part, ends, of = rows.take(mine), end[mine], cluster[mine]
        below = np.cumsum(rows.layer < layer)[mine]
        shift = part.file_offset - part.offset
        joins = (
            (of[1:] == of[:-1]) & (shift[1:] == shift[:-1]) & (part.offset[1:] - ends[:-1] <= _GAP) & (below[1:] == below[:-1])
        )
        head = np.flatnonzero(np.concatenate(([True], ~joins)))
        stop = ends[np.append(head[1:], len(mine)) - 1]
        found.append(Rows(part.layer[head], part.file_offset[head], part.offset[head], stop - part.offset[head]))
        owner.append(of[head])
    owners = np.concatenate(owner)
    order = np.argsort(owners, kind="stable")
    return Rows(*(np.concatenate(column) for column in zip(*found, strict=True))).take(order), owners[order]


def _cut(rows: Rows, at: Column, step: int) -> Rows:
    """The rows cut wherever `at` (where each begins, on a scale of the caller's) crosses a multiple of `step`."""
    count = (at + rows.length - 1) // step - at // step + 1
    if not bool((count > 1).any()):
        return rows
    row = np.repeat(np.arange(len(count)), count)
    number = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    head = np.where(number == 0, 0, (at[row] // step + number) * step - at[row])
    tail = np.minimum((at[row] // step + number + 1) * step - at[row], rows.length[row])
    return Rows(rows.layer[row], rows.file_offset[row] + head, rows.offset[row] + head, tail - head)
