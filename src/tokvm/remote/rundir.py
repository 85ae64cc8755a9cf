"""A directory for Unix sockets that only we can enter, and that the next run removes when we were killed.

    $TMPDIR/tokvm-ssh-a8f3k2p1/c      mode 0700, random name, locked (flock) for as long as its owner lives

A Unix socket's path has at most 108 bytes and ssh adds 17 while it makes one, so the directory is short.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

LONGEST_BASE = 60
# Younger directories may belong to somebody who has made one and not locked it yet.
_ABANDONED_AFTER_S = 60.0


class RunDirectory:
    """Made by the constructor. `prefix` names the kind, and what is swept."""

    def __init__(self, prefix: str) -> None:
        base = tempfile.gettempdir()
        if len(os.fsencode(base)) > LONGEST_BASE or not base.replace("/", "").replace("-", "").replace("_", "").isalnum():
            base = "/tmp"
        _sweep(Path(base), prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._fd)


def _sweep(base: Path, prefix: str) -> None:
    """Remove directories of ours that nobody holds any more."""
    for path in base.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                status = os.fstat(fd)
                old = time.time() - status.st_mtime > _ABANDONED_AFTER_S
                if old and status.st_uid == os.geteuid():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
            finally:
                os.close(fd)
