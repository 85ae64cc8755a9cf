"""Which footer of a VHD file is to be believed?

    offset 0: copy (dynamic and differencing only; in a fixed disk this is the guest's first sector)   …   end - 512: footer

The one at the end, when its cookie and checksum are right. Else the copy at the start, with a warning. Both of a disk that
XenServer was rebuilding say v_poison: refused. Virtual PC before 2004 wrote a last footer of 511 bytes (blktap, libvhd.c,
vhd_read_footer). QEMU does it the other way round and so trusts a stale copy.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokvm.core.errors import ImageError
from tokvm.images.base import ReadAt
from tokvm.images.fields import bad_field
from tokvm.images.vhd.structs import FOOTER_COOKIE, FOOTER_SIZE, POISON_COOKIE, DiskType, Footer, is_intact


@dataclass(frozen=True, slots=True)
class FoundFooter:
    """offset: where the footer is. end: the byte after the last one that a structure or a block may use."""

    footer: Footer
    offset: int
    end: int
    warnings: tuple[str, ...] = ()


def find_footer(file: ReadAt) -> FoundFooter:
    """The footer to believe, or ImageError about the one at the end."""
    if file.size < FOOTER_SIZE:
        raise bad_field(file.name, 0, "file size", file.size, f"at least {FOOTER_SIZE} bytes")
    at = _trailing_offset(file)
    raw = _read(file, at, file.size - at)
    try:
        footer = Footer.parse(raw, name=file.name, offset=at)
    except ImageError as exc:
        if is_intact(raw) or raw[:8] == POISON_COOKIE:  # its writer meant it, so the copy is no way around it
            raise
        return _fall_back(file, exc)
    warnings = () if footer.type is DiskType.FIXED else _compare_copy(file, footer)
    return FoundFooter(footer, at, at, warnings)


def has_footer(file: ReadAt) -> bool:
    """Does the file look like a VHD, by the cookie at its end or at its start?"""
    if file.size < FOOTER_SIZE:
        return False
    return any(_read(file, at, 8)[:8] in (FOOTER_COOKIE, POISON_COOKIE) for at in (_trailing_offset(file), 0))


def has_intact_footer(file: ReadAt) -> bool:
    """Does the file end with a footer whose checksum is right? A guest's stray bytes do not, unless it means them to."""
    return file.size >= FOOTER_SIZE and is_intact(_read(file, at := _trailing_offset(file), file.size - at))


def _trailing_offset(file: ReadAt) -> int:
    return file.size - (FOOTER_SIZE - 1 if file.size % FOOTER_SIZE == FOOTER_SIZE - 1 else FOOTER_SIZE)


def _read(file: ReadAt, offset: int, length: int) -> bytes:
    """Padded to a footer's length: the missing byte of the short footer is a reserved one."""
    raw = bytearray(length)
    file.read_into(offset, memoryview(raw))
    return bytes(raw.ljust(FOOTER_SIZE, b"\0"))


def _fall_back(file: ReadAt, error: ImageError) -> FoundFooter:
    copy = _read(file, 0, FOOTER_SIZE)
    if not is_intact(copy) and copy[:8] != POISON_COOKIE:
        raise error
    footer = Footer.parse(copy, name=file.name, offset=0)
    if footer.type is DiskType.FIXED:  # a fixed disk has no copy: the guest wrote this
        raise error
    warning = f"the footer at the end is damaged ({error.what}); its copy at the start is used"
    return FoundFooter(footer, 0, file.size, (warning,))


def _compare_copy(file: ReadAt, footer: Footer) -> tuple[str, ...]:
    raw = _read(file, 0, FOOTER_SIZE)
    try:
        copy = Footer.parse(raw, name=file.name, offset=0)
    except ImageError as exc:
        if raw[:8] == POISON_COOKIE:
            raise
        return (f"the footer's copy at the start is damaged ({exc.what}); the footer at the end is used",)
    fields = ("type", "current_size", "unique_id", "data_offset")
    differs = [field for field in fields if getattr(copy, field) != getattr(footer, field)]
    if differs:
        return (f"the footer and its copy at the start differ in {', '.join(differs)}; the footer is used",)
    return ()
