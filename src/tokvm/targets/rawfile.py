"""A raw file as a target: sparse, byte for byte the guest's disk; made by us, or proved to be the one we made.

O_EXCL does not exclude on a file that exists, so two locks do (flock, and an OFD lock as QEMU's image locking sees it), and a
look through /proc for other writers. A file we made carries a random token in the attribute user.tokvm.id, so that a copy put
in its place, or another file of the same name, is not taken for it. A file without any data that has our token or exactly the
disk's size (a run that died between making the file and recording its identity) is taken again.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from pathlib import Path

from tokvm.core.errors import TargetError, UnsafeTarget
from tokvm.targets import interlocks, linux, topology
from tokvm.targets.interlocks import Consent
from tokvm.targets.medium import Medium

log = logging.getLogger(__name__)

TOKEN = "user.tokvm.id"
_PSEUDO = ("/dev/", "/proc/", "/sys/")
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class RawFile(Medium):
    """DiskWriter on a regular file. `known_zero` only for a file that this object made and has not written yet."""

    @classmethod
    def create(cls, path: str, *, size: int) -> RawFile:
        """A new sparse file of `size` bytes, mode 0600; UnsafeTarget when anything is there already."""
        fd = create_new(path)
        try:
            interlocks.take_locks(path, fd)
            identity = mark_file(fd)  # first: what a kill leaves behind is empty, or known to be ours
            os.ftruncate(fd, size)
            os.fsync(fd)
            sync_directory(Path(path).parent)
            warn_if_tight(path, fd, size)
            return cls(fd, path=path, size=size, identity=identity, known_zero=True)
        except OSError as exc:
            os.close(fd)
            raise TargetError(f"the file cannot be made: {exc.strerror}", where=path, fix="check the filesystem") from exc
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open(cls, path: str, *, size: int, expect: str | None, consent: Consent) -> RawFile:
        """An existing file: empty, ours by `expect`, or given up by the operator. Grown to `size` if smaller, never cut."""
        fd = open_existing(path)
        try:
            _check(path, fd, size=size, expect=expect, consent=consent)
            blank = _holds_nothing(fd)
            identity = file_identity(fd) if expect is not None else mark_file(fd)
            if os.fstat(fd).st_size < size:
                os.ftruncate(fd, size)
            os.fsync(fd)
            actual = os.fstat(fd).st_size
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return cls(fd, path=path, size=actual, identity=identity, known_zero=blank)
        except OSError as exc:
            os.close(fd)
            raise TargetError(f"the file cannot be used: {exc.strerror}", where=path, fix="check the filesystem") from exc
        except BaseException:
            os.close(fd)
            raise

    @staticmethod
    def probe(path: str, *, size: int, consent: Consent) -> None:
        """UnsafeTarget when `open` would refuse the file; nothing is changed."""
        fd = open_existing(path)
        try:
            _check(path, fd, size=size, expect=None, consent=consent)
        finally:
            os.close(fd)

    def _zero_range(self, offset: int, length: int) -> None:
        """A hole where the filesystem can punch one; else unwritten blocks, which read as zeros too."""
        try:
            linux.fallocate(self._fd, linux.FALLOC_PUNCH_HOLE | linux.FALLOC_KEEP_SIZE, offset, length)
        except OSError as exc:
            if exc.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            linux.fallocate(self._fd, linux.FALLOC_ZERO_RANGE | linux.FALLOC_KEEP_SIZE, offset, length)


def create_new(path: str) -> int:
    """A descriptor of an empty file that was not there before, mode 0600."""
    refuse_pseudo(path)
    try:
        return os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as exc:
        raise UnsafeTarget("something appeared at the path just now", where=path, fix="look who made it") from exc
    except OSError as exc:
        raise _cannot_open(path, exc) from exc


def open_existing(path: str) -> int:
    """A descriptor to read and write, of a file that no symbolic link led to at the last step."""
    try:
        return os.open(path, _FLAGS)
    except OSError as exc:
        raise _cannot_open(path, exc) from exc


def _check(path: str, fd: int, *, size: int, expect: str | None, consent: Consent) -> None:
    refuse_shared(path, fd)
    status = os.fstat(fd)
    interlocks.take_locks(path, fd)
    interlocks.refuse_writers(path, status)
    if expect is not None:
        interlocks.refuse_other_identity(path, expect, file_identity(fd))
        return
    unused = _holds_nothing(fd) and (status.st_size == size or token_of(fd))
    if status.st_size and not unused and not consent.covers(status.st_size, (), needs_confirm=False):
        raise foreign_file(path, status.st_size, consent)


def foreign_file(path: str, size: int, consent: Consent) -> UnsafeTarget:
    """The refusal of a file with content that the operator has not given up."""
    detail = f", and {consent.confirm!r} is not its size" if consent.force else ""
    return UnsafeTarget(
        f"a file of {size} bytes is there already, and no run of ours made it{detail}",
        where=path,
        fix=f"give another path, remove it, or if it may be lost repeat its size: --overwrite {path}={size}",
    )


def refuse_shared(path: str, fd: int) -> None:
    """No regular file, not this path's any more, or one that is reached in another way too."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise interlocks.refuse_kind(path, status.st_mode)
    if status.st_nlink > 1:
        raise UnsafeTarget("the file has more than one name (hard links)", where=path, fix="give a file of its own")
    loops = topology.loops_over(status.st_dev, status.st_ino)
    if loops:
        raise UnsafeTarget(
            f"{', '.join(loops)} lies on the file", where=path, fix="detach it (losetup -d), or give another file"
        )
    if topology.is_swap_file(status):
        raise UnsafeTarget("the host swaps on the file", where=path, fix="give another file")
    interlocks.refuse_moved(path, fd)


