"""How an archive of an initramfs is packed, and unpacking it piece by piece.

    1f 8b gzip   fd 37 xz   5d 00 00 lzma   42 5a 68 bzip2   28 b5 2f fd zstd   02 21 4c 18 lz4   89 4c 5a 4f lzo   "0707" not

The first four are the standard library's. zstd and lz4 are the distribution's programs: Python has neither before 3.14, and
both are there wherever such a guest's own initramfs is built. lzo, which no distribution chooses, is refused.
Magic numbers: Linux, lib/decompress.c.
"""

from __future__ import annotations

import bz2
import lzma
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import StrEnum
from typing import Protocol

from tokvm.core.units import KiB, MiB
from tokvm.guest.base import GuestError
from tokvm.guest.initrd.frames import LZ4_MAGIC, lz4_end, zstd_end
from tokvm.guest.initrd.stream import PIECE, bad
from tokvm.remote import process

_FEED = 64 * KiB
_XZ_MEMORY = 256 * MiB  # `xz -9` needs 65 MiB to unpack
_GZIP_WINDOW = 31
TIMEOUT_S = 120.0


class Packing(StrEnum):
    NONE = "none"
    GZIP = "gzip"
    XZ = "xz"
    LZMA = "lzma"
    BZIP2 = "bzip2"
    ZSTD = "zstd"
    LZ4 = "lz4"
    LZO = "lzo"


_MAGIC = {
    b"0707": Packing.NONE,
    b"\x1f\x8b": Packing.GZIP,
    b"\xfd7zXZ\0": Packing.XZ,
    b"\x5d\0\0": Packing.LZMA,
    b"BZh": Packing.BZIP2,
    b"\x28\xb5\x2f\xfd": Packing.ZSTD,
    LZ4_MAGIC: Packing.LZ4,
    b"\x89LZO": Packing.LZO,
}


class _Decompressor(Protocol):
    """bz2's and lzma's own face; _Gzip gives zlib the same."""

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...


class _Gzip:
    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(_GZIP_WINDOW)
        self._full = False

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        out = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        self._full = len(out) == max_length  # zlib may hold more, with no input left over
        return out

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail and not self._full

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data


_LIBRARIES: dict[Packing, Callable[[], _Decompressor]] = {
    Packing.GZIP: _Gzip,
    Packing.XZ: lambda: lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY),
    Packing.LZMA: lambda: lzma.LZMADecompressor(format=lzma.FORMAT_ALONE, memlimit=_XZ_MEMORY),
    Packing.BZIP2: bz2.BZ2Decompressor,
}
_ENDS = {Packing.ZSTD: zstd_end, Packing.LZ4: lz4_end}


def packing_at(data: memoryview, at: int, where: str) -> Packing:
    """How the archive at `at` is packed; GuestError when nothing that the kernel unpacks starts there."""
    head = bytes(data[at : at + 6])
    found = next((packing for magic, packing in _MAGIC.items() if head.startswith(magic)), None)
    if found is None:
        raise bad(f"no archive starts with {head.hex(' ')}", where, at)
    return found


class Stream:
    """One packed archive. Iterate over `pieces` to their end; then `end` is the offset behind it in the file."""

    def __init__(self, data: memoryview, at: int, packing: Packing, where: str) -> None:
        self.end = at
        self._data = data
        self._at = at
        self._packing = packing
        self._where = where

    def pieces(self) -> Iterator[bytes | memoryview]:
        """What it unpacks to, at most 1 MiB at a time. GuestError when it is damaged, cut off or of an unknown kind."""
        if self._packing is Packing.NONE:
            return (self._data[at : at + PIECE] for at in range(self._at, len(self._data), PIECE))
        if self._packing in _ENDS:
            self.end = _ENDS[self._packing](self._data, self._at, self._where)
            return program_pieces(
                [self._packing.value, "-dcq"], self._data[self._at : self.end], f"{self._where}@{self._at:#x}"
            )
        if self._packing in _LIBRARIES:
            return self._by_library(_LIBRARIES[self._packing]())
        raise bad(f"{self._packing.value} is not supported", self._where, self._at)

    def _by_library(self, library: _Decompressor) -> Iterator[bytes]:
        fed = self._at
        try:
            while not library.eof:
                feed = bytes(self._data[fed : fed + _FEED]) if library.needs_input else b""
                if library.needs_input and not feed:
                    raise bad(f"a {self._packing.value} archive is cut off", self._where, self._at)
                fed += len(feed)
                piece = library.decompress(feed, PIECE)
                if piece:
                    yield piece
        except (zlib.error, lzma.LZMAError, OSError, EOFError) as exc:
            raise bad(f"a damaged {self._packing.value} archive: {exc}", self._where, self._at) from exc
        self.end = fed - len(library.unused_data)


def program_pieces(argv: list[str], packed: memoryview, where: str) -> Iterator[bytes]:
    """What a program that unpacks its input says, piece by piece. A reader that stops early kills it."""
    with process.start(argv, where=where, stdin=process.Stdin.PIPE) as child:
        feeder = threading.Thread(target=_feed, args=(child, packed), name=f"feeder of {child.pid}", daemon=True)
        feeder.start()
        watch = threading.Timer(TIMEOUT_S, child.kill)
        watch.daemon = True
        watch.start()
        try:
            while piece := os.read(child.stdout, PIECE):
                yield piece
            code = child.wait(TIMEOUT_S)
        finally:
            watch.cancel()
            child.kill()  # first: then the feeder's write fails, and nobody closes a pipe that it is writing to
            feeder.join()
        if code != 0:
            said = " ".join(child.stderr_tail().decode(errors="replace").split())[-300:]
            raise GuestError(f"{argv[0]} cannot unpack it: {said or f'exit status {code}'}", where=where)


def _feed(child: process.Child, packed: memoryview) -> None:
    with suppress(OSError):  # it ended early; its exit code says why
        at = 0
        while at < len(packed):
            at += os.write(child.stdin, packed[at : at + PIECE])
    child.close_stdin()
