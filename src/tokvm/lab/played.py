"""The hypervisors that a lab can play, and what it needs of each.

tokvm ── ssh ──► [link] ──► sshd ──► persona ──► its backend door over SourceVm ──► QEMU ── guest ── heartbeats ──► clock
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from tokvm.lab.machines import LabMachine, make_guest
from tokvm.lab.settings import LabSettings
from tokvm.testing.sshd import Sshd


class LabHost(Protocol):
    """A played host (testing.persona.host.PlayedHost) as a lab needs it. Machines are named by their names."""

    @property
    def scheme(self) -> str: ...

    @property
    def sshd(self) -> Sshd: ...

    def reach(self, netloc: str) -> tuple[str, list[str]]:
        """(URL, options of tokvm that go with it). netloc: `user@host:port` of its sshd, or of a link before it."""
        ...

    def start(self, name: str) -> None: ...

    def is_running(self, name: str) -> bool: ...

    def snapshots(self, name: str) -> Sequence[object]:
        """What was frozen and is still there."""
        ...

    def violations(self) -> Sequence[dict[str, object]]: ...


def build(folder: Path, machines: list[LabMachine], settings: LabSettings, *, clock_port: int) -> LabHost:
    """The host of `settings.source` in folder/host, with all guests made and off."""
    host = BUILDERS[settings.source](folder / "host", machines, settings)
    for one in machines:
        make_guest(folder, one, settings, clock_port=clock_port)
    return host


def _xenserver(folder: Path, machines: Sequence[LabMachine], settings: LabSettings) -> LabHost:
    from tokvm.lab.xenserver import build_xenserver

    return build_xenserver(folder, machines, settings)


def _hyperv(folder: Path, machines: Sequence[LabMachine], settings: LabSettings) -> LabHost:
    from tokvm.lab.hyperv import build_hyperv

    return build_hyperv(folder, machines, settings)


def _esxi(folder: Path, machines: Sequence[LabMachine], settings: LabSettings) -> LabHost:
    from tokvm.lab.esx import build_esx

    return build_esx(folder, machines, settings)


def _esxi_vmfs5(folder: Path, machines: Sequence[LabMachine], settings: LabSettings) -> LabHost:
    from tokvm.lab.esx import build_esx

    return build_esx(folder, machines, settings, datastore="VMFS-5")


def _esxi_locked(folder: Path, machines: Sequence[LabMachine], settings: LabSettings) -> LabHost:
    from tokvm.lab.esx import build_esx

    return build_esx(folder, machines, settings, locked=True)


def _vcenter(folder: Path, machines: Sequence[LabMachine], settings: LabSettings) -> LabHost:
    from tokvm.lab.vcenter import build_vcenter

    return build_vcenter(folder, machines, settings, ssh=True)


def _vcenter_api(folder: Path, machines: Sequence[LabMachine], settings: LabSettings) -> LabHost:
    from tokvm.lab.vcenter import build_vcenter

    return build_vcenter(folder, machines, settings, ssh=False)


Builder = Callable[[Path, Sequence[LabMachine], LabSettings], LabHost]
BUILDERS: dict[str, Builder] = {
    "xenserver": _xenserver,
    "hyperv": _hyperv,
    "esxi": _esxi,
    "esxi-vmfs5": _esxi_vmfs5,
    "esxi-locked": _esxi_locked,
    "vcenter": _vcenter,
    "vcenter-api": _vcenter_api,
}
