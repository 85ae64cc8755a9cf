"""A target opened only to be read back: for `verify`, long after the pass. Takes no lock and can write nothing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tokvm.core.errors import TargetError, UnsafeTarget
from tokvm.targets import linux
from tokvm.targets.blockdev import device_identity
from tokvm.targets.medium import is_hole, open_direct, read_direct, read_dropped
from tokvm.targets.rawfile import file_identity


class ReadBack:
    """`size`, `identity` and `read_back` as a DiskWriter has them."""

    def __init__(self, path: str, fd: int, *, size: int, identity: str) -> None:
        self.path = path
        self.size = size
        self.identity = identity
        self._fd = fd
        self._direct = open_direct(fd, os.O_RDONLY)

    @classmethod
    def open(cls, path: str | Path, *, expect: str | None = None) -> ReadBack:
        """expect: the identity that the run which wrote it recorded; another is UnsafeTarget."""
        path = str(path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as exc:
            raise TargetError(f"the target cannot be opened: {exc.strerror}", where=path, fix="check the path") from exc
        try:
            block = stat.S_ISBLK(os.fstat(fd).st_mode)
            identity = device_identity(fd) if block else file_identity(fd)
            if expect is not None and expect != identity:
                raise UnsafeTarget(f"this is {identity}, not {expect} that was written", where=path, fix="give the right path")
            return cls(path, fd, size=linux.device_size(fd) if block else os.fstat(fd).st_size, identity=identity)
        except BaseException:
            os.close(fd)
            raise

    def read_back(self, offset: int, length: int) -> memoryview:
        try:
            if self._direct >= 0:
                return read_direct(self._direct, offset, length)
            return read_dropped(self._fd, offset, length)
        except OSError as exc:
            where = f"{self.path}@{offset:#x}"
            raise TargetError(f"reading back failed: {exc.strerror}", where=where, fix="check the storage below it") from exc

    def is_hole(self, offset: int, length: int) -> bool:
        return is_hole(self._fd, offset, length)

    def close(self) -> None:
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1
