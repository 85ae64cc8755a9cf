"""What the API says of a VM, as values: its disks with their chains of files, its snapshots, how it stands.

    disk    node (scsi0:0) ── layers, top first: [ds] vm/vm-000002.vmdk, [ds] vm/vm-000001.vmdk, [ds] vm/vm.vmdk
    key     scsi0:0:[ds] vm/vm.vmdk     node and base: the top's file changes with every snapshot

A snapshot's own hardware names the file that it froze, the one the VM wrote until then. It is somewhere in the running disk's
layers, never the top.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokvm.core.errors import SourceError
from tokvm.core.machine import PowerState
from tokvm.core.text import readable
from tokvm.core.units import KiB
from tokvm.sources.vmware.api.vmomi import vim
from tokvm.sources.vmware.hardware import LARGEST_DISK, MOST_LAYERS, DiskDevice, Node

_MOST_SNAPSHOTS = 4096
_POWER = {"poweredOn": PowerState.RUNNING, "poweredOff": PowerState.OFF, "suspended": PowerState.SUSPENDED}


@dataclass(frozen=True, slots=True)
class VmDisk:
    """number: the device's key, by which CBT and snapshots know it. change_id: of a snapshot's disk, while CBT is on."""

    number: int
    device: DiskDevice
    change_id: str = ""

    @property
    def key(self) -> str:
        return self.device.key

    @property
    def node(self) -> Node:
        return self.device.node

    @property
    def size(self) -> int:
        return self.device.size

    @property
    def layers(self) -> tuple[str, ...]:
        return self.device.chain

    def depth_of(self, path: str) -> int | None:
        """How many layers lie above this file; None when it is not in the chain."""
        return next((depth for depth, layer in enumerate(self.layers) if layer == path), None)


@dataclass(frozen=True, slots=True)
class VmSnapshot:
    """moid: the server's id of it. Names are what a person gave: any text."""

    moid: str
    name: str
    ref: Any


def power_state(connection: object, power: object, *, paused: bool = False) -> PowerState:
    """UNKNOWN while nobody can be asked: its host is not connected, or the VM is orphaned or inaccessible."""
    if str(connection) != "connected":
        return PowerState.UNKNOWN
    return PowerState.PAUSED if paused else _POWER.get(str(power), PowerState.UNKNOWN)


def disks_of(hardware: Any, where: str) -> tuple[VmDisk, ...]:
    """The disks in the guest's order. SourceError when the server's description does not hang together."""
    devices = list(hardware.device or ())
    controllers = {one.key: one for one in devices if isinstance(one, vim.vm.device.VirtualController)}
    found = [_disk(one, controllers, where) for one in devices if isinstance(one, vim.vm.device.VirtualDisk)]
    nodes = [disk.node for disk in found]
    if len(set(nodes)) != len(nodes):
        raise _refuse("two disks have one place on a controller", where)
    return tuple(sorted(found, key=lambda disk: disk.node.place))


def _disk(device: Any, controllers: dict[int, Any], where: str) -> VmDisk:
    controller = controllers.get(device.controllerKey)
    if controller is None or device.unitNumber is None:
        raise _refuse(f"disk {device.key} hangs on no controller", where)
    backing = device.backing
    found = DiskDevice(
        node=Node(_kind(controller, where), int(controller.busNumber), int(device.unitNumber)),
        size=_size(device, where),
        chain=_layers(backing, where),
        mode=str(getattr(backing, "diskMode", None) or "persistent"),
        rdm=_mapping(backing),
        shared=_shared(backing, controller),
        encrypted=getattr(backing, "keyId", None) is not None,
        kind=type_name(backing),
    )
    return VmDisk(int(device.key), found, str(getattr(backing, "changeId", None) or ""))


def type_name(value: Any) -> str:
    """`FlatVer2BackingInfo` of a `vim.vm.device.VirtualDisk.FlatVer2BackingInfo`."""
    return type(value).__name__.rpartition(".")[2]


def _kind(controller: Any, where: str) -> str:
    kinds = vim.vm.device
    for kind, name in (
        (kinds.VirtualSCSIController, "scsi"),
        (kinds.VirtualIDEController, "ide"),
        (kinds.VirtualSATAController, "sata"),
        (kinds.VirtualNVMEController, "nvme"),
    ):
        if isinstance(controller, kind):
            return name
    raise _refuse(f"a disk hangs on a {type_name(controller)}, which is no controller known here", where)


def _shared(backing: Any, controller: Any) -> str:
    """By whom else it may be written: `sharingMultiWriter`, `physicalSharing`, …; "" when by nobody."""
    found = (getattr(backing, "sharing", None), getattr(controller, "sharedBus", None))
    return next((str(one) for one in found if one and str(one) not in ("sharingNone", "noSharing")), "")


def _size(device: Any, where: str) -> int:
    size = int(device.capacityInBytes or (device.capacityInKB or 0) * KiB)
    if not 0 < size <= LARGEST_DISK:
        raise _refuse(f"disk {device.key} has {size} bytes", where)
    return size


def _mapping(backing: Any) -> str:
    kinds = vim.vm.device.VirtualDisk
    if isinstance(backing, kinds.RawDiskMappingVer1BackingInfo):
        return str(backing.compatibilityMode or "physicalMode")
    raw = (kinds.RawDiskVer2BackingInfo, kinds.PartitionedRawDiskVer2BackingInfo)
    return "physicalMode" if isinstance(backing, raw) else ""


def _layers(backing: Any, where: str) -> tuple[str, ...]:
    found: list[str] = []
    while backing is not None and len(found) <= MOST_LAYERS:
        path = getattr(backing, "fileName", None)
        if path is None:
            break
        found.append(str(path))
        backing = getattr(backing, "parent", None)
    if len(found) > MOST_LAYERS or len(set(found)) != len(found):
        raise _refuse(f"a disk has a chain of {len(found)} files or more, or one file twice", where)
    return tuple(found)


def snapshots_of(tree: Any, where: str) -> list[VmSnapshot]:
    """All of them, parents before children, without recursion."""
    found: list[VmSnapshot] = []
    waiting = list(getattr(tree, "rootSnapshotList", None) or ())
    while waiting:
        one = waiting.pop(0)
        found.append(VmSnapshot(str(one.snapshot._GetMoId()), str(one.name), one.snapshot))
        waiting.extend(one.childSnapshotList or ())
        if len(found) > _MOST_SNAPSHOTS:
            raise _refuse(f"it has more than {_MOST_SNAPSHOTS} snapshots", where)
    return found


def networks_of(hardware: Any) -> Iterator[tuple[int, str, Any]]:
    """(device key, MAC as the server writes it, backing) of each network card, in the order of their keys."""
    for card in cards_of(hardware):
        yield int(card.key), str(card.macAddress or ""), card.backing


def cards_of(hardware: Any) -> list[Any]:
    """Network cards, in the order of their keys."""
    cards = [one for one in hardware.device or () if isinstance(one, vim.vm.device.VirtualEthernetCard)]
    return sorted(cards, key=lambda one: int(one.key))


def hardware_version(text: str) -> int:
    """7 of `vmx-07`; 0 when it is none."""
    match = re.fullmatch(r"vmx-([0-9]{1,4})", text)
    return int(match[1]) if match else 0


def _refuse(what: str, where: str) -> SourceError:
    return SourceError(f"the server's description of the VM: {readable(what)}", where=where, fix="look at its settings")
