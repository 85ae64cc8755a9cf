"""A qcow2 target opened only to be read back: for `verify`, long after the pass. Served read-only, by a qemu-nbd of its own.

Unlike a raw target it cannot be read while a VM runs on it: its tables change under the reader, so QEMU's image lock refuses.
"""

from __future__ import annotations

import os
from pathlib import Path

from tokvm.core.errors import TargetError, UnsafeTarget
from tokvm.remote.qemu_nbd import Access
from tokvm.targets.nbd import NbdTarget
from tokvm.targets.qcow2 import IDENTITY, holding, qcow2_as_made, qcow2_identity, require_tools, serve
from tokvm.targets.readback import ReadBack


class Qcow2ReadBack(NbdTarget):
    """`size`, `identity`, `read_back` and `is_hole`; what would write is refused by the server."""

    @classmethod
    def open(cls, path: str | Path, *, expect: str | None = None) -> Qcow2ReadBack:
        """expect: the identity that the run which wrote it recorded; another is UnsafeTarget."""
        path = str(path)
        require_tools(path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as exc:
            raise TargetError(f"the target cannot be opened: {exc.strerror}", where=path, fix="check the path") from exc
        with holding(fd, path):
            identity = qcow2_identity(fd)
            if expect is not None and expect != identity:
                raise UnsafeTarget(f"this is {identity}, not {expect} that was written", where=path, fix="give the right path")
            header = qcow2_as_made(path, fd)
            server, export, cache = serve(fd, path, header.size, Access.READ)
            return cls(fd, server, export, path=path, identity=identity, known_zero=False, cache=cache)


def open_read_back(path: str | Path, *, expect: str) -> ReadBack | Qcow2ReadBack:
    """The target that has this identity, whatever format it was made as."""
    kind = Qcow2ReadBack if expect.startswith(IDENTITY) else ReadBack
    return kind.open(path, expect=expect)
