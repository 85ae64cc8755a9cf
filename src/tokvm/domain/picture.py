"""A guest's screen as a PNG, made without an imaging library.

    PPM   P6 <width> <height> 255 and one white-space byte, then 3 bytes for each pixel, rows from the top
    PNG   signature 8 | chunks: length 4, type 4, data, CRC-32 of type and data: IHDR 13 | IDAT zlib | IEND
          IDAT unpacked: for each row a filter byte (0: none), then its pixels

libvirt hands out what QEMU's screendump makes: PPM, or PNG from libvirt 8.4 with QEMU 7.1 on; the first bytes tell.
Formats: netpbm's ppm(5); W3C, "Portable Network Graphics (PNG) Specification (Third Edition)" (2025).
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

from tokvm.core.errors import DomainError
from tokvm.core.units import KiB, MiB

MAX_PICTURE = 64 * MiB
PNG = b"\x89PNG\r\n\x1a\n"

_SPACE = rb"(?:\s|#[^\n]*\n)+"
_PPM = re.compile(rb"P6" + _SPACE + rb"(\d{1,5})" + _SPACE + rb"(\d{1,5})" + _SPACE + rb"255\s")


def take_picture(connection: Any, domain: Any) -> bytes:
    """The PNG of a running domain's first screen (libvirt's connection and domain). DomainError when it is no picture or too
    large; libvirt's own errors as they are."""
    stream = connection.newStream(0)
    try:
        domain.screenshot(stream, 0, 0)
        data = bytearray()
        while part := stream.recv(256 * KiB):
            data += part
            if len(data) > MAX_PICTURE:
                raise DomainError(f"a screen of more than {MAX_PICTURE} bytes", where=domain.name())
        stream.finish()
    except BaseException:
        stream.abort()
        raise
    return to_png(bytes(data), where=domain.name())


def keep_picture(path: Path, png: bytes) -> None:
    """A new file of ours alone: a screen may show what nobody else should read, and QEMU's user passes through the folder.
    OSError as it is, also when something is there."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(png)


def to_png(data: bytes, *, where: str) -> bytes:
    """`data` as PNG, from PPM or as it is. DomainError when it is neither, or cut short."""
    if data.startswith(PNG):
        return data
    header = _PPM.match(data)
    if header is None:
        raise DomainError("the picture of the screen is neither PPM nor PNG", where=where)
    width, height = int(header[1]), int(header[2])
    stride = width * 3
    if not width or not height or len(data) - header.end() < stride * height:
        raise DomainError(f"a picture of {width}x{height} in {len(data)} bytes", where=where)
    pixels = memoryview(data)[header.end() :]
    rows = b"".join(b"\0" + pixels[row * stride : (row + 1) * stride] for row in range(height))
    described = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    return PNG + _chunk(b"IHDR", described) + _chunk(b"IDAT", zlib.compress(rows, 6)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
