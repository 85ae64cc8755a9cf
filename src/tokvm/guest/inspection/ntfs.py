"""Two facts of an NTFS volume that decide whether it may be written to, from raw bytes of its partition.

    boot sector   0x03 "NTFS    " | 0x0B bytes per sector (2) | 0x0D sectors per cluster (1) | 0x30 $MFT's cluster (8)
                  0x40 size of a record (signed: > 0 clusters, < 0 2^-n bytes)
    $Volume       record 3 of $MFT: "FILE" | 0x04 offset, 0x06 count of the update sequence | 0x14 first attribute
    an attribute  type (4) | length (4) | non-resident (1) … 0x10 length of the value (4) | 0x14 its offset (2)
    0x70          $VOLUME_INFORMATION: 8 unused | major | minor | flags (2); flag 0x0001: dirty, chkdsk is due

Little-endian. Microsoft documents none of it; as in ntfs-3g 2022.10.3, include/ntfs-3g/layout.h.
A volume that is mounted by a running Windows is *not* dirty: the flag means that Windows itself wants a chkdsk.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from tokvm.core.units import SECTOR

BITLOCKER_SIGNATURE = b"-FVE-FS-"
"""At byte 3 of an encrypted volume's boot sector (BitLocker and BitLocker To Go; Vista to 11)."""
_DIRTY = 0x0001
_VOLUME_INFORMATION = 0x70
_END = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class RecordPlace:
    """Where $Volume's record lies in the partition: bytes."""

    offset: int
    size: int


def is_bitlocker(boot_sector: bytes) -> bool:
    return boot_sector[3:11] == BITLOCKER_SIGNATURE


def volume_record_place(boot_sector: bytes) -> RecordPlace | None:
    """None: no NTFS, or a boot sector that cannot be."""
    if len(boot_sector) < SECTOR or boot_sector[3:11] != b"NTFS    ":
        return None
    sector, per_cluster = struct.unpack_from("<HB", boot_sector, 0x0B)
    (mft,) = struct.unpack_from("<Q", boot_sector, 0x30)
    (size_code,) = struct.unpack_from("<b", boot_sector, 0x40)
    # Above 0x80 the field is 2^-n sectors: clusters over 64 KiB, Windows 10 1709.
    cluster = sector * per_cluster if per_cluster <= 0x80 else sector << (256 - per_cluster)
    size = size_code * cluster if size_code > 0 else 1 << -size_code
    if sector not in {512, 1024, 2048, 4096} or not SECTOR <= size <= 65536 or not 0 < mft < 1 << 40:
        return None
    return RecordPlace(mft * cluster + 3 * size, size)


def is_dirty(record: bytes) -> bool:
    """Whether $Volume's record carries the dirty flag. A record that cannot be read counts as dirty: nobody should write."""
    if record[:4] != b"FILE" or len(record) < 0x30:
        return True
    record = _fixed_up(record)
    (at,) = struct.unpack_from("<H", record, 0x14)
    while at + 24 <= len(record):
        kind, length = struct.unpack_from("<II", record, at)
        if kind == _END or length < 24:
            break
        if kind == _VOLUME_INFORMATION:
            (value,) = struct.unpack_from("<H", record, at + 0x14)
            flags = record[at + value + 10 : at + value + 12]
            return len(flags) != 2 or bool(int.from_bytes(flags, "little") & _DIRTY)
        at += length
    return True


def _fixed_up(record: bytes) -> bytes:
    """The record with the last two bytes of each sector put back from the update sequence array."""
    fixed = bytearray(record)
    offset, count = struct.unpack_from("<HH", record, 4)
    for index in range(1, min(count, len(record) // SECTOR + 1)):
        saved = record[offset + 2 * index : offset + 2 * index + 2]
        if len(saved) == 2:
            fixed[index * SECTOR - 2 : index * SECTOR] = saved
    return bytes(fixed)
