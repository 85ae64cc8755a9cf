"""What tests do to overlays."""

from __future__ import annotations

from tokvm.guest.base import GuestDisk
from tokvm.remote import process


def change(disk: GuestDisk, *commands: str) -> None:
    """qemu-io's commands on a disk: a morph that takes no time."""
    argv = ["qemu-io", "-d", "unmap", "-f", disk.format, *(word for one in commands for word in ("-c", one)), disk.path]
    done = process.run(argv, timeout_s=60, where=disk.path)
    assert done.code == 0, done
