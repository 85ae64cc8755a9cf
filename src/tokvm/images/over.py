"""A file that shows another one differently: with a log's writes, or its grains inflated."""

from __future__ import annotations

from tokvm.images.base import ReadAt, announcer


class OverFile:
    """What such a `ReadAt` takes from the file below it, which it owns: its name, and who it is for marks and resuming."""

    def __init__(self, file: ReadAt) -> None:
        self.file = file
        self.name = file.name
        self._announce = announcer(file)

    @property
    def inodes(self) -> tuple[object, ...]:
        return tuple(getattr(self.file, "inodes", ()))

    @property
    def stamp(self) -> str:
        return str(getattr(self.file, "stamp", ""))

    def fileno(self) -> int:
        found: int = self.file.fileno()  # type: ignore[attr-defined]
        return found

    def close(self) -> None:
        self.file.close()
