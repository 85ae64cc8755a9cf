"""A raw file as the base of a chain: byte n of the file is byte n of the guest disk; all of it is DATA.

A raw file has no id of its own. A VHD made over a raw parent names the null id, so that is what a raw base is called.
"""

from __future__ import annotations

from collections.abc import Iterator

from tokvm.core.extents import ExtentKind, ExtentMap
from tokvm.images.base import MAX_ROWS, WINDOW, ReadAt

RAW_IDENTITY = "00000000-0000-0000-0000-000000000000"


class RawLayer:
    """Implements `images.base.Layer`."""

    format = "raw"
    identity = RAW_IDENTITY
    parent_identity: str | None = None

    def __init__(self, file: ReadAt) -> None:
        self.file = file

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def size(self) -> int:
        return self.file.size

    def windows(self, *, max_rows: int = MAX_ROWS) -> Iterator[ExtentMap]:
        for start in range(0, self.size, WINDOW):
            yield self.window(start, start + WINDOW)

    def window(self, start: int, stop: int) -> ExtentMap:
        return linear_map(start, min(stop, self.size))

    def describe(self) -> dict[str, object]:
        return {"format": self.format, "virtual_size": self.size, "identity": self.identity, "warnings": []}


def linear_map(start: int, stop: int) -> ExtentMap:
    """[start, stop) of a disk that lies in its file byte for byte from the file's beginning."""
    if start >= stop:
        return ExtentMap.empty(start, start)
    return ExtentMap.build(start, stop, [start], stop - start, int(ExtentKind.DATA), start)
