"""The partition table of a disk, from its first bytes. (parted and sgdisk in the appliance need seconds for each question.)

    MBR   0x000 boot code (440) | 0x1BE 4 × 16: flag, CHS, type (at 4), CHS, first LBA (at 8), count (at 12) | 0x1FE 55 AA
    GPT   LBA 1: "EFI PART" … 0x48 LBA of the entries, 0x50 their number, 0x54 size of one
          an entry: type GUID (16) | own GUID (16) | first LBA (8) | last LBA (8) | attributes (8) | name

Little-endian. Logical sectors are 512 or 4096 bytes; the place of "EFI PART" says which. Logical partitions inside an MBR's
extended one are not listed: nothing boots from them by itself. Spec: UEFI 2.10 (2022), chapter 5.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass

from tokvm.core.units import SECTOR

HEAD = 6 * 4096
"""Bytes of a disk that hold an MBR or a GPT with 128 entries, with either sector size."""
ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
BIOS_BOOT = "21686148-6449-6e6f-744e-656564454649"
MBR_ESP = "ef"
_PROTECTIVE = 0xEE
_MOST_ENTRIES = 128


@dataclass(frozen=True, slots=True)
class Partition:
    """`kind`: GPT's type GUID, lower case, or MBR's type as two hex digits."""

    number: int
    kind: str
    active: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """`scheme`: gpt | mbr | "" (no table). boot_code: a BIOS would find something to run. grub: that is GRUB's boot.img."""

    scheme: str
    partitions: tuple[Partition, ...] = ()
    boot_code: bool = False
    grub: bool = False

    @property
    def esp(self) -> Partition | None:
        return next((one for one in self.partitions if one.kind in {ESP, MBR_ESP}), None)

    @property
    def bios_boot(self) -> bool:
        return any(one.kind == BIOS_BOOT for one in self.partitions)


def parse_table(head: bytes) -> Table:
    """The table in the first HEAD bytes of a disk. Damage reads as "no such partition"."""
    if len(head) < SECTOR or head[510:512] != b"\x55\xaa":
        return Table("")
    code, grub = any(head[:440]), b"GRUB" in head[:440]
    for sector in (SECTOR, 4096):
        if head[sector : sector + 8] == b"EFI PART":
            return Table("gpt", _gpt(head, sector), code, grub)
    return Table("mbr", _mbr(head), code, grub)


def _mbr(head: bytes) -> tuple[Partition, ...]:
    found = []
    for number in range(1, 5):
        flag, kind, count = struct.unpack_from("<B3xB3x4xI", head, 0x1BE + 16 * (number - 1))
        if kind and count and kind != _PROTECTIVE and flag in {0, 0x80}:
            found.append(Partition(number, f"{kind:02x}", flag == 0x80))
    return tuple(found)


def _gpt(head: bytes, sector: int) -> tuple[Partition, ...]:
    lba, count, size = struct.unpack_from("<QII", head, sector + 0x48)
    if size < 128 or lba * sector >= len(head):
        return ()
    found = []
    for number in range(1, min(count, _MOST_ENTRIES) + 1):
        at = lba * sector + (number - 1) * size
        kind = head[at : at + 16]
        if len(kind) == 16 and any(kind):
            found.append(Partition(number, str(uuid.UUID(bytes_le=kind))))
    return tuple(found)
