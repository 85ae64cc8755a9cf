"""Image files on this host, read with preadv straight into the caller's buffer.

open(O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK)   the last: a FIFO must not hold us up
fstat: a regular file or a block device, nothing else
everything after that works on the descriptor, never on the path again
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tokvm.core.errors import ImageError
from tokvm.core.units import KiB
from tokvm.images.page_cache import is_cached

_DIRECT_ALIGN = 512  # of file offset and length: VHD data begins at any sector. A medium that wants more says EINVAL
_DIRECT_FROM = 64 * KiB  # smaller reads are the page cache's: it reads ahead, and neighbours share its pages


class LocalFile:
    """A regular file or block device, open for reading. Implements `images.base.ReadAt`; thread-safe."""

    def __init__(self, name: str, fd: int, direct_fd: int | None) -> None:
        self.name = name
        self._fd = fd
        self._direct_fd = direct_fd
        found = os.fstat(fd)
        self._stat = found
        self.size = os.lseek(fd, 0, os.SEEK_END) if stat.S_ISBLK(found.st_mode) else found.st_size

    def fileno(self) -> int:
        return self._fd

    @property
    def inodes(self) -> tuple[tuple[int, int], ...]:
        """(device, inode), one: two paths with the same one are the same file."""
        return ((self._stat.st_dev, self._stat.st_ino),)

    @property
    def stamp(self) -> str:
        """Changes when somebody writes to the file: modification time in ns. A block device has none."""
        return "" if stat.S_ISBLK(self._stat.st_mode) else str(self._stat.st_mtime_ns)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset < 0 or offset + len(buffer) > self.size:
            raise ImageError(
                f"cannot read {len(buffer)} bytes: the file ends at {self.size:#x}",
                where=f"{self.name}@{offset:#x}",
                fix="copy the file again; it is shorter than it says",
            )
        done = 0
        direct = self._direct_for(offset, len(buffer))
        if direct is not None:
            done = self._read(direct, offset, buffer)
        while done < len(buffer):
            count = self._read(self._fd, offset + done, buffer[done:] if done else buffer)
            if count == 0:
                raise ImageError(
                    f"the file ended {len(buffer) - done} bytes early; it shrank while it was read",
                    where=f"{self.name}@{offset + done:#x}",
                    fix="see who writes to the image, then run the command again",
                )
            done += count

    def data_ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of what is not a hole in [start, stop), ascending; all of it where nobody can tell."""
        at = start
        while at < stop:
            try:
                begin = os.lseek(self._fd, at, os.SEEK_DATA)
                end = os.lseek(self._fd, begin, os.SEEK_HOLE)
            except OSError as exc:
                if exc.errno == errno.ENXIO:  # nothing but a hole up to the end
                    return
                begin, end = at, stop
            if begin < stop:
                yield begin, min(end, stop) - begin
            at = end

    def will_read(self, offset: int, length: int) -> None:
        """The kernel may begin to read this now, into the page cache."""
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def _direct_for(self, offset: int, length: int) -> int | None:
        """Past the page cache costs a tenth of the CPU, but what the cache holds already is quicker to have from there."""
        direct = self._direct_fd
        if direct is None or length < _DIRECT_FROM or (offset | length) % _DIRECT_ALIGN:
            return None
        return None if is_cached(self._fd, offset, length) else direct

    def _read(self, fd: int, offset: int, buffer: memoryview) -> int:
        """Bytes read, perhaps fewer than asked; 0 past the page cache where the file system wants other alignments."""
        try:
            return os.preadv(fd, [buffer], offset)
        except OSError as exc:
            if exc.errno == errno.EINVAL and fd == self._direct_fd:
                return 0
            raise self._failed(offset, exc) from exc

    def _failed(self, offset: int, exc: OSError) -> ImageError:
        return ImageError(
            f"reading failed: {exc.strerror}",
            where=f"{self.name}@{offset:#x}",
            fix="look into the kernel's log (dmesg) for errors of this disk",
        )

    def close(self) -> None:
        for fd in (self._fd, self._direct_fd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._fd, self._direct_fd = -1, None


def open_file(path: str | Path, *, direct: bool = True, regular: bool = False) -> LocalFile:
    """Open an image file. regular: a block device is refused. direct: large reads of what the page cache does not hold go past
    it (O_DIRECT), where the file system has that."""
    name = str(path)
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags | os.O_NONBLOCK)
    except OSError as exc:
        fix = "give the path that the link leads to" if exc.errno == errno.ELOOP else "check the path and its permissions"
        what = "it is a symbolic link" if exc.errno == errno.ELOOP else f"cannot open: {exc.strerror}"
        raise ImageError(what, where=name, fix=fix) from exc
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or (stat.S_ISBLK(mode) and not regular)):
            what = "it is no regular file" if regular else "it is neither a regular file nor a block device"
            raise ImageError(what, where=name, fix="give an image file")
        return LocalFile(name, fd, _open_direct(fd, flags) if direct else None)
    except BaseException:
        os.close(fd)
        raise


def _open_direct(fd: int, flags: int) -> int | None:
    """A second descriptor of the very same file with O_DIRECT, or None where it is not to be had (tmpfs before 6.6)."""
    with contextlib.suppress(OSError):
        return os.open(f"/proc/self/fd/{fd}", (flags & ~os.O_NOFOLLOW) | os.O_DIRECT)
    return None
