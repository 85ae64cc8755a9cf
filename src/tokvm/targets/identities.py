"""What a path is known as, without opening it for writing: to find out whether somebody's target is meant by another name."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tokvm.core.errors import TargetError
from tokvm.targets.blockdev import device_identity
from tokvm.targets.qcow2 import qcow2_identity
from tokvm.targets.rawfile import file_identity


def identities_of(path: str) -> frozenset[str]:
    """All that a run may have recorded of what is there: a file's as a raw target and as a qcow2, or a device's. None where
    nothing is. TargetError when it cannot be opened. Takes no lock."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return frozenset()
    except OSError as exc:
        raise TargetError(f"the disk cannot be opened: {exc.strerror}", where=path, fix="check the path and rights") from exc
    try:
        if stat.S_ISBLK(os.fstat(fd).st_mode):
            return frozenset({device_identity(fd)})
        return frozenset({file_identity(fd), qcow2_identity(fd)})
    finally:
        os.close(fd)


def same_place(one: str, other: str) -> bool:
    """Whether two paths lead to one file or device now, or would if it were there."""
    try:
        first, second = Path(one).stat(), Path(other).stat()
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)
    if stat.S_ISBLK(first.st_mode) and stat.S_ISBLK(second.st_mode):
        return first.st_rdev == second.st_rdev
    return os.path.samestat(first, second)
