"""A vCenter in front of an ESXi host with real guests.

vcenter      the API for control, SSH to the host for bytes
vcenter-api  HTTPS alone: the base comes by an export lease, everything else after the stop from /folder
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokvm.lab.esx import build_esx
from tokvm.lab.keeping_backend import KEEPING_BACKEND
from tokvm.lab.machines import LabMachine
from tokvm.lab.settings import LabSettings
from tokvm.testing.esxi.host import EsxHost
from tokvm.testing.sshd import Lifetime, Sshd
from tokvm.testing.vsphere.contract import TOKVM_CALLS
from tokvm.testing.vsphere.host import VSphere

AREAS = 2000  # in one answer of QueryChangedDiskAreas: each costs a look at all layers


class VCenterHost:
    """Implements lab.played.LabHost."""

    scheme = "vpx"

    def __init__(self, esx: EsxHost, vsphere: VSphere, *, ssh: bool) -> None:
        self.esx = esx
        self.vsphere = vsphere
        self._ssh = ssh

    @property
    def sshd(self) -> Sshd:
        """The ESXi host's."""
        return self.esx.sshd

    def reach(self, netloc: str) -> tuple[str, list[str]]:
        """netloc: where the ESXi host's sshd is, or a link before it."""
        words = ["--tls-ca", str(self.vsphere.ca_file), "--password-file", str(self.vsphere.password_file)]
        return self.vsphere.url, [*words, *(("--bytes", f"ssh://{netloc}") if self._ssh else ("--enable-cbt",))]

    def start(self, name: str) -> None:
        self.esx.start(name)

    def is_running(self, name: str) -> bool:
        return self.esx.is_running(name)

    def snapshots(self, name: str) -> Sequence[object]:
        return self.esx.snapshots(name)

    def violations(self) -> Sequence[dict[str, object]]:
        return [*self.esx.violations(), *self.vsphere.violations()]


def build_vcenter(folder: Path, machines: Sequence[LabMachine], settings: LabSettings, *, ssh: bool) -> VCenterHost:
    """The ESXi host in `folder` and the vCenter in a process of its own, which is noted there; guests are still to be made."""
    esx = build_esx(folder, machines, settings)
    with esx.edit() as state:
        state["options"]["backend"] = KEEPING_BACKEND
    vsphere = VSphere(esx, vcenter=True, lifetime=Lifetime.OUTLIVES_US, areas=AREAS, empty_pages=False, only=[*TOKVM_CALLS])
    return VCenterHost(esx, vsphere, ssh=ssh)
