"""Where a Windows program keeps its signatures, and what they sign.

    DOS header ── e_lfanew at 0x3c ─► "PE\\0\\0" | COFF header 20 | optional header (0x10b: 32 bit, 0x20b: 64 bit)
                                       … CheckSum at +64 … data directories: the fifth is the certificate table's
    certificate table: FILE OFFSET (no address) and size; at the file's end; records padded to 8 bytes:
        u32 length (with these 8 bytes) | u16 revision | u16 type (2: PKCS#7 SignedData) | blob

Little-endian. Authenticode's digest covers every byte of the file but CheckSum, the table's directory entry and the table
itself. (The specification goes section by section: a file with gaps between its sections differs, and is refused.)
Spec: Microsoft, "PE Format" (2024), "Windows Authenticode Portable Executable Signature Format" (2008).
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Self

from tokvm.guest.base import GuestError

MAX_RECORDS = 32
SECURITY = 4
PKCS7 = 2
_DIRECTORY_COUNT_AT = {0x10B: 92, 0x20B: 108}


@dataclass(frozen=True, slots=True)
class SignedProgram:
    """A program with a certificate table that lies where it may. `checksum_at`, `entry_at`: offsets of the fields that the
    digest leaves out; `table`, `end`: the table's offset and the file's size."""

    data: bytes
    name: str
    checksum_at: int
    entry_at: int
    table: int
    end: int

    @classmethod
    def parse(cls, data: bytes, name: str) -> Self:
        """GuestError: no PE file, no certificate table (`unsigned`), or one that is not the file's end."""
        optional = _optional_header(data, name)
        count_at = _DIRECTORY_COUNT_AT.get(_u16(data, optional, name), 0)
        if not count_at:
            raise _damaged("an optional header of an unknown kind", name, optional)
        entry_at = optional + count_at + 4 + 8 * SECURITY
        if _u32(data, optional + count_at, name) <= SECURITY:
            raise unsigned(name)
        table, size = _u32(data, entry_at, name), _u32(data, entry_at + 4, name)
        if not table and not size:
            raise unsigned(name)
        if table < entry_at + 8 or table % 8 or table + size != len(data):
            raise _damaged(f"the certificate table ({table:#x}, {size} bytes) is not the end of the file", name, entry_at)
        return cls(data, name, optional + 64, entry_at, table, len(data))

    def blobs(self) -> list[tuple[int, bytes]]:
        """File offset and bytes of each PKCS#7 record, with its padding."""
        found: list[tuple[int, bytes]] = []
        at = self.table
        while at < self.end:
            length, kind = _u32(self.data, at, self.name), _u16(self.data, at + 6, self.name)
            if length <= 8 or at + length > self.end or len(found) >= MAX_RECORDS:
                raise _damaged("a damaged certificate table", self.name, at)
            if kind == PKCS7:
                found.append((at + 8, self.data[at + 8 : at + length]))
            at += -(-length // 8) * 8
        return found

    def digest(self, algorithm: str) -> bytes:
        """Authenticode's digest: `algorithm` is hashlib's name."""
        total = hashlib.new(algorithm, usedforsecurity=False)
        view = memoryview(self.data)
        total.update(view[: self.checksum_at])
        total.update(view[self.checksum_at + 4 : self.entry_at])
        total.update(view[self.entry_at + 8 : self.table])
        return total.digest()


def is_program(data: bytes) -> bool:
    return data[:2] == b"MZ"


def unsigned(name: str) -> GuestError:
    return GuestError("the file is not signed", where=name, fix="take the driver from a signed virtio-win build")


def _optional_header(data: bytes, name: str) -> int:
    if not is_program(data):
        raise _damaged("this is no Windows program (no MZ)", name, 0)
    at = _u32(data, 0x3C, name)
    if data[at : at + 4] != b"PE\0\0":
        raise _damaged("this is no Windows program (no PE header)", name, at)
    return at + 24


def _u16(data: bytes, at: int, name: str) -> int:
    if at + 2 > len(data):
        raise _damaged("the file ends too early", name, len(data))
    return int(struct.unpack_from("<H", data, at)[0])


def _u32(data: bytes, at: int, name: str) -> int:
    if at + 4 > len(data):
        raise _damaged("the file ends too early", name, len(data))
    return int(struct.unpack_from("<I", data, at)[0])


def _damaged(what: str, name: str, at: int) -> GuestError:
    return GuestError(what, where=f"{name}@{at:#x}", fix="get the file again; it is damaged or not what its name says")
