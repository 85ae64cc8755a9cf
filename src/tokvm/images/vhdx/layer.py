"""VHDX as a Layer."""

from __future__ import annotations

from tokvm.core.errors import ImageError
from tokvm.images.base import Layer, ReadAt


def open_vhdx(file: ReadAt) -> Layer:
    """Parse and check a VHDX."""
    raise ImageError("VHDX is not read yet", where=file.name)
