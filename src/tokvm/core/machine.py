"""A virtual machine as every hypervisor could describe it, and as libvirt can be told it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Firmware(StrEnum):
    BIOS = "bios"
    UEFI = "uefi"


class PowerState(StrEnum):
    RUNNING = "running"
    OFF = "off"
    PAUSED = "paused"
    SUSPENDED = "suspended"
    UNKNOWN = "unknown"


class DiskBus(StrEnum):
    """The bus of the disk on the target. All but the first two are hardware that a guest of another hypervisor drives as it is.

    PVSCSI is VMware's own controller, SAS LSI's 1068 (VMware's "LSI Logic SAS"), MEGASAS LSI's 1078."""

    VIRTIO_BLK = "virtio-blk"
    VIRTIO_SCSI = "virtio-scsi"
    SATA = "sata"
    IDE = "ide"
    NVME = "nvme"
    PVSCSI = "pvscsi"
    SAS = "sas"
    MEGASAS = "megasas"


class NicModel(StrEnum):
    """The network card on the target; the value is libvirt's."""

    VIRTIO = "virtio"
    VMXNET3 = "vmxnet3"
    E1000E = "e1000e"
    E1000 = "e1000"
    RTL8139 = "rtl8139"


class Severity(StrEnum):
    BLOCKER = "blocker"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Disk:
    """One disk of the source VM. `key` is the hypervisor's own id for it (XenServer: VDI uuid); `index` counts from 0
    in the guest's order; `size` is the virtual size in bytes; `storage` says what it lies on (XenServer: the SR's type).
    `sector` is the logical block size in bytes that the guest sees, 512 or 4096: partition tables count in it."""

    index: int
    key: str
    size: int
    device: str = ""
    bootable: bool = False
    storage: str = ""
    label: str = ""
    sector: int = 512


@dataclass(frozen=True, slots=True)
class Nic:
    """`index`: the source's number of it (XenServer: the vif's device). `mac` is lower case, colon separated. `network` is
    the source's name of the network it is plugged into. `slot` is the PCI slot that the guest names it after (192: ens192;
    VMware: `ethernetN.pciSlotNumber`), None when the source says nothing."""

    index: int
    mac: str
    network: str = ""
    slot: int | None = None


@dataclass(frozen=True, slots=True)
class VirtualMachine:
    """`uuid` is the source's id of the VM, kept on the target. Names are what a person gave: any text, newlines too."""

    uuid: str
    name: str
    vcpus: int
    memory: int
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...] = ()
    firmware: Firmware = Firmware.BIOS
    secure_boot: bool = False
    tpm: bool = False
    hypervisor: str = ""
    power: PowerState = PowerState.UNKNOWN
    description: str = ""
    extra: dict[str, str] = field(default_factory=dict)


def machine_from(stored: Mapping[str, Any]) -> VirtualMachine:
    """A machine from what `dataclasses.asdict` made of one, through JSON. Fields that an older tokvm did not know have their
    defaults; KeyError, TypeError or ValueError when it is none."""
    known = dict(stored)
    known["disks"] = tuple(Disk(**disk) for disk in known["disks"])
    known["nics"] = tuple(Nic(**nic) for nic in known.get("nics", ()))
    known["firmware"] = Firmware(known.get("firmware", Firmware.BIOS))
    known["power"] = PowerState(known.get("power", PowerState.UNKNOWN))
    return VirtualMachine(**known)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `tokvm check`: what is in the way (BLOCKER) or worth knowing (WARNING), and what to do about it."""

    severity: Severity
    what: str
    fix: str = ""
    where: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A frozen state of the VM that tokvm made. `mark` is our own unique name for it (with the migration's id), `key` the
    hypervisor's id, `disks` maps Disk.key → the hypervisor's id of that disk's frozen image (the change point)."""

    key: str
    mark: str
    disks: dict[str, str]


@dataclass(frozen=True, slots=True)
class OffEvidence:
    """Two independent witnesses that a VM is off. Both must be true before the final delta and before the start."""

    power: PowerState
    released: bool
    detail: str = ""

    @property
    def proved(self) -> bool:
        return self.power is PowerState.OFF and self.released