def file_identity(fd: int) -> str:
    """`file:inode:token`; where the filesystem takes no attributes, the inode and the time of its birth.

    No device number: it may be another after a reboot."""
    inode, token = os.fstat(fd).st_ino, token_of(fd)
    return f"file:{inode}:{token}" if token else f"file:{inode}:born-{linux.birth_time(fd)}"


def mark_file(fd: int) -> str:
    """The identity after a new token was put on it: an earlier owner's recorded identity is void from now on."""
    try:
        os.setxattr(fd, TOKEN, os.urandom(16).hex().encode("ascii"))
    except OSError as exc:
        log.info("the filesystem takes no attribute %s (%s)", TOKEN, exc.strerror)
    return file_identity(fd)


def token_of(fd: int) -> str:
    try:
        return os.getxattr(fd, TOKEN).decode("ascii", "replace")
    except OSError:
        return ""


def _holds_nothing(fd: int) -> bool:
    """True when the file is empty or one hole."""
    if os.fstat(fd).st_size == 0:
        return True
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as exc:
        return exc.errno == errno.ENXIO
    return False


def refuse_pseudo(path: str) -> None:
    """A mistyped device name must not become a file in memory."""
    real = str(Path(path).parent.resolve()) + "/"
    if real.startswith(_PSEUDO) and not real.startswith("/dev/shm/"):
        raise UnsafeTarget(
            "there is no such device, and a file would not belong there", where=path, fix="check the device's name"
        )


def _cannot_open(path: str, exc: OSError) -> TargetError:
    if exc.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY):
        return UnsafeTarget(f"the file cannot be opened for writing: {exc.strerror}", where=path, fix="give another path")
    return TargetError(f"the file cannot be opened: {exc.strerror}", where=path, fix="check that its directory exists")


def warn_if_tight(path: str, fd: int, size: int) -> None:
    found = os.fstatvfs(fd)
    free = found.f_bavail * found.f_frsize
    if free < size:
        log.warning("%s: the filesystem has %d bytes free, the disk may grow to %d", path, free, size)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
