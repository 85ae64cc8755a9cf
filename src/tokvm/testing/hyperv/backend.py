"""The door to the guests behind the played Hyper-V, and the plain one: files, and guests that only pretend.

A disk is (vm id, number). A moment in its life is named by a freeze; "" is the disk's beginning as `since`, and now as `upto`.
"""

from __future__ import annotations

import importlib
import json
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, cast

from tokvm.testing.persona.store import replace
from tokvm.testing.xenserver.backend import copy_sparse

MiB = 1 << 20
FILE_BACKEND = "tokvm.testing.hyperv.backend:FileBackend"
DATA, ZERO, UNMAPPED = "data", "zero", "unmapped"


class Change(NamedTuple):
    """A range that the guest wrote, wrote zeros to, or trimmed (it reads as zeros). Bytes, whole sectors."""

    offset: int
    length: int
    kind: str


class Backend(Protocol):
    """Calls come from short-lived processes; everything is kept on disk. They come one at a time."""

    def power_on(self, vm: str) -> None: ...

    def ask_shutdown(self, vm: str) -> None:
        """Press the power button and return; `is_running` tells when it worked. May be pressed again."""
        ...

    def power_off(self, vm: str) -> None: ...

    def is_running(self, vm: str) -> bool: ...

    def freeze(self, vm: str, name: str) -> None:
        """All disks at one moment."""
        ...

    def changes(self, vm: str, disk: int, since: str, upto: str) -> list[Change]:
        """What happened to the disk between two moments, ascending and disjoint; the last word on each byte counts."""
        ...

    def data(self, vm: str, disk: int, upto: str, changes: Iterable[Change]) -> Iterator[tuple[int, bytes]]:
        """The bytes at that moment of the DATA among `changes`: (offset, bytes), in pieces, in order."""
        ...

    def drop(self, vm: str, name: str) -> None:
        """The frozen state is not needed any more."""
        ...


def load(dotted: str, folder: Path) -> Backend:
    """The backend `package.module:Class`, made with its folder."""
    module, _, name = dotted.partition(":")
    return cast("Backend", getattr(importlib.import_module(module), name)(folder))


