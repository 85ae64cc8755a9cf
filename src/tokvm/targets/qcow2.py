"""A qcow2 file as a target: made by us with qemu-img, written through qemu-nbd; or proved to be the one we made.

    path ─ O_EXCL ─► flock, token ─► qemu-img create ─► qemu-nbd on /proc/PID/fd/N (the very file we hold) ─► writes

What a raw file as a target may be, this may be too (see rawfile.py): an empty file; one made and not yet written; the one an
earlier run recorded; one given up by the operator. All but the recorded one are made anew: nothing is ever written into an
image of somebody else's. QEMU's own image lock excludes VMs while the file is served (our lock on all bytes would lock qemu-nbd
out); our flock excludes other runs, and outlives the server.

The attribute user.tokvm.served is on the file while it is served. Found at the next opening, the run was killed: then leaked
clusters are given back first (without lazy refcounts a kill leaves nothing worse), and real damage is refused.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokvm.core.errors import TargetError, UnsafeTarget
from tokvm.core.units import SECTOR
from tokvm.remote.nbd import NbdExport, require_libnbd
from tokvm.remote.process import ProgramError
from tokvm.remote.qemu_img import Health, create_qcow2, grow_qcow2, repair_leaks
from tokvm.remote.qemu_nbd import Access, Cache, QemuNbd, require_qemu
from tokvm.targets import interlocks, linux, rawfile
from tokvm.targets.interlocks import Consent
from tokvm.targets.medium import open_direct
from tokvm.targets.nbd import NbdTarget
from tokvm.targets.qcow2_header import Qcow2Header

log = logging.getLogger(__name__)

SERVED = "user.tokvm.served"
IDENTITY = "qcow2:"
_CONNECTIONS = 8


class Qcow2File(NbdTarget):
    """DiskWriter on a qcow2 file. `known_zero` until the first write, when no earlier run wrote either."""

    @classmethod
    def create(cls, path: str, *, size: int) -> Qcow2File:
        """A new qcow2 for a disk of `size` bytes, mode 0600; UnsafeTarget when anything is there already."""
        _refuse_impossible(path, size)
        with holding(rawfile.create_new(path), path) as fd:
            interlocks.take_locks(path, fd)
            rawfile.sync_directory(Path(path).parent)
            return cls._make(fd, path, size)

    @classmethod
    def open(cls, path: str, *, size: int, expect: str | None, consent: Consent) -> Qcow2File:
        """An existing file: made anew when it holds nothing or was given up, gone on with when it is `expect`. The disk in it
        grows to `size` if it is smaller, and is never cut."""
        _refuse_impossible(path, size)
        with holding(rawfile.open_existing(path), path) as fd:
            _check(path, fd, size=size, expect=expect, consent=consent)
            return cls._make(fd, path, size) if expect is None else cls._go_on(fd, path, size, expect)

    @staticmethod
    def probe_new(path: str, *, size: int) -> None:
        """UnsafeTarget or TargetError when `create` would refuse whatever the path; nothing is made."""
        _refuse_impossible(path, size)

    @staticmethod
    def probe(path: str, *, size: int, consent: Consent) -> None:
        """UnsafeTarget when `open` would refuse the file; nothing is changed."""
        _refuse_impossible(path, size)
        with holding(rawfile.open_existing(path), path) as fd:
            _check(path, fd, size=size, expect=None, consent=consent)
            os.close(fd)

    @classmethod
    def _make(cls, fd: int, path: str, size: int) -> Qcow2File:
        identity = _identity(rawfile.mark_file(fd))  # first: what a kill leaves behind is empty, or known to be ours
        linux.unlock_whole(fd)
        create_qcow2(fd, size=size, where=path)
        os.fsync(fd)
        rawfile.warn_if_tight(path, fd, size)
        return cls._serve(fd, path, size, identity, known_zero=True)

    @classmethod
    def _go_on(cls, fd: int, path: str, size: int, identity: str) -> Qcow2File:
        header = qcow2_as_made(path, fd)
        linux.unlock_whole(fd)
        if not _was_closed(fd) and repair_leaks(fd, where=path) is Health.DAMAGED:
            raise TargetError("the qcow2 is damaged (`qemu-img check` says how)", where=path, fix="copy this disk anew")
        if header.size < size:
            grow_qcow2(fd, size=size, where=path)
        return cls._serve(fd, path, max(size, header.size), identity, known_zero=header.blank(fd))

    @classmethod
    def _serve(cls, fd: int, path: str, size: int, identity: str, *, known_zero: bool) -> Qcow2File:
        _set_served(fd)
        server, export, cache = serve(fd, path, size, Access.WRITE)
        return cls(fd, server, export, path=path, identity=identity, known_zero=known_zero, cache=cache)

    def _closed_well(self, fd: int) -> None:
        try:
            os.removexattr(fd, SERVED)
        except OSError as exc:
            log.info("%s: no attribute %s (%s)", self.path, SERVED, exc.strerror)


def serve(fd: int, path: str, size: int, access: Access) -> tuple[QemuNbd, NbdExport, Cache]:
    """The image behind `fd` on a socket, and connections to it."""
    direct = open_direct(fd, os.O_RDWR if access is Access.WRITE else os.O_RDONLY)
    cache = Cache.WRITEBACK if direct < 0 else Cache.NONE
    if direct >= 0:
        os.close(direct)
    server = QemuNbd.serve(fd, image_format="qcow2", where=path, cache=cache, access=access, connections=_CONNECTIONS)
    try:
        export = NbdExport(server.socket, most=_CONNECTIONS)
        if export.size != size:
            raise ProgramError(f"qemu-nbd serves {export.size} bytes, not {size}", where=path)
    except BaseException:
        server.stop()
        raise
    return server, export, cache


def qcow2_as_made(path: str, fd: int) -> Qcow2Header:
    """The header of an image that QEMU may be let near; UnsafeTarget when it is not as we made it."""
    header = Qcow2Header.read(fd)
    if header is None or header.peculiar:
        why = "it is no qcow2 file" if header is None else header.peculiar
        raise UnsafeTarget(f"the file is no longer the qcow2 that was made here: {why}", where=path, fix="copy this disk anew")
    return header


def qcow2_identity(fd: int) -> str:
    """As a raw file's, but never equal to one: whoever takes the image for a raw disk must be refused."""
    return _identity(rawfile.file_identity(fd))


