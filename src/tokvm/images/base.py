"""The doors of image parsing: ReadAt and ByteStream (bytes in), Layer (map out)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

from tokvm.core.extents import ExtentMap
from tokvm.core.units import GiB

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


@runtime_checkable
class Layer(Protocol):
    """One image file, parsed and believed. If you hold one, its structures were checked."""

    @property
    def name(self) -> str: ...

    @property
    def format(self) -> str:
        """`vhd`, later `vhdx`, `vmdk`, …"""
        ...

    @property
    def file(self) -> ReadAt: ...

    @property
    def size(self) -> int:
        """Virtual size, bytes."""
        ...

    @property
    def identity(self) -> str:
        """The id by which a child names this layer (VHD: footer unique id). Lower-case hex with dashes."""
        ...

    @property
    def parent_identity(self) -> str | None:
        """The id of the parent this layer was made over; None for a base."""
        ...

    def windows(self, *, max_rows: int = MAX_ROWS) -> Iterator[ExtentMap]:
        """The whole disk as ascending windows of bounded row count. DATA rows carry file offsets in `file`.

        A window spans at most WINDOW bytes and holds at most about `max_rows` rows (one block's rows at the least). The
        same file gives the same windows every time.
        """
        ...

    def window(self, start: int, stop: int) -> ExtentMap:
        """The map of [start, stop), clipped to the virtual size."""
        ...

    def describe(self) -> dict[str, object]:
        """Everything a person wants to know, JSON-ready."""
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
