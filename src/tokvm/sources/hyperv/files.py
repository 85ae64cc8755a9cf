"""A Windows host's disk files over SFTP. Implements `frozen_file.Files`.

Win32-OpenSSH opens files so that they cannot be renamed or deleted meanwhile: a merge waits for our handles, so they are closed
with the reader; an sftp-server whose connection broke may keep its own (1605; leftovers.ps1 finds it).
"""

from __future__ import annotations

from tokvm.sources import lanes
from tokvm.sources.hyperv.frozen_file import HABITS, LANES
from tokvm.sources.hyperv.paths import problem, sftp_path
from tokvm.sources.lanes import Connecting, RemoteFile

__all__ = ["LANES", "Connecting", "Lanes", "RemoteFile"]


class Lanes(lanes.Lanes):
    def __init__(self, host: Connecting) -> None:
        super().__init__(host, HABITS)

    def problem(self, path: str) -> str:
        return problem(path)

    def open_layer(self, path: str, *, drive: str, where: str) -> RemoteFile:
        """drive: any drive's files are the host's."""
        return self.open(sftp_path(path, where=where), name=f"{where} {path}")
