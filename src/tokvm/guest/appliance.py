"""libguestfs' appliance with a VM's disks in it: the only place where a guest's file systems are ever mounted.

    with Appliance.launch(disks, readonly=True, tcg=tcg) as appliance:
        appliance.mount({"/": "/dev/sda1"})
        appliance.g.ls("/boot")

A hostile file system meets the appliance's kernel, not the host's (guestfs-security(1)). The format of each disk is always
said. The appliance's QEMU dies with us (libguestfs' recovery process sees to it) and at its deadline: a call that waits fails.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tokvm.core.units import MiB
from tokvm.guest.base import GuestDisk, GuestError

log = logging.getLogger(__name__)

READ_LIMIT = 512 * MiB
PIECE = 2 * MiB
"""What one message of libguestfs' protocol carries well within its limit of 4 MiB (guestfs(3))."""
MEMORY_MB = 1024
AGAIN_S = 0.05
"""Between two looks for what libguestfs started, when its deadline has passed while it launches."""
TABLE = 6 * 4096
"""Bytes of a GPT with sectors of 4 KiB; those of 512 bytes need less, and the oldest first partitions begin at 63 * 512."""

Layout = dict[str, tuple[int, bytes]]
"""Device → how many bytes of its beginning, and their SHA-256."""
FIX_APPLIANCE = (
    "install python3-guestfs and a kernel for its appliance (Debian: linux-image-amd64; Ubuntu: linux-image-virtual), or "
    "name one by SUPERMIN_KERNEL and SUPERMIN_MODULES; `libguestfs-test-tool` says more"
)


class Launcher:
    """The calling thread, about to launch an appliance. libguestfs forks in the thread that calls it, so what that thread has
    started since is libguestfs' (supermin, QEMU); what other threads started, such as the server of a target, is not."""

    def __init__(self) -> None:
        self._thread = threading.get_native_id()
        self._older = self._all()

    def children(self) -> frozenset[int]:
        return self._all() - self._older

    def _all(self) -> frozenset[int]:
        """Processes that this thread started (proc(5): task/TID/children)."""
        try:
            return frozenset(map(int, Path(f"/proc/self/task/{self._thread}/children").read_text().split()))
        except OSError:
            return frozenset()


