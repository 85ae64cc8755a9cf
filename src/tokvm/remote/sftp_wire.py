"""SFTP version 3 on the wire, as far as reading files needs it.

    request   length 4 | type 1 | id 4 | …              reply   length 4 | type 1 | id 4 | …
    OPEN      path, flags 4, attributes                 HANDLE  handle (string)
    READ      handle, offset 8, length 4                DATA    length 4, bytes
    STAT      path          FSTAT   handle              ATTRS   flags 4 [size 8] [uid 4, gid 4] [mode 4] [atime 4, mtime 4]
    OPENDIR   path          READDIR handle              NAME    count 4, (name, long name, attributes) …
    CLOSE     handle                                    STATUS  code 4, message, language
    EXTENDED  name          (limits@openssh.com)        EXTENDED_REPLY  max packet 8, read 8, write 8, handles 8

Big-endian; a string is length 4, bytes; `length` counts what follows it. INIT and VERSION carry a version instead of an id.
Every reply but VERSION has at least 13 bytes, so one read of 13 gets the head of any: for DATA exactly up to its bytes.
Replies come in any order. Spec: draft-ietf-secsh-filexfer-02 (2001); OpenSSH's PROTOCOL, section 4.8, for the limits.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from tokvm.core.units import KiB

VERSION_3 = 3
LIMITS = b"limits@openssh.com"
HEAD = struct.Struct(">IBII")
# What a server may send at once: OpenSSH's SFTP_MAX_MSG_LENGTH. Nothing larger is ever asked for or believed.
LARGEST_PACKET = 256 * KiB
LARGEST_READ = 255 * KiB
# Servers without the limits extension: all take 32 KiB (OpenSSH's own client asked no more until 8.5).
DEFAULT_READ = 32 * KiB
READ_ONLY = 1


class Kind(IntEnum):
    INIT = 1
    VERSION = 2
    OPEN = 3
    CLOSE = 4
    READ = 5
    FSTAT = 8
    OPENDIR = 11
    READDIR = 12
    STAT = 17
    STATUS = 101
    HANDLE = 102
    DATA = 103
    NAME = 104
    ATTRS = 105
    EXTENDED = 200
    EXTENDED_REPLY = 201


class Status(IntEnum):
    OK = 0
    EOF = 1
    NO_SUCH_FILE = 2
    PERMISSION_DENIED = 3
    FAILURE = 4


class WireError(ValueError):
    """The peer's bytes are not SFTP. The connection is of no use any more."""


@dataclass(frozen=True, slots=True)
class Attributes:
    """What the server says about a file; None for what it does not say. `mtime_s` is Unix time."""

    size: int | None = None
    mode: int | None = None
    mtime_s: int | None = None


def packet(kind: Kind, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">IB", 1 + len(body), kind) + body


def request(kind: Kind, number: int, *parts: bytes) -> bytes:
    return packet(kind, u32(number), *parts)


def u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def u64(value: int) -> bytes:
    return value.to_bytes(8, "big")


def string(value: bytes) -> bytes:
    return u32(len(value)) + value


class Body:
    """The fields of a reply behind its id, taken one by one; WireError when there is less than it claims."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise WireError(f"a field of {count} bytes where {len(self._data) - self._at} are left")
        self._at += count
        return self._data[self._at - count : self._at]

    def u32(self) -> int:
        return int.from_bytes(self._take(4), "big")

    def u64(self) -> int:
        return int.from_bytes(self._take(8), "big")

    def string(self) -> bytes:
        return self._take(self.u32())

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def attributes(self) -> Attributes:
        flags = self.u32()
        size = self.u64() if flags & 0x1 else None
        if flags & 0x2:
            self._take(8)
        mode = self.u32() if flags & 0x4 else None
        mtime_s = None
        if flags & 0x8:
            self._take(4)
            mtime_s = self.u32()
        if flags & 0x8000_0000:
            self._extended()
        return Attributes(size, mode, mtime_s)

    def _extended(self) -> None:
        for _ in range(self._count(least=8)):
            self.string()
            self.string()

    def names(self) -> list[tuple[bytes, Attributes]]:
        found = []
        for _ in range(self._count(least=12)):
            name = self.string()
            self.string()
            found.append((name, self.attributes()))
        return found

    def _count(self, *, least: int) -> int:
        """A count of entries of at least so many bytes, checked before anything is made of it."""
        count = self.u32()
        if count * least > self.left:
            raise WireError(f"{count} entries cannot be in {self.left} bytes")
        return count
