"""The door to the disks and guests behind the played toolstack, and the plain one: raw files, and guests that only pretend.

A disk is (vm uuid, number). Frozen states are named by the snapshot's uuid.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import time
from pathlib import Path
from typing import Protocol, cast

from tokvm.testing.persona.store import replace

MiB = 1 << 20
PIECE = 4096  # granularity at which two states of a disk are compared
FILE_BACKEND = "tokvm.testing.xenserver.backend:FileBackend"


class Backend(Protocol):
    """Calls come from short-lived processes; everything is kept on disk. `power_*` and `freeze` come one at a time."""

    def power_on(self, vm: str) -> None: ...

    def shutdown(self, vm: str, deadline_s: float) -> None:
        """Ask the guest to stop and wait until it is off, or TimeoutError at the deadline."""
        ...

    def power_off(self, vm: str) -> None: ...

    def is_running(self, vm: str) -> bool: ...

    def freeze(self, vm: str, name: str) -> None:
        """All disks at one moment."""
        ...

    def export_base(self, vm: str, disk: int, frozen: str, out: Path) -> None:
        """A dynamic VHD of the whole disk."""
        ...

    def export_delta(self, vm: str, disk: int, since: str, frozen: str, out: Path) -> None:
        """A differencing VHD of what changed from one frozen state to the other."""
        ...

    def drop(self, vm: str, name: str) -> None:
        """The frozen state is not needed any more."""
        ...


def load(dotted: str, folder: Path) -> Backend:
    """The backend `package.module:Class`, made with its folder."""
    module, _, name = dotted.partition(":")
    return cast("Backend", getattr(importlib.import_module(module), name)(folder))


class FileBackend:
    """folder/<vm>/  0.raw 1.raw …   guest.json   frozen/<name>/0.raw …   The raw files may be written by anybody at any time,
    also while the "guest" runs: that is its work."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def power_on(self, vm: str) -> None:
        guest = self._guest(vm)
        self._set_guest(vm, {**guest, "on": True, "boots": int(cast("int", guest.get("boots", 0))) + 1})

    def shutdown(self, vm: str, deadline_s: float) -> None:
        guest = self._guest(vm)
        needed = float(cast("float", guest.get("shutdown_s", 0.0)))
        if guest.get("ignores_shutdown") or needed > deadline_s:
            self._sleep_while_on(vm, deadline_s)
            if self.is_running(vm):
                raise TimeoutError
            return
        self._sleep_while_on(vm, needed)
        self.power_off(vm)

    def power_off(self, vm: str) -> None:
        self._set_guest(vm, {**self._guest(vm), "on": False})

    def is_running(self, vm: str) -> bool:
        return bool(self._guest(vm).get("on"))

    def freeze(self, vm: str, name: str) -> None:
        folder = self._path(vm, "frozen", name)
        folder.mkdir(parents=True)
        for disk in sorted(self._path(vm).glob("*.raw")):
            copy_sparse(disk, folder / disk.name)

    def export_base(self, vm: str, disk: int, frozen: str, out: Path) -> None:
        self._export(out, self._path(vm, "frozen", frozen, f"{disk}.raw"), None)

    def export_delta(self, vm: str, disk: int, since: str, frozen: str, out: Path) -> None:
        parent = self._path(vm, "frozen", since, f"{disk}.raw")
        self._export(out, self._path(vm, "frozen", frozen, f"{disk}.raw"), parent)

    def drop(self, vm: str, name: str) -> None:
        import shutil  # lzma and bz2 behind it: only those who remove pay for them

        shutil.rmtree(self._path(vm, "frozen", name), ignore_errors=True)

    def _export(self, out: Path, path: Path, parent: Path | None) -> None:
        from tokvm.testing.xenserver.streams import export_raw  # only exports pay for the VHD code

        export_raw(out, path, parent)

    def _guest(self, vm: str) -> dict[str, object]:
        with self._path(vm, "guest.json").open(encoding="ascii") as file:
            return cast("dict[str, object]", json.load(file))

    def _set_guest(self, vm: str, guest: dict[str, object]) -> None:
        replace(self._path(vm, "guest.json"), json.dumps(guest))

    def _sleep_while_on(self, vm: str, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (rest := until - time.monotonic()) > 0 and self.is_running(vm):
            time.sleep(min(rest, 0.02))

    def _path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)


def copy_sparse(source: Path, target: Path) -> None:
    """A copy that shares blocks where the filesystem can, and keeps holes where it cannot."""
    with source.open("rb") as reader, target.open("wb") as writer:
        size = os.fstat(reader.fileno()).st_size
        writer.truncate(size)
        for start, stop in data_ranges(reader.fileno(), size):
            at = start
            while at < stop:
                moved = os.copy_file_range(reader.fileno(), writer.fileno(), stop - at, at, at)
                if moved == 0:
                    break
                at += moved


def data_ranges(file: int, size: int) -> list[tuple[int, int]]:
    """Where the file has blocks: SEEK_DATA and SEEK_HOLE."""
    found = []
    at = 0
    with contextlib.suppress(OSError):  # ENXIO: no data behind `at`
        while at < size:
            start = os.lseek(file, at, os.SEEK_DATA)
            at = min(os.lseek(file, start, os.SEEK_HOLE), size)
            found.append((start, at))
    return found
