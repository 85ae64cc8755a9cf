r"""What the played Hyper-V host knows, in STATE_DIR/state.json.

    STATE_DIR/  state.json   everything below; replaced atomically, read and written under `lock`
                lock         flock: one writer at a time
                drives/C/    the host's disk C:, where the VHDX files are
                backend/     what the guests wrote (the backend's own)
                handles/     which sftp-server holds which files, one JSON for each process
                commands.log events.log violations faults.json sftp.json

Plain dicts, because every single command loads this and must answer within milliseconds. Numbers of enums are Hyper-V's own.
"""

from __future__ import annotations

from typing import TypedDict

from tokvm.testing.persona.sftp_settings import SftpSettings
from tokvm.testing.persona.store import Store as FolderStore
from tokvm.testing.persona.store import new_uuid, replace

__all__ = [
    "Checkpoint",
    "Drive",
    "Job",
    "Late",
    "Nic",
    "Options",
    "Role",
    "SftpSettings",
    "State",
    "Store",
    "Vhd",
    "Vm",
    "new_uuid",
    "replace",
]

RUNNING, OFF, SAVED, PAUSED = 2, 3, 6, 9  # VMState
DYNAMIC, DIFFERENCING, FIXED = 3, 4, 2  # VhdType
VHDX, VHD = "VHDX", "VHD"  # VhdFormat
STANDARD, RECOVERY = "Standard", "Recovery"  # SnapshotType


class Vhd(TypedDict):
    """A disk file. `since`, `upto`: the freezes between which the guest wrote what it holds; "" is the disk's beginning, and
    now. `live`: a VM runs on it, so its bytes in the file mean nothing. disk_id: VirtualDiskId in the file, one for the chain;
    identifier: Get-VHD's, of each file its own."""

    path: str
    format: str
    type: int
    size: int
    block_size: int
    logical: int
    physical: int
    disk_id: str
    identifier: str
    data_guid: str
    parent: str
    vm: str
    disk: int
    since: str
    upto: str
    live: bool


class Drive(TypedDict):
    """A hard disk drive of a VM. `path`: the top of its chain, "" for a pass-through disk. controller: 0 IDE, 1 SCSI."""

    path: str
    controller: int
    number: int
    location: int
    pass_through: int
    shared: bool


class Nic(TypedDict):
    name: str
    mac: str
    dynamic_mac: bool
    switch: str
    vlan: int
    legacy: bool


class Checkpoint(TypedDict):
    """`freeze` names the moment to the backend. `paths`: for each drive the file that was frozen."""

    id: str
    name: str
    vm: str
    type: str
    parent: str
    created: float
    freeze: str
    paths: list[str]


class Role(TypedDict):
    """The VM's cluster group, and the RestartAction of its Virtual Machine resource. priority 0: not started on failover."""

    group: str
    owner: str
    priority: int
    restart_action: int


class Vm(TypedDict):
    """`fields`: everything that is only looked at or set. `state`: as it was last seen. role: None outside a cluster.
    `since`: wall clock of the last power-on."""

    id: str
    name: str
    state: int
    since: float
    notes: str
    fields: dict[str, object]
    drives: list[Drive]
    nics: list[Nic]
    role: Role | None


class Job(TypedDict):
    """A merge that begins when nobody holds the files and lands at `due` (wall clock)."""

    vm: str
    freeze: str
    due: float


class Late(TypedDict):
    """What a client asked for before its connection broke, and that lands at `due` all the same."""

    script: str
    data: dict[str, object]
    due: float


class Options(TypedDict):
    """How this host behaves; see specs.HostOptions."""

    backend: str
    default_shell: str
    code_page: str
    banner: bool
    wrap: int
    merge_s: float
    orphans: bool
    node: str
    locks: bool


class State(TypedDict):
    vms: dict[str, Vm]
    vhds: dict[str, Vhd]
    checkpoints: list[Checkpoint]
    jobs: list[Job]
    later: list[Late]
    options: Options


Store = FolderStore[State]


def guid() -> str:
    """As Windows writes them in file names."""
    return new_uuid().upper()


def chain(state: State, top: str) -> list[Vhd]:
    """The files of a drive, top first."""
    found = []
    at = top
    while at:
        found.append(state["vhds"][at])
        at = found[-1]["parent"]
    return found


def is_merging(state: State, vm: str) -> bool:
    return any(job["vm"] == vm for job in state["jobs"])
