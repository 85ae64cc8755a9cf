"""May this be written to? Asked of the open descriptor, before the first byte.

Everything here refuses with UnsafeTarget and has written nothing. Order: what it is → who uses it → what it holds.
"In use" has no override. "Holds something" has one: the operator repeats the device's size or serial.

What is *not* refused: a logical volume whose volume group holds mounted volumes too. The volume is its own device, and
giving one of many to a VM is what volume groups are for; a mounted, swapped-on or held volume is refused like any device.
A partition is refused when its disk or a sibling is in use: most often that is a slip of one letter on the host's own disk.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from tokvm.core.errors import UnsafeTarget
from tokvm.core.units import parse_size
from tokvm.targets import linux, topology
from tokvm.targets.signatures import blkid_content, known_content

LOCK_WAIT_S = 3.0  # udev holds a shared lock for a moment while it probes a new device (systemd.io/BLOCK_DEVICE_LOCKING)

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a fifo",
    stat.S_IFCHR: "a character device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
}


def refuse_kind(path: str, mode: int) -> UnsafeTarget:
    """The refusal for what is neither a regular file nor a block device."""
    kind = _KINDS.get(stat.S_IFMT(mode), "no file or device")
    return UnsafeTarget(f"the target is {kind}", where=path, fix="give a raw file or a block device")


def users(device: int) -> str | None:
    """Why the device itself is in use, in words; None when it is not."""
    point = topology.mount_point(device)
    if point is not None:
        return f"it is mounted on {point}"
    if topology.is_swap(device):
        return "the host swaps on it"
    held = topology.holders(device)
    return f"{', '.join(held)} lies on it" if held else None


def relatives_in_use(device: int) -> str | None:
    """The same for a disk's partitions, and for a partition's disk and siblings."""
    disk = topology.whole_disk(device)
    for other in (disk, *topology.partitions(disk)):
        if other == device:
            continue
        reason = users(other)
        if reason is not None:
            return f"{topology.name_of(other)} is on the same disk, and {reason}"
    return None


def refuse_used(path: str, device: int) -> None:
    reason = users(device) or relatives_in_use(device)
    if reason is not None:
        raise UnsafeTarget(f"the device is in use: {reason}", where=path, fix="give another device, or free this one first")


def refuse_writers(path: str, status: os.stat_result) -> None:
    """Somebody else has it open for writing: a VM, a tool. (qemu opens a host device without O_EXCL.)"""
    found = topology.writers_of(status)
    if found:
        who = ", ".join(f"{opener.program} (pid {opener.pid})" for opener in found[:3])
        raise UnsafeTarget(f"it is open for writing in {who}", where=path, fix="stop that program, or give another target")


def refuse_shared_backing(path: str, fd: int) -> None:
    """A loop device whose file is written in another way too."""
    disk = topology.whole_disk(os.fstat(fd).st_rdev)
    loop = linux.loop_status(fd)
    if loop is None or not topology.name_of(disk).startswith("loop"):
        return  # device-mapper passes the question on to what lies below it
    backing = topology.read_text(topology.sys_dir(disk) / "loop" / "backing_file")
    others = [name for name in topology.loops_over(loop.device, loop.inode) if name != topology.name_of(disk)]
    if others:
        raise UnsafeTarget(
            f"its file {backing} is under {', '.join(others)} too", where=path, fix="detach the other loop device (losetup -d)"
        )
    try:
        status = Path(backing).stat()
    except OSError:
        return
    if (status.st_dev, status.st_ino) == (loop.device, loop.inode):
        refuse_writers(path, status)


def take_locks(path: str, fd: int, *, wait_s: float = 0.0) -> None:
    """flock, which udev and other tools respect, and an OFD lock on every byte, which QEMU's image locking respects.

    wait_s: how long the second may take, where the one that has it is known to be ending."""
    if not _flock(fd):
        raise UnsafeTarget("another process has locked it", where=path, fix=f"see who with `fuser -v {path}`; wait for its end")
    until = time.monotonic() + wait_s
    while not linux.lock_whole(fd):
        if time.monotonic() < until:
            time.sleep(0.02)
            continue
        raise UnsafeTarget(
            "another process has locked parts of it, as QEMU does with the disks of a running VM",
            where=path,
            fix="stop that VM or program, or give another target",
        )


def _flock(fd: int) -> bool:
    until = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until or stat.S_ISREG(os.fstat(fd).st_mode):
                return False
            time.sleep(0.05)
        else:
            return True


def refuse_small(path: str, have: int, need: int) -> None:
    if have < need:
        raise UnsafeTarget(
            f"the target has {have} bytes, the disk {need}: {need - have} too few",
            where=path,
            fix="give a target at least as large",
        )


def refuse_moved(path: str, fd: int) -> None:
    """The path must still mean what was opened (a link flipped, a device was re-scanned, in between)."""
    opened = os.fstat(fd)
    try:
        now = Path(path).stat()
    except OSError as exc:
        raise UnsafeTarget("the path vanished while it was opened", where=path, fix="look what happens to it") from exc
    same = (
        now.st_rdev == opened.st_rdev
        if stat.S_ISBLK(opened.st_mode)
        else (now.st_dev, now.st_ino) == (opened.st_dev, opened.st_ino)
    )
    if not same or stat.S_IFMT(now.st_mode) != stat.S_IFMT(opened.st_mode):
        raise UnsafeTarget("the path changed its meaning while it was opened", where=path, fix="give a path that stays (by-id)")


def refuse_other_identity(path: str, expect: str, found: str) -> None:
    if expect != found:
        raise UnsafeTarget(
            f"this is another target than in the earlier run: it is {found}, and that was {expect}",
            where=path,
            fix="give the path of the earlier one, or start over with a new state directory",
        )


@dataclass(frozen=True, slots=True)
class Consent:
    """What the operator allowed. `confirm` repeats the target's size, or one of the names a device is known by."""

    force: bool
    confirm: str | None

    def covers(self, size: int, names: tuple[str, ...], *, needs_confirm: bool) -> bool:
        if not self.force:
            return False
        if self.confirm is None:
            return not needs_confirm
        return self.confirm in names or _is_size(self.confirm, size)


def _is_size(text: str, size: int) -> bool:
    try:
        return parse_size(text) == size
    except ValueError:
        return False


def refuse_content(path: str, fd: int, size: int, *, consent: Consent, names: tuple[str, ...]) -> None:
    """A device that holds something needs the operator's word, and the right one."""
    found = known_content(fd, size) or blkid_content(fd)
    if found is None or consent.covers(size, names, needs_confirm=True):
        return
    if consent.force:
        asked = f"{consent.confirm!r} is not its size or serial" if consent.confirm else "its size or serial was not repeated"
        raise UnsafeTarget(f"the device holds something ({found}), and {asked}", where=path, fix=f"its size is {size} bytes")
    raise UnsafeTarget(
        f"the device holds something: {found}",
        where=path,
        fix=f"give another, or if its content may be lost repeat its size: --overwrite {path}={size}",
    )
