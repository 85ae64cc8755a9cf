"""Real guests behind the played XenServer: its backend door over SourceVm. Named in the host's state, loaded by that name.

backend/<vm uuid>/   one SourceVm; frozen states bear the snapshots' uuids
"""

from __future__ import annotations

from pathlib import Path

from tokvm.lab.source_vm import SourceVm

QEMU_BACKEND = "tokvm.lab.xenserver_backend:QemuBackend"


class QemuBackend:
    """tokvm.testing.xenserver.backend.Backend over QEMU."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def power_on(self, vm: str) -> None:
        self._vm(vm).power_on()

    def shutdown(self, vm: str, deadline_s: float) -> None:
        if not self._vm(vm).shutdown(deadline_s=deadline_s):
            raise TimeoutError

    def power_off(self, vm: str) -> None:
        self._vm(vm).power_off()

    def is_running(self, vm: str) -> bool:
        """As long as there is a QEMU: one that stands still after a panic may still hold the disks."""
        return self._vm(vm).qemu.pid() is not None

    def freeze(self, vm: str, name: str) -> None:
        self._vm(vm).freeze(name)

    def export_base(self, vm: str, disk: int, frozen: str, out: Path) -> None:
        self._vm(vm).export_base(disk, frozen, out)

    def export_delta(self, vm: str, disk: int, since: str, frozen: str, out: Path) -> None:
        with out.open("wb") as file:
            self._vm(vm).export_delta(disk, since, frozen, file)

    def drop(self, vm: str, name: str) -> None:
        self._vm(vm).drop(name)

    def _vm(self, vm: str) -> SourceVm:
        return SourceVm(self.folder / vm)
