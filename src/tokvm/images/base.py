"""The doors of image parsing: ReadAt, ExtentFiles and ByteStream (bytes in), Layer (map out)."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tokvm.core.extents import ExtentMap
from tokvm.core.units import SECTOR, GiB

WINDOW = 64 * GiB  # guest bytes mapped at once: file order pays off within it, and its map fits into a few MiB
MAX_ROWS = 1 << 17  # rows of one window: 5 MiB of columns, whatever a hostile bitmap says


@runtime_checkable
class ReadAt(Protocol):
    """Random access to the bytes of one image file, wherever it lies. Thread-safe."""

    @property
    def name(self) -> str:
        """For messages: the path or the remote name."""
        ...

    @property
    def size(self) -> int: ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`, or ImageError when the file ends before (never a short read)."""
        ...

    def close(self) -> None: ...


def announcer(file: ReadAt) -> Callable[[int, int], None]:
    """The file's own `will_read(offset, length)`, if it has one: many small reads are announced, then they are on their way
    together. Nothing otherwise."""
    found: Callable[[int, int], None] | None = getattr(file, "will_read", None)
    return found or _announce_nothing


def _announce_nothing(_offset: int, _length: int) -> None:
    """For a file that reads nothing ahead."""


@dataclass(frozen=True, slots=True)
class Linkage:
    """By which names a layer and its child know each other. All names are lower case.

    ids: names of this layer, the one for messages first (VHD: unique id, VHDX: DataWriteGuid, VMDK: `cid-…`, `uuid-…`); none in
    a file that bears none. parents: names of which the parent must have one; none of a base. unique: no two files share an id
    (a VMDK's CID is only a check: a running VM's layers all have their base's, because ESX writes a new one on close only).
    parent_file: the file name by which the child knows its parent, where ids alone do not tell layers apart; without directory.
    """

    ids: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()
    unique: bool = True
    parent_file: str = ""

    def knows_file(self, name: str) -> bool:
        """May the file of this name (a path, too) be the parent? Always, where the ids decide."""
        return self.unique or not self.parent_file or file_name(name) == self.parent_file


def file_name(path: str) -> str:
    """The last part of a path as any hypervisor writes it: `/` or `\\` between directories."""
    return re.split(r"[/\\]", path)[-1]


UNKNOWN_PARENT = "unknown"  # of a child that does not say over what it was made (a bare COWD or seSparse extent)


@runtime_checkable
class Layer(Protocol):
    """One image, parsed and believed. If you hold one, its structures were checked."""

    @property
    def name(self) -> str: ...

    @property
    def format(self) -> str:
        """`raw`, `vhd`, `vhdx`, `vmdk`."""
        ...

    @property
    def file(self) -> ReadAt:
        """Where the rows' file offsets are good. Several files of one image, or its compressed grains, are one `ReadAt`."""
        ...

    @property
    def size(self) -> int:
        """Virtual size, bytes."""
        ...

    @property
    def sector_size(self) -> int:
        """The guest's logical sector: 512, or 4096 on a 4Kn disk."""
        ...

    @property
    def linkage(self) -> Linkage: ...

    @property
    def identity(self) -> str:
        """The first of the linkage's ids; "" when there is none."""
        ...

    @property
    def parent_identity(self) -> str | None:
        """The first name of the parent this layer was made over; None for a base."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """Damage that was read around, and what an operator should know before trusting the content."""
        ...

    def windows(self, *, max_rows: int = MAX_ROWS) -> Iterator[ExtentMap]:
        """The whole disk as ascending windows of bounded row count. DATA rows carry file offsets in `file`.

        A window spans at most WINDOW bytes and holds at most about `max_rows` rows (one block's rows at the least). The
        same file gives the same windows every time. ImageError when a table that is read on the way is damaged; whoever
        must not write before all of it was checked walks it once (`ChainReader.total` does).
        """
        ...

    def window(self, start: int, stop: int) -> ExtentMap:
        """The map of [start, stop), clipped to the virtual size."""
        ...

    def describe(self) -> dict[str, object]:
        """Everything a person wants to know, JSON-ready."""
        ...


class MappedLayer(ABC):
    """A Layer on top of one method: the map of a part. Implements `Layer` but for `describe`."""

    format: str = ""

    def __init__(
        self, file: ReadAt, *, size: int, linkage: Linkage, sector_size: int = SECTOR, warnings: tuple[str, ...] = ()
    ) -> None:
        self.file = file
        self.size = size
        self.linkage = linkage
        self.sector_size = sector_size
        self.warnings = warnings

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def identity(self) -> str:
        return self.linkage.ids[0] if self.linkage.ids else ""

    @property
    def parent_identity(self) -> str | None:
        return self.linkage.parents[0] if self.linkage.parents else None

    def windows(self, *, max_rows: int = MAX_ROWS) -> Iterator[ExtentMap]:
        map_part = self.walker()
        start = 0
        while start < self.size:
            found = map_part(start, min(start + WINDOW, self.size), max_rows)
            yield found
            start = found.stop

    def window(self, start: int, stop: int) -> ExtentMap:
        stop = min(stop, self.size)
        return self.map_part(start, stop, None) if start < stop else ExtentMap.empty(start, start)

    def walker(self) -> Callable[[int, int, int | None], ExtentMap]:
        """`map_part` for one walk over the whole disk. A layer that checks something across windows (no two grains at one place
        of the file) gives each walk a memory of its own here."""
        return self.map_part

    @abstractmethod
    def map_part(self, start: int, stop: int, max_rows: int | None) -> ExtentMap:
        """The map of [start, stop), not empty and inside the disk; or of less of it, cut at a block's end, as soon as it has
        not much more than `max_rows` rows (None: all of it)."""


@runtime_checkable
class ExtentFiles(Protocol):
    """The files that an image may be made of besides its own: those that the caller listed, and no others."""

    def open(self, name: str) -> ReadAt | None:
        """The listed file with this bare name (no directory part), or None when none is. The caller of `open_image` owns it."""
        ...


@runtime_checkable
class ByteStream(Protocol):
    """Bytes in order, once: the standard output of a program on another machine. One reader at a time."""

    def read_into(self, buffer: memoryview) -> int:
        """Bytes put at the start of `buffer`: at least 1, may be fewer than it holds; 0 means the end.

        ConnectionLost when the peer is silent for too long or gone.
        """
        ...

    def finish(self) -> None:
        """After the end: raises ConnectionLost or SourceError unless the peer says that all of it was sent."""
        ...

    def close(self) -> None:
        """Stop now, whatever is still to come. Idempotent."""
        ...
