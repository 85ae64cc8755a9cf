"""An NTFS as a running Windows leaves it on its disk: $LogFile says that somebody has the volume mounted.

    boot sector   bytes per sector at 11, sectors per cluster at 13, LCN of $MFT at 48; MFT records of 1024 bytes
    MFT record 2  $LogFile; its attribute 0x80 names the clusters
    $LogFile      two restart pages of 4096 bytes: RSTR, fixups, restart area, one log client ("NTFS") in use

ntfs-3g takes a log whose restart area has a client in use, and no "clean" flag, for a mounted volume's. One of version 1.1
(before Windows 8) it clears by default, one of 2.0 it never does (libntfs-3g/logfile.c; fields: include/ntfs-3g/logfile.h).
"""

from __future__ import annotations

import struct
from collections.abc import Callable

PAGE = 4096
RECORD = 1024
DATA = 0x80
NO_CLIENT = 0xFFFF
_FIXUPS_AT, _AREA_AT, _CLIENTS_AT = 0x1E, 0x30, 0x30


def mark_in_use(
    read: Callable[[int, int], bytes], write: Callable[[bytes, int], object], version: tuple[int, int] = (2, 0)
) -> None:
    """read(count, offset), write(content, offset): of the volume, in bytes."""
    boot = read(512, 0)
    sector, per_cluster = struct.unpack_from("<HB", boot, 11)
    (mft,) = struct.unpack_from("<Q", boot, 48)
    cluster = sector * per_cluster
    first, size = _data_of(read(RECORD, mft * cluster + 2 * RECORD))
    write(2 * restart_page(size, version), first * cluster)


def restart_page(log_size: int, version: tuple[int, int]) -> bytes:
    """log_size: bytes of $LogFile. version: (major, minor) of its format."""
    major, minor = version
    name = "NTFS".encode("utf-16-le")
    client = struct.pack("<qqHHH6xI128s", 1, 1, NO_CLIENT, NO_CLIENT, 0, len(name), name)
    in_use, flags, sequence_bits = 0, 0, 67 - log_size.bit_length()
    area = struct.pack("<qHHHHI", 1, 1, NO_CLIENT, in_use, flags, sequence_bits)
    area += struct.pack("<HHqIHHII", _CLIENTS_AT + len(client), _CLIENTS_AT, log_size, 0, 0x30, 0x40, 1, 0)
    head = struct.pack("<4sHHQIIHhh", b"RSTR", _FIXUPS_AT, PAGE // 512 + 1, 0, PAGE, PAGE, _AREA_AT, minor, major)
    return _fixed_up(bytearray((head.ljust(_AREA_AT, b"\0") + area + client).ljust(PAGE, b"\0")))


def _fixed_up(page: bytearray) -> bytes:
    """Every sector's last two bytes go to the fixup array, and the fixup number there."""
    number = struct.pack("<H", 1)
    page[_FIXUPS_AT : _FIXUPS_AT + 2] = number
    for index, end in enumerate(range(512, PAGE + 1, 512), start=1):
        page[_FIXUPS_AT + 2 * index : _FIXUPS_AT + 2 * index + 2] = page[end - 2 : end]
        page[end - 2 : end] = number
    return bytes(page)


def _data_of(record: bytes) -> tuple[int, int]:
    """(first cluster, bytes) of an MFT record's unnamed data."""
    assert record[:4] == b"FILE"
    (at,) = struct.unpack_from("<H", record, 20)
    while (found := struct.unpack_from("<II", record, at))[0] != DATA:
        assert found[1], "this file has no data"
        at += found[1]
    (runs,) = struct.unpack_from("<H", record, at + 32)
    (size,) = struct.unpack_from("<Q", record, at + 48)
    header = record[at + runs]
    place = at + runs + 1 + (header & 15)
    return int.from_bytes(record[place : place + (header >> 4)], "little"), size
