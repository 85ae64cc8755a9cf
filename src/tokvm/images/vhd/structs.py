"""VHD structures: footer, dynamic header, parent locators, XenServer's batmap header. Parsed, and packed for writers.

    footer, 512 bytes                               dynamic header, 1024 bytes
    0   cookie "conectix"                           0   cookie "cxsparse"
    8   features u32                                8   unused, all ones
    12  file version u32 = 0x00010000               16  BAT offset u64, bytes
    16  data offset u64: the header; fixed: ~0      24  header version u32 = 0x00010000
    24  timestamp u32, s since 2000-01-01 UTC       28  BAT entries u32
    28  creator app [4], version u32, OS [4]        32  block size u32, bytes, 2^n
    40  original size u64, bytes                    36  checksum u32
    48  current size u64, bytes: the virtual size   40  parent's unique id [16]
    56  CHS geometry u16 u8 u8 (a rounded view)     56  parent timestamp u32 (not dependable)
    60  type u32: 2 fixed 3 dynamic 4 differencing  64  parent name, 256 x UTF-16BE
    64  checksum u32                                576 8 locators of 24: code[4] space u32 length u32 0 offset u64
    68  unique id [16]
    84  saved state u8    85  XenServer: hidden u8

Big-endian. A checksum is the ones' complement of the sum of all bytes, itself taken as 0.
Spec: Microsoft, "Virtual Hard Disk Image Format Specification" 1.0 (2006); blktap, include/vhd.h.
Field differences: old tapdisk set `hidden` without summing again; XenServer marks a file being rebuilt with the cookie
"v_poison". This module imports no numpy: writers use it in programs that must start fast.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from uuid import UUID

from tokvm.core.errors import ImageError
from tokvm.core.text import printable
from tokvm.core.units import SECTOR, KiB, MiB, TiB, round_up
from tokvm.images.fields import bad_field

FOOTER_SIZE = 512
HEADER_SIZE = 1024
FOOTER_COOKIE = b"conectix"
POISON_COOKIE = b"v_poison"
HEADER_COOKIE = b"cxsparse"
BATMAP_COOKIE = b"tdbatmap"
NO_OFFSET = 0xFFFF_FFFF_FFFF_FFFF
NO_BLOCK = 0xFFFF_FFFF  # BAT entry of a block that is not in the file
NULL_ID = UUID(int=0)  # as parent id of a differencing disk: the parent is a raw file
EPOCH = datetime(2000, 1, 1, tzinfo=UTC)

MAX_FIXED_SIZE = 64 * TiB
MAX_SPARSE_SIZE = 2 * TiB  # BAT entries are 32-bit sectors; writers stop at 2040 GiB (XenServer at 2044)
MAX_BLOCK_SIZE = 64 * MiB  # 2 MiB is usual, 512 KiB occurs
MAX_BLOCKS = 1 << 22  # 2 TiB of 512 KiB blocks; 16 MiB of BAT
LOCATORS = 8
MAX_LOCATOR = 64 * KiB

_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16sBB")
_HEADER = struct.Struct(">8sQQIIII16sI4x512s")
_LOCATOR = struct.Struct(">4sII4xQ")


class DiskType(IntEnum):
    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4


def checksum(raw: bytes | bytearray | memoryview, at: int) -> int:
    """Of a structure whose 4-byte checksum field is at `at`."""
    return ~(sum(raw) - sum(raw[at : at + 4])) & 0xFFFF_FFFF


def bitmap_size(block_size: int) -> int:
    """Bytes of a block's sector bitmap: a bit per sector, padded to a whole sector."""
    return round_up(-(-block_size // SECTOR // 8), SECTOR)


@dataclass(frozen=True, slots=True)
class Footer:
    """A footer whose cookie, checksum and values were checked. Sizes in bytes."""

    type: DiskType
    current_size: int
    unique_id: UUID
    data_offset: int = NO_OFFSET
    original_size: int = 0
    geometry: tuple[int, int, int] = (0, 0, 0)
    creator_app: bytes = b"win "
    creator_version: int = 0x000A_0000
    creator_os: bytes = b"Wi2k"
    timestamp: int = 0
    features: int = 2
    saved_state: int = 0
    hidden: int = 0

    @classmethod
    def parse(cls, raw: bytes | bytearray | memoryview, *, name: str, offset: int) -> Footer:
        """The footer in these 512 bytes, read at `offset` of the file `name`, or ImageError."""
        raw = bytes(raw)
        _check_footer_cookie(raw, name, offset)
        fields = _FOOTER.unpack_from(raw)
        (_, features, version, data_offset, timestamp, app, app_version, creator_os) = fields[:8]
        (original, current, cylinders, heads, sectors, kind, stored, unique_id, saved, hidden) = fields[8:]
        _check_footer_sum(raw, stored, name, offset)
        if version >> 16 != 1:
            raise bad_field(name, offset + 12, "footer file version", f"{version:#x}", "0x10000")
        if kind not in tuple(DiskType):
            raise bad_field(name, offset + 60, "footer disk type", kind, "2 fixed, 3 dynamic, 4 differencing")
        kind = DiskType(kind)
        limit = MAX_FIXED_SIZE if kind is DiskType.FIXED else MAX_SPARSE_SIZE
        if not 0 < current <= limit or current % SECTOR:
            raise bad_field(name, offset + 48, "footer current size", current, f"whole sectors, 512 to {limit}")
        if app == b"tap\0" and app_version == 1:
            fix = "coalesce or copy the disk on its host with a current XenServer"
            raise ImageError(
                "footer creator is tap 0.1, whose sector bitmaps have another bit order; allowed: later versions",
                where=f"{name}@{offset + 28:#x}",
                fix=fix,
            )
        geometry = (cylinders, heads, sectors)
        return cls(
            kind, current, UUID(bytes=unique_id), data_offset, original, geometry,
            app, app_version, creator_os, timestamp, features, saved, hidden,
        )  # fmt: skip

    def pack(self) -> bytes:
        raw = bytearray(FOOTER_SIZE)
        _FOOTER.pack_into(
            raw, 0, FOOTER_COOKIE, self.features, 0x0001_0000, self.data_offset, self.timestamp, self.creator_app,
            self.creator_version, self.creator_os, self.original_size or self.current_size, self.current_size,
            *self.geometry, self.type, 0, self.unique_id.bytes, self.saved_state, self.hidden,
        )  # fmt: skip
        raw[64:68] = checksum(raw, 64).to_bytes(4, "big")
        return bytes(raw)

    @property
    def chs_size(self) -> int:
        cylinders, heads, sectors = self.geometry
        return cylinders * heads * sectors * SECTOR

    @property
    def creator(self) -> str:
        app = self.creator_app.decode("latin-1").rstrip("\0 ")
        return f"{app} {self.creator_version >> 16}.{self.creator_version & 0xFFFF}"

    @property
    def created(self) -> str:
        return (EPOCH + timedelta(seconds=self.timestamp)).isoformat()


def _check_footer_cookie(raw: bytes, name: str, offset: int) -> None:
    if raw[:8] == POISON_COOKIE:
        raise ImageError(
            "footer cookie is v_poison: XenServer was changing this file when it was copied; allowed: conectix",
            where=f"{name}@{offset:#x}",
            fix="let the host repair the disk (scan its storage repository), then export it again",
        )
    if raw[:8] != FOOTER_COOKIE:
        raise bad_field(name, offset, "footer cookie", raw[:8], "conectix")


def _footer_sums(raw: bytes) -> tuple[int, ...]:
    """The checksums that this footer may have; the one that it should have first."""
    right = checksum(raw, 64)
    if raw[28:36] in (b"tap\0\0\0\0\1", b"tap\0\0\1\0\1"):
        return right, (right + raw[85]) & 0xFFFF_FFFF  # summed with hidden as 0
    return (right,)


def is_intact(raw: bytes) -> bool:
    """Cookie and checksum of a footer are right: whatever it says, its writer meant it."""
    return raw[:8] == FOOTER_COOKIE and int.from_bytes(raw[64:68], "big") in _footer_sums(raw)


def _check_footer_sum(raw: bytes, stored: int, name: str, offset: int) -> None:
    sums = _footer_sums(raw)
    if stored not in sums:
        raise bad_field(name, offset + 64, "footer checksum", f"{stored:#010x}", f"{sums[0]:#010x}")


@dataclass(frozen=True, slots=True)
class Locator:
    """Where a parent may be found, as its writer thought. Shown, compared, never followed."""

    code: bytes
    length: int
    offset: int

    def decode(self, raw: bytes | bytearray) -> str:
        """The text of its data: a path or URL, control characters escaped."""
        encoding = "utf-16-le" if self.code in (b"W2ku", b"W2ru") else "utf-8"
        return printable(raw.decode(encoding, errors="replace"))


@dataclass(frozen=True, slots=True)
class DynamicHeader:
    """The header of a dynamic or differencing disk whose cookie, checksum and values were checked."""

    bat_offset: int
    entries: int
    block_size: int
    parent_id: UUID = NULL_ID
    parent_timestamp: int = 0
    parent_name: str = ""
    locators: tuple[Locator, ...] = ()

    @classmethod
    def parse(cls, raw: bytes | bytearray | memoryview, *, footer: Footer, name: str, offset: int) -> DynamicHeader:
        """The header in these 1024 bytes, read at `offset` of the file `name` with this footer, or ImageError."""
        raw = bytes(raw)
        cookie, _, bat_offset, version, entries, block_size, stored, parent, stamp, title = _HEADER.unpack_from(raw)
        if cookie != HEADER_COOKIE:
            raise bad_field(name, offset, "header cookie", cookie, "cxsparse")
        right = checksum(raw, 36)
        if stored != right:
            raise bad_field(name, offset + 36, "header checksum", f"{stored:#010x}", f"{right:#010x}")
        if version >> 16 != 1:
            raise bad_field(name, offset + 24, "header version", f"{version:#x}", "0x10000")
        if not SECTOR <= block_size <= MAX_BLOCK_SIZE or block_size & (block_size - 1):
            raise bad_field(name, offset + 32, "block size", block_size, f"a power of two, 512 to {MAX_BLOCK_SIZE}")
        needed = -(-footer.current_size // block_size)
        if needed > MAX_BLOCKS:
            raise bad_field(
                name, offset + 32, "block size", block_size, f"at least {footer.current_size // MAX_BLOCKS} for this size"
            )
        if entries < needed:
            raise bad_field(name, offset + 28, "BAT entries", entries, f"at least {needed} for {footer.current_size} bytes")
        if footer.type is DiskType.DIFFERENCING and parent == footer.unique_id.bytes:
            raise bad_field(name, offset + 40, "parent unique id", UUID(bytes=parent), "another than the disk's own")
        return cls(bat_offset, entries, block_size, UUID(bytes=parent), stamp, _parent_name(title), _locators(raw))

    def pack(self) -> bytes:
        raw = bytearray(HEADER_SIZE)
        title = self.parent_name.encode("utf-16-be")[:510]
        _HEADER.pack_into(
            raw, 0, HEADER_COOKIE, NO_OFFSET, self.bat_offset, 0x0001_0000, self.entries, self.block_size, 0,
            self.parent_id.bytes, self.parent_timestamp, title,
        )  # fmt: skip
        for place, locator in enumerate(self.locators[:LOCATORS]):
            space = round_up(locator.length, SECTOR)
            _LOCATOR.pack_into(raw, 576 + 24 * place, locator.code, space, locator.length, locator.offset)
        raw[36:40] = checksum(raw, 36).to_bytes(4, "big")
        return bytes(raw)

    @property
    def bat_bytes(self) -> int:
        return 4 * self.entries

    @property
    def batmap_offset(self) -> int:
        """Where XenServer puts the batmap header, if there is one."""
        return self.bat_offset + round_up(self.bat_bytes, SECTOR)

    def blocks(self, size: int) -> int:
        """BAT entries that mean something for a disk of `size` bytes; a resized disk's table may be longer."""
        return -(-size // self.block_size)


def _parent_name(raw: bytes) -> str:
    return printable(raw.decode("utf-16-be", errors="replace").split("\0")[0])


def _locators(raw: bytes) -> tuple[Locator, ...]:
    """`space` is sectors in the specification, bytes in the field: not looked at."""
    found = (_LOCATOR.unpack_from(raw, 576 + 24 * place) for place in range(LOCATORS))
    return tuple(Locator(code, length, offset) for code, _, length, offset in found if code != bytes(4))


def check_batmap(raw: bytes | bytearray | memoryview, *, name: str, offset: int) -> None:
    """Refuse a disk whose payload is encrypted.

        batmap header: cookie "tdbatmap" | offset u64 | sectors u32 | version u32 | checksum u32 | marker u8
        then key hash: cookie u8 (1: encrypted) | nonce [32] | hash [32]        (blktap, include/vhd.h)

    The batmap itself only repeats what the sector bitmaps say, so nobody needs to read it.
    """
    if bytes(raw[:8]) == BATMAP_COOKIE and raw[29] == 1:
        raise ImageError(
            "batmap key hash cookie is 1: the disk is encrypted; allowed: 0",
            where=f"{name}@{offset + 29:#x}",
            fix="copy the disk to an unencrypted storage repository on its host first",
        )
