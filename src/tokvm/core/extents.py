"""What is where on a guest disk, in numpy columns, and the algebra of laying one layer over another.

    window [start, stop) of the guest disk, bytes
    offset | length | kind | file_offset | layer      one row per extent, ascending, disjoint, coalesced

`kind` is three-valued. DATA: the bytes are at `file_offset` in the image file of `layer`. ZERO: the range reads as zeros and
hides the parent's bytes. ABSENT: this layer says nothing; the parent decides (in a base: zeros). ABSENT has no rows: it is
what no row names, so a map of a sparse disk costs what is there, not what is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.int64]


class ExtentKind(IntEnum):
    ABSENT = 0
    ZERO = 1
    DATA = 2


@dataclass(frozen=True, slots=True)
class Extent:
    """A byte range of the guest disk. `file_offset` and `layer` mean something only for DATA."""

    offset: int
    length: int
    kind: ExtentKind
    file_offset: int = 0
    layer: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True, slots=True, eq=False)
class ExtentMap:
    """DATA and ZERO extents of the window [start, stop); everything else in the window is ABSENT.

    Columns are int64, equally long, ascending and disjoint in `offset`; the constructors see to it.
    """

    start: int
    stop: int
    offset: Column
    length: Column
    kind: Column
    file_offset: Column
    layer: Column

    @classmethod
    def empty(cls, start: int, stop: int) -> ExtentMap:
        none = np.empty(0, np.int64)
        return cls(start, stop, none, none, none, none, none)

    @classmethod
    def build(
        cls,
        start: int,
        stop: int,
        offset: npt.ArrayLike,
        length: npt.ArrayLike,
        kind: npt.ArrayLike,
        file_offset: npt.ArrayLike = 0,
        layer: npt.ArrayLike = 0,
    ) -> ExtentMap:
        """A map from columns in any order (scalars are spread), clipped to the window and coalesced.

        ValueError when two rows overlap: a layer that says two things about one byte is damaged.
        """
        at, size, what, where, who = (
            np.array(column, np.int64)
            for column in np.broadcast_arrays(np.atleast_1d(offset), length, kind, file_offset, layer)
        )
        if len(at) > 1 and not bool(np.all(at[1:] >= at[:-1])):
            order = np.argsort(at, kind="stable")
            at, size, what, where, who = at[order], size[order], what[order], where[order], who[order]
        head = np.maximum(start - at, 0)
        end = np.minimum(at + size, stop)
        at, where = at + head, where + head
        size = end - at
        keep = (size > 0) & (what != ExtentKind.ABSENT)
        at, size, what, where, who = at[keep], size[keep], what[keep], where[keep], who[keep]
        if len(at) > 1 and bool(np.any(at[1:] < at[:-1] + size[:-1])):
            raise ValueError("extents overlap")
        return cls(start, stop, at, size, what, where, who)._coalesced()

    @classmethod
    def of(cls, start: int, stop: int, extents: Iterable[Extent]) -> ExtentMap:
        """A map from a few Extent values."""
        rows = [(e.offset, e.length, int(e.kind), e.file_offset, e.layer) for e in extents]
        if not rows:
            return cls.empty(start, stop)
        return cls.build(start, stop, *np.array(rows, np.int64).T)

    def __len__(self) -> int:
        return len(self.offset)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExtentMap):
            return NotImplemented
        return (self.start, self.stop) == (other.start, other.stop) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Extent]:
        """DATA and ZERO extents, ascending. For few rows; hot code works on the columns."""
        columns = (self.offset, self.length, self.kind, self.file_offset, self.layer)
        for at, size, what, where, who in zip(*(column.tolist() for column in columns), strict=True):
            kind = ExtentKind(what)
            yield Extent(at, size, kind, where if kind is ExtentKind.DATA else 0, who if kind is ExtentKind.DATA else 0)

    def explicit(self) -> Iterator[Extent]:
        """All of the window, ascending, with ABSENT extents between the others."""
        at = self.start
        for extent in self:
            if extent.offset > at:
                yield Extent(at, extent.offset - at, ExtentKind.ABSENT)
            yield extent
            at = extent.end
        if at < self.stop:
            yield Extent(at, self.stop - at, ExtentKind.ABSENT)

    def bytes_of(self, kind: ExtentKind) -> int:
        if kind is ExtentKind.ABSENT:
            return self.stop - self.start - int(self.length.sum())
        return int(self.length[self.kind == kind].sum())

    def only(self, kind: ExtentKind) -> ExtentMap:
        return self._rows(self.kind == kind)

    def with_layer(self, layer: int) -> ExtentMap:
        """The same map, every row marked as belonging to `layer`."""
        return ExtentMap(
            self.start, self.stop, self.offset, self.length, self.kind, self.file_offset, np.full_like(self.offset, layer)
        )

    def clip(self, start: int, stop: int) -> ExtentMap:
        """The part inside [start, stop)."""
        start, stop = max(start, self.start), min(stop, self.stop)
        if start >= stop:
            return ExtentMap.empty(start, start)
        first = int(np.searchsorted(self.offset + self.length, start, side="right"))
        last = int(np.searchsorted(self.offset, stop, side="left"))
        part = slice(first, last)
        return ExtentMap.build(
            start, stop, self.offset[part], self.length[part], self.kind[part], self.file_offset[part], self.layer[part]
        )

    def gaps(self) -> tuple[Column, Column]:
        """(offsets, lengths) of the ABSENT ranges of the window, ascending."""
        begins = np.concatenate(([self.start], self.offset + self.length))
        ends = np.concatenate((self.offset, [self.stop]))
        some = ends > begins
        return begins[some], (ends - begins)[some]

    def over(self, lower: ExtentMap) -> ExtentMap:
        """This layer laid over `lower` (same window): what this one names hides what is below, ZERO included."""
        if (self.start, self.stop) != (lower.start, lower.stop):
            raise ValueError("maps of different windows cannot be merged")
        if not len(lower):
            return self
        if not len(self):
            return lower
        cuts = np.unique(np.concatenate((self.offset, self.offset + self.length, lower.offset, lower.offset + lower.length)))
        at, size = cuts[:-1], np.diff(cuts)
        above, row_above = self._row_at(at)
        below, row_below = lower._row_at(at)
        use = above | below
        at, size, above = at[use], size[use], above[use]
        row_above, row_below = row_above[use], row_below[use]
        kind = np.where(above, self.kind[row_above], lower.kind[row_below])
        layer = np.where(above, self.layer[row_above], lower.layer[row_below])
        where = np.where(
            above,
            self.file_offset[row_above] + (at - self.offset[row_above]),
            lower.file_offset[row_below] + (at - lower.offset[row_below]),
        )
        return ExtentMap(self.start, self.stop, at, size, kind, where, layer)._coalesced()

    def _row_at(self, at: Column) -> tuple[npt.NDArray[np.bool_], Column]:
        """For each position: is there a row over it, and which (0 where there is none)."""
        row = np.searchsorted(self.offset, at, side="right") - 1
        safe = np.maximum(row, 0)
        inside = (row >= 0) & (at < self.offset[safe] + self.length[safe])
        return inside, safe

    def _rows(self, keep: npt.NDArray[np.bool_]) -> ExtentMap:
        return ExtentMap(
            self.start,
            self.stop,
            self.offset[keep],
            self.length[keep],
            self.kind[keep],
            self.file_offset[keep],
            self.layer[keep],
        )

    def _coalesced(self) -> ExtentMap:
        """Neighbours that go on in guest and in file become one row."""
        if len(self) < 2:
            return self
        data = self.kind == ExtentKind.DATA
        joins = (
            (self.offset[1:] == self.offset[:-1] + self.length[:-1])
            & (self.kind[1:] == self.kind[:-1])
            & (
                ~data[1:]
                | ((self.file_offset[1:] == self.file_offset[:-1] + self.length[:-1]) & (self.layer[1:] == self.layer[:-1]))
            )
        )
        if not bool(joins.any()):
            return self
        head = np.concatenate(([True], ~joins))
        first = np.flatnonzero(head)
        length = np.add.reduceat(self.length, first)
        return ExtentMap(
            self.start,
            self.stop,
            self.offset[first],
            length,
            self.kind[first],
            self.file_offset[first],
            self.layer[first],
        )
