"""Reading a structure out of an image file and saying what is wrong with a field of it. No numpy: writers use it, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokvm.core.errors import ImageError
from tokvm.core.units import MiB

if TYPE_CHECKING:  # it brings numpy
    from tokvm.images.base import ReadAt

DAMAGED = "copy the image again from its source; if it is damaged there too, restore it from a backup"
MAX_READ = 64 * MiB  # one structure; what is larger is read in slices


def bad_field(name: str, offset: int, field: str, read: object, allowed: str, *, fix: str = DAMAGED) -> ImageError:
    """The error of one field: the file and offset it is at, what was read, what would have been allowed."""
    return ImageError(f"{field} is {read}; allowed: {allowed}", where=f"{name}@{offset:#x}", fix=fix)


def read_exact(file: ReadAt, offset: int, length: int) -> bytearray:
    """`length` bytes from `offset`. The caller checked the length against the file; this refuses before it allocates."""
    if not 0 <= offset <= file.size - length or not 0 <= length <= MAX_READ:
        allowed = f"a range inside the file's {file.size} bytes, of at most {MAX_READ}"
        raise bad_field(file.name, max(offset, 0), "a structure", f"{length} bytes at {offset:#x}", allowed)
    raw = bytearray(length)
    file.read_into(offset, memoryview(raw))
    return raw
