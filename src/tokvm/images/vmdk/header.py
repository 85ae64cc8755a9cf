"""The 512 bytes at the start of a hosted sparse extent ("KDMV"), and again near the end of a stream-optimised one.

    0 KDMV | 4 version 1-3 | 8 flags | 12 capacity | 20 grain sectors | 28 descriptor sector | 36 descriptor sectors
    44 entries of a table: 512 | 48 redundant directory's sector | 56 directory's sector, all ones: see the footer
    64 overhead | 72 unclean | 73 "\\n \\r\\n" | 77 compression, 1: deflate

Little-endian; places and lengths are sectors. The four characters at 73 show a copy that went through a text conversion.
Version 2 brought zeroed grains, version 3 is written by exporters and by disks with changed block tracking.
Specification: VMware, "Virtual Disk Format 5.0" (2011), "Hosted Sparse Extents", "Stream-Optimized Compressed Sparse Extents".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntFlag
from typing import NamedTuple

from tokvm.core.units import SECTOR, KiB
from tokvm.images.fields import bad_field
from tokvm.images.vmdk.descriptor import MAX_DESCRIPTOR, MAX_SIZE

MAGIC = b"KDMV"
HEADER_SIZE = SECTOR
ENTRIES = 512
TABLE_BYTES = 4 * ENTRIES
AT_END = 2**64 - 1  # directory's sector: the footer has it
_FORMAT = "<4sIIQQQQIQQQB4sH"
_NEWLINES = b"\n \r\n"
_MIN_GRAIN, _MAX_GRAIN, _MAX_PACKED = 8, 32 * KiB, 4 * KiB  # sectors; everybody writes 128
_FAR = 1 << 54  # a sector whose byte offset is below 2^63
_DEFLATE = 1


class Flags(IntFlag):
    NEWLINE_TEST = 1
    REDUNDANT = 2  # there is a second directory with tables of its own
    ZEROED_GRAINS = 4  # an entry of 1 is a grain of zeros
    COMPRESSED = 0x10000
    MARKERS = 0x20000  # grains bear their place in the disk


_KNOWN = Flags.NEWLINE_TEST | Flags.REDUNDANT | Flags.ZEROED_GRAINS | Flags.COMPRESSED | Flags.MARKERS


class _Fields(NamedTuple):
    """As packed."""

    magic: bytes
    version: int
    flags: int
    capacity: int
    grain: int
    descriptor: int
    descriptor_sectors: int
    entries: int
    redundant: int
    directory: int
    overhead: int
    unclean: int
    newlines: bytes
    compression: int


_Test = tuple[bool, int, str, object, str]  # wrong? | offset, name and value of the field | values allowed


def _kind_tests(f: _Fields) -> list[_Test]:
    """What kind of a disk it is, and how large."""
    packed = bool(f.flags & Flags.COMPRESSED)
    max_grain = _MAX_PACKED if packed else _MAX_GRAIN
    grain_wrong = not _MIN_GRAIN <= f.grain <= max_grain or bool(f.grain & (f.grain - 1))
    newlines = f"{_NEWLINES!r}"[1:] + "; others mean that the file was copied as text"
    compression = "1 (deflate) where the flags say that grains are compressed, else 0"
    return [
        (f.magic != MAGIC, 0, "magic", repr(f.magic)[1:], "'KDMV'"),
        (not 1 <= f.version <= 3, 4, "version", f.version, "1, 2 or 3"),
        (bool(f.flags & ~int(_KNOWN)), 8, "flags", f"{f.flags:#x}", f"no other bits than those of {int(_KNOWN):#x}"),
        (bool(f.flags & Flags.NEWLINE_TEST) and f.newlines != _NEWLINES, 73, "newline test", repr(f.newlines)[1:], newlines),
        (not 1 <= f.capacity <= MAX_SIZE // SECTOR, 12, "capacity", f.capacity, f"1 to {MAX_SIZE // SECTOR} sectors"),
        (grain_wrong, 20, "grain size", f.grain, f"a power of two, {_MIN_GRAIN} to {max_grain} sectors"),
        (f.entries != ENTRIES, 44, "entries of a grain table", f.entries, f"{ENTRIES}"),
        (f.compression != (_DEFLATE if packed else 0), 77, "compression", f.compression, compression),
        (bool(f.flags & Flags.MARKERS) and not packed, 8, "flags", f"{f.flags:#x}", "markers only with compression"),
    ]


def _place_tests(f: _Fields) -> list[_Test]:
    """Where its structures are. That they lie inside the file, whoever knows its size asks."""
    somewhere, sectors = "a sector of the file", MAX_DESCRIPTOR // SECTOR
    text_wrong = f.descriptor != 0 and not 1 <= f.descriptor_sectors <= sectors
    copied = bool(f.flags & Flags.REDUNDANT)
    return [
        (f.descriptor >= _FAR, 28, "descriptor sector", f.descriptor, somewhere),
        (text_wrong, 36, "descriptor size", f.descriptor_sectors, f"1 to {sectors} sectors"),
        (copied and f.redundant >= _FAR, 48, "redundant grain directory", f.redundant, somewhere),
        (f.directory != AT_END and not 1 <= f.directory < _FAR, 56, "grain directory", f.directory, somewhere),
        (f.overhead >= _FAR, 64, "overhead", f.overhead, "sectors of the file"),
    ]


@dataclass(frozen=True, slots=True)
class SparseHeader:
    """Places and lengths in sectors, as they are in the file."""

    version: int
    flags: Flags
    capacity: int
    grain_sectors: int
    descriptor_sector: int
    descriptor_sectors: int
    redundant_sector: int
    directory_sector: int
    overhead: int
    unclean: bool

    @classmethod
    def parse(cls, raw: bytes | bytearray, *, name: str, offset: int) -> SparseHeader:
        fields = _Fields(*struct.unpack_from(_FORMAT, raw))
        for wrong, at, field, read, allowed in (*_kind_tests(fields), *_place_tests(fields)):
            if wrong:
                raise bad_field(name, offset + at, f"KDMV {field}", read, allowed)
        return cls(
            fields.version, Flags(fields.flags), fields.capacity, fields.grain, fields.descriptor,
            fields.descriptor_sectors if fields.descriptor else 0, fields.redundant if fields.flags & Flags.REDUNDANT else 0,
            fields.directory, fields.overhead, bool(fields.unclean),
        )  # fmt: skip

    @property
    def grain_bytes(self) -> int:
        return self.grain_sectors * SECTOR

    @property
    def compressed(self) -> bool:
        return Flags.COMPRESSED in self.flags

    @property
    def markers(self) -> bool:
        return Flags.MARKERS in self.flags

    @property
    def span(self) -> int:
        """Guest bytes of a grain table."""
        return ENTRIES * self.grain_bytes

    def same_disk(self, other: SparseHeader) -> bool:
        """Header and footer of one file differ in the places of what was written between them, and in nothing else."""
        fields = ("version", "flags", "capacity", "grain_sectors", "descriptor_sector", "descriptor_sectors")
        return all(getattr(self, field) == getattr(other, field) for field in fields)
