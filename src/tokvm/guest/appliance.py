"""libguestfs' appliance with a VM's disks in it: the only place where a guest's file systems are ever mounted.

    with Appliance.launch(disks, readonly=True, tcg=tcg) as appliance:
        appliance.mount({"/": "/dev/sda1"})
        appliance.g.ls("/boot")

A hostile file system meets the appliance's kernel, not the host's (guestfs-security(1)). The format of each disk is always
said. The appliance's QEMU dies with us (libguestfs' recovery process sees to it) and at its deadline: a call that waits fails.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from tokvm.core.units import MiB
from tokvm.guest.base import GuestDisk, GuestError

log = logging.getLogger(__name__)

READ_LIMIT = 512 * MiB
MEMORY_MB = 1024
FIX_APPLIANCE = (
    "install python3-guestfs and a kernel for its appliance (Debian: linux-image-amd64; Ubuntu: linux-image-virtual), or "
    "name one by SUPERMIN_KERNEL and SUPERMIN_MODULES; `libguestfs-test-tool` says more"
)


class Appliance:
    """A launched appliance. `g` is libguestfs' own handle (guestfs(3)); its errors are RuntimeError: see `translated`."""

    def __init__(self, g: Any, disks: Sequence[GuestDisk], *, readonly: bool, deadline_s: float) -> None:
        self.g = g
        self.disks = tuple(disks)
        self.readonly = readonly
        self.where = ", ".join(disk.path for disk in disks)
        self._overdue = False
        self._timer = threading.Timer(deadline_s, self._kill)
        self._timer.daemon = True

    @classmethod
    def launch(cls, disks: Sequence[GuestDisk], *, readonly: bool, tcg: bool, deadline_s: float = 900.0) -> Self:
        """Boot the appliance. `tcg`: KVM does not work here. deadline_s: for its whole life. GuestError: it does not start."""
        guestfs = _bindings()
        g = guestfs.GuestFS(python_return_dict=True, close_on_exit=True)
        made = cls(g, disks, readonly=readonly, deadline_s=deadline_s)
        try:
            g.set_backend("direct")
            g.set_backend_settings(["force_tcg"] if tcg else [])
            g.set_memsize(MEMORY_MB)
            g.set_autosync(True)
            for disk in disks:
                g.add_drive_opts(disk.path, format=disk.format, readonly=readonly, cachemode="writeback", discard="besteffort")
            made._timer.start()
            g.launch()
        except RuntimeError as failed:
            made._end()
            raise GuestError(
                f"libguestfs' appliance does not start: {_one_line(failed)}", where=made.where, fix=FIX_APPLIANCE
            ) from failed
        return made

    def mount(self, mounts: Mapping[str, str]) -> None:
        """Mount file systems, parents first; read-only when the disks are."""
        with self.translated("cannot mount the guest's file systems"):
            for point in sorted(mounts, key=len):
                if self.readonly:
                    self.g.mount_ro(mounts[point], point)
                else:
                    self.g.mount_options("", mounts[point], point)

    def unmount(self) -> None:
        with self.translated("cannot unmount the guest's file systems"):
            self.g.umount_all()

    def forget(self) -> None:
        """Drop whatever the appliance's kernel holds of the disks: they changed below it. Nothing may be mounted."""
        with self.translated("cannot look at the disks afresh"):
            for device in self.g.list_devices():
                self.g.blockdev_flushbufs(device)
            self.g.drop_caches(3)

    def read(self, path: str, limit: int = READ_LIMIT) -> bytes:
        """A guest's file, whole; GuestError above `limit` bytes, before any of it is read."""
        with self.translated(f"cannot read {path!r}"):
            size = int(self.g.filesize(path))
            if size > limit:
                raise GuestError(f"{path!r} has {size} bytes, more than the {limit} allowed", where=self.where)
            return bytes(self.g.read_file(path)) if size < 2 * MiB else self._download(path, size)

    def close(self) -> None:
        """Unmount, flush and power off. GuestError when what was written may not be on the disks."""
        try:
            if not self.readonly:
                self.g.umount_all()
                self.g.sync()
            self.g.shutdown()
        except RuntimeError as failed:
            raise GuestError(
                f"the appliance did not end well: {self._why(failed)}", where=self.where, fix="run the command again"
            ) from failed
        finally:
            self._end()

    def abandon(self) -> None:
        """Switch it off as it is: for an appliance whose overlays are thrown away."""
        self._end()

    @contextmanager
    def translated(self, what: str) -> Iterator[None]:
        """libguestfs' RuntimeError as GuestError."""
        try:
            yield
        except RuntimeError as failed:
            raise GuestError(f"{what}: {self._why(failed)}", where=self.where) from failed

    def _download(self, path: str, size: int) -> bytes:
        parts, at = [], 0
        while at < size:
            part = bytes(self.g.pread(path, min(2 * MiB, size - at), at))
            if not part:
                raise GuestError(f"{path!r} ended at {at} of {size} bytes", where=self.where)
            parts.append(part)
            at += len(part)
        return b"".join(parts)

    def _why(self, failed: RuntimeError) -> str:
        return "it did not end within its deadline and was killed" if self._overdue else _one_line(failed)

    def _kill(self) -> None:
        self._overdue = True
        with suppress(RuntimeError, OSError):
            os.kill(self.g.get_pid(), signal.SIGKILL)

    def _end(self) -> None:
        self._timer.cancel()
        with suppress(RuntimeError):
            self.g.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._end()


def _bindings() -> Any:
    try:
        return importlib.import_module("guestfs")
    except ImportError as failed:
        raise GuestError(
            "libguestfs' Python bindings are not installed",
            fix="install python3-guestfs, and make the venv with --system-site-packages",
        ) from failed


def _one_line(failed: BaseException) -> str:
    return " ".join(str(failed).split())[:500]
