"""VHDX structures at fixed places: file identifier, headers, region tables.

    0         "vhdxfile" | creator, UTF-16, 512 bytes         64 KiB zone
    64 KiB    header 1        128 KiB   header 2              4 KiB each, CRC over all of it
    192 KiB   region table 1  256 KiB   region table 2        64 KiB each, CRC over all of it
    1 MiB …   log, BAT, metadata, blocks                      in any order, at whole MiB

    header                                          region table
    0   "head"                                      0   "regi"
    4   checksum u32                                4   checksum u32
    8   sequence number u64                         8   entries u32, at most 2047
    16  file write guid [16]                        12  0 u32
    32  data write guid [16]: who the content is    16  entries of 32: guid [16] offset u64 length u32 required u32
    48  log guid [16]: 0 when the log is empty
    64  log version u16 = 0   66  version u16 = 1
    68  log length u32        72  log offset u64

Little-endian, bytes. A checksum is the CRC-32C of the structure, itself taken as 0. GUIDs are stored as Windows does: the first
three groups little-endian.
Spec: Microsoft, [MS-VHDX] "Virtual Hard Disk v2 (VHDX) File Format" v8 (2024), 2.2.
Field differences: disk2vhd writes two headers of equal sequence; old QEMU marks the BAT and the metadata as not required. This
module imports no numpy (a checksum brings it).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from uuid import UUID

from tokvm.core.text import printable
from tokvm.core.units import KiB, MiB, TiB
from tokvm.images.fields import bad_field
from tokvm.images.vhdx.crc import crc32c

FILE_SIGNATURE = b"vhdxfile"
HEADER_SIGNATURE = b"head"
REGION_SIGNATURE = b"regi"
CREATOR_OFFSET, CREATOR_SIZE = 8, 512
HEADER_OFFSETS = (64 * KiB, 128 * KiB)
HEADER_SIZE = 4 * KiB
REGION_OFFSETS = (192 * KiB, 256 * KiB)
REGION_TABLE_SIZE = 64 * KiB
FRONT = MiB  # what these take; nothing else lies before it
MAX_ENTRIES = 2047  # of a region table and of a metadata table
MAX_SIZE = 64 * TiB  # of the guest disk
MAX_FILE = 128 * TiB  # the disk, its bitmaps and tables; what claims to be larger is hostile

BAT_REGION = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA_REGION = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
NULL_GUID = UUID(int=0)

_HEADER = struct.Struct("<4sIQ16s16s16sHHIQ")
_REGION_TABLE = struct.Struct("<4sII4x")
_REGION = struct.Struct("<16sQII")
_NAMES = {BAT_REGION: "BAT", METADATA_REGION: "metadata region"}

Structure = tuple[str, int, int]  # what it is, its first byte in the file, the byte after its last


class BlockState(IntEnum):
    """Of a payload block. 4 is not used; 5 was UNMAPPED in draft 0.95 of the specification."""

    NOT_PRESENT = 0
    UNDEFINED = 1
    ZERO = 2
    UNMAPPED = 3
    FULLY_PRESENT = 6
    PARTIALLY_PRESENT = 7


class BitmapState(IntEnum):
    NOT_PRESENT = 0
    PRESENT = 6


def guid(raw: bytes) -> UUID:
    return UUID(bytes_le=raw)


def checksum(raw: bytes | bytearray) -> int:
    """Of a structure whose 4-byte checksum is at 4."""
    return crc32c(bytes(raw[:4]) + bytes(4) + raw[8:])


def is_intact(raw: bytes | bytearray, signature: bytes) -> bool:
    """Signature and checksum are right: whatever it says, its writer meant it."""
    return raw[:4] == signature and int.from_bytes(raw[4:8], "little") == checksum(raw)


def check_intact(raw: bytes | bytearray, signature: bytes, what: str, *, name: str, offset: int) -> None:
    if raw[:4] != signature:
        raise bad_field(name, offset, f"{what} signature", bytes(raw[:4]), signature.decode())
    stored, right = int.from_bytes(raw[4:8], "little"), checksum(raw)
    if stored != right:
        raise bad_field(name, offset + 4, f"{what} checksum", f"{stored:#010x}", f"{right:#010x}")


def check_place(at: int, length: int, limit: int, what: str, *, name: str, offset: tuple[int, int]) -> None:
    """A log or a region: whole MiB, behind the front, inside the file. offset: of its offset and of its length field."""
    if at % MiB or not FRONT <= at <= limit:
        raise bad_field(name, offset[0], f"{what} offset", f"{at:#x}", f"whole MiB, 0x100000 to {limit:#x}")
    if length % MiB or not 0 < length <= limit - at:
        raise bad_field(name, offset[1], f"{what} length", f"{length:#x}", f"whole MiB, 0x100000 to {limit - at:#x}")


@dataclass(frozen=True, slots=True)
class Header:
    """A header whose signature, checksum and versions were checked; its log's place was not, only the used header's is."""

    sequence: int
    file_write_guid: UUID
    data_write_guid: UUID
    log_guid: UUID
    log_length: int
    log_offset: int

    @classmethod
    def parse(cls, raw: bytes | bytearray, *, name: str, offset: int) -> Header:
        """The header in these 4096 bytes, read at `offset` of the file `name`, or ImageError."""
        check_intact(raw, HEADER_SIGNATURE, "header", name=name, offset=offset)
        _, _, sequence, file_write, data_write, log, log_version, version, length, place = _HEADER.unpack_from(raw)
        if version != 1:
            raise bad_field(name, offset + 66, "header version", version, "1")
        if log_version and any(log):
            raise bad_field(name, offset + 64, "header log version", log_version, "0")
        return cls(sequence, guid(file_write), guid(data_write), guid(log), length, place)

    @property
    def has_log(self) -> bool:
        """Writes are in the log that are not yet where they belong."""
        return self.log_guid != NULL_GUID

    def check_log(self, limit: int, *, name: str, offset: int) -> None:
        """The log lies inside the file's `limit` bytes; none at all is fine when nothing is in it."""
        if self.has_log or self.log_length:
            check_place(self.log_offset, self.log_length, limit, "log", name=name, offset=(offset + 72, offset + 68))

    @property
    def log(self) -> Structure:
        return "log", self.log_offset, self.log_offset + self.log_length


