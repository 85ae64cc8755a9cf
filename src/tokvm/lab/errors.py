"""What the lab can explain when it cannot be built or does not behave."""

from __future__ import annotations

from tokvm.core.errors import TokvmError


class LabError(TokvmError):
    """A lab guest, its QEMU or its libvirt could not be made, reached or understood."""
