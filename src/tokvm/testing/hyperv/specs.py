"""What a played Hyper-V host is made of, and the state that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokvm.testing.hyperv.backend import FILE_BACKEND
from tokvm.testing.hyperv.state import DYNAMIC, FIXED, OFF, VHD, VHDX, Drive, Nic, Options, Role, State, Vhd, Vm
from tokvm.testing.persona.store import new_uuid

MiB = 1 << 20
BLOCK = 2 * MiB
GiB = 1 << 30
FOLDER = "C:\\Virtual Machines (new)"


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """size in bytes. kind: dynamic or fixed. path: "" makes one up from the VM's name. controller: 0 IDE, 1 SCSI; None: as the
    generation has it. pass_through: the number of the host's disk, without a file. shared: several VMs may write to it.
    format: vhdx, or vhd, whose sectors are always of 512 bytes."""

    size: int
    kind: str = "dynamic"
    path: str = ""
    block_size: int = BLOCK
    logical: int = 512
    physical: int = 4096
    controller: int | None = None
    number: int = 0
    location: int | None = None
    pass_through: int = -1
    shared: bool = False
    format: str = "vhdx"


@dataclass(frozen=True, slots=True)
class NicSpec:
    mac: str = "00155D010101"
    switch: str = "LAN"
    name: str = "Network Adapter"
    vlan: int = 0
    dynamic_mac: bool = True
    legacy: bool = False


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """A cluster role. owner: "" is this node. priority: 2000 is medium. restart_action: 2 restarts, then fails over."""

    group: str
    owner: str = ""
    priority: int = 2000
    restart_action: int = 2


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """A VM. shutdown_s: how long its guest takes to shut down; ignores_shutdown: it never does. fields: over what a new VM has
    (see `_fields`)."""

    name: str
    disks: Sequence[DiskSpec] = ()
    nics: Sequence[NicSpec] = (NicSpec(),)
    id: str = ""
    running: bool = True
    generation: int = 2
    vcpus: int = 1
    memory: int = 256 * MiB
    notes: str = ""
    cluster: ClusterSpec | None = None
    fields: dict[str, object] = field(default_factory=dict)
    shutdown_s: float = 0.0
    ignores_shutdown: bool = False


@dataclass(frozen=True, slots=True)
class HostOptions:
    """default_shell: cmd or powershell (whose messages a refused command line gets). code_page: of banners and noise.
    banner: profiles print before and behind the answer. wrap: columns of the answer's base64 (a multiple of 4), 0 for one line.
    merge_s: how long a merge takes. orphans: an sftp-server whose
    connection broke keeps its files. locks: a running VM's files are refused to sftp (off: old builds let you read rubbish).
    cap: bytes of one sftp READ. limits: sftp-server knows limits@openssh.com. site: the backend needs installed packages."""

    backend: str = FILE_BACKEND
    default_shell: str = "cmd"
    code_page: str = "cp850"
    banner: bool = False
    wrap: int = 76
    merge_s: float = 0.0
    orphans: bool = False
    locks: bool = True
    node: str = "HV1"
    cap: int = 102400
    limits: bool = False
    site: bool = False


def first_state(machines: Sequence[MachineSpec], options: HostOptions) -> State:
    """The state of a host with these VMs, all off."""
    state = State(vms={}, vhds={}, checkpoints=[], jobs=[], later=[], options=_options(options))
    for spec in machines:
        vm = _vm(spec, options)
        state["vms"][vm["id"]] = vm
        for number, disk in enumerate(spec.disks):
            path = "" if disk.pass_through >= 0 else disk.path or _made_up(spec.name, vm["id"], number, disk.format)
            vm["drives"].append(_drive(disk, number, path, spec.generation))
            if path:
                state["vhds"][path] = _vhd(disk, path, vm["id"], number)
    return state


def _options(options: HostOptions) -> Options:
    return Options(
        backend=options.backend,
        default_shell=options.default_shell,
        code_page=options.code_page,
        banner=options.banner,
        wrap=options.wrap,
        merge_s=options.merge_s,
        orphans=options.orphans,
        node=options.node,
        locks=options.locks,
    )


def _made_up(name: str, id_: str, number: int, format_: str) -> str:
    """Names that no file can have are Hyper-V's problem too: it asks for another. The id keeps folders of namesakes apart."""
    plain = "".join(
        "_" if letter < " " or letter in '<>:"/\\|?*' or "\ud800" <= letter <= "\udfff" else letter for letter in name
    )
    return f"{FOLDER}\\{plain[:60].strip(' .') or 'vm'} {id_[:4]}\\Festplatte [{number}].{format_}"


def _drive(disk: DiskSpec, number: int, path: str, generation: int) -> Drive:
    ide = disk.controller == 0 or (disk.controller is None and generation == 1)
    controller, location = (number // 2, number % 2) if ide else (0, number)
    return Drive(
        path=path,
        controller=0 if ide else 1,
        number=disk.number or controller,
        location=location if disk.location is None else disk.location,
        pass_through=disk.pass_through,
        shared=disk.shared,
    )


def _vhd(disk: DiskSpec, path: str, vm: str, number: int) -> Vhd:
    return Vhd(
        path=path,
        format={"vhdx": VHDX, "vhd": VHD}[disk.format],
        type={"dynamic": DYNAMIC, "fixed": FIXED}[disk.kind],
        size=disk.size,
        block_size=disk.block_size,
        logical=disk.logical,
        physical=disk.physical if disk.format == "vhdx" else 512,
        disk_id=new_uuid(),
        identifier=new_uuid(),
        data_guid=new_uuid(),
        parent="",
        vm=vm,
        disk=number,
        since="",
        upto="",
        live=False,
    )


def _vm(spec: MachineSpec, options: HostOptions) -> Vm:
    role, cluster = None, spec.cluster
    if cluster is not None:
        owner = cluster.owner or options.node
        role = Role(group=cluster.group, owner=owner, priority=cluster.priority, restart_action=cluster.restart_action)
    nics = [
        Nic(name=n.name, mac=n.mac, dynamic_mac=n.dynamic_mac, switch=n.switch, vlan=n.vlan, legacy=n.legacy) for n in spec.nics
    ]
    return Vm(
        id=spec.id or new_uuid(),
        name=spec.name,
        state=OFF,
        since=0.0,
        notes=spec.notes,
        fields={**_fields(spec), **spec.fields},
        drives=[],
        nics=nics,
        role=role,
    )


def _fields(spec: MachineSpec) -> dict[str, object]:
    """What Get-VM and its relatives say of a new VM. Enums are Hyper-V's numbers."""
    return {
        "Generation": spec.generation,
        "ProcessorCount": spec.vcpus,
        "MemoryStartup": spec.memory,
        "DynamicMemoryEnabled": False,
        "MemoryMaximum": 1 << 40,
        "Version": "9.0",
        "CheckpointType": "Production",
        "AutomaticCheckpointsEnabled": False,
        "AutomaticStartAction": "StartIfRunning",
        "ReplicationState": 0,
        "ReplicationMode": 0,
        "SecureBoot": "On",
        "TpmEnabled": False,
        "Shielded": False,
        "EncryptStateAndVmMigrationTraffic": False,
        "ShutdownEnabled": True,  # the integration service is switched on,
        "ShutdownContact": True,  # and the guest has its half of it
        "VssEnabled": True,
    }
