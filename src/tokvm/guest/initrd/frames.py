"""Where a zstd or lz4 stream ends, found without unpacking it: their programs do not say how much they used.

    zstd   magic 28 b5 2f fd | header 2–14 | blocks: 3 bytes (bit 0 last, bits 1–2 kind, rest size) + size | checksum 0 or 4
           (RFC 8878, Zstandard Compression, 2021). The kernel unpacks one frame per archive
    lz4    "legacy" frame, the only one that the kernel knows: magic 02 21 4c 18 | size (4) + block | size + block | … to the
           end, or to zeros or another magic (lz4_Frame_format.md; lib/decompress_unlz4.c)

Both little-endian.
"""

from __future__ import annotations

import struct

from tokvm.core.units import MiB
from tokvm.guest.initrd.stream import bad

LZ4_MAGIC = b"\x02\x21\x4c\x18"
_LZ4_BLOCK = 8 * MiB
_LZ4_BOUND = _LZ4_BLOCK + _LZ4_BLOCK // 255 + 16
_RLE = 1
_RESERVED = 3


def zstd_end(data: memoryview, at: int, where: str) -> int:
    """The offset behind the frame that starts at `at`; GuestError when it is cut off or says nonsense."""
    try:
        descriptor = data[at + 4]
        single = descriptor >> 5 & 1
        content_size = (single, 2, 4, 8)[descriptor >> 6]
        position = at + 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3] + content_size
        last = False
        while not last:
            header = int.from_bytes(bytes((data[position], data[position + 1], data[position + 2])), "little")
            last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
            if kind == _RESERVED:
                raise bad("a zstd block of a kind that does not exist", where, position)
            position += 3 + (1 if kind == _RLE else size)
    except IndexError as cut:
        raise bad("a zstd frame is cut off", where, at) from cut
    return _inside(data, position + (4 if descriptor & 4 else 0), where, at, "a zstd frame")


def lz4_end(data: memoryview, at: int, where: str) -> int:
    """The offset behind the last block of the legacy stream that starts at `at`."""
    position = at + len(LZ4_MAGIC)
    while len(data) - position >= 4:
        (size,) = struct.unpack_from("<I", data, position)
        if size == 0 or data[position : position + 4] == LZ4_MAGIC:
            break
        if size > _LZ4_BOUND:
            raise bad(f"an lz4 block of {size} bytes", where, position)
        position = _inside(data, position + 4 + size, where, position, "an lz4 block")
    return position


def _inside(data: memoryview, position: int, where: str, at: int, what: str) -> int:
    if position > len(data):
        raise bad(f"{what} is cut off", where, at)
    return position
