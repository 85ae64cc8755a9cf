"""The structures of a VHDX as bytes, for the writers beside this file.

    0        identifier: `vhdxfile`, creator           64 KiB, 128 KiB   headers, 4 KiB each
    192 KiB, 256 KiB   region tables, 64 KiB each      from 1 MiB        log, metadata, BAT, blocks, at whole MiB

Little-endian; GUIDs in Microsoft's mixed order; CRC-32C over the structure with its checksum field as 0.
BAT: u64 entries, state in bits 0-2, MiB of the file from bit 20 on; behind each `chunk_ratio` payload entries comes the entry
of the bitmap block that they share. Spec: Microsoft, "[MS-VHDX]: Virtual Hard Disk v2 (VHDX) File Format", v8.
Shares no code with the reader in `images/vhdx`, so that a mistake in one shows in the other. Imports no numpy.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from uuid import UUID

from tokvm.core.units import KiB, MiB, TiB, round_up

Bytes = bytes | bytearray | memoryview

HEADER_OFFSETS = (64 * KiB, 128 * KiB)
HEADER_SIZE = 4 * KiB
REGION_TABLE_OFFSETS = (192 * KiB, 256 * KiB)
REGION_TABLE_SIZE = 64 * KiB
METADATA_TABLE_SIZE = 64 * KiB
METADATA_SIZE = MiB
BITMAP_SIZE = MiB
BITMAP_PRESENT = 6
NULL_GUID = UUID(int=0)

BAT_REGION = UUID("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA_REGION = UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E")
FILE_PARAMETERS = UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
VIRTUAL_DISK_SIZE = UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
VIRTUAL_DISK_ID = UUID("BECA12AB-B2E6-4523-93EF-C309E000C746")
LOGICAL_SECTOR_SIZE = UUID("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
PHYSICAL_SECTOR_SIZE = UUID("CDA348C7-445D-4471-9CC9-E9885251C556")
PARENT_LOCATOR = UUID("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
LOCATOR_TYPE = UUID("B04AEFB7-D19E-4A81-B789-25B8E9445913")


class BlockState(IntEnum):
    """Of a payload block. 4 and 5 are reserved."""

    NOT_PRESENT = 0
    UNDEFINED = 1
    ZERO = 2
    UNMAPPED = 3
    FULLY_PRESENT = 6
    PARTIALLY_PRESENT = 7


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a disk is cut into blocks and chunks, and where their BAT entries are."""

    size: int
    block_size: int
    logical_sector: int
    differencing: bool

    def __post_init__(self) -> None:
        if self.logical_sector not in (512, 4096):
            raise ValueError(f"logical sectors have 512 or 4096 bytes, not {self.logical_sector}")
        if self.size <= 0 or self.size % self.logical_sector or self.size > 64 * TiB:
            raise ValueError(f"a size is 1 sector to 64 TiB in whole sectors, not {self.size}")
        if not MiB <= self.block_size <= 256 * MiB or self.block_size & (self.block_size - 1):
            raise ValueError(f"a block has 1 to 256 MiB, a power of two, not {self.block_size}")

    @property
    def chunk_ratio(self) -> int:
        return (1 << 23) * self.logical_sector // self.block_size

    @property
    def blocks(self) -> int:
        return -(-self.size // self.block_size)

    @property
    def bat_entries(self) -> int:
        if self.differencing:
            return -(-self.blocks // self.chunk_ratio) * (self.chunk_ratio + 1)
        return self.blocks + (self.blocks - 1) // self.chunk_ratio

    @property
    def bitmap_width(self) -> int:
        """Bytes of one block's bits in its chunk's bitmap block."""
        return self.block_size // self.logical_sector // 8

    def payload_entry(self, block: int) -> int:
        return block + block // self.chunk_ratio

    def bitmap_entry(self, chunk: int) -> int:
        return (chunk + 1) * self.chunk_ratio + chunk

    def whole(self, block: int) -> int:
        """The bits of all of the block's sectors that the disk has."""
        sectors = min(self.block_size, self.size - block * self.block_size) // self.logical_sector
        return (1 << sectors) - 1


def bat_entry(state: int, file_offset: int) -> int:
    if file_offset % MiB:
        raise ValueError(f"blocks begin at whole MiB, not at {file_offset:#x}")
    return file_offset | state


def file_identifier(creator: str) -> bytes:
    return b"vhdxfile" + creator.encode("utf-16-le")[:512].ljust(512, b"\0")


@dataclass(frozen=True, slots=True)
class Header:
    sequence: int
    file_write_guid: UUID
    data_write_guid: UUID
    log_guid: UUID
    log_offset: int
    log_length: int

    def pack(self) -> bytes:
        ids = self.file_write_guid.bytes_le + self.data_write_guid.bytes_le + self.log_guid.bytes_le
        raw = struct.pack("<4sIQ48sHHIQ", b"head", 0, self.sequence, ids, 0, 1, self.log_length, self.log_offset)
        return sealed(raw.ljust(HEADER_SIZE, b"\0"))

    @classmethod
    def unpack(cls, raw: bytes) -> Header:
        signature, _, sequence, ids, _, _, length, offset = struct.unpack_from("<4sIQ48sHHIQ", raw)
        if signature != b"head":
            raise ValueError(f"no VHDX header: {signature!r}")
        file_write, data_write, log = (UUID(bytes_le=ids[at : at + 16]) for at in (0, 16, 32))
        return cls(sequence, file_write, data_write, log, offset, length)


@cache
def region_table(bat: tuple[int, int], metadata: tuple[int, int]) -> bytes:
    """One copy of the table, from the (offset, length) of both regions."""
    raw = struct.pack("<4sIII", b"regi", 0, 2, 0)
    for guid, (offset, length) in ((BAT_REGION, bat), (METADATA_REGION, metadata)):
        raw += struct.pack("<16sQII", guid.bytes_le, offset, length, 1)
    return sealed(raw.ljust(REGION_TABLE_SIZE, b"\0"))


def metadata_region(items: Sequence[tuple[UUID, int, bytes]]) -> bytes:
    """Table and items, each (id, flags, value). Not padded to the region's end."""
    table = struct.pack("<8sHH20x", b"metadata", 0, len(items))
    values = b""
    for guid, flags, value in items:
        table += struct.pack("<16sIIII", guid.bytes_le, METADATA_TABLE_SIZE + len(values), len(value), flags, 0)
        values += value.ljust(round_up(len(value), 8), b"\0")
    return table.ljust(METADATA_TABLE_SIZE, b"\0") + values


def disk_items(
    geometry: Geometry, *, physical_sector: int, virtual_disk_id: UUID, leave_allocated: bool, locator: Mapping[str, str]
) -> list[tuple[UUID, int, bytes]]:
    """The metadata that every file has, and a child's parent locator. Flags: 4 required, 2 of the virtual disk."""
    parameters = struct.pack("<II", geometry.block_size, leave_allocated | geometry.differencing << 1)
    items = [
        (FILE_PARAMETERS, 4, parameters),
        (VIRTUAL_DISK_SIZE, 6, struct.pack("<Q", geometry.size)),
        (VIRTUAL_DISK_ID, 6, virtual_disk_id.bytes_le),
        (LOGICAL_SECTOR_SIZE, 6, struct.pack("<I", geometry.logical_sector)),
        (PHYSICAL_SECTOR_SIZE, 6, struct.pack("<I", physical_sector)),
    ]
    return [*items, (PARENT_LOCATOR, 4, parent_locator(locator))] if geometry.differencing else items


def parent_locator(entries: Mapping[str, str]) -> bytes:
    """Type, count, then (key offset, value offset, key length, value length), then the strings in UTF-16LE."""
    table, strings = b"", b""
    start = 20 + 12 * len(entries)
    for key, value in entries.items():
        raw_key, raw_value = key.encode("utf-16-le"), value.encode("utf-16-le")
        at = start + len(strings)
        table += struct.pack("<IIHH", at, at + len(raw_key), len(raw_key), len(raw_value))
        strings += raw_key + raw_value
    return struct.pack("<16sHH", LOCATOR_TYPE.bytes_le, 0, len(entries)) + table + strings


def sealed(raw: bytes) -> bytes:
    """With the checksum at byte 4, where all structures have it."""
    clear = raw[:4] + bytes(4) + raw[8:]
    return raw[:4] + crc32c(clear).to_bytes(4, "little") + raw[8:]


def crc32c(data: Bytes) -> int:
    """Castagnoli. The zeros at the end, which are most of these structures, cost next to nothing."""
    raw = bytes(data)
    body = raw.rstrip(b"\0")
    table, value = _table(), 0xFFFF_FFFF
    for byte in body:
        value = value >> 8 ^ table[(value ^ byte) & 0xFF]
    return _over_zeros(value, len(raw) - len(body)) ^ 0xFFFF_FFFF


@cache
def _table() -> tuple[int, ...]:
    def entry(value: int) -> int:
        for _ in range(8):
            value = value >> 1 ^ (0x82F6_3B78 if value & 1 else 0)
        return value

    return tuple(map(entry, range(256)))


def _over_zeros(value: int, count: int) -> int:
    """The register after `count` zero bytes: one linear map per power of two."""
    power = 0
    while count >> power:
        if count >> power & 1:
            value = _mapped(value, _zeros_map(power))
        power += 1
    return value


@cache
def _zeros_map(power: int) -> tuple[int, ...]:
    """What 2^power zero bytes make of each single bit of the register."""
    if power:
        half = _zeros_map(power - 1)
        return tuple(_mapped(column, half) for column in half)
    table = _table()
    return tuple(bit >> 8 ^ table[bit & 0xFF] for bit in (1 << place for place in range(32)))


def _mapped(value: int, columns: tuple[int, ...]) -> int:
    found = 0
    for column in columns:
        if value & 1:
            found ^= column
        value >>= 1
    return found
