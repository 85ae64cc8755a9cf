"""Who uses a block device: what the kernel says in /sys, /proc/self/mountinfo, /proc/swaps and /proc/*/fd.

    disk ── partitions ── holders (dm, md, bcache) ── … ── mounted, or swap
      └── holders
    loop device ── backing file ── (the file may be under another loop device too)

Devices are named by `os.makedev` numbers, never by path: a path may mean another device tomorrow.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SYS_BLOCK = Path("/sys/dev/block")


def sys_dir(device: int) -> Path:
    """The device's directory in /sys (it need not exist)."""
    return (SYS_BLOCK / f"{os.major(device)}:{os.minor(device)}").resolve()


def read_text(path: Path) -> str:
    """A small /sys or /proc file, stripped; empty when it is not there or cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _number(folder: Path) -> int | None:
    major, _, minor = read_text(folder / "dev").partition(":")
    return os.makedev(int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def _children(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(folder.iterdir())
    except OSError:
        return


def name_of(device: int) -> str:
    return sys_dir(device).name


def is_partition(device: int) -> bool:
    return (sys_dir(device) / "partition").exists()


def whole_disk(device: int) -> int:
    """The disk a partition lies on; the device itself when it is no partition."""
    found = _number(sys_dir(device).parent) if is_partition(device) else None
    return device if found is None else found


def partitions(device: int) -> list[int]:
    """The partitions of a whole disk."""
    folders = (child for child in _children(sys_dir(device)) if (child / "partition").exists())
    return [number for number in map(_number, folders) if number is not None]


def holders(device: int) -> list[str]:
    """Names of the devices that were made on top of this one (`dm-0`, `md127`)."""
    return [child.name for child in _children(sys_dir(device) / "holders")]


@dataclass(frozen=True, slots=True)
class Mount:
    device: int
    source: str
    point: str


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def mounts() -> list[Mount]:
    """What is mounted in our mount namespace."""
    found = []
    for line in read_text(Path("/proc/self/mountinfo")).splitlines():
        fields = line.split(" ")
        divider = fields.index("-") if "-" in fields else len(fields)
        if divider + 2 >= len(fields):
            continue
        major, _, minor = fields[2].partition(":")
        found.append(Mount(os.makedev(int(major), int(minor)), _unescape(fields[divider + 2]), _unescape(fields[4])))
    return found


def mount_point(device: int) -> str | None:
    """Where the device is mounted. btrfs and others mount under a number of their own, so the mount's source counts too."""
    for mount in mounts():
        if mount.device == device or _is_device(mount.source, device):
            return mount.point
    return None


def is_swap(device: int) -> bool:
    lines = read_text(Path("/proc/swaps")).splitlines()[1:]
    return any(_is_device(_unescape(line.split()[0]), device) for line in lines if line.strip())


def _is_device(path: str, device: int) -> bool:
    if not path.startswith("/"):
        return False
    try:
        found = Path(path).stat()
    except OSError:
        return False
    return stat.S_ISBLK(found.st_mode) and found.st_rdev == device


def loops_over(device: int, inode: int) -> list[str]:
    """Names of the loop devices whose backing file is this inode (named by its filesystem's device number)."""
    found = []
    for folder in _children(Path("/sys/block")):
        backing = read_text(folder / "loop" / "backing_file")
        try:
            status = Path(backing).stat() if backing else None
        except OSError:
            continue
        if status is not None and (status.st_dev, status.st_ino) == (device, inode):
            found.append(folder.name)
    return found


@dataclass(frozen=True, slots=True)
class Opener:
    pid: int
    program: str


def writers_of(status: os.stat_result) -> list[Opener]:
    """Other processes that have this file or block device open for writing, as far as we may look (root sees all).

    For a device it is the number that counts, for a file its filesystem and inode.
    """
    block = stat.S_ISBLK(status.st_mode)
    wanted = status.st_rdev if block else (status.st_dev, status.st_ino)
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        for link in _children(process / "fd"):
            try:
                other = link.stat()
            except OSError:
                continue
            if block and not stat.S_ISBLK(other.st_mode):
                continue
            if (other.st_rdev if block else (other.st_dev, other.st_ino)) != wanted:
                continue
            if _writable(process / "fdinfo" / link.name):
                found.append(Opener(int(process.name), read_text(process / "comm")))
                break
    return found


def _writable(info: Path) -> bool:
    for line in read_text(info).splitlines():
        if line.startswith("flags:"):
            return int(line.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return False


def is_swap_file(status: os.stat_result) -> bool:
    """Is this regular file an active swap file?"""
    for line in read_text(Path("/proc/swaps")).splitlines()[1:]:
        try:
            found = Path(_unescape(line.split()[0])).stat()
        except (OSError, IndexError):
            continue
        if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
            return True
    return False
