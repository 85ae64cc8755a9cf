"""Which VMs a host has, and what one of them is made of: the answer of inspect.ps1 as a VirtualMachine.

Generation 1 is BIOS with its boot disk on IDE, generation 2 is UEFI. Memory: what the VM starts with; where it is dynamic, the
maximum that somebody set (the default, 1 TiB, is nobody's choice). Disks in the guest's order: IDE, then SCSI, by number and
location. A MAC is `00155D010101`; zeros until a VM with a dynamic one is first started.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from tokvm.core.errors import SourceError
from tokvm.core.machine import Disk, Firmware, Nic, PowerState, VirtualMachine
from tokvm.core.text import readable
from tokvm.core.units import TiB
from tokvm.sources.base import MachineSummary
from tokvm.sources.hyperv.answers import Fields
from tokvm.sources.hyperv.faults import Fault, fault_of
from tokvm.sources.hyperv.machine import (
    Checkpoint,
    Cluster,
    RunningDisk,
    Slot,
    parse_cluster,
    parse_disks,
    power_state,
    unmerged,
)
from tokvm.sources.hyperv.powershell import Asking

SHUTDOWN_SERVICE = "9F8233AC-BE49-4C79-8EE3-E7E1985B2077"
UNSET_MAC = "00:00:00:00:00:00"
_MAC = re.compile(r"[0-9a-f]{12}")
_RECORD = re.compile(r"(^|\n)#tokvm [^\r\n]*(?:\r?\n|$)")
_DEFAULT_MAXIMUM = TiB
_PASSING = (Fault.IN_USE, Fault.TIMEOUT, Fault.NO_SUCH_FILE)


@dataclass(frozen=True, slots=True)
class Adapter:
    mac: str
    dynamic: bool
    switch: str
    vlan_mode: str
    vlan: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that inspect.ps1 says. `tpm`, `shielded`: False where Windows is too old to have them. `shutdown`: the integration
    service that stops the guest: None when it is missing, else whether it is enabled and its status (2 is all right)."""

    host: str
    id: str
    name: str
    notes: str
    version: str
    state: int
    operational: tuple[int, ...]
    status: str
    generation: int
    processors: int
    memory_startup: int
    memory_dynamic: bool
    memory_maximum: int
    checkpoint_type: str | None
    automatic_checkpoints: bool | None
    auto_start: str
    replication: int
    cluster: Cluster | None
    secure_boot: bool
    boot_drive: tuple[int, int] | None
    tpm: bool
    shielded: bool
    disks: tuple[RunningDisk, ...]
    adapters: tuple[Adapter, ...]
    checkpoints: tuple[Checkpoint, ...]
    shutdown: tuple[bool, int] | None

    @property
    def power(self) -> PowerState:
        return power_state(self.state)

    @property
    def memory(self) -> int:
        chosen = self.memory_dynamic and self.memory_maximum < _DEFAULT_MAXIMUM
        return max(self.memory_startup, self.memory_maximum) if chosen else self.memory_startup

    def unmerged(self) -> set[str]:
        return unmerged(self.disks, self.checkpoints)

    def boot_slot(self) -> Slot | None:
        slots = [disk.slot for disk in self.disks]
        if self.generation == 2 and self.boot_drive is not None:
            wanted = Slot("SCSI", *self.boot_drive)
            if wanted in slots:
                return wanted
        return next(iter(slots), None)


def list_machines(shell: Asking) -> list[MachineSummary]:
    answer = Fields.of(shell.ask("list", {}), shell.where, "list")
    found = [
        MachineSummary(one.guid("id"), one.text("name"), power_state(one.number("state", most=1 << 32)))
        for one in answer.items("machines")
    ]
    if len({one.uuid for one in found}) != len(found):
        raise answer.refuse("has two VMs with one Id")
    return found


def look_inside(shell: Asking, vm: str) -> Inspection:
    answer = Fields.of(shell.ask("inspect", {"vm": vm}), shell.where, "inspect")
    if answer.guid("id") != vm:
        raise answer.refuse("is about another VM")
    memory, security, firmware = answer.item("memory"), answer.item_or_none("security"), answer.item_or_none("firmware")
    cluster = answer.item_or_none("cluster")
    return Inspection(
        host=answer.text("host"),
        id=vm,
        name=answer.text("name"),
        notes=answer.text("notes"),
        version=answer.text("version"),
        state=answer.number("state", most=1 << 32),
        operational=answer.numbers("operational"),
        status=answer.text("status"),
        generation=answer.number("generation", least=1, most=2),
        processors=answer.number("processors", least=1, most=4096),
        memory_startup=memory.number("startup", least=1, most=64 * TiB),
        memory_dynamic=memory.truth("dynamic"),
        memory_maximum=memory.number("maximum", most=64 * TiB),
        checkpoint_type=answer.text_or_none("checkpointType"),
        automatic_checkpoints=answer.truth_or_none("automaticCheckpoints"),
        auto_start=answer.text("autoStart"),
        replication=max(answer.item("replication").number(name, most=1 << 31) for name in ("state", "mode")),
        cluster=None if cluster is None else parse_cluster(cluster),
        secure_boot=firmware is not None and firmware.text("secureBoot").lower() == "on",
        boot_drive=_boot_drive(firmware),
        tpm=security is not None and security.truth("tpm"),
        shielded=security is not None and security.truth("shielded"),
        disks=parse_disks(answer),
        adapters=tuple(_adapter(one) for one in answer.items("nics")),
        checkpoints=tuple(Checkpoint.parse(one) for one in answer.items("checkpoints")),
        shutdown=_shutdown_service(answer),
    )


