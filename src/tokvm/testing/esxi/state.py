"""What the played ESXi host knows, in STATE_DIR/state.json.

    STATE_DIR/  state.json      everything below; replaced atomically, read and written under `lock`
                lock            flock: one writer at a time
                vmfs/volumes/   <uuid of a datastore>/<directory>/…, and a symlink for each datastore's name
                backend/        what the guests wrote (the backend's own)
                handles/        which sftp-server holds which files (persona.holders)
                commands.log events.log violations faults.json sftp.json

Plain dicts, because every single command loads this and must answer within milliseconds. Paths are the host's own:
/vmfs/volumes/<uuid>/<directory>/<name>.vmdk names the descriptor, which stands for the whole file of the disk.
"""

from __future__ import annotations

from typing import TypedDict

from tokvm.testing.persona.store import Store as FolderStore

ON, OFF, SUSPENDED = "poweredOn", "poweredOff", "suspended"
FLAT, SESPARSE, COWD = "flat", "sesparse", "delta"  # an extent's suffix: disk-flat.vmdk, disk-000001-sesparse.vmdk
PERSISTENT = "persistent"
CREATE, REMOVE = "createSnapshot", "remove"
NO_RDM = ""


class Datastore(TypedDict):
    """type: VMFS-6, VMFS-5 or NFS. size, free: bytes."""

    name: str
    uuid: str
    type: str
    size: int
    free: int


class Layer(TypedDict):
    """A VMDK. `since`, `upto`: the freezes between which the guest wrote what it holds; "" is the disk's beginning, and now.
    `live`: a VM runs on it, so its bytes in the file mean nothing. `guest`, `disk`: whose disk, for the backend."""

    path: str
    kind: str
    thin: bool
    size: int
    cid: int
    parent: str
    guest: str
    disk: int
    since: str
    upto: str
    live: bool


class Disk(TypedDict):
    """A VirtualDisk. `top`: its file. bus: scsi, sata, nvme or ide. controller: the model of it, as .vmx names it. rdm: "",
    physicalMode or virtualMode. number: the backend's."""

    top: str
    bus: str
    controller: str
    bus_number: int
    unit: int
    mode: str
    sharing: str
    shared_bus: str
    rdm: str
    number: int
    uuid: str


class Nic(TypedDict):
    model: str
    mac: str
    address_type: str
    network: str
    connected: bool


class Snapshot(TypedDict):
    """`freeze` names the moment to the backend. `paths`: for each disk the file that was frozen, "" for independent ones.
    parent: the id of another, 0 at the root. created: wall clock. state: powered on or off, then."""

    id: int
    name: str
    description: str
    parent: int
    created: float
    freeze: str
    state: str
    paths: list[str]


class Autostart(TypedDict):
    """vim.host.AutoStartManager.AutoPowerInfo; delays of -1 are the host's default."""

    startOrder: int
    startDelay: int
    waitForHeartbeat: str
    startAction: str
    stopDelay: int
    stopAction: str


class Vm(TypedDict):
    """`fields`: everything that is only looked at or set (specs.FIELDS). `guest`: the backend's name of it. current: the
    snapshot that it runs upon, 0 for none. asks: the question that its next power-on waits for; question: the one that is open.
    away: another host runs it now, from the same files. world: the id of its process here."""

    vmid: int
    guest: str
    uuid: str
    instance: str
    name: str
    datastore: str
    folder: str
    file: str
    state: str
    since: float
    fields: dict[str, object]
    disks: list[Disk]
    nics: list[Nic]
    snapshots: list[Snapshot]
    current: int
    last_uid: int
    autostart: Autostart | None
    asks: str
    question: str
    away: bool
    world: int


class Task(TypedDict):
    """What hostd does for a VM; lands at `due` (wall clock). kind: CREATE or REMOVE. freeze: of the removed snapshot."""

    vm: int
    kind: str
    number: int
    due: float
    name: str
    description: str
    freeze: str


class Done(TypedDict):
    """A task that is over, at `at`; it stays in the list of recent ones for a while. error: what hostd says if it failed."""

    vm: int
    name: str
    at: float
    error: str


class Late(TypedDict):
    """What a client asked for before its connection broke, and that lands at `due` all the same."""

    line: str
    due: float


class Options(TypedDict):
    """How this host behaves; see specs.HostOptions."""

    backend: str
    version: str
    build: str
    name: str
    vcenter: str
    fault_code: int
    create_s: float
    merge_s: float
    recent_s: float
    locks: bool
    base_stays_locked: str
    readers_lock: bool
    autostart: bool
    dumps: str


class State(TypedDict):
    vms: list[Vm]
    layers: dict[str, Layer]
    datastores: list[Datastore]
    tasks: list[Task]
    done: list[Done]
    later: list[Late]
    counter: int
    options: Options


Store = FolderStore[State]


def next_number(state: State) -> int:
    """For Vmids, worlds and tasks: never given out twice."""
    state["counter"] += 1
    return state["counter"]


def chain(state: State, top: str) -> list[Layer]:
    """The files of a disk, top first."""
    found = []
    at = top
    while at:
        found.append(state["layers"][at])
        at = found[-1]["parent"]
    return found


def present(state: State) -> list[Vm]:
    """The VMs that this host has."""
    return [vm for vm in state["vms"] if not vm["away"]]


def datastore_of(state: State, uuid: str) -> Datastore:
    return next(one for one in state["datastores"] if one["uuid"] == uuid)


def pairs(state: State, guest: str, freeze: str) -> list[tuple[str, str]]:
    """(parent, child) of each disk whose layers meet at this freeze and no other child hangs on the parent."""
    children: dict[str, list[str]] = {}
    for layer in state["layers"].values():
        if layer["parent"]:
            children.setdefault(layer["parent"], []).append(layer["path"])
    mine = [layer for layer in state["layers"].values() if (layer["guest"], layer["upto"]) == (guest, freeze)]
    return [(one["path"], children[one["path"]][0]) for one in mine if len(children.get(one["path"], ())) == 1]
