"""What a played XenServer is made of, and the state that follows from it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokvm.testing.xenserver.backend import FILE_BACKEND
from tokvm.testing.xenserver.state import HALTED, Options, Sr, State, Vbd, Vdi, Vif, Vm

GiB = 1 << 30
NETWORK = "Pool-wide network associated with eth0"


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """size in bytes, a multiple of 512. sr: the type of the storage repository."""

    size: int
    sr: str = "ext"
    label: str = ""
    sharable: bool = False
    mode: str = "RW"
    sm_config: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NicSpec:
    mac: str
    network: str = NETWORK


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """A VM. shutdown_s: how long its guest takes to shut down; ignores_shutdown: it never does."""

    name: str
    disks: Sequence[DiskSpec] = ()
    nics: Sequence[NicSpec] = (NicSpec("02:16:3e:00:00:01"),)
    uuid: str = ""
    running: bool = True
    vcpus: int = 1
    memory: int = 256 << 20
    description: str = ""
    firmware: str = "bios"
    secure_boot: bool = False
    vtpm: bool = False
    pv: bool = False
    ha_priority: str = ""
    other_config: dict[str, str] = field(default_factory=dict)
    cd_drive: bool = True
    shutdown_s: float = 0.0
    ignores_shutdown: bool = False


@dataclass(frozen=True, slots=True)
class HostOptions:
    """How the host behaves; see state.Options. `site`: the backend needs installed packages (which costs 50 ms a command)."""

    backend: str = FILE_BACKEND
    ha_delay_s: float = -1.0
    in_use_s: float = 0.0
    clean_timeout_s: float = 1200.0
    linger_s: float = 0.0
    vtpm_known: bool = True
    site: bool = False


def first_state(machines: Sequence[MachineSpec], options: HostOptions) -> State:
    """The state of a host with these VMs (all halted), dom0 and a template, which no honest list may show."""
    state = State(vms={}, vdis={}, srs={}, next_domid=1, options=_options(options))
    for vm in (
        _vm(MachineSpec("Control domain on host: lab", cd_drive=False), _new(), control=True),
        _vm(MachineSpec("Debian Bookworm 12", cd_drive=False), _new(), template=True),
    ):
        state["vms"][vm["uuid"]] = vm
    for spec in machines:
        vm = _vm(spec, spec.uuid or _new())
        for number, disk in enumerate(spec.disks):
            vdi = _vdi(disk, vm["uuid"], number, _sr(state, disk.sr))
            state["vdis"][vdi["uuid"]] = vdi
            vm["vbds"].append(_vbd("Disk", _position(number, spec), vdi["uuid"], bootable=number == 0, mode=disk.mode))
        if spec.cd_drive:
            vm["vbds"].append(_vbd("CD", 3, "", bootable=False, mode="RO"))
        state["vms"][vm["uuid"]] = vm
    return state


def _options(options: HostOptions) -> Options:
    return Options(
        backend=options.backend,
        ha_delay_s=options.ha_delay_s,
        in_use_s=options.in_use_s,
        clean_timeout_s=options.clean_timeout_s,
        linger_s=options.linger_s,
        vtpm_known=options.vtpm_known,
    )


def _new() -> str:
    return str(uuid.uuid4())


def _position(number: int, spec: MachineSpec) -> int:
    """userdevice 3 is the CD drive's, as on a real host."""
    return number + 1 if spec.cd_drive and number >= 3 else number


def _sr(state: State, kind: str) -> str:
    for name, sr in state["srs"].items():
        if sr["type"] == kind:
            return name
    name = _new()
    state["srs"][name] = Sr(type=kind, label=f"{kind} storage", size=1000 * GiB, used=100 * GiB)
    return name


def _vbd(kind: str, position: int, vdi: str, *, bootable: bool, mode: str) -> Vbd:
    device = f"xvd{chr(ord('a') + position)}"
    return Vbd(uuid=_new(), userdevice=str(position), device=device, type=kind, bootable=bootable, mode=mode, vdi=vdi)


def _vdi(disk: DiskSpec, vm: str, number: int, sr: str) -> Vdi:
    return Vdi(
        uuid=_new(),
        size=disk.size,
        sr=sr,
        label=disk.label or f"disk {number}",
        sharable=disk.sharable,
        snapshot_of="",
        sm_config=dict(disk.sm_config),
        vm=vm,
        disk=number,
        frozen="",
        readers=[],
        busy_until=0.0,
    )


def _vm(spec: MachineSpec, name: str, *, control: bool = False, template: bool = False) -> Vm:
    fields = {
        "name-description": spec.description,
        "VCPUs-max": str(spec.vcpus),
        "memory-static-max": str(spec.memory),
        "HVM-boot-policy": "" if spec.pv else "BIOS order",
        "PV-bootloader": "pygrub" if spec.pv else "",
        "ha-restart-priority": spec.ha_priority,
    }
    platform = {"device-model": "qemu-upstream-compat", "acpi": "1", "apic": "true", "pae": "true", "viridian": "false"}
    if spec.firmware == "uefi":
        platform["device-model"] = "qemu-upstream-uefi"
        platform["secureboot"] = "true" if spec.secure_boot else "false"
    maps = {
        "HVM-boot-params": {} if spec.pv else {"firmware": spec.firmware, "order": "cd"},
        "platform": platform,
        "blocked-operations": {},
        "other-config": {"base_template_name": "Other install media", **spec.other_config},
    }
    return Vm(
        uuid=name,
        name=spec.name,
        power=HALTED,
        domid=-1,
        snapshot_of="",
        template=template,
        control=control,
        fields=fields,
        maps=maps,
        operations=[],
        vbds=[],
        vifs=[Vif(device=str(number), mac=nic.mac, network=nic.network) for number, nic in enumerate(spec.nics)],
        vtpms=[_new()] if spec.vtpm else [],
        off_since=0.0,
        linger_until=0.0,
    )
