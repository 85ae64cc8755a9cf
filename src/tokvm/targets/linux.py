"""The few Linux calls that Python's os module lacks: block-device ioctls, fallocate, OFD locks, statx.

Numbers from <linux/fs.h>, <linux/loop.h>, <linux/falloc.h>, <asm-generic/fcntl.h> (the same on x86-64 and arm64).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from functools import cache

BLKROGET = 0x125E
BLKGETSIZE64 = 0x80081272
BLKZEROOUT = 0x127F
LOOP_GET_STATUS64 = 0x4C05

FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
FALLOC_ZERO_RANGE = 0x10

F_OFD_GETLK = 36
F_OFD_SETLK = 37
_FLOCK = struct.Struct("hhqqi4x")

_AT_EMPTY_PATH = 0x1000
_STATX_BTIME = 0x800


def device_size(fd: int) -> int:
    """Bytes of a block device."""
    return int(struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))[0])


def device_read_only(fd: int) -> bool:
    return bool(struct.unpack("i", fcntl.ioctl(fd, BLKROGET, bytes(4)))[0])


def zero_out(fd: int, offset: int, length: int) -> None:
    """BLKZEROOUT: reads as zeros afterwards, by WRITE ZEROES or written zeros (not BLKDISCARD: its result may be anything)."""
    fcntl.ioctl(fd, BLKZEROOUT, struct.pack("QQ", offset, length))


@dataclass(frozen=True, slots=True)
class LoopStatus:
    """What a loop device lies on. `device` and `inode` name the backing file."""

    device: int
    inode: int
    offset: int


def loop_status(fd: int) -> LoopStatus | None:
    """None when the device is no loop device, or has no file."""
    try:
        raw = fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(232))
    except OSError:
        return None
    device, inode, _, offset = struct.unpack_from("QQQQ", raw)
    return LoopStatus(device, inode, offset)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    call = _libc().fallocate64 if hasattr(_libc(), "fallocate64") else _libc().fallocate
    while call(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def lock_whole(fd: int) -> bool:
    """An exclusive open-file-description lock on every byte, as QEMU's image locking would see it. False: somebody has one."""
    try:
        fcntl.fcntl(fd, F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


def unlock_whole(fd: int) -> None:
    """Give `lock_whole`'s lock back."""
    fcntl.fcntl(fd, F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))


def birth_time(fd: int) -> int:
    """Nanoseconds since 1970 at which the inode was made; 0 where the filesystem does not say."""
    buffer = ctypes.create_string_buffer(256)
    if _libc().statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, buffer) != 0:
        return 0
    mask = struct.unpack_from("I", buffer.raw, 0)[0]
    seconds, nanoseconds = struct.unpack_from("qI", buffer.raw, 80)
    return int(seconds * 10**9 + nanoseconds) if mask & _STATX_BTIME else 0
