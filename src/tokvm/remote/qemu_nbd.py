"""qemu-nbd: one image file of ours, served on a Unix socket that only we can reach.

    QemuNbd.serve(fd, …) ─► qemu-nbd --persistent --shared=N --socket=DIR/s … /proc/PID/fd/FD    our child, in the foreground
    socket               ─► remote.nbd.NbdExport
    stop()               ─► SIGTERM: it writes its metadata and closes the image; SIGKILL when that takes too long

It dies with us, however we die (see process.py); DIR is swept by the next run then (see rundir.py).
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from enum import Enum
from pathlib import Path

from tokvm.remote import process
from tokvm.remote.process import ProgramError, ProgramTimeout
from tokvm.remote.qemu_img import ENVIRONMENT, PACKAGE, held, shown
from tokvm.remote.rundir import RunDirectory

log = logging.getLogger(__name__)

_PREFIX = "tokvm-nbd-"
_START_S = 30.0
# It flushes its metadata caches (some MiB) and waits for the medium.
_STOP_S = 60.0
_DIES_S = 1.0
# NBD protocol, "Newstyle negotiation": greeting and 16 flags | our 32 flags, NBD_OPT_ABORT without data | its acknowledgement.
_GREETING = b"NBDMAGICIHAVEOPT"
_FAREWELL = struct.pack(">I8sII", 1, b"IHAVEOPT", 2, 0)
_ACK = 20


class Cache(Enum):
    """NONE: O_DIRECT on the image file, so that what is read comes from the medium. WRITEBACK: through the page cache."""

    NONE = "none"
    WRITEBACK = "writeback"


class Access(Enum):
    WRITE = "write"
    READ = "read"


class QemuNbd:
    """A running server. Thread-safe but for `stop`."""

    def __init__(self, child: process.Child, directory: RunDirectory, fd: int, where: str) -> None:
        self._child = child
        self._directory = directory
        self._fd = fd
        self.where = where
        self._dying = threading.Lock()

    @classmethod
    def serve(
        cls, fd: int, *, image_format: str, where: str, cache: Cache, access: Access = Access.WRITE, connections: int = 8
    ) -> QemuNbd:
        """Serving when this returns; ProgramError with what it said when it does not come up. The caller keeps `fd` open.

        connections: how many may be up at a time. QEMU's own image lock is taken and refuses a file that a VM uses.
        """
        directory = RunDirectory(_PREFIX)
        try:
            argv = [
                *("qemu-nbd", f"--format={image_format}", f"--socket={directory.path / 's'}", "--persistent"),
                # One more than we use: a connection that we have closed is counted until the server noticed.
                *(f"--shared={connections + 1}", f"--cache={cache.value}", "--discard=unmap", "--detect-zeroes=off"),
                *(["--read-only"] if access is Access.READ else []),
                *("--", held(fd)),
            ]
            child = process.start(argv, where=where, env=ENVIRONMENT)
        except BaseException:
            directory.remove()
            raise
        server = cls(child, directory, fd, where)
        try:
            server._await_socket()
        except BaseException:
            server._clear()
            raise
        return server

    @property
    def socket(self) -> str:
        return str(self._directory.path / "s")

    @property
    def pid(self) -> int:
        return self._child.pid

    def death(self) -> str | None:
        """How it ended, in words, with the last it said; None when it still runs (it is given a moment)."""
        try:
            with self._dying:
                code = self._child.wait(_DIES_S)
        except ProgramTimeout:
            return None
        said = shown(self._child.stderr_tail(), self._fd, self.where)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"qemu-nbd {how}: {said}" if said else f"qemu-nbd {how}"

    def stop(self) -> bool:
        """End it. True when it closed the image properly, so that all of its metadata is in the file."""
        self._child.terminate(_STOP_S)
        clean = self._child.poll() == 0
        if not clean:
            log.warning("%s: %s", self.where, self.death())
        self._clear()
        return clean

    def _clear(self) -> None:
        self._child.close()
        self._directory.remove()

    def _await_socket(self) -> None:
        deadline = time.monotonic() + _START_S
        while not _answers(self.socket):
            if self._child.poll() is not None:
                raise ProgramError(f"the image cannot be served: {self.death()}", where=self.where)
            if time.monotonic() > deadline:
                raise ProgramTimeout(f"qemu-nbd did not begin to serve within {_START_S:g} s", where=self.where)
            time.sleep(0.005)


def require_qemu() -> None:
    """ProgramError when a program that we use is not installed: to be known before anything is made."""
    for name in ("qemu-nbd", "qemu-img"):
        process.which(name, fix=PACKAGE)


def _answers(path: str) -> bool:
    """It greets, so the image is open; and we part as the protocol wants it, so that nothing is written to its stderr."""
    if not Path(path).exists():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_START_S)
        try:
            probe.connect(path)
            greeting = probe.recv(len(_GREETING) + 2, socket.MSG_WAITALL)
            probe.sendall(_FAREWELL)
            probe.recv(_ACK, socket.MSG_WAITALL)
        except OSError:
            return False
    return greeting.startswith(_GREETING)
