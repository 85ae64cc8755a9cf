"""A rehearsal's picture, as far as a report needs to know it: a PNG file of a sane size that is still there.

    89 "PNG" CR LF 1A LF | length 13 "IHDR" width height … | chunks … | 0 "IEND" CRC        big-endian
Spec: W3C, "Portable Network Graphics (PNG) Specification (Second Edition)" (2003). Nothing is decoded here.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path

from tokvm.core.units import MiB

MAX_PICTURE = 4 * MiB
MAX_SIDE = 8192
BEGIN = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR"
END = b"\x00\x00\x00\x00IEND\xae\x42\x60\x82"


@dataclass(frozen=True, slots=True)
class Picture:
    """A whole PNG file; width and height in pixels."""

    width: int
    height: int
    png: bytes = field(repr=False)


def read_picture(path: Path) -> Picture | None:
    """None when it is gone, is no PNG, or is too large to be a screen."""
    try:
        png = read_bounded(path, MAX_PICTURE)
    except (OSError, ValueError):
        return None
    if not png.startswith(BEGIN) or not png.endswith(END):
        return None
    width, height = struct.unpack_from(">II", png, len(BEGIN))
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        return None
    return Picture(width, height, png)


def read_bounded(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes; ValueError for anything else. No link is followed, no FIFO waited for."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("it is no regular file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it is larger than {limit} bytes")
    return data
