"""The extents of a disk side by side, each with a map of its own; and the two kinds that have no tables.

flat   |….offset….|==== size bytes, raw ====|…   an extent file may be longer than stated, never shorter
zero   no file: all of it is ZERO
"""

from __future__ import annotations

from typing import Protocol

from tokvm.core.extents import ExtentKind, ExtentMap
from tokvm.core.units import SECTOR
from tokvm.images.base import ReadAt
from tokvm.images.fields import bad_field
from tokvm.images.raw import linear_map
from tokvm.images.vmdk.descriptor import ExtentLine
from tokvm.images.vmdk.grains import PartMap

UNCLEAN = "it was not closed cleanly: its host may have lost its last writes"


class Part(Protocol):
    """One extent, parsed and believed. Its map is of [0, size), and its rows' file offsets are good in `file`."""

    @property
    def file(self) -> ReadAt | None: ...

    @property
    def size(self) -> int: ...

    @property
    def warnings(self) -> tuple[str, ...]: ...

    def walker(self) -> PartMap:
        """`map_part` for one walk over all of it, which checks that no two grains lie at one place."""
        ...

    def map_part(self, start: int, stop: int, max_rows: int | None) -> ExtentMap: ...

    def describe(self) -> dict[str, object]: ...


class FlatPart:
    """Raw bytes of a file. The file's holes are ZERO."""

    warnings: tuple[str, ...] = ()

    def __init__(self, file: ReadAt, extent: ExtentLine) -> None:
        self.file = file
        self.size = extent.size
        self._offset = extent.first_sector * SECTOR
        if self._offset + self.size > file.size:
            allowed = f"at least {self._offset + self.size}, as its descriptor says"
            raise bad_field(file.name, 0, f"size of the {extent.type.value} extent", file.size, allowed)

    def walker(self) -> PartMap:
        return self.map_part

    def map_part(self, start: int, stop: int, max_rows: int | None) -> ExtentMap:
        return linear_map(start, stop, file=self.file, shift=self._offset, max_rows=max_rows)

    def describe(self) -> dict[str, object]:
        return {"kind": "flat", "offset": self._offset}


class ZeroPart:
    """An extent without a file."""

    file: ReadAt | None = None
    warnings: tuple[str, ...] = ()

    def __init__(self, size: int) -> None:
        self.size = size

    def walker(self) -> PartMap:
        return self.map_part

    def map_part(self, start: int, stop: int, max_rows: int | None) -> ExtentMap:  # one row always has room
        return ExtentMap.build(start, stop, [start], stop - start, int(ExtentKind.ZERO))

    def describe(self) -> dict[str, object]:
        return {"kind": "zero"}


def size_of(capacity: int, stated: int | None, *, name: str, offset: int) -> int:
    """Bytes of the disk in a sparse extent of `capacity` sectors: what the descriptor states, which is what the hypervisor
    shows; VirtualBox rounds the header's up to whole grains."""
    if stated is None:
        return capacity * SECTOR
    if stated > capacity:
        raise bad_field(name, offset, "header capacity", capacity, f"at least {stated} sectors, as the descriptor says")
    return stated * SECTOR
