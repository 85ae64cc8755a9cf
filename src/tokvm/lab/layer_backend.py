"""Real guests behind a played host whose disks are chains of layer files (Hyper-V, ESXi): its backend door over SourceVm. Named
in the host's state, loaded by that name.

backend/<vm id>/   one SourceVm; frozen states bear the names that the host gave them
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from tokvm.lab import source_export
from tokvm.lab.source_export import READ_SIZE, LayerFile
from tokvm.lab.source_vm import SourceVm
from tokvm.testing.hyperv.backend import DATA, ZERO, Change

QEMU_BACKEND = "tokvm.lab.layer_backend:QemuBackend"
WHOLE = -1  # since the disk's beginning: below its base


class QemuBackend:
    """tokvm.testing.hyperv.backend.Backend over QEMU. Lives for a moment of the host: what the disks hold is looked up once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[Path, list[source_export.Change]] = {}

    def power_on(self, vm: str) -> None:
        self._vm(vm).power_on()

    def ask_shutdown(self, vm: str) -> None:
        self._vm(vm).press_power_button()

    def power_off(self, vm: str) -> None:
        self._vm(vm).power_off()

    def is_running(self, vm: str) -> bool:
        """As long as there is a QEMU: one that stands still after a panic may still hold the disks."""
        return self._vm(vm).qemu.pid() is not None

    def freeze(self, vm: str, name: str) -> None:
        self._vm(vm).freeze(name)

    def changes(self, vm: str, disk: int, since: str, upto: str) -> list[Change]:
        """A base is written without its zeros."""
        machine = self._vm(vm)
        chain = machine.layers(disk, upto or None)
        if not since:
            return [Change(one.offset, one.length, DATA) for one in self._whole(machine, disk, chain) if one.layer is not None]
        older = machine.layers(disk, since)[-1].index
        found = source_export.changes(chain, since=older, size=machine.config.sizes[disk])
        return [Change(one.offset, one.length, ZERO if one.layer is None else DATA) for one in found]

    def data(self, vm: str, disk: int, upto: str, changes: Iterable[Change]) -> Iterator[tuple[int, bytes]]:
        machine = self._vm(vm)
        chain = machine.layers(disk, upto or None)
        whole = self._whole(machine, disk, chain)
        with ExitStack() as stack:
            files = {layer.index: stack.enter_context(layer.path.open("rb")) for layer in chain}
            for change in changes:
                yield from _read(whole, files, change)

    def drop(self, vm: str, name: str) -> None:
        self._vm(vm).drop(name)

    def _whole(self, machine: SourceVm, disk: int, chain: Sequence[LayerFile]) -> list[source_export.Change]:
        """Where each byte of the disk lies; asked for frozen disks and for those of a VM that is off."""
        top = chain[-1].path
        if top not in self._held:
            self._held[top] = source_export.changes(chain, since=WHOLE, size=machine.config.sizes[disk])
        return self._held[top]

    def _vm(self, vm: str) -> SourceVm:
        return SourceVm(self.folder / vm)


def _read(whole: Sequence[source_export.Change], files: Mapping[int, BinaryIO], wanted: Change) -> Iterator[tuple[int, bytes]]:
    """The bytes of one range, piece by piece as they lie in the layers."""
    at, end = wanted.offset, wanted.offset + wanted.length
    number = bisect_right(whole, at, key=lambda one: one.offset) - 1
    while at < end:
        piece = whole[number]
        stop = min(end, piece.offset + piece.length)
        while at < stop:
            length = min(READ_SIZE, stop - at)
            yield at, source_export.read_piece(files, piece, at - piece.offset, length)
            at += length
        number += 1
