"""One process for each migration: a file lock that the kernel drops when its holder dies, however it dies.

<state>/<id>.lock      flock(2), exclusive; holds one JSON line that says who: pid, host, since
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokvm.core.errors import JournalError


class RunLocks:
    """The locks this process holds. Taking one again in the same process is free."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self._held: dict[str, int] = {}

    @contextmanager
    def hold(self, migration: str) -> Iterator[None]:
        """Hold the lock of one migration, or JournalError that names who does."""
        if migration in self._held:
            self._held[migration] += 1
            try:
                yield
            finally:
                self._held[migration] -= 1
            return
        fd = self._take(self._state_dir / f"{migration}.lock")
        self._held[migration] = 1
        try:
            yield
        finally:
            del self._held[migration]
            os.close(fd)

    def _take(self, path: Path) -> int:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise JournalError(
                f"the lock cannot be opened: {exc.strerror}", where=str(path), fix="check the state directory, or give another"
            ) from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            holder = _holder(fd)
            os.close(fd)
            raise JournalError(
                f"another run works on this migration: {holder}", where=str(path), fix="wait for it, or stop it, then try again"
            ) from exc
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S%z")}
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(who).encode(), 0)
        return fd


def _holder(fd: int) -> str:
    """Who the lock file says holds it. Its text may be half written: the winner has only just begun."""
    try:
        who = json.loads(os.pread(fd, 4096, 0))
        return f"process {who['pid']} on {who['host']} since {who['since']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has only just begun"