def _identity(raw: str) -> str:
    return IDENTITY + raw.removeprefix("file:")


def _check(path: str, fd: int, *, size: int, expect: str | None, consent: Consent) -> None:
    rawfile.refuse_shared(path, fd)
    status = os.fstat(fd)
    # The server of a run that was killed a moment ago dies with it, but not before its writes in flight have ended.
    interlocks.take_locks(path, fd, wait_s=0.0 if _was_closed(fd) else interlocks.LOCK_WAIT_S)
    interlocks.refuse_writers(path, status)
    if expect is not None:
        interlocks.refuse_other_identity(path, expect, qcow2_identity(fd))
        return
    header = Qcow2Header.read(fd)
    unused = header is not None and header.blank(fd) and (header.size == size or rawfile.token_of(fd) != "")
    if status.st_size and not unused and not consent.covers(status.st_size, (), needs_confirm=False):
        raise rawfile.foreign_file(path, status.st_size, consent)


def _refuse_impossible(path: str, size: int) -> None:
    if size % SECTOR:
        raise UnsafeTarget(
            f"a qcow2 holds whole sectors, and the disk has {size} bytes", where=path, fix="give a raw file as the target"
        )
    require_tools(path)


def require_tools(path: str) -> None:
    """TargetError when a program or binding that every qcow2 target needs is missing."""
    with translated(path):
        require_qemu()
        require_libnbd()


def _was_closed(fd: int) -> bool:
    """No server of ours had it last, or it ended well. Not known where the filesystem takes no attributes: then False."""
    try:
        os.getxattr(fd, SERVED)
    except OSError as exc:
        return exc.errno == errno.ENODATA and rawfile.token_of(fd) != ""
    return False


def _set_served(fd: int) -> None:
    try:
        os.setxattr(fd, SERVED, b"1")
    except OSError as exc:
        log.info("the filesystem takes no attribute %s (%s)", SERVED, exc.strerror)
        return
    os.fsync(fd)


@contextmanager
def holding(fd: int, path: str) -> Iterator[int]:
    """Closes the descriptor when something goes wrong; the target keeps it when not."""
    try:
        with translated(path):
            yield fd
    except BaseException:
        os.close(fd)
        raise


@contextmanager
def translated(path: str) -> Iterator[None]:
    """A program's failure, or the kernel's, on the way to the image is the target's."""
    try:
        yield
    except ProgramError as exc:
        raise TargetError(
            exc.what, where=exc.where or path, fix=exc.fix or "stop what uses the file, or check its filesystem"
        ) from exc
    except OSError as exc:
        raise TargetError(f"the file cannot be used: {exc.strerror}", where=path, fix="check the filesystem") from exc
