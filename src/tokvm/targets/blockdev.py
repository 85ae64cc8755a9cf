"""A block device as a target: opened once, exclusively, after every interlock; zeroed by BLKZEROOUT.

O_EXCL on a block device is the kernel's own claim: it fails while the device, its disk or one of its partitions is mounted,
swapped on, or under dm, md, btrfs or bcache, in any mount namespace; and while we hold it none of them can begin.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from pathlib import Path

from tokvm.core.errors import TargetError, UnsafeTarget
from tokvm.targets import interlocks, linux, topology
from tokvm.targets.interlocks import Consent
from tokvm.targets.medium import Medium

log = logging.getLogger(__name__)

BY_ID = Path("/dev/disk/by-id")


class BlockDevice(Medium):
    """DiskWriter on a block device. Needs no capability, only the right to open the device."""

    @classmethod
    def open(cls, path: str, *, size: int, expect: str | None, consent: Consent) -> BlockDevice:
        """Held exclusively, checked, nothing written yet; or UnsafeTarget."""
        fd = _open_exclusive(path)
        try:
            actual = linux.device_size(fd)
            identity = device_identity(fd)
            _check(path, fd, actual, identity, size=size, expect=expect, consent=consent)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # no stale page of an earlier owner
            if actual > size:
                log.warning("%s is %d bytes larger than the disk: a backup GPT will not be at its end", path, actual - size)
            return cls(fd, path=path, size=actual, identity=identity, known_zero=False)
        except OSError as exc:
            os.close(fd)
            raise TargetError(
                f"the device cannot be examined: {exc.strerror}", where=path, fix="check the device (dmesg)"
            ) from exc
        except BaseException:
            os.close(fd)
            raise

    def _zero_range(self, offset: int, length: int) -> None:
        linux.zero_out(self._fd, offset, length)


def _check(path: str, fd: int, actual: int, identity: str, *, size: int, expect: str | None, consent: Consent) -> None:
    """All interlocks, on the descriptor we hold, cheapest and plainest first."""
    device = os.fstat(fd).st_rdev
    if linux.device_read_only(fd):
        raise UnsafeTarget("the device is read-only", where=path, fix="give another, or `blockdev --setrw` this one")
    interlocks.refuse_used(path, device)
    interlocks.refuse_moved(path, fd)
    interlocks.take_locks(path, fd)
    interlocks.refuse_writers(path, os.fstat(fd))
    interlocks.refuse_shared_backing(path, fd)
    if expect is not None:
        interlocks.refuse_other_identity(path, expect, identity)
    interlocks.refuse_small(path, actual, size)
    if expect is None:
        interlocks.refuse_content(path, fd, actual, consent=consent, names=serial_names(device))


def _open_exclusive(path: str) -> int:
    """Looks before it opens, because closing a device that was opened for writing makes udev probe it; then looks again."""
    try:
        interlocks.refuse_used(path, Path(path).stat().st_rdev)
        return os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            fix = "give another device, or free this one first"
            raise UnsafeTarget(f"the device is in use: {_why_busy(path)}", where=path, fix=fix) from exc
        if exc.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise UnsafeTarget(
                f"the device cannot be written: {exc.strerror}", where=path, fix="check its mode and rights"
            ) from exc
        raise TargetError(f"the device cannot be opened: {exc.strerror}", where=path, fix="check the path") from exc


def _why_busy(path: str) -> str:
    try:
        device = Path(path).stat().st_rdev
    except OSError:
        return "and its path has just vanished"
    return interlocks.users(device) or interlocks.relatives_in_use(device) or "another process holds it exclusively"


def device_identity(fd: int) -> str:
    """What this device is, from the steadiest name the kernel has for it to the weakest.

    dm uuid (an LV's is LVM's own) | loop: the backing file | WWN or NVMe id | serial | by-id link | number and size (does not
    survive a re-scan, and a changed one is refused). A partition is its disk's identity with number and start sector.
    """
    device = os.fstat(fd).st_rdev
    folder = topology.sys_dir(device)
    if topology.is_partition(device):
        number, start = topology.read_text(folder / "partition"), topology.read_text(folder / "start")
        return f"{_disk_identity(topology.whole_disk(device), fd)}#part{number}@{start}"
    return _disk_identity(device, fd)


def _disk_identity(device: int, fd: int) -> str:
    folder = topology.sys_dir(device)
    dm_uuid = topology.read_text(folder / "dm" / "uuid")
    if dm_uuid:
        return f"dm:{dm_uuid}"
    loop = linux.loop_status(fd)
    if loop is not None and topology.name_of(device).startswith("loop"):
        return f"loop:{loop.device:x}:{loop.inode}:{loop.offset}"
    backing = topology.read_text(folder / "loop" / "backing_file")
    if backing:
        return f"loop:{backing}"
    names = serial_names(device)
    if names:
        return f"disk:{names[0]}"
    link = _by_id(device)
    if link:
        return f"by-id:{link}"
    return f"dev:{topology.name_of(device)}:{os.major(device)}:{os.minor(device)}:{topology.read_text(folder / 'size')}"


def serial_names(device: int) -> tuple[str, ...]:
    """WWN and serial of the disk, as /sys has them for SCSI, NVMe and virtio, steadiest first."""
    folder = topology.sys_dir(topology.whole_disk(device))
    places = ("wwid", "device/wwid", "serial", "device/serial", "device/cid")
    found = (re.sub(r"\s+", " ", topology.read_text(folder / place)) for place in places)
    return tuple(dict.fromkeys(name for name in found if name))


def _by_id(device: int) -> str:
    """The first udev link that leads to the device (for md, multipath and whatever else udev knows and /sys does not say)."""
    try:
        links = sorted(BY_ID.iterdir())
    except OSError:
        return ""
    for link in links:
        try:
            if link.stat().st_rdev == device:
                return link.name
        except OSError:
            continue
    return ""
