"""A qcow2 file's header, as far as one must know it before QEMU is let near the file. Big-endian.

    0 "QFI\\xfb" | 4 version | 8 backing file's name at, 16 length | 20 cluster_bits | 24 size | 32 encryption
    36 L1 entries | 40 L1 table at | 48 refcount table at, 56 clusters | 60 snapshots | 64 at
    version 3: 72 incompatible | 80 compatible | 88 autoclear features

An L1 entry of 0: no L2 table, so its 512 MiB (with 64 KiB clusters) read as zeros. A backing file or an external data file
would make QEMU open whatever path the image names (CVE-2024-32498), so no image with one is opened.
Spec: QEMU, docs/interop/qcow2.txt.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from tokvm.core.units import MiB

_LENGTH = 104
_FIELDS = struct.Struct(">4sIQIIQIIQQIIQQ")
_MAGIC = b"QFI\xfb"
_L1_LIMIT = 32 * MiB  # QEMU's own: QCOW_MAX_L1_SIZE
_CORRUPT = 2


@dataclass(frozen=True, slots=True)
class Qcow2Header:
    """size: of the guest's disk. peculiar: why it is no image as we make them, in words; "" when it is one."""

    size: int
    peculiar: str
    l1_offset: int
    l1_entries: int

    @classmethod
    def read(cls, fd: int) -> Qcow2Header | None:
        """None when the file is no qcow2."""
        raw = os.pread(fd, _LENGTH, 0)
        if len(raw) < _LENGTH or not raw.startswith(_MAGIC):
            return None
        (_, version, backing, _, bits, size, crypt, entries, l1, _, _, snapshots, _, incompatible) = _FIELDS.unpack_from(raw)
        oddities = (
            (version != 3, f"it is of version {version}"),
            (backing != 0, "it has a backing file"),
            (bits != 16, f"its clusters have 2^{bits} bytes"),
            (crypt != 0, "it is encrypted"),
            (snapshots != 0, "it holds snapshots"),
            (incompatible & _CORRUPT != 0, "QEMU marked it as corrupt"),
            (incompatible & ~_CORRUPT != 0, f"it has the features {incompatible:#x}"),
        )
        return cls(size, ", ".join(text for found, text in oddities if found), l1, entries)

    def blank(self, fd: int) -> bool:
        """Nothing was ever written to the guest's disk: the L1 table is in the file and holds no entry."""
        length = self.l1_entries * 8
        if self.peculiar or length > _L1_LIMIT or self.l1_offset + length > os.fstat(fd).st_size:
            return False
        return all(not any(os.pread(fd, min(MiB, length - at), self.l1_offset + at)) for at in range(0, length, MiB))