class Appliance:
    """A launched appliance. `g` is libguestfs' own handle (guestfs(3)); its errors are RuntimeError: see `translated`."""

    def __init__(self, g: Any, disks: Sequence[GuestDisk], *, readonly: bool, deadline_s: float) -> None:
        self.g = g
        self.disks = tuple(disks)
        self.readonly = readonly
        self.where = ", ".join(disk.path for disk in disks)
        self._overdue = False
        self._ended = threading.Event()
        self._pid = 0
        self._launcher: Launcher | None = None
        self._layout: Layout | None = None
        self._whole: list[str] = []
        self._timer = self._new_timer(deadline_s)

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
            made._launcher = Launcher()
            g.launch()
            made._pid = int(g.get_pid())
        except RuntimeError as failed:
            made._end()
            raise GuestError(
                f"libguestfs' appliance does not start: {made._why(failed)}", where=made.where, fix=FIX_APPLIANCE
            ) from failed
        return made

    def give(self, deadline_s: float) -> None:
        """A new deadline, from now: for an appliance that waited."""
        self._timer.cancel()
        self._timer = self._new_timer(deadline_s)

    def mount(self, mounts: Mapping[str, str], options: str = "") -> None:
        """Mount file systems, parents first; read-only when the disks are. options: of mount(8), for those written to."""
        with self.translated("cannot mount the guest's file systems"):
            for point in sorted(mounts, key=len):
                if self.readonly:
                    self.g.mount_ro(mounts[point], point)
                else:
                    self.g.mount_options(options, mounts[point], point)

    def unmount(self) -> None:
        with self.translated("cannot unmount the guest's file systems"):
            self.g.umount_all()

    def forget(self) -> None:
        """Drop whatever the appliance's kernel holds of the disks: they changed below it. Nothing may be mounted.

        GuestError when what it keeps all the same (partitions, logical volumes) is not what `note_layout` saw."""
        with self.translated("cannot look at the disks afresh"):
            # What is mounted nowhere has no inodes in memory; the pages of physical volumes stay, for LVM holds them open.
            for device in dict.fromkeys([*self.block_devices(), *(self._layout or ())]):
                self.g.blockdev_flushbufs(device)
            self.g.drop_caches(1)
        if self._layout is not None and self._digests(self._layout) != self._layout:
            raise GuestError(
                "partitions or logical volumes changed since the appliance was started", where=self.where, fix="start another"
            )

    def note_layout(self) -> None:
        """Remember what says where file systems lie, for the kernel maps it once, when the appliance starts: the partition
        table (an MBR, or a GPT with its entries) and LVM's metadata (lvm2: in the first MiB of a physical volume)."""
        with self.translated("cannot read the disks' layout"):
            split = {str(self.g.part_to_dev(partition)) for partition in self.g.list_partitions()}
            volumes = [str(device) for device in self.g.pvs()]
            self.block_devices()
        self._layout = self._digests(dict.fromkeys(split, (TABLE, b"")) | dict.fromkeys(volumes, (MiB, b"")))

    def block_devices(self) -> list[str]:
        """The whole disks, asked for once: the question costs a second where the appliance is emulated."""
        if not self._whole:
            self._whole = [str(device) for device in self.g.list_devices()]
        return self._whole

    def _digests(self, layout: Layout) -> Layout:
        with self.translated("cannot read the disks' layout"):
            return {
                device: (length, hashlib.sha256(bytes(self.g.pread_device(device, length, 0))).digest())
                for device, (length, _) in layout.items()
            }

    def read(self, path: str, limit: int = READ_LIMIT) -> bytes:
        """A guest's file, whole; GuestError above `limit` bytes, before any of it is read."""
        with self.translated(f"cannot read {path!r}"):
            size = int(self.g.filesize(path))
            if size > limit:
                raise GuestError(f"{path!r} has {size} bytes, more than the {limit} allowed", where=self.where)
        return self.read_between(path, 0, size)  # read_file takes ten times as long where the appliance is emulated

    def read_between(self, path: str, start: int, end: int) -> bytes:
        """Bytes of a guest's file; GuestError when it has not so many."""
        parts, at = [], start
        with self.translated(f"cannot read {path!r}"):
            while at < end:
                part = bytes(self.g.pread(path, min(PIECE, end - at), at))
                if not part:
                    raise GuestError(f"{path!r} ended at {at} of {end} bytes", where=self.where)
                parts.append(part)
                at += len(part)
        return b"".join(parts)

    def write(self, path: str, content: bytes) -> None:
        """A guest's file, new or over the old one. libguestfs' `upload` and `tar_in` send 8 KiB at a time: in an emulated
        appliance 10 MiB took them 9 s of CPU, and half of that as it is done here."""
        with self.translated(f"cannot write {path!r}"):
            self.g.write(path, content[:PIECE])
        self.write_at(path, content[PIECE:], PIECE)

    def write_at(self, path: str, content: bytes, offset: int) -> None:
        """Into a guest's file that is there; beyond its end it grows."""
        at = 0
        with self.translated(f"cannot write {path!r}"):
            while at < len(content):
                at += int(self.g.pwrite(path, content[at : at + PIECE], offset + at))

    def close(self) -> None:
        """Unmount, flush and power off. GuestError when what was written may not be on the disks."""
        try:
            if not self.readonly:
                self.g.umount_all()
            self.g.shutdown()  # with autosync it flushes every disk first, and says when that fails (guestfs_shutdown)
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

    def _why(self, failed: RuntimeError) -> str:
        return "it did not end within its deadline and was killed" if self._overdue else _one_line(failed)

    def _new_timer(self, deadline_s: float) -> threading.Timer:
        timer = threading.Timer(deadline_s, self._kill)
        timer.daemon = True
        timer.start()
        return timer

    def _kill(self) -> None:
        """A call that waits fails then. libguestfs is not asked for the pid: it answers when that call has ended. While it
        launches, it starts one program after the other, and between two of them nothing is found: so it is looked again."""
        self._overdue = True
        while not (self._pid or self._ended.wait(AGAIN_S)):
            for pid in self._launcher.children() if self._launcher else ():
                _kill_process(pid)
        if self._pid and not self._ended.is_set():
            _kill_process(self._pid)

    def _end(self) -> None:
        self._ended.set()
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


def _kill_process(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


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
