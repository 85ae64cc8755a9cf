"""What a VM is made of: the answer of `vim-cmd vmsvc/device.getdevices`, checked.

    controller   key 1000, busNumber 0 ◄── disk   controllerKey 1000, unitNumber 1        its node: scsi0:1
    backing      what the VM writes ── parent ── parent … ── base                          `chain`, paths as `[ds] dir/file`

A disk's key is its node and its base, `scsi0:1:[ds] web/web_1.vmdk`: snapshots change what the VM writes, not these.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokvm.core.units import KiB, TiB
from tokvm.sources.vmware.fields import Fields

LARGEST_DISK = 62 * TiB
MOST_LAYERS = 64
_KINDS = ("scsi", "sata", "nvme", "ide")  # in the order in which firmware and kernels count them mostly
_KIND_OF = {
    "VirtualIDEController": "ide",
    "VirtualLsiLogicController": "scsi",
    "VirtualLsiLogicSASController": "scsi",
    "VirtualBusLogicController": "scsi",
    "ParaVirtualSCSIController": "scsi",
    "VirtualAHCIController": "sata",
    "VirtualSATAController": "sata",
    "VirtualNVMEController": "nvme",
}
_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")
_NODE = re.compile(r"(ide|scsi|sata|nvme)([0-9]{1,2}):([0-9]{1,3})")


@dataclass(frozen=True, slots=True)
class Node:
    """Where a disk is plugged in; ordered as guests count them."""

    kind: str
    bus: int
    unit: int

    @classmethod
    def parse(cls, text: str) -> Node:
        """ValueError for what is none."""
        found = _NODE.fullmatch(text)
        if found is None:
            raise ValueError(f"{text[:40]!r} is no node of a disk")
        return cls(found[1], int(found[2]), int(found[3]))

    @property
    def place(self) -> tuple[int, int, int]:
        return _KINDS.index(self.kind), self.bus, self.unit

    def __str__(self) -> str:
        return f"{self.kind}{self.bus}:{self.unit}"


@dataclass(frozen=True, slots=True)
class DiskDevice:
    """chain: from the file that the VM writes down to the base, none of a disk that is no file. mode: persistent, or
    independent_…. rdm: physicalMode, virtualMode or "". shared: how several VMs may write it, "" for not at all."""

    node: Node
    size: int
    chain: tuple[str, ...]
    mode: str
    rdm: str = ""
    shared: str = ""
    encrypted: bool = False
    kind: str = ""

    @property
    def key(self) -> str:
        return f"{self.node}:{self.chain[-1] if self.chain else 'unknown'}"


FIRST_FUNCTION = 1024


@dataclass(frozen=True, slots=True)
class NicDevice:
    """type: generated, assigned or manual. network: a standard switch's network, or a distributed port group's key. slot: PCI
    slot that a Linux guest names the card after (192: ens192), None where none is known."""

    mac: str
    type: str
    network: str
    slot: int | None = None


@dataclass(frozen=True, slots=True)
class Hardware:
    processors: int
    memory_mib: int
    disks: tuple[DiskDevice, ...]
    nics: tuple[NicDevice, ...]
    tpm: bool = False
    persistent_memory: bool = False
    passed_through: tuple[str, ...] = ()

    @classmethod
    def parse(cls, fields: Fields) -> Hardware:
        devices = fields.items("device")
        controllers = {one.number("key", least=-(1 << 31)): one for one in devices if one.type in _KIND_OF}
        disks = [_disk(one, controllers) for one in devices if one.type == "VirtualDisk"]
        nodes = [disk.node for disk in disks]
        if len(set(nodes)) != len(nodes):
            raise fields.refuse("two disks are plugged in at one place")
        return cls(
            processors=fields.number("numCPU", least=1, most=4096),
            memory_mib=fields.number("memoryMB", least=1, most=64 << 20),
            disks=tuple(sorted(disks, key=lambda disk: disk.node.place)),
            nics=tuple(_nic(one) for one in devices if one.raw("macAddress") is not None),
            tpm=any(one.type == "VirtualTPM" for one in devices),
            persistent_memory=any(one.type.startswith("VirtualNVDIMM") and "Controller" not in one.type for one in devices),
            passed_through=tuple(
                one.type for one in devices if one.type in ("VirtualPCIPassthrough", "VirtualSCSIPassthrough")
            ),
        )

    def disk(self, key: str) -> DiskDevice | None:
        return next((disk for disk in self.disks if disk.key == key), None)


def _disk(fields: Fields, controllers: dict[int, Fields]) -> DiskDevice:
    controller = controllers.get(fields.number("controllerKey", least=-(1 << 31)))
    if controller is None:
        raise fields.refuse("it hangs on a controller that is no disk controller")
    node = Node(_KIND_OF[controller.type], controller.number("busNumber", most=63), fields.number("unitNumber", most=255))
    backing = fields.item("backing")
    layers = _layers(backing)
    return DiskDevice(
        node=node,
        size=_size(fields),
        chain=tuple(name for one in layers if (name := one.text_or_none("fileName"))),
        mode=backing.text_or_none("diskMode") or "",
        rdm=next((one.text_or_none("compatibilityMode") or "" for one in layers if one.type.startswith("RawDisk")), ""),
        shared=_shared(backing, controller),
        encrypted=any(one.raw("keyId") is not None for one in layers),
        kind=layers[-1].type,
    )


def _layers(backing: Fields) -> list[Fields]:
    """From the top down."""
    found = [backing]
    while (parent := found[-1].item_or_none("parent")) is not None:
        found.append(parent)
        if len(found) > MOST_LAYERS:
            raise backing.refuse(f"it has more than {MOST_LAYERS} layers")
    return found


def _size(fields: Fields) -> int:
    """Old hosts say it in KiB alone."""
    size = fields.number_or_none("capacityInBytes", least=1, most=LARGEST_DISK)
    return fields.number("capacityInKB", least=1, most=LARGEST_DISK // KiB) * KiB if size is None else size


def _shared(backing: Fields, controller: Fields) -> str:
    sharing, bus = backing.text_or_none("sharing") or "", controller.text_or_none("sharedBus") or ""
    if sharing.lower() not in ("", "sharingnone"):
        return sharing
    return "" if bus.lower() in ("", "nosharing") else bus


def _nic(fields: Fields) -> NicDevice:
    mac = fields.text("macAddress").lower()
    if mac and not _MAC.fullmatch(mac):
        raise fields.refuse(f"its MAC is {mac[:40]!r}")
    backing = fields.item_or_none("backing")
    port = None if backing is None else backing.item_or_none("port")
    name = backing.text_or_none("deviceName") if backing is not None else None
    network = name or (port.text_or_none("portgroupKey") if port is not None else None) or ""
    place = fields.item_or_none("slotInfo")
    slot = None if place is None else plain_slot(place.number_or_none("pciSlotNumber", least=-1))
    return NicDevice(mac, fields.text_or_none("addressType") or "", network, slot)


def plain_slot(number: int | None) -> int | None:
    """A slot that a name is made of. Above 1023 a function of the bridge is in the number too, and no name is known for it."""
    return number if number is not None and 0 < number < FIRST_FUNCTION else None
