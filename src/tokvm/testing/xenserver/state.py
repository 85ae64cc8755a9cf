"""What the played XenServer knows, in STATE_DIR/state.json.

    STATE_DIR/  state.json   everything below; replaced atomically, read and written under `lock`
                lock         flock: one writer at a time
                backend/     the disks and the guests (the backend's own)
                exports/     VHD files made for vdi-export, kept so that a second export of the same is quick
                run/         pid files of workers that outlive their command
                commands.log exports.log events.log violations faults.json

Plain dicts, because every single command loads this and must answer within milliseconds.
"""

from __future__ import annotations

from typing import TypedDict

from tokvm.testing.persona.store import Store as FolderStore

RUNNING = "running"
HALTED = "halted"


class Vbd(TypedDict):
    """A disk or CD drive of a VM. `vdi` is empty for an empty drive."""

    uuid: str
    userdevice: str
    device: str
    type: str
    bootable: bool
    mode: str
    vdi: str


class Vif(TypedDict):
    device: str
    mac: str
    network: str


class Operation(TypedDict):
    """An entry of current-operations: what the toolstack has in hand."""

    ref: str
    name: str
    pid: int
    tick: int


class Vm(TypedDict):
    """A VM, a snapshot (`snapshot_of` set), a template or dom0. `off_since`: wall clock of the last power-off, 0 when
    it is not off."""

    uuid: str
    name: str
    power: str
    domid: int
    snapshot_of: str
    template: bool
    control: bool
    fields: dict[str, str]
    maps: dict[str, dict[str, str]]
    operations: list[Operation]
    vbds: list[Vbd]
    vifs: list[Vif]
    vtpms: list[str]
    off_since: float
    linger_until: float


class Vdi(TypedDict):
    """`vm`, `disk` and `frozen` name the bytes to the backend: disk number `disk` of `vm`, live (`frozen` empty) or as
    frozen under that name. `readers`: pids and start ticks of exports. `busy_until`: dom0 detaches it late."""

    uuid: str
    size: int
    sr: str
    label: str
    sharable: bool
    snapshot_of: str
    sm_config: dict[str, str]
    vm: str
    disk: int
    frozen: str
    readers: list[tuple[int, int]]
    busy_until: float


class Sr(TypedDict):
    type: str
    label: str
    size: int
    used: int


class Options(TypedDict):
    """How this host behaves. ha_delay_s < 0: no HA. in_use_s: how long a VDI stays attached to dom0 after an export.
    clean_timeout_s: how long xe waits for a guest to shut down. linger_s: how long the domain outlives `halted`."""

    backend: str
    ha_delay_s: float
    in_use_s: float
    clean_timeout_s: float
    linger_s: float
    vtpm_known: bool


class State(TypedDict):
    vms: dict[str, Vm]
    vdis: dict[str, Vdi]
    srs: dict[str, Sr]
    options: Options
    next_domid: int


Store = FolderStore[State]
