"""Which VMs a host has, and what one of them is made of.

    VM ── VBDs (type Disk; userdevice "0", "1", … is the position on the guest's bus) ── VDI (the disk) ── SR (what it lies on)
     └─── VIFs (device "0", "1", …; MAC; network)

Sizes are bytes. `userdevice` is a decimal string, so "10" comes after "9". Firmware: HVM-boot-params:firmware is `uefi` or
`bios` (absent: BIOS). An empty HVM-boot-policy means a paravirtual guest, which has no firmware at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokvm.core.machine import Disk, Firmware, Nic, PowerState, VirtualMachine
from tokvm.core.text import readable
from tokvm.core.units import TiB
from tokvm.sources.base import MachineSummary
from tokvm.sources.xenserver.faults import Fault, XenServerError
from tokvm.sources.xenserver.xe import NOTHING, Command, Row, Xe, is_uuid, parse_map, value_of

# Templates, snapshots and dom0 are VMs to xapi as well.
MACHINES: Command = ("vm-list", "is-control-domain=false", "is-a-template=false", "is-a-snapshot=false")

POWER = {
    "running": PowerState.RUNNING,
    "halted": PowerState.OFF,
    "paused": PowerState.PAUSED,
    "suspended": PowerState.SUSPENDED,
}
_HARDWARE = (
    *("name-label", "name-description", "power-state", "VCPUs-max", "memory-static-max"),
    *("HVM-boot-policy", "HVM-boot-params", "platform", "PV-bootloader"),
)
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_LARGEST = 64 * TiB
_MOST_DEVICES = 1 << 20


@dataclass(frozen=True, slots=True)
class AttachedDisk:
    """A VBD of type Disk with something in it. `vdi` and the VBD's own `uuid` are uuids."""

    uuid: str
    userdevice: str
    vdi: str
    bootable: bool
    writable: bool


def list_machines(xe: Xe) -> list[MachineSummary]:
    rows = xe.table(MACHINES, ["name-label", "power-state"])
    return [MachineSummary(row["uuid"], row["name-label"], power_state(row["power-state"])) for row in rows]


def power_state(text: str) -> PowerState:
    return POWER.get(text, PowerState.UNKNOWN)


def attached_disks(xe: Xe, vm: str) -> list[AttachedDisk]:
    """A VM's disks in the order of `userdevice`."""
    listing: Command = ("vbd-list", f"vm-uuid={vm}", "type=Disk")
    rows = xe.table(listing, ["userdevice", "bootable", "vdi-uuid", "mode"])
    found = [
        AttachedDisk(row["uuid"], row["userdevice"], row["vdi-uuid"], row["bootable"] == "true", row["mode"] == "RW")
        for row in rows
        if holds_disk(xe, row, listing)
    ]
    return sorted(found, key=lambda disk: position(xe, disk.userdevice, listing))


def holds_disk(xe: Xe, row: Row, listing: Command) -> bool:
    """False for an empty drive. SourceError for a `vdi-uuid` that is neither a uuid nor nothing."""
    if row["vdi-uuid"] in (NOTHING, ""):
        return False
    xe.uuid(row["vdi-uuid"], (*listing, "params=vdi-uuid", "--minimal"))
    return True


def position(xe: Xe, device: str, listing: Command) -> int:
    return xe.number(device, (*listing, "params=userdevice", "--minimal"), least=0, most=_MOST_DEVICES)


def inspect(xe: Xe, uuid: str) -> VirtualMachine:
    """Everything the target needs to know of it. SourceError when it is gone or makes no sense."""
    asked = xe.values("vm", uuid, _HARDWARE)
    boot, platform = parse_map(asked["HVM-boot-params"]), parse_map(asked["platform"])
    uefi = boot.get("firmware", "").lower() == "uefi"
    return VirtualMachine(
        uuid=uuid,
        name=asked["name-label"],
        description=asked["name-description"],
        vcpus=xe.number(asked["VCPUs-max"], value_of("vm", uuid, "VCPUs-max"), least=1, most=4096),
        memory=xe.number(asked["memory-static-max"], value_of("vm", uuid, "memory-static-max"), least=1, most=_LARGEST),
        disks=_disks(xe, uuid),
        nics=_nics(xe, uuid),
        firmware=Firmware.UEFI if uefi else Firmware.BIOS,
        secure_boot=uefi and platform.get("secureboot", "").lower() == "true",
        tpm=platform.get("vtpm", "").lower() == "true" or has_tpm(xe, uuid),
        hypervisor="xenserver",
        power=power_state(asked["power-state"]),
        extra={
            "boot-policy": asked["HVM-boot-policy"],
            "boot-order": boot.get("order", ""),
            "pv-bootloader": asked["PV-bootloader"],
            "device-model": platform.get("device-model", ""),
            "secureboot": platform.get("secureboot", ""),
            "virtualization": "hvm" if asked["HVM-boot-policy"] else "pv",
        },
    )


def has_tpm(xe: Xe, uuid: str) -> bool:
    """Hosts older than XenServer 8 and XCP-ng 8.3 have no virtual TPM and do not know the question."""
    try:
        return any(is_uuid(found) for found in xe.column(("vtpm-list", f"vm-uuid={uuid}"), "uuid"))
    except XenServerError as failed:
        if failed.fault is Fault.UNKNOWN_COMMAND:
            return False
        raise


def _disks(xe: Xe, vm: str) -> tuple[Disk, ...]:
    attached = attached_disks(xe, vm)
    names = ("virtual-size", "sr-uuid", "name-label")
    answers = xe.ask_all([value_of("vdi", disk.vdi, name) for disk in attached for name in names])
    vdis = [answers[at : at + len(names)] for at in range(0, len(answers), len(names))]
    types = sr_values(xe, [(disk.vdi, sr) for disk, (_, sr, _) in zip(attached, vdis, strict=True)], ["type"])
    return tuple(
        Disk(
            index=index,
            key=disk.vdi,
            size=xe.number(size, value_of("vdi", disk.vdi, "virtual-size"), least=1, most=_LARGEST),
            device=disk.userdevice,
            bootable=disk.bootable,
            storage=types[sr]["type"],
            label=label,
        )
        for index, (disk, (size, sr, label)) in enumerate(zip(attached, vdis, strict=True))
    )


def sr_values(xe: Xe, disks: list[tuple[str, str]], names: list[str]) -> dict[str, Row]:
    """Parameters of the SRs that these (VDI, SR) lie on, each SR asked once."""
    repositories = {xe.uuid(sr, value_of("vdi", vdi, "sr-uuid")): None for vdi, sr in disks}
    return {sr: xe.values("sr", sr, names) for sr in repositories}


def _nics(xe: Xe, vm: str) -> tuple[Nic, ...]:
    listing: Command = ("vif-list", f"vm-uuid={vm}")
    rows = xe.table(listing, ["MAC", "network-name-label"], key="device")
    numbered = [(xe.number(row["device"], (*listing, "params=device"), least=0, most=_MOST_DEVICES), row) for row in rows]
    return tuple(
        Nic(device, _mac(xe, row, listing), row["network-name-label"])
        for device, row in sorted(numbered, key=lambda one: one[0])
    )


def _mac(xe: Xe, row: Row, listing: Command) -> str:
    mac = row["MAC"].lower()
    if not _MAC.fullmatch(mac):
        raise xe.confused((*listing, "params=MAC", "--minimal"), f"{readable(repr(mac), limit=60)} is not a MAC address")
    return mac
