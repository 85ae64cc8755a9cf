"""A VM of the played ESXi host as the API names it: its ids, its keys of devices, its files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyVmomi import vim

from tokvm.testing.esxi import paths
from tokvm.testing.esxi.state import Disk, Layer, Snapshot, Vm, chain
from tokvm.testing.esxi.state import State as EsxState

# Where the keys of a bus's controllers and disks begin, and how many disks a controller has: hostd's numbers since ESX 4.
CONTROLLER_KEYS = {"scsi": 1000, "sata": 15000, "nvme": 31000, "ide": 200}
DISK_KEYS = {"scsi": (2000, 16), "sata": (16000, 30), "nvme": (32000, 15), "ide": (3000, 2)}


@dataclass(frozen=True, slots=True)
class Machine:
    """One VM at one moment. number: its place among all VMs of the state, which vMotion does not change."""

    state: EsxState
    vm: Vm
    number: int
    vcenter: bool

    @property
    def moid(self) -> str:
        """vCenter counts its own; an ESXi host says the Vmid."""
        return f"vm-{1001 + self.number}" if self.vcenter else str(self.vm["vmid"])

    @property
    def ref(self) -> Any:
        return vim.VirtualMachine(self.moid, None)

    @property
    def name(self) -> str:
        return self.vm["name"]

    @property
    def uuid(self) -> str:
        return self.vm["uuid"]

    @property
    def instance_uuid(self) -> str:
        return self.vm["instance"]

    @property
    def folder(self) -> str:
        """/vmfs/volumes/<uuid>/<directory>"""
        return paths.directory(self.state, self.vm)

    @property
    def vmx_path(self) -> str:
        """`[datastore1] web/web.vmx`"""
        return self.bracketed(f"{self.folder}/{self.vm['file']}")

    def bracketed(self, path: str) -> str:
        return paths.bracketed(self.state, path)

    def layers(self, top: str) -> list[Layer]:
        """A disk's files, top first."""
        return chain(self.state, top)

    def snapshot_ref(self, snapshot: Snapshot) -> Any:
        return vim.vm.Snapshot(self.snapshot_moid(snapshot["id"]), None)

    def snapshot_moid(self, number: int) -> str:
        return f"snapshot-{(1 + self.number) * 1000 + number}" if self.vcenter else f"{self.vm['vmid']}-snapshot-{number}"

    def snapshot_of(self, moid: str) -> Snapshot | None:
        return next((one for one in self.vm["snapshots"] if self.snapshot_moid(one["id"]) == moid), None)

    def disk_of(self, key: int) -> Disk | None:
        return next((one for one in self.vm["disks"] if disk_key(one) == key), None)

    def field(self, name: str) -> Any:
        return self.vm["fields"].get(name)


def machines_of(state: EsxState, *, vcenter: bool) -> list[Machine]:
    """vCenter knows those that went to another host, too; an ESXi host only its own."""
    return [Machine(state, vm, number, vcenter) for number, vm in enumerate(state["vms"]) if vcenter or not vm["away"]]


def disk_key(disk: Disk) -> int:
    """VirtualDisk.key"""
    first, each = DISK_KEYS[disk["bus"]]
    return first + each * disk["bus_number"] + disk["unit"]


def controller_key(disk: Disk) -> int:
    return CONTROLLER_KEYS[disk["bus"]] + disk["bus_number"]


def has_extents(state: EsxState, path: str) -> bool:
    """vSAN and vVols hold disks as objects: there is a descriptor, and no file of its bytes."""
    return not any(one["uuid"] == path.split("/")[3] and one["type"] in ("vsan", "VVOL") for one in state["datastores"])


def frozen_tops(machine: Machine, snapshot: Snapshot | None) -> Sequence[str]:
    """For each disk the top of its chain: now, or at a snapshot ("" for one that it left out)."""
    return [disk["top"] for disk in machine.vm["disks"]] if snapshot is None else snapshot["paths"]


def size_of(folder: Path, path: str) -> int:
    try:
        return paths.local(folder, path).stat().st_size
    except FileNotFoundError:
        return 0


def escaped(name: str) -> str:
    """As names of entities are: `%`, `/` and `\\` stand escaped in them."""
    return name.replace("%", "%25").replace("/", "%2f").replace("\\", "%5c")
