"""Does this device or file hold something? Known beginnings, read without believing any of it.

blkid(8) knows filesystems, partition tables, swap and RAID members, but no disk-image headers: a qcow2 header gives an empty
answer. So both are asked, and a device is blank only when neither knows what it holds.

    offset in the device | bytes | what it is
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from tokvm.core.units import KiB, MiB
from tokvm.remote.process import ProgramError, run, which

log = logging.getLogger(__name__)

HEAD = 72 * KiB
TAIL = MiB


@dataclass(frozen=True, slots=True)
class Signature:
    """`offset` from the start, or from the end when negative."""

    offset: int
    magic: bytes
    name: str


_LVM_LABELS = tuple(Signature(sector * 512, b"LABELONE", "LVM physical volume") for sector in range(4))
_SWAP_PAGES = (4 * KiB, 8 * KiB, 16 * KiB, 64 * KiB)
_SWAP = tuple(Signature(page - 10, magic, "swap space") for page in _SWAP_PAGES for magic in (b"SWAPSPACE2", b"SWAP-SPACE"))

SIGNATURES = (
    Signature(0, b"QFI\xfb", "qcow2 image"),
    Signature(0, b"KDMV", "VMDK image (sparse)"),
    Signature(0, b"COWD", "VMDK image (COWD)"),
    Signature(0, b"\xbe\xba\xfe\xca\x00\x00\x00\x00", "VMDK image (SESparse)"),
    Signature(0, b"# Disk DescriptorFile", "VMDK descriptor"),
    Signature(0, b"vhdxfile", "VHDX image"),
    Signature(0, b"conectix", "VHD image"),
    Signature(-512, b"conectix", "VHD image (footer)"),
    Signature(0, b"<<< ", "VDI image"),
    Signature(0, b"QED\x00", "QED image"),
    Signature(0, b"LUKS\xba\xbe", "LUKS volume"),
    Signature(0x4000, b"SKUL\xba\xbe", "LUKS volume (second header)"),
    Signature(3, b"NTFS    ", "NTFS filesystem"),
    Signature(3, b"-FVE-FS-", "BitLocker volume"),
    Signature(3, b"EXFAT   ", "exFAT filesystem"),
    Signature(54, b"FAT", "FAT filesystem"),
    Signature(82, b"FAT32", "FAT filesystem"),
    Signature(0, b"XFSB", "XFS filesystem"),
    Signature(1080, b"\x53\xef", "ext2/3/4 filesystem"),
    Signature(64 * KiB + 64, b"_BHRfS_M", "btrfs filesystem"),
    Signature(1024, b"\x10\x20\xf5\xf2", "F2FS filesystem"),
    Signature(32 * KiB + 1, b"CD001", "ISO 9660 filesystem"),
    Signature(0, b"hsqs", "squashfs filesystem"),
    Signature(512, b"EFI PART", "GPT partition table"),
    Signature(4096, b"EFI PART", "GPT partition table (4Kn)"),
    Signature(-512, b"EFI PART", "GPT partition table (backup)"),
    Signature(-4096, b"EFI PART", "GPT partition table (backup, 4Kn)"),
    Signature(0, b"\xfc\x4e\x2b\xa9", "Linux RAID member (1.1)"),
    Signature(4096, b"\xfc\x4e\x2b\xa9", "Linux RAID member (1.2)"),
    Signature(0, b"bluestore block device", "Ceph BlueStore"),
    Signature(0, b"SnAp", "device-mapper snapshot store"),
    Signature(0, b"\x21\x06\x22\x01", "DRBD"),
    *_LVM_LABELS,
    *_SWAP,
)


def known_content(fd: int, size: int) -> str | None:
    """The name of what the first or last bytes look like; None when we know nothing of the kind."""
    head = os.pread(fd, min(HEAD, size), 0)
    tail_at = max(size - TAIL, 0)
    tail = os.pread(fd, size - tail_at, tail_at)
    for signature in SIGNATURES:
        held, at = (head, signature.offset) if signature.offset >= 0 else (tail, len(tail) + signature.offset)
        if at >= 0 and held[at : at + len(signature.magic)] == signature.magic:
            return signature.name
    return _mbr(head) or _raid_at_end(tail, size)


def _mbr(head: bytes) -> str | None:
    """Boot code or a partition entry under the 55 AA mark (a lone 55 AA counts too: it is somebody's)."""
    return "MBR or boot sector" if head[510:512] == b"\x55\xaa" else None


def _raid_at_end(tail: bytes, size: int) -> str | None:
    """md 0.90 keeps its superblock in the last 64 KiB-aligned 64 KiB; md 1.0 at 8 KiB before the end, 4 KiB aligned."""
    old = (size & ~(64 * KiB - 1)) - 64 * KiB
    new = ((size >> 9) - 16 & ~7) << 9
    for at in (old, new):
        inside = at - (size - len(tail))
        if inside >= 0 and tail[inside : inside + 4] in (b"\xfc\x4e\x2b\xa9", b"\xa9\x2b\x4e\xfc"):
            return "Linux RAID member"
    return None


def blkid_content(fd: int) -> str | None:
    """What `blkid -p` calls it; None when it finds nothing (2) or is not installed. An ambivalent answer (8) is content too."""
    try:
        program = which("blkid")
    except ProgramError:
        log.info("blkid is not installed; only our own table of signatures was asked")
        return None
    path = f"/proc/{os.getpid()}/fd/{fd}"
    found = run([program, "--probe", "--output", "export", path], timeout_s=30, where="blkid")
    if found.code == 2:
        return None
    tags = dict(line.split("=", 1) for line in found.stdout.decode(errors="replace").splitlines() if "=" in line)
    about_place = ("DEVNAME", "PART_ENTRY_")  # where a partition lies says nothing about what it holds
    if found.code == 0 and all(tag.startswith(about_place) for tag in tags):
        return None
    return tags.get("TYPE") or tags.get("PTTYPE") or f"something blkid finds (exit code {found.code})"