def _boot_drive(firmware: Fields | None) -> tuple[int, int] | None:
    drive = None if firmware is None else firmware.item_or_none("bootDrive")
    return None if drive is None else (drive.number("number", most=1 << 16), drive.number("location", most=1 << 16))


def _adapter(fields: Fields) -> Adapter:
    mac = fields.text("mac").lower().replace(":", "").replace("-", "")
    if not _MAC.fullmatch(mac):
        raise fields.refuse(f"has a MAC {readable(repr(mac), limit=60)}")
    vlan = fields.item_or_none("vlan")
    mode = "Untagged" if vlan is None else vlan.text("mode")
    number = 0 if vlan is None else vlan.number("native" if mode == "Trunk" else "access", most=4095)
    pairs = ":".join(mac[at : at + 2] for at in range(0, 12, 2))
    return Adapter(pairs, fields.truth("dynamic"), fields.text("switch"), mode, number)


def _shutdown_service(answer: Fields) -> tuple[bool, int] | None:
    for service in answer.items("services"):
        if service.text("component").upper() == SHUTDOWN_SERVICE:
            return service.truth("enabled"), service.number("status", most=1 << 31)
    return None


def inspect(shell: Asking, vm: str) -> VirtualMachine:
    """Everything the target needs to know of it. A disk whose size nobody can tell has size 0; `check` says why."""
    found = look_inside(shell, vm)
    _refuse_passing(shell, found)
    return VirtualMachine(
        uuid=vm,
        name=found.name,
        description=_RECORD.sub(r"\1", found.notes),
        vcpus=found.processors,
        memory=found.memory,
        disks=_disks(found),
        nics=tuple(Nic(index, one.mac, one.switch) for index, one in enumerate(found.adapters)),
        firmware=Firmware.UEFI if found.generation == 2 else Firmware.BIOS,
        secure_boot=found.secure_boot,
        tpm=found.tpm,
        hypervisor="hyperv",
        power=found.power,
        extra=_extra(found),
    )


def _refuse_passing(shell: Asking, found: Inspection) -> None:
    """A file that cannot be looked at for a moment (a merge takes it away) must not look like a disk that shrank."""
    for disk in found.disks:
        failure = disk.failure
        if failure is not None and fault_of(failure) in _PASSING:
            raise SourceError(
                f"disk {disk.slot} cannot be looked at now: {readable(failure.message)}",
                where=f"{shell.where} VM {found.id}",
                fix="wait for the merge or backup that has its files, then run the same command again",
            )


def copied_disks(found: Inspection) -> list[RunningDisk]:
    return [disk for disk in found.disks if disk.pass_through is None]


def _disks(found: Inspection) -> tuple[Disk, ...]:
    boot = found.boot_slot()
    return tuple(
        Disk(
            index=index,
            key=disk.key,
            size=disk.size,
            device=str(disk.slot),
            bootable=disk.slot == boot,
            storage=disk.volume.file_system if disk.volume is not None else "",
            label=re.split(r"[\\/]", disk.layers[-1].path)[-1],
        )
        for index, disk in enumerate(copied_disks(found))
    )


def _extra(found: Inspection) -> dict[str, str]:
    vlans = {
        f"vlan-of-nic-{index}": f"{one.vlan_mode} {one.vlan}"
        for index, one in enumerate(found.adapters)
        if one.vlan_mode != "Untagged"
    }
    said: Mapping[str, object] = {
        "generation": found.generation,
        "version": found.version,
        "host": found.host,
        "memory-startup": found.memory_startup,
        "memory-maximum": found.memory_maximum if found.memory_dynamic else found.memory_startup,
        "automatic-start": found.auto_start,
        "cluster-role": "" if found.cluster is None else found.cluster.group,
    }
    return {key: str(value) for key, value in said.items() if value != ""} | vlans
