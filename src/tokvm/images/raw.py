"""A raw file as the base of a chain: byte n of the file is byte n of the guest disk. Its holes are ZERO, the rest is DATA.

A raw file has no id of its own. A VHD made over a raw parent names the null id, so that is what a raw base is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from tokvm.core.extents import ExtentKind, ExtentMap
from tokvm.images.base import Linkage, MappedLayer, ReadAt

RAW_IDENTITY = "00000000-0000-0000-0000-000000000000"
DataRanges = Callable[[int, int], Iterator[tuple[int, int]]]


class RawLayer(MappedLayer):
    """Implements `images.base.Layer`."""

    format = "raw"

    def __init__(self, file: ReadAt) -> None:
        super().__init__(file, size=file.size, linkage=Linkage((RAW_IDENTITY,), unique=False))

    def map_part(self, start: int, stop: int, max_rows: int | None) -> ExtentMap:
        return linear_map(start, stop, file=self.file, max_rows=max_rows)

    def describe(self) -> dict[str, object]:
        return {"format": self.format, "virtual_size": self.size, "identity": self.identity, "warnings": list(self.warnings)}


def linear_map(start: int, stop: int, *, file: ReadAt | None = None, shift: int = 0, max_rows: int | None = None) -> ExtentMap:
    """[start, stop) of a disk whose byte n is byte n + shift of the file. `file`: one whose holes are to be found, if it has a
    way to say so (`data_ranges(start, stop)`); the map ends early when there are more than `max_rows` of them."""
    if start >= stop:
        return ExtentMap.empty(start, start)
    data_ranges: DataRanges | None = getattr(file, "data_ranges", None)
    if data_ranges is None:
        return ExtentMap.build(start, stop, [start], stop - start, int(ExtentKind.DATA), start + shift)
    found = list(islice(data_ranges(start + shift, stop + shift), max_rows))
    if max_rows is not None and len(found) == max_rows:
        stop = min(stop, sum(found[-1]) - shift)
    if not found:
        return ExtentMap.build(start, stop, [start], stop - start, int(ExtentKind.ZERO))
    where, length = np.array(found, np.int64).T
    data = ExtentMap.build(start, stop, where - shift, length, int(ExtentKind.DATA), where)
    zeros = ExtentMap.build(start, stop, [start], stop - start, int(ExtentKind.ZERO))
    return data.over(zeros)
