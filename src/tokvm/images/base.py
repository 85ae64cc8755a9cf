"""The doors of image parsing: ReadAt (bytes in) and Layer (map out)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from tokvm.core.extents import ExtentMap


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

    def windows(self) -> Iterator[ExtentMap]:
        """The whole disk as ascending windows of bounded row count. DATA rows carry file offsets in `file`."""
        ...

    def window(self, start: int, stop: int) -> ExtentMap:
        """The map of [start, stop), clipped to the virtual size."""
        ...

    def describe(self) -> dict[str, object]:
        """Everything a person wants to know, JSON-ready."""
        ...
