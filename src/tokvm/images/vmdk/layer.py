"""VMDK as a Layer."""

from __future__ import annotations

from tokvm.core.errors import ImageError
from tokvm.images.base import ExtentFiles, Layer, ReadAt


def open_vmdk(file: ReadAt, extents: ExtentFiles | None = None) -> Layer:
    """Parse and check a VMDK: a descriptor, or an extent file."""
    raise ImageError("VMDK is not read yet", where=file.name)