@dataclass(frozen=True, slots=True)
class Region:
    guid: UUID
    offset: int
    length: int
    required: bool

    @property
    def structure(self) -> Structure:
        return _NAMES.get(self.guid, f"region {self.guid}"), self.offset, self.offset + self.length


def parse_regions(raw: bytes | bytearray, *, name: str, offset: int, limit: int) -> dict[UUID, Region]:
    """The regions in this table, read at `offset`: known or not required, each inside the file's `limit` bytes."""
    check_intact(raw, REGION_SIGNATURE, "region table", name=name, offset=offset)
    count = _REGION_TABLE.unpack_from(raw)[2]
    if count > MAX_ENTRIES:
        raise bad_field(name, offset + 8, "region table entries", count, f"at most {MAX_ENTRIES}")
    found: dict[UUID, Region] = {}
    for at in range(16, 16 + 32 * count, 32):
        region = _parse_region(bytes(raw[at : at + 32]), name, offset + at, limit)
        if region.guid in found:
            raise bad_field(name, offset + at, "region", region.guid, "each region once")
        found[region.guid] = region
    for wanted, title in _NAMES.items():
        if wanted not in found:
            raise bad_field(name, offset + 8, "region table", f"without a {title}", f"an entry {wanted}")
    return found


def _parse_region(raw: bytes, name: str, offset: int, limit: int) -> Region:
    kind, at, length, required = _REGION.unpack(raw)
    if required > 1:
        raise bad_field(name, offset + 28, "region flags", f"{required:#x}", "0, 1 required")
    region = Region(guid(kind), at, length, bool(required))
    if required and region.guid not in _NAMES:
        raise bad_field(name, offset, "required region", region.guid, ", ".join(_NAMES.values()))
    check_place(at, length, limit, region.structure[0], name=name, offset=(offset + 16, offset + 24))
    return region


def parse_creator(raw: bytes | bytearray) -> str:
    """What wrote the file: text behind the signature, control characters escaped."""
    return printable(raw.decode("utf-16-le", errors="replace").split("\0")[0])
