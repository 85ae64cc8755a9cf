"""What every way to a Windows host's disk files has in common.

Files ── open(path) ──► FrozenFile     over SFTP: files.Lanes, RemoteFile     over SMB: smb.SmbFiles, SmbFile
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from tokvm.core.units import KiB
from tokvm.sources import frozen
from tokvm.sources.frozen import Habits, Places

LANES = 3
READ_SIZE = 64 * KiB  # Win32-OpenSSH answers a READ with at most 100 KiB (its 1395)
_MARKS = ((64 * KiB, 4 * KiB), (128 * KiB, 4 * KiB))  # a VHDX' headers: whoever opens it for writing changes one of them
_FOOTER = 512  # a VHD's


def _marks(size: int) -> Places:
    return (*_MARKS, (max(0, size - _FOOTER), min(_FOOTER, size)))


HABITS = Habits(
    marks=_marks,
    damaged="the image is damaged on the host; look at it with Test-VHD",
    changed="a merge or a person changes the VM's files; run the same command again",
    lanes=LANES,
    read_size=READ_SIZE,
)


class FrozenFile(frozen.FrozenFile):
    """Of a Windows host."""

    habits = HABITS


class Files(Protocol):
    """The files of one host. Thread-safe."""

    @property
    def open_files(self) -> Collection[frozen.FrozenFile]: ...

    def problem(self, path: str) -> str:
        """Why a file of this Windows path cannot be reached this way; "" when it can."""
        ...

    def open_layer(self, path: str, *, drive: str, where: str) -> frozen.FrozenFile:
        """The file at this Windows path, open for reading. drive: the path that the VM's own settings name for the disk.

        SourceError for a path that cannot be reached this way.
        """
        ...

    def close(self) -> None: ...
