"""Small files that a power cut must not take: on the medium, name and all, when these functions return.

An OSError on the way becomes GuestError through `storing`: what is kept here is kept before a disk is touched, so a full file
system ends a morph, and never a disk.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokvm.guest.base import GuestError

NEW = ".new"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def storing(where: Path | str) -> Iterator[None]:
    """OSError as GuestError."""
    try:
        yield
    except OSError as exc:
        fix = "make room there, then run the command again" if exc.errno in _FULL else "check the file system and its rights"
        raise GuestError(f"cannot be written: {exc.strerror or exc}", where=str(where), fix=fix) from exc


def write_file(path: Path, data: bytes) -> None:
    """Put `data` there in one step: whoever looks, after a crash too, finds all of the old or all of the new."""
    fresh = path.with_name(path.name + NEW)
    with storing(path):
        fresh.unlink(missing_ok=True)
        fd = create(fresh)
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        fresh.replace(path)
        sync_folder(path.parent)


def create(path: Path) -> int:
    """A descriptor of a new file, mode 0600; FileExistsError when anything is there."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """All of `data`, looping over short writes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_private(path: Path) -> None:
    """A folder of our own, made (with those above it) when missing, mode 0700; its name is on the medium."""
    with storing(path):
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
            sync_folder(path.parent)


def open_private(path: Path) -> int:
    """A descriptor of the folder; GuestError when others could write or look into it (QEMU's user passes)."""
    with storing(path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    found = os.fstat(fd)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o066:
        os.close(fd)
        raise GuestError(
            f"the folder is not ours alone (owner {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o})",
            where=str(path),
            fix="chown it to yourself and chmod 0700 it, or give another state directory",
        )
    return fd


def boot_id() -> str:
    """Another after each boot of this host (proc(5))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
