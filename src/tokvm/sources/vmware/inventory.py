"""Which VMs a host has, and what one of them is made of, as a VirtualMachine.

Texts and settings are those of the .vmx, where they are escaped; devices those of device.getdevices, whose disks must be the
ones that the .vmx names: so no text can add a disk or hide one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tokvm.core.machine import Disk, Firmware, Nic, VirtualMachine
from tokvm.core.text import readable
from tokvm.core.units import MiB
from tokvm.sources.base import MachineSummary
from tokvm.sources.vmware.faults import EsxError, Fault
from tokvm.sources.vmware.fields import Fields, confused
from tokvm.sources.vmware.hardware import DiskDevice, Hardware
from tokvm.sources.vmware.machines import Machines, Place, Seen
from tokvm.sources.vmware.places import Datastores
from tokvm.sources.vmware.shell import Answer, Command, vim
from tokvm.sources.vmware.vmx import SnapshotList

PAUSE_S = 1.0
_TRIES = 5
T = TypeVar("T")
_GONE_FILE = 1  # exit code of `cat` for a file that is not there


def list_machines(machines: Machines) -> list[MachineSummary]:
    return [MachineSummary(one.uuid, one.name, one.power) for one in machines.all() if not one.template]


@dataclass(frozen=True, slots=True)
class Inspection:
    """One VM, just seen, with its hardware and its snapshots (anybody's)."""

    seen: Seen
    hardware: Hardware
    snapshots: SnapshotList
    stores: Datastores

    @property
    def firmware(self) -> Firmware:
        return Firmware.UEFI if self.seen.settings.get("firmware").lower() == "efi" else Firmware.BIOS

    @property
    def secure_boot(self) -> bool:
        return self.firmware is Firmware.UEFI and self.seen.settings.truth("uefi.secureBoot.enabled")

    @property
    def tpm(self) -> bool:
        return self.hardware.tpm or self.seen.settings.truth("vtpm.present")

    @property
    def encrypted(self) -> bool:
        return bool(self.seen.settings.get("encryption.keySafe")) or any(disk.encrypted for disk in self.hardware.disks)

    def paths(self, disk: DiskDevice) -> tuple[str, ...]:
        """Its chain as paths from the root, top first."""
        return tuple(self.stores.path(one) for one in disk.chain)


def questions(place: Place) -> list[Command]:
    """What `inspection_of` needs the answers to."""
    return [vim("vmsvc/device.getdevices", place.vmid), ("cat", place.vmsd)]


def look_inside(machines: Machines, uuid: str, *, anew: bool = False) -> Inspection:
    """anew: list the datastores again, too."""

    def look() -> Inspection:
        seen, answers = machines.look(uuid, questions)
        return inspection_of(machines, seen, answers, anew=anew)

    return until_settled(look)


def until_settled(look: Callable[[], T]) -> T:
    """A snapshot that is being made shows in one answer before it does in another."""
    for _ in range(_TRIES - 1):
        try:
            return look()
        except EsxError as changing:
            if changing.fault is not Fault.CHANGING:
                raise
        time.sleep(PAUSE_S)
    return look()


def inspection_of(machines: Machines, seen: Seen, answers: list[Answer], *, anew: bool = False) -> Inspection:
    devices, snapshots = answers
    fields = Fields.of(devices.checked(), machines.where, devices.what, known=seen.texts)
    found = Inspection(seen, Hardware.parse(fields), snapshot_list(snapshots), machines.stores(anew=anew))
    if not found.seen.settings.get("encryption.keySafe"):
        _compare(found, machines.where)
    return found


def snapshot_list(answer: Answer) -> SnapshotList:
    """The .vmsd; a VM that never had a snapshot has none, or an empty one."""
    if answer.code == _GONE_FILE and not answer.text:
        return SnapshotList()
    try:
        return SnapshotList.parse(answer.checked())
    except ValueError as exc:
        raise confused(answer.where, answer.what, str(exc)) from exc


def _compare(found: Inspection, where: str) -> None:
    """The disks that the host has in mind are those of the .vmx, node by node, file by file."""
    folder = found.seen.place.folder
    try:
        written = {node: found.stores.beside(name, folder) for node, name in found.seen.settings.disks().items()}
    except ValueError as exc:
        raise confused(where, found.seen.place.vmx, str(exc)) from exc
    told = {str(disk.node): found.paths(disk)[0] for disk in found.hardware.disks if disk.chain}
    if written != told:
        odd = sorted(node for node in written.keys() | told.keys() if written.get(node) != told.get(node))
        raise EsxError(
            f"the host and the VM's .vmx name different files for {', '.join(odd)}: "
            f"{readable(str(told.get(odd[0])), limit=120)} and {readable(str(written.get(odd[0])), limit=120)}",
            where=f"{where} VM {found.seen.summary.uuid}",
            fix="its snapshots or disks are being changed; wait a minute, then run the same command again",
            fault=Fault.CHANGING,
        )


def inspect(machines: Machines, uuid: str) -> VirtualMachine:
    """Everything the target needs to know of it."""
    found = look_inside(machines, uuid, anew=True)
    settings, summary = found.seen.settings, found.seen.summary
    return VirtualMachine(
        uuid=uuid,
        name=settings.get("displayName") or summary.name,
        description=settings.get("annotation"),
        vcpus=found.hardware.processors,
        memory=found.hardware.memory_mib * MiB,
        disks=_disks(found),
        nics=tuple(Nic(index, one.mac, one.network, one.slot) for index, one in enumerate(found.hardware.nics)),
        firmware=found.firmware,
        secure_boot=found.secure_boot,
        tpm=found.tpm,
        hypervisor="vmware",
        power=summary.power,
        extra=_extra(found),
    )


def _disks(found: Inspection) -> tuple[Disk, ...]:
    boot = found.seen.settings.get("bios.hddOrder").split(",")[0].strip().lower()
    nodes = [str(disk.node) for disk in found.hardware.disks]
    first = boot if boot in nodes else next(iter(nodes), "")
    return tuple(
        Disk(
            index=index,
            key=disk.key,
            size=disk.size,
            device=str(disk.node),
            bootable=str(disk.node) == first,
            storage=found.stores.find(disk.chain[-1])[0].type if disk.chain else "",
            label=disk.chain[-1].rpartition("/")[2] if disk.chain else disk.kind,
        )
        for index, disk in enumerate(found.hardware.disks)
    )


def _extra(found: Inspection) -> dict[str, str]:
    settings = found.seen.settings
    said = {
        "vmid": str(found.seen.vmid),
        "vmx": found.seen.summary.vmx,
        "guest-os": settings.get("guestOS"),
        "hardware-version": settings.get("virtualHW.version"),
        "mac-types": ",".join(one.type for one in found.hardware.nics),
    }
    return {key: value for key, value in said.items() if value}
