"""An image file as it is after writes that were never made: a log's, which a reader must see and must not carry out.

    file      |-----------------------------| size            opened for reading
    writes         |page|    |  zeros  |        |page|        in order; a later one hides an earlier one
    patches        |page|    |  zer|page|   |zer|page|        disjoint, ascending; new space behind the file's end is zeros

A read that touches no patch goes to the file as it is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokvm.core.errors import ImageError
from tokvm.images.base import ReadAt
from tokvm.images.over import OverFile


@dataclass(frozen=True, slots=True)
class Write:
    """`length` bytes at `offset` of the file: these bytes, or zeros."""

    offset: int
    length: int
    data: bytes | None = None


class PatchedFile(OverFile):
    """Implements `images.base.ReadAt` over a file, which it owns. Bytes and offsets are those of the file after the writes."""

    def __init__(self, file: ReadAt, writes: Sequence[Write], size: int) -> None:
        super().__init__(file)
        self.size = max(size, file.size, *(write.offset + write.length for write in writes), 0)
        growth = [Write(file.size, self.size - file.size)] if self.size > file.size else []
        self._writes = [*growth, *(write for write in writes if write.length)]
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._source: list[int] = []  # index into _writes of each patch
        if self._writes:
            self._lay()

    def _lay(self) -> None:
        """Paint the writes over one another, on the scale of all places where one begins or ends."""
        starts = np.array([write.offset for write in self._writes], np.int64)
        ends = starts + np.array([write.length for write in self._writes], np.int64)
        cuts = np.unique(np.concatenate((starts, ends)))
        owner = np.full(len(cuts), -1, np.int32)
        spans = zip(np.searchsorted(cuts, starts).tolist(), np.searchsorted(cuts, ends).tolist(), strict=True)
        for index, (first, last) in enumerate(spans):
            owner[first:last] = index
        first = np.flatnonzero(np.diff(owner, prepend=-1))
        last = np.append(first[1:], len(cuts) - 1)
        used = owner[first] >= 0
        self._starts, self._ends = cuts[first][used].tolist(), cuts[last][used].tolist()
        self._source = owner[first][used].tolist()

    @property
    def patches(self) -> int:
        return len(self._starts)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        stop = offset + len(buffer)
        if offset < 0 or stop > self.size:
            raise ImageError(
                f"cannot read {len(buffer)} bytes: with its log replayed the file ends at {self.size:#x}",
                where=f"{self.name}@{offset:#x}",
                fix="copy the file again; it is shorter than it says",
            )
        index = bisect_right(self._ends, offset)
        if index == len(self._ends) or self._starts[index] >= stop:
            self.file.read_into(offset, buffer)
            return
        at = offset
        while at < stop:
            start = self._starts[index] if index < len(self._starts) else stop
            if at < start:
                end = min(start, stop)
                self.file.read_into(at, buffer[at - offset : end - offset])
            else:
                end = min(self._ends[index], stop)
                self._fill(self._writes[self._source[index]], at, buffer[at - offset : end - offset])
                index += 1
            at = end

    @staticmethod
    def _fill(write: Write, at: int, buffer: memoryview) -> None:
        data = write.data
        inside = at - write.offset
        buffer[:] = bytes(len(buffer)) if data is None else data[inside : inside + len(buffer)]

    def will_read(self, offset: int, length: int) -> None:
        end = min(offset + length, self.file.size)
        if offset < end:
            self._announce(offset, end - offset)
