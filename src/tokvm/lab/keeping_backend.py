"""Real guests behind a played host whose changed block tracking is asked for what happened since moments long gone.

Imports as little as layer_backend: every command of the host loads it, without installed packages.
"""

from __future__ import annotations

from tokvm.lab.layer_backend import QemuBackend

KEEPING_BACKEND = "tokvm.lab.keeping_backend:KeepingBackend"


class KeepingBackend(QemuBackend):
    """Keeps the moments of removed snapshots."""

    def drop(self, vm: str, name: str) -> None:
        """It may be asked for again."""