class FileBackend:
    """folder/<vm>/  0.raw 1.raw …   0.journal …   guest.json   frozen/<name>/0.raw 0.journal …

    The journal is a line for each write, `offset length kind`; a frozen one is as long as it was then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # What a test's hand does

    def create(self, vm: str, sizes: Iterable[int], guest: dict[str, object]) -> None:
        self._path(vm).mkdir(parents=True)
        self._set_guest(vm, {"on": False, "off_at": 0.0, **guest})
        for number, size in enumerate(sizes):
            with self._path(vm, f"{number}.raw").open("wb") as file:
                file.truncate(size)
            self._path(vm, f"{number}.journal").touch()

    def write(self, vm: str, disk: int, offset: int, data: bytes) -> None:
        self._put(vm, disk, Change(offset, len(data), DATA), data)

    def trim(self, vm: str, disk: int, offset: int, length: int, kind: str = UNMAPPED) -> None:
        """kind: UNMAPPED (a discard) or ZERO (zeros were written without sending them)."""
        self._put(vm, disk, Change(offset, length, kind), bytes(length))

    def read(self, vm: str, disk: int, freeze: str = "") -> bytes:
        return self._raw(vm, disk, freeze).read_bytes()

    def set_guest(self, vm: str, **settings: object) -> None:
        self._set_guest(vm, {**self._guest(vm), **settings})

    def revert(self, vm: str, name: str) -> None:
        """All disks back to that moment; the VM is off."""
        for disk in sorted(self._path(vm, "frozen", name).glob("*.raw")):
            copy_sparse(disk, self._path(vm, disk.name))
            self._path(vm, disk.name).with_suffix(".journal").write_bytes(disk.with_suffix(".journal").read_bytes())

    def _put(self, vm: str, disk: int, change: Change, data: bytes) -> None:
        path = self._raw(vm, disk, "")
        if change.offset % 512 or change.length % 512 or change.offset + change.length > path.stat().st_size:
            raise ValueError(f"{change} is not made of whole sectors of the disk")
        with path.open("r+b") as file:
            file.seek(change.offset)
            file.write(data)
        with path.with_suffix(".journal").open("a") as journal:
            journal.write(f"{change.offset} {change.length} {change.kind}\n")

    # Implements Backend

    def power_on(self, vm: str) -> None:
        guest = self._guest(vm)
        self._set_guest(vm, {**guest, "on": True, "off_at": 0.0, "boots": int(cast("int", guest.get("boots", 0))) + 1})

    def ask_shutdown(self, vm: str) -> None:
        guest = self._guest(vm)
        if guest["on"] and not guest.get("ignores_shutdown") and not guest["off_at"]:
            off_at = time.time() + float(cast("float", guest.get("shutdown_s", 0.0)))
            self._set_guest(vm, {**guest, "off_at": off_at})

    def power_off(self, vm: str) -> None:
        self._set_guest(vm, {**self._guest(vm), "on": False, "off_at": 0.0})

    def is_running(self, vm: str) -> bool:
        guest = self._guest(vm)
        off_at = float(cast("float", guest["off_at"]))
        return bool(guest["on"]) and not 0 < off_at <= time.time()

    def freeze(self, vm: str, name: str) -> None:
        folder = self._path(vm, "frozen", name)
        folder.mkdir(parents=True)
        for disk in sorted(self._path(vm).glob("*.raw")):
            copy_sparse(disk, folder / disk.name)
            (folder / disk.name).with_suffix(".journal").write_bytes(disk.with_suffix(".journal").read_bytes())

    def changes(self, vm: str, disk: int, since: str, upto: str) -> list[Change]:
        lines = self._raw(vm, disk, upto).with_suffix(".journal").read_text().splitlines()
        done = len(self._raw(vm, disk, since).with_suffix(".journal").read_text().splitlines()) if since else 0
        painted: list[Change] = []
        for line in lines[done:]:
            offset, length, kind = line.split()
            _paint(painted, Change(int(offset), int(length), kind))
        return _joined(painted)

    def data(self, vm: str, disk: int, upto: str, changes: Iterable[Change]) -> Iterator[tuple[int, bytes]]:
        with self._raw(vm, disk, upto).open("rb") as file:
            for change in changes:
                for at in range(change.offset, change.offset + change.length, MiB):
                    file.seek(at)
                    yield at, file.read(min(MiB, change.offset + change.length - at))

    def drop(self, vm: str, name: str) -> None:
        import shutil  # lzma and bz2 behind it: only those who remove pay for them

        shutil.rmtree(self._path(vm, "frozen", name), ignore_errors=True)

    # The inside

    def _raw(self, vm: str, disk: int, freeze: str) -> Path:
        return self._path(vm, "frozen", freeze, f"{disk}.raw") if freeze else self._path(vm, f"{disk}.raw")

    def _guest(self, vm: str) -> dict[str, object]:
        with self._path(vm, "guest.json").open(encoding="ascii") as file:
            return cast("dict[str, object]", json.load(file))

    def _set_guest(self, vm: str, guest: dict[str, object]) -> None:
        replace(self._path(vm, "guest.json"), json.dumps(guest))

    def _path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)


def _paint(painted: list[Change], new: Change) -> None:
    """Put `new` over what is there: `painted` stays ascending and disjoint."""
    end = new.offset + new.length
    first = bisect_right(painted, new.offset, key=lambda one: one.offset + one.length)
    stop = first
    rest: list[Change] = []
    before: list[Change] = []
    while stop < len(painted) and painted[stop].offset < end:
        old = painted[stop]
        if old.offset < new.offset:
            before = [Change(old.offset, new.offset - old.offset, old.kind)]
        if old.offset + old.length > end:
            rest = [Change(end, old.offset + old.length - end, old.kind)]
        stop += 1
    painted[first:stop] = [*before, new, *rest]


def _joined(painted: list[Change]) -> list[Change]:
    found: list[Change] = []
    for one in painted:
        if found and found[-1].kind == one.kind and found[-1].offset + found[-1].length == one.offset:
            found[-1] = Change(found[-1].offset, found[-1].length + one.length, one.kind)
        else:
            found.append(one)
    return found
