"""Guests' backends that keep the moments of removed snapshots: block tracking is asked for what happened since those."""

from __future__ import annotations

from tokvm.testing.esxi.state import State
from tokvm.testing.hyperv.backend import FILE_BACKEND, FileBackend

KEEPING_FILES = "tokvm.testing.vsphere.keeping:KeepingFiles"
_KEEPING = {FILE_BACKEND: KEEPING_FILES}


class KeepingFiles(FileBackend):
    def drop(self, vm: str, name: str) -> None:
        """It may be asked for again."""


def keep_moments(state: State) -> None:
    """From now on the host's own backend does; one that is not in the table is taken to do so already."""
    options = state["options"]
    options["backend"] = _KEEPING.get(options["backend"], options["backend"])
