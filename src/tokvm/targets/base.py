"""What callers may ask of any open target beyond a DiskWriter's work."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from tokvm.core.disk import DiskWriter


@runtime_checkable
class Target(DiskWriter, Protocol):
    """A DiskWriter that somebody gave a path."""

    @property
    def path(self) -> str: ...

    def fileno(self) -> int:
        """The descriptor of the file or device that is held. For an image format this is the image, not the guest's disk."""
        ...

    def is_hole(self, offset: int, length: int) -> bool:
        """True when all of the range is known to read as zeros without reading it; False when that is not known."""
        ...
