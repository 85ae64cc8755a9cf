"""Several files as one address space: the extent files of one VMDK, or an image whose parts lie apart.

    file 0 |-------|          file 1 |----------------|        …
           0       size               place of file 1

A file's place is a multiple of STEP and at least a page behind the end of the one before, so no row of a map goes on from one
file into the next, and O_DIRECT alignment within a file stays what it was.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

from tokvm.core.errors import ImageError
from tokvm.core.units import MiB, round_up
from tokvm.images.base import ReadAt, announcer

STEP = MiB


class JoinedFile:
    """Implements `images.base.ReadAt` over files, which it owns. `places[i]` is where file i begins."""

    def __init__(self, name: str, files: Sequence[ReadAt]) -> None:
        self.name = name
        self.files = tuple(files)
        self.places: list[int] = []
        end = 0
        for file in self.files:
            self.places.append(end)
            end = round_up(end + file.size + 1, STEP)
        self.size = end
        self._announce = [announcer(file) for file in self.files]

    @property
    def inodes(self) -> tuple[object, ...]:
        return tuple(inode for file in self.files for inode in getattr(file, "inodes", ()))

    @property
    def stamp(self) -> str:
        return " ".join(str(getattr(file, "stamp", "")) for file in self.files)

    def fileno(self) -> int:
        """Of the first file, for marks on the image as a whole."""
        found: int = self.files[0].fileno()  # type: ignore[attr-defined]
        return found

    def read_into(self, offset: int, buffer: memoryview) -> None:
        index, inside = self._find(offset)
        self.files[index].read_into(inside, buffer)

    def will_read(self, offset: int, length: int) -> None:
        index, inside = self._find(offset)
        self._announce[index](inside, length)

    def locate(self, offset: int) -> tuple[str, int | None]:
        """(name of the file, offset in it); None where its bytes are not the guest's (compressed)."""
        index, inside = self._find(offset)
        file = self.files[index]
        locate: Callable[[int], tuple[str, int | None]] | None = getattr(file, "locate", None)
        return (file.name, inside) if locate is None else locate(inside)

    def _find(self, offset: int) -> tuple[int, int]:
        index = bisect_right(self.places, offset) - 1
        if index < 0:
            raise ImageError(f"nothing lies at {offset:#x}", where=self.name, fix="report this: it is a mistake of tokvm's")
        return index, offset - self.places[index]

    def close(self) -> None:
        for file in self.files:
            file.close()
