"""What a played ESXi host is made of, and the state that follows from it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokvm.testing.esxi.dump import NEW
from tokvm.testing.esxi.paths import VOLUMES, directory
from tokvm.testing.esxi.state import (
    FLAT,
    NO_RDM,
    OFF,
    PERSISTENT,
    Autostart,
    Datastore,
    Disk,
    Layer,
    Nic,
    Options,
    State,
    Vm,
    next_number,
)
from tokvm.testing.hyperv.backend import FILE_BACKEND
from tokvm.testing.persona.store import new_uuid

MiB = 1 << 20
GiB = 1 << 30


@dataclass(frozen=True, slots=True)
class DatastoreSpec:
    """type: VMFS-6 (deltas are seSparse), VMFS-5 or NFS (COWD below 2 TiB)."""

    name: str = "datastore1"
    type: str = "VMFS-6"
    size: int = 4096 * GiB
    free: int = 2048 * GiB
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """size in bytes. bus: scsi, sata, nvme, ide; controller: the model of a scsi bus (pvscsi, lsilogic, lsisas1068, buslogic).
    unit: None for the next that is free on bus number `bus_number`. mode: persistent, independent_persistent, …
    path: `[datastore] directory/name.vmdk`, "" for one in the VM's directory. sharing, shared_bus: as the API names them. rdm:
    physicalMode or virtualMode."""

    size: int
    thin: bool = True
    bus: str = "scsi"
    controller: str = "pvscsi"
    bus_number: int = 0
    unit: int | None = None
    mode: str = PERSISTENT
    path: str = ""
    sharing: str = "sharingNone"
    shared_bus: str = "noSharing"
    rdm: str = NO_RDM


@dataclass(frozen=True, slots=True)
class NicSpec:
    """address_type: generated, assigned (by vCenter) or manual."""

    mac: str = "00:0c:29:aa:bb:01"
    model: str = "vmxnet3"
    address_type: str = "generated"
    network: str = "VM Network"
    connected: bool = True


@dataclass(frozen=True, slots=True)
class AutostartSpec:
    order: int = 1
    action: str = "powerOn"
    delay: int = -1
    stop: str = "systemDefault"
    stop_delay: int = -1
    heartbeat: str = "systemDefault"


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """A VM. datastore: its name, "" for the first. folder, file: of the .vmx, "" for the VM's name. asks: the question that its
    power-ons wait for. shutdown_s: how long its guest takes to shut down; ignores_shutdown: it never does. fields: over
    FIELDS."""

    name: str
    disks: Sequence[DiskSpec] = ()
    nics: Sequence[NicSpec] = (NicSpec(),)
    uuid: str = ""
    running: bool = True
    vcpus: int = 1
    memory: int = 256 * MiB
    datastore: str = ""
    folder: str = ""
    file: str = ""
    autostart: AutostartSpec | None = None
    asks: str = ""
    fields: dict[str, object] = field(default_factory=dict)
    shutdown_s: float = 0.0
    ignores_shutdown: bool = False


@dataclass(frozen=True, slots=True)
class HostOptions:
    """fault_code: vim-cmd's exit code when it printed a fault (nobody depends on it: 0 or 1). create_s, merge_s: how long a new
    snapshot, and a merge, take. recent_s: how long a finished task stays in the list of recent ones. base_stays_locked:
    "files", SFTP and dd get no base of a running VM even with a snapshot on top; "all", vmkfstools neither (7.0U1c). locks: a
    running VM's files are refused at all. readers_lock: who reads a file keeps others from opening it to write. vcenter: the
    address of the vCenter that manages the host. autostart: the host starts VMs by itself. dumps: new, old or lean (dump.py).
    banner: sshd prints one. cap: bytes of one sftp READ. limits: sftp-server knows limits@openssh.com (8.0). site: the backend
    needs installed packages."""

    backend: str = FILE_BACKEND
    datastores: Sequence[DatastoreSpec] = (DatastoreSpec(),)
    version: str = "8.0.2"
    build: str = "22380479"
    name: str = "esx1"
    vcenter: str = ""
    fault_code: int = 1
    create_s: float = 0.0
    merge_s: float = 0.0
    recent_s: float = 600.0
    locks: bool = True
    base_stays_locked: str = ""
    readers_lock: bool = True
    autostart: bool = True
    dumps: str = NEW
    banner: str = ""
    cap: int = 261120
    limits: bool = True
    site: bool = False


# What is only looked at or set. invalid: hostd cannot read its .vmx, and lists it apart.
# tools: guestToolsRunning, guestToolsNotRunning or guestToolsExecutingScripts.
FIELDS: dict[str, object] = {
    "annotation": "",
    "connectionState": "connected",
    "consolidationNeeded": False,
    "encrypted": False,
    "faultTolerance": "notConfigured",
    "firmware": "bios",
    "guestFullName": "Debian GNU/Linux 11 (64-bit)",
    "guestId": "debian11_64Guest",
    "invalid": False,
    "secureBoot": False,
    "template": False,
    "tools": "guestToolsRunning",
    "toolsInstalled": True,
    "version": "vmx-19",
    "vtpm": False,
}


def first_state(machines: Sequence[MachineSpec], options: HostOptions) -> State:
    """The state of a host with these VMs, all off."""
    state = State(vms=[], layers={}, datastores=[], tasks=[], done=[], later=[], counter=0, options=_options(options))
    state["datastores"] = [_datastore(one) for one in options.datastores]
    for spec in machines:
        vm = _vm(state, spec)
        state["vms"].append(vm)
        for number, disk in enumerate(spec.disks):
            vm["disks"].append(_disk(state, vm, disk, number))
    return state


def _options(options: HostOptions) -> Options:
    return Options(
        backend=options.backend,
        version=options.version,
        build=options.build,
        name=options.name,
        vcenter=options.vcenter,
        fault_code=options.fault_code,
        create_s=options.create_s,
        merge_s=options.merge_s,
        recent_s=options.recent_s,
        locks=options.locks,
        base_stays_locked=options.base_stays_locked,
        readers_lock=options.readers_lock,
        autostart=options.autostart,
        dumps=options.dumps,
    )


def _datastore(spec: DatastoreSpec) -> Datastore:
    hexes = os.urandom(16).hex()
    vmfs = f"{hexes[:8]}-{hexes[8:16]}-{hexes[16:20]}-{hexes[20:]}"
    uuid = spec.uuid or (f"{hexes[:8]}-{hexes[8:16]}" if spec.type == "NFS" else vmfs)
    return Datastore(name=spec.name, uuid=uuid, type=spec.type, size=spec.size, free=spec.free)


def _vm(state: State, spec: MachineSpec) -> Vm:
    uuid = spec.uuid or new_uuid()
    folder = spec.folder or _file_name(spec.name)
    stores = [one["uuid"] for one in state["datastores"] if spec.datastore in ("", one["name"])]
    twin = any(vm["guest"] == uuid for vm in state["vms"])  # a copy of a VM has the same BIOS uuid
    autostart = spec.autostart
    return Vm(
        vmid=next_number(state),
        guest=new_uuid() if twin else uuid,
        uuid=uuid,
        instance=f"52{new_uuid()[2:]}",
        name=spec.name,
        datastore=stores[0],
        folder=folder,
        file=spec.file or f"{_file_name(spec.name)}.vmx",
        state=OFF,
        since=0.0,
        fields={**FIELDS, "numCPU": spec.vcpus, "memoryMB": spec.memory // MiB, **spec.fields},
        disks=[],
        nics=[
            Nic(model=n.model, mac=n.mac, address_type=n.address_type, network=n.network, connected=n.connected)
            for n in spec.nics
        ],
        snapshots=[],
        current=0,
        last_uid=0,
        autostart=None if autostart is None else _autostart(autostart),
        asks=spec.asks,
        question="",
        away=False,
        world=0,
    )


def _file_name(name: str) -> str:
    """hostd leaves a slash and a percent sign out of names of files."""
    return "".join("_" if letter in "/\\%" or letter < " " else letter for letter in name)


def _autostart(spec: AutostartSpec) -> Autostart:
    return Autostart(
        startOrder=spec.order,
        startDelay=spec.delay,
        waitForHeartbeat=spec.heartbeat,
        startAction=spec.action,
        stopDelay=spec.stop_delay,
        stopAction=spec.stop,
    )


def _disk(state: State, vm: Vm, spec: DiskSpec, number: int) -> Disk:
    path = _disk_path(state, vm, spec, number)
    shared = state["layers"].get(path)  # two VMs may have the same disk
    if shared is None:
        state["layers"][path] = Layer(
            path=path,
            kind=FLAT,
            thin=spec.thin,
            size=spec.size,
            cid=int.from_bytes(os.urandom(4), "big") & 0xFFFF_FFFD,
            parent="",
            guest=vm["guest"],
            disk=number,
            since="",
            upto="",
            live=False,
        )
    taken = [one["unit"] for one in vm["disks"] if (one["bus"], one["bus_number"]) == (spec.bus, spec.bus_number)]
    free = next(one for one in range(256) if one not in taken and (spec.bus, one) != ("scsi", 7))
    return Disk(
        top=path,
        bus=spec.bus,
        controller=spec.controller if spec.bus == "scsi" else "ahci" if spec.bus == "sata" else spec.bus,
        bus_number=spec.bus_number,
        unit=free if spec.unit is None else spec.unit,
        mode=spec.mode,
        sharing=spec.sharing,
        shared_bus=spec.shared_bus,
        rdm=spec.rdm,
        number=number,
        uuid=f"6000C29{new_uuid()[7:]}",
    )


def _disk_path(state: State, vm: Vm, spec: DiskSpec, number: int) -> str:
    if spec.path:
        name, _, rest = spec.path.removeprefix("[").partition("] ")
        uuid = next(one["uuid"] for one in state["datastores"] if one["name"] == name)
        return f"{VOLUMES}/{uuid}/{rest}"
    stem = vm["file"].removesuffix(".vmx")
    return f"{directory(state, vm)}/{stem}{f'_{number}' if number else ''}.vmdk"
