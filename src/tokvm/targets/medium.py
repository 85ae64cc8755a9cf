"""An open target's bytes: written past the page cache where that is faster, flushed, and read back from the medium.

    one write:   | head, buffered | whole pages, O_DIRECT | tail, buffered |
                 offset           4 KiB line              4 KiB line

Two descriptors of one inode. Large writes go past the page cache (a tenth of the CPU of buffered writes, and no flood of dirty
pages to flush); small ones go through it, because it gathers them. The two never meet in one page: the direct part is made of
pages that lie wholly inside one write, and no two writes of a pass overlap, so a page is either only direct or only buffered.
(A page that is dirty in the cache while it is written past the cache can lose one of the two.)

After the first failed write or flush the medium is poisoned: every later call fails until it is opened again. Linux reports a
writeback error once and then calls the pages clean, so a second fdatasync that succeeds means nothing.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import stat
import threading

import numpy as np

from tokvm.core.errors import TargetError
from tokvm.core.units import GiB, KiB, MiB, round_up

log = logging.getLogger(__name__)

PAGE = 4 * KiB
DIRECT_FROM = 64 * KiB
ZERO_STEP = GiB
_MEMORY_ALIGNMENT = 512
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS)
_ZEROS = memoryview(mmap.mmap(-1, MiB))


class Medium:
    """DiskWriter over an open descriptor, which it owns. Subclasses say how a range is zeroed without sending zeros."""

    def __init__(self, fd: int, *, path: str, size: int, identity: str, known_zero: bool) -> None:
        self._fd = fd
        self._direct = open_direct(fd, os.O_RDWR)
        self._path = path
        self._size = size
        self._identity = identity
        self._known_zero = known_zero
        self._poison: TargetError | None = None
        self._can_zero_range = True
        self._bounce = threading.local()

    @property
    def path(self) -> str:
        return self._path

    @property
    def size(self) -> int:
        return self._size

    @property
    def identity(self) -> str:
        return self._identity

    @property
    def known_zero(self) -> bool:
        return self._known_zero

    def fileno(self) -> int:
        return self._fd

    def write(self, offset: int, data: memoryview) -> None:
        """All of `data`, looping over short writes (the kernel may stop early without an error)."""
        self._check(offset, len(data))
        self._known_zero = False
        first, end = round_up(offset, PAGE), (offset + len(data)) // PAGE * PAGE
        if self._direct < 0 or end - first < DIRECT_FROM:
            self._push(self._fd, offset, data)
            return
        self._push(self._fd, offset, data[: first - offset])
        self._push_direct(first, data[first - offset : end - offset])
        self._push(self._fd, end, data[end - offset :])

    def zero(self, offset: int, length: int) -> None:
        """Whole pages by the medium's own command where it has one, the rest (or all) by written zeros."""
        self._check(offset, length)
        first, end = round_up(offset, PAGE), (offset + length) // PAGE * PAGE
        if end - first < DIRECT_FROM:
            self._write_zeros(offset, length)
            return
        self._write_zeros(offset, first - offset)
        at = first
        while at < end and self._can_zero_range:
            step = min(ZERO_STEP, end - at)
            if not self._try_zero_range(at, step):
                break
            at += step
        self._write_zeros(at, end - at)
        self._write_zeros(end, offset + length - end)

    def flush(self) -> None:
        """fdatasync on both descriptors. An error voids everything since the last good flush, and is never retried."""
        self._check(0, 0)
        for fd in (self._fd, self._direct):
            if fd < 0:
                continue
            try:
                os.fdatasync(fd)
            except OSError as exc:
                raise self._failed("flushing", None, exc) from exc

    def read_back(self, offset: int, length: int) -> memoryview:
        """From the medium: O_DIRECT, or where that cannot be had after a flush and dropping the pages from the cache."""
        self._check(offset, length)
        try:
            if self._direct >= 0:
                return read_direct(self._direct, offset, length)
            self.flush()
            return read_dropped(self._fd, offset, length)
        except OSError as exc:
            raise TargetError(
                f"reading back failed: {exc.strerror}", where=f"{self._path}@{offset:#x}", fix="check the storage below it"
            ) from exc

    def is_hole(self, offset: int, length: int) -> bool:
        """True when the filesystem itself says that it stores nothing there, so that it reads as zeros."""
        return is_hole(self._fd, offset, length)

    def close(self) -> None:
        """Gives the target back. Does not flush: what was not flushed does not count."""
        fds, self._fd, self._direct = (self._direct, self._fd), -1, -1
        for fd in fds:
            if fd >= 0:
                try:
                    os.close(fd)
                except OSError as exc:
                    log.warning("%s: closing failed: %s", self._path, exc.strerror)
        self._poison = self._poison or TargetError("the target was closed", where=self._path)

    def _zero_range(self, offset: int, length: int) -> None:
        """Make whole pages read as zeros without sending them; OSError (EOPNOTSUPP and the like) when that cannot be done."""
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def _try_zero_range(self, offset: int, length: int) -> bool:
        try:
            self._zero_range(offset, length)
        except OSError as exc:
            if exc.errno not in _UNSUPPORTED:
                raise self._failed("zeroing", offset, exc) from exc
            log.info("%s: no zeroing command here (%s), writing zeros", self._path, exc.strerror)
            self._can_zero_range = False
            return False
        return True

    def _write_zeros(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            step = min(len(_ZEROS), end - offset)
            self.write(offset, _ZEROS[:step])
            offset += step

    def _push_direct(self, offset: int, data: memoryview) -> None:
        """The page-aligned middle. Bytes that lie askew in memory are copied once; O_DIRECT wants them aligned."""
        if _address(data) % _MEMORY_ALIGNMENT:
            room = self._bounce_buffer()
            for at in range(0, len(data), len(room)):
                part = data[at : at + len(room)]
                room[: len(part)] = part
                self._push(self._direct, offset + at, room[: len(part)])
            return
        self._push(self._direct, offset, data)

    def _bounce_buffer(self) -> memoryview:
        found: memoryview | None = getattr(self._bounce, "room", None)
        if found is None:
            found = self._bounce.room = memoryview(mmap.mmap(-1, MiB))
        return found

    def _push(self, fd: int, offset: int, data: memoryview) -> None:
        while data:
            try:
                done = os.pwrite(fd, data, offset)
            except InterruptedError:
                continue
            except OSError as exc:
                if exc.errno == errno.EINVAL and fd == self._direct:
                    fd = self._fd  # this medium takes no direct write of this shape
                    continue
                raise self._failed("writing", offset, exc) from exc
            if done <= 0:
                raise self._failed("writing", offset, OSError(errno.EIO, "the kernel took no bytes"))
            data, offset = data[done:], offset + done

    def _check(self, offset: int, length: int) -> None:
        if self._poison is not None:
            raise TargetError(self._poison.what, where=self._poison.where, fix=self._poison.fix) from self._poison
        if offset < 0 or length < 0 or offset + length > self._size:
            raise TargetError(
                f"{length} bytes would lie outside the target's {self._size} bytes", where=f"{self._path}@{offset:#x}"
            )

    def _failed(self, doing: str, offset: int | None, exc: OSError) -> TargetError:
        where = self._path if offset is None else f"{self._path}@{offset:#x}"
        fix = "check the storage below it (dmesg), then run the same command again: it goes on from the last checkpoint"
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fix = "make room on it, then run the same command again: it goes on from the last checkpoint"
        error = TargetError(f"{doing} failed: {exc.strerror}", where=where, fix=fix)
        self._poison = self._poison or error
        return error


def open_direct(fd: int, flags: int) -> int:
    """A second descriptor of the same inode, with O_DIRECT (by /proc: no path can come between); -1 where there is none."""
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as exc:
        log.info("no O_DIRECT on fd %d (%s), going through the page cache", fd, exc.strerror)
        return -1


def read_direct(fd: int, offset: int, length: int) -> memoryview:
    """`length` bytes at `offset` of an O_DIRECT descriptor, read as whole pages into a buffer of their own."""
    start = offset // PAGE * PAGE
    room = memoryview(mmap.mmap(-1, max(round_up(offset + length, PAGE) - start, PAGE)))
    return _filled(fd, start, room, offset - start, length)


def read_dropped(fd: int, offset: int, length: int) -> memoryview:
    """The same through the page cache, after asking the kernel to drop those pages (they must be clean: flush first)."""
    os.posix_fadvise(fd, offset // PAGE * PAGE, round_up(length, PAGE) + PAGE, os.POSIX_FADV_DONTNEED)
    return _filled(fd, offset, memoryview(bytearray(length)), 0, length)


def _filled(fd: int, at: int, room: memoryview, skip: int, length: int) -> memoryview:
    got = 0
    while got < skip + length:
        count = os.preadv(fd, [room[got:]], at + got)
        if count == 0:
            raise OSError(errno.EIO, f"it ends at {at + got:#x}")
        got += count
    return room[skip : skip + length]


def is_hole(fd: int, offset: int, length: int) -> bool:
    """By SEEK_DATA; always False for a block device, which has no holes to show."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return False
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) >= offset + length
    except OSError as exc:
        return exc.errno == errno.ENXIO


def _address(data: memoryview) -> int:
    return int(np.frombuffer(data, np.uint8).__array_interface__["data"][0])
