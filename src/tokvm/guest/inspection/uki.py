"""A unified kernel image: a PE file with kernel, initramfs and command line in it, measured and often signed as a whole.

    0x3C offset of "PE\\0\\0" | at +6 number of sections (2), +20 size of the optional header (2) | sections behind it
    a section, 40 bytes: name (8) | virtual size (4) | address (4) | size in the file (4) | offset in the file (4) | …
    .linux  .initrd  .cmdline  .uname  .osrel

Little-endian. Spec: UAPI.5 "Unified Kernel Image". Changing a byte of it breaks its signature and the PCR policy bound to it.
"""

from __future__ import annotations

import struct

_SECTIONS_LIMIT = 96


def sections_of(data: bytes) -> dict[str, bytes]:
    """Sections by name; {} when it is no PE file. A section that lies outside the file is left out."""
    if data[:2] != b"MZ" or len(data) < 0x40:
        return {}
    (pe,) = struct.unpack_from("<I", data, 0x3C)
    if data[pe : pe + 4] != b"PE\0\0" or pe + 24 > len(data):
        return {}
    count, optional = struct.unpack_from("<H12xH", data, pe + 6)
    found: dict[str, bytes] = {}
    for index in range(min(count, _SECTIONS_LIMIT)):
        at = pe + 24 + optional + 40 * index
        if at + 40 > len(data):
            break
        name, virtual, _, size, offset = struct.unpack_from("<8sIIII", data, at)
        used = min(virtual or size, size)
        if offset + used <= len(data):
            found[name.rstrip(b"\0").decode("ascii", "replace")] = data[offset : offset + used]
    return found


def section_text(sections: dict[str, bytes], name: str) -> str:
    return sections.get(name, b"")[:8192].split(b"\0")[0].decode("utf-8", "replace").strip()
