"""The smallest Windows programs that have everything a reader looks at: for phony guests and signature tests.

    DOS header 64 | "PE\\0\\0" | COFF header 20 | optional header with 16 data directories | section header | body at 0x200

Spec: Microsoft, "PE Format" (2024). Not meant to be run.
"""

from __future__ import annotations

import struct

HEADERS = 0x200
AT = {"x86": 0x14C, "amd64": 0x8664, "arm64": 0xAA64}


def program(*, arch: str = "amd64", body: bytes = b"\xc3", native: bool = False) -> bytes:
    """An executable with one section; `native`: a driver. Its checksum field is zero."""
    wide = arch != "x86"
    raw = -(-len(body) // 512) * 512
    coff = struct.pack("<HHIIIHH", AT[arch], 1, 0, 0, 0, 240 if wide else 224, 0x22 if wide else 0x102)
    optional = struct.pack("<HBBIIIII", 0x20B if wide else 0x10B, 14, 0, raw, 0, 0, 0x1000, 0x1000)
    optional += struct.pack("<Q", 0x140000000) if wide else struct.pack("<II", 0x2000, 0x400000)
    optional += struct.pack("<IIHHHHHHIIIIHH", 0x1000, 512, 10, 0, 0, 0, 10, 0, 0, 0x2000, HEADERS, 0, 1 if native else 3, 0)
    optional += struct.pack("<QQQQ" if wide else "<IIII", 1 << 20, 1 << 12, 1 << 20, 1 << 12) + struct.pack("<II", 0, 16)
    optional += bytes(16 * 8)
    section = struct.pack("<8sIIIIIIHHI", b".text", len(body), 0x1000, raw, HEADERS, 0, 0, 0, 0, 0x60000020)
    dos = b"MZ" + bytes(58) + struct.pack("<I", 64)
    return (dos + b"PE\0\0" + coff + optional + section).ljust(HEADERS, b"\0") + body.ljust(raw, b"\0")
