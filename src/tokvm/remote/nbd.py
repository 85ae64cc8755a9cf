"""An NBD export, read and written over several connections at a time. Errors are OSError, as from the kernel.

    thread ─► NbdExport.write() ─► an idle connection of the pool (or a new one, up to `most`) ─► server
    thread ─► NbdExport.flush() ─► …

libnbd's synchronous calls let other threads run (no GIL) and send straight from the caller's memory, but hold the handle: so
one handle per call in flight. A flush on one connection covers the finished writes of all of them only where the server says
so (NBD_FLAG_CAN_MULTI_CONN; qemu-nbd does since 7.1); where it does not, there is one connection, and calls take turns.
Unix sockets only: libnbd's TLS had CVE-2024-7383.
"""

from __future__ import annotations

import errno
import functools
import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokvm.core.units import GiB, MiB
from tokvm.remote.process import ProgramError

_LARGEST = 32 * MiB  # where the server does not say: the protocol's advice, and QEMU's limit
_ZERO_STEP = GiB  # 32 bits of length on the wire
_CONTEXT = "base:allocation"
_READS_ZERO = 2  # NBD_STATE_ZERO


class NbdExport:
    """The default export behind a Unix socket. Thread-safe."""

    def __init__(self, socket: str, *, most: int) -> None:
        """OSError: the server cannot be reached. ProgramError: libnbd is missing, or the server asks for what we do not do."""
        self._socket = socket
        self._idle: list[Any] = []
        first = self._connect()
        self.size = int(first.get_size())
        self.multi_conn = bool(first.can_multi_conn())
        self.largest = min(int(first.get_block_size(_libnbd().SIZE_MAXIMUM)) or _LARGEST, _LARGEST)
        smallest = int(first.get_block_size(_libnbd().SIZE_MINIMUM))
        self._idle.append(first)
        self._room = threading.Semaphore(most if self.multi_conn else 1)
        if smallest > 1:
            self.close()
            raise ProgramError(f"the NBD server takes only blocks of {smallest} bytes", where=socket)

    def write(self, offset: int, data: memoryview) -> None:
        with self._connection() as handle:
            for at in range(0, len(data), self.largest):
                handle.pwrite(data[at : at + self.largest], offset + at)

    def zero(self, offset: int, length: int) -> None:
        """The server may make a hole of it."""
        with self._connection() as handle:
            for at in range(offset, offset + length, _ZERO_STEP):
                handle.zero(min(_ZERO_STEP, offset + length - at), at)

    def read(self, offset: int, length: int) -> memoryview:
        if length <= self.largest:
            return memoryview(self._read(offset, length))
        room = memoryview(bytearray(length))
        for at in range(0, length, self.largest):
            step = min(self.largest, length - at)
            room[at : at + step] = self._read(offset + at, step)
        return room

    def flush(self) -> None:
        """Every write that has returned is on the server's medium."""
        with self._connection() as handle:
            handle.flush()

    def reads_as_zeros(self, offset: int, length: int) -> bool:
        """True when the server knows, without reading, that all of the range is zeros; False when it does not say."""
        with self._connection() as handle:
            if not handle.can_meta_context(_CONTEXT):
                return False
            at, end = offset, offset + length
            while at < end:
                known = _zeros_from(handle, at, min(end - at, _ZERO_STEP))
                if not known:
                    return False
                at += known
        return True

    def close(self) -> None:
        """Hang up (a handle does when nobody has it), without the farewell, which a server that hangs would never answer."""
        self._idle.clear()

    def _read(self, offset: int, length: int) -> bytearray:
        if not length:
            return bytearray()
        with self._connection() as handle:
            data: bytearray = handle.pread(length, offset)
            return data

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        """A connection for one caller. One that broke is not used again."""
        with self._room:
            try:
                handle = self._idle.pop()
            except IndexError:
                handle = self._connect()
            try:
                yield handle
            except _libnbd().Error as exc:
                raise _os_error(exc) from exc
            finally:
                if handle.aio_is_ready():
                    self._idle.append(handle)

    def _connect(self) -> Any:
        handle = _libnbd().NBD()
        try:
            handle.add_meta_context(_CONTEXT)
            handle.connect_unix(self._socket)
        except _libnbd().Error as exc:
            raise _os_error(exc) from exc
        return handle


def _zeros_from(handle: Any, offset: int, length: int) -> int:
    """How many bytes from `offset` on are known to be zeros (at most what the server told of)."""
    told: list[int] = []

    def extents(context: str, start: int, entries: list[int], _error: object) -> int:
        if context == _CONTEXT and start == offset:
            told.extend(entries)
        return 0

    handle.block_status(length, offset, extents)
    known = 0
    for size, flags in zip(told[::2], told[1::2], strict=True):
        if not flags & _READS_ZERO:
            return 0
        known += size
    return known


def _os_error(exc: Any) -> OSError:
    """libnbd's message is its own; the number is the server's, or of the call that broke."""
    return OSError(exc.errnum or errno.EIO, str(exc.string))


def require_libnbd() -> None:
    """ProgramError when it is not installed: to be known before anything is made."""
    _libnbd()


@functools.cache
def _libnbd() -> Any:
    try:
        return importlib.import_module("nbd")
    except ImportError as exc:
        raise ProgramError(
            "libnbd's Python binding is not there", where="import nbd", fix="install the package python3-libnbd"
        ) from exc
