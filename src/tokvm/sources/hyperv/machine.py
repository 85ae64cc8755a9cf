"""What Hyper-V says of a VM, as values: the answers of inspect.ps1, layers.ps1 and power.ps1, checked.

    disk    slot (controller, number, location) ── layers, top first ── base
    key     SCSI:0:1:<the base's disk id>      the path changes with every checkpoint, and a VHD's own id with every layer

A checkpoint's path is the file it froze: somewhere in the running disk's layers, never the top.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from tokvm.core.machine import PowerState
from tokvm.core.units import TiB
from tokvm.sources.hyperv.answers import Fields
from tokvm.sources.hyperv.faults import Failure
from tokvm.sources.hyperv.paths import is_checkpoint_file, same
from tokvm.sources.hyperv.powershell import Value

LARGEST_DISK = 64 * TiB
_CONTROLLERS = ("IDE", "SCSI", "PMEM")
_MOST_SLOTS = 1 << 16
_MOST_LAYERS = 64

RUNNING, OFF, STOPPING, SHUTTING_DOWN = 2, 3, 4, 32781
_POWER = {
    RUNNING: PowerState.RUNNING,
    OFF: PowerState.OFF,
    9: PowerState.PAUSED,
    6: PowerState.SUSPENDED,
    32779: PowerState.SUSPENDED,  # saved by a fast shutdown of the host
    32783: PowerState.SUSPENDED,  # hibernated
    32785: PowerState.RUNNING,  # in a critical health (its storage is gone), but on
    32788: PowerState.SUSPENDED,
    32789: PowerState.PAUSED,
    32795: PowerState.SUSPENDED,
}
MERGING = 32772
CHECKPOINTING = frozenset((32768, 32769, 23769, 32770))  # made, applied (two numbers in the field), deleted
MOVING = frozenset((32773, 32774, 32776, 32778, 32779, 32780))  # export, migration, backup, storage migration


def power_state(state: int) -> PowerState:
    """Everything between two states, and an off VM whose files are gone, is UNKNOWN."""
    return _POWER.get(state, PowerState.UNKNOWN)


@dataclass(frozen=True, slots=True, order=True)
class Slot:
    """Where a disk is plugged in; ordered as guests count them."""

    controller: str
    number: int
    location: int

    @classmethod
    def parse(cls, fields: Fields) -> Slot:
        controller = fields.text("controller")
        if controller not in _CONTROLLERS:
            raise fields.refuse(f"has a controller {controller!r}, not one of {', '.join(_CONTROLLERS)}")
        return cls(controller, fields.number("number", most=_MOST_SLOTS), fields.number("location", most=_MOST_SLOTS))

    def __str__(self) -> str:
        return f"{self.controller} {self.number}:{self.location}"


@dataclass(frozen=True, slots=True)
class LayerFile:
    """One file of a disk. `failure`: it could not be looked at; then the sizes are 0."""

    path: str
    parent: str
    format: str
    size: int
    disk_id: str
    logical_sector: int = 512
    failure: Failure | None = None

    @classmethod
    def parse(cls, fields: Fields) -> LayerFile:
        failed = fields.item_or_none("error")
        path = fields.text("path")
        if failed is not None:
            kind, message, error_id = failed.text("type"), failed.text("message"), failed.text("id")
            hresult = failed.number("hresult", least=-(1 << 31), most=1 << 32)
            return cls(path, "", "", 0, "", failure=Failure(kind, message, hresult, error_id))
        return cls(
            path=path,
            parent=fields.text("parent"),
            format=fields.text("format"),
            size=fields.number("size", least=1, most=LARGEST_DISK),
            disk_id=fields.text("diskId").lower().strip("{}"),
            logical_sector=fields.number_or_none("logicalSector", most=1 << 20) or 512,
        )


@dataclass(frozen=True, slots=True)
class Volume:
    id: str
    file_system: str
    size: int
    free: int


@dataclass(frozen=True, slots=True)
class RunningDisk:
    """A disk as the VM has it now; `layers` from the file it writes down to the base, none of a pass-through disk."""

    slot: Slot
    path: str
    layers: tuple[LayerFile, ...]
    pass_through: int | None = None
    shared: bool = False
    volume: Volume | None = None

    @property
    def key(self) -> str:
        base = self.layers[-1].disk_id if self.layers else ""
        return f"{self.slot.controller}:{self.slot.number}:{self.slot.location}:{base or 'unknown'}"

    @property
    def size(self) -> int:
        return self.layers[0].size if self.layers else 0

    @property
    def failure(self) -> Failure | None:
        return next((layer.failure for layer in self.layers if layer.failure is not None), None)

    def depth_of(self, path: str) -> int | None:
        """How many layers lie above this file; None when it is not in the chain."""
        wanted = same(path)
        return next((depth for depth, layer in enumerate(self.layers) if same(layer.path) == wanted), None)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`type`: Standard, Recovery, … `frozen`: what it froze, by slot."""

    id: str
    name: str
    type: str
    frozen: dict[Slot, str]

    @classmethod
    def parse(cls, fields: Fields) -> Checkpoint:
        frozen = {Slot.parse(one): one.text("path") for one in fields.items("disks") if one.text("path")}
        return cls(fields.guid("id"), fields.text("name"), fields.text("type"), frozen)


@dataclass(frozen=True, slots=True)
class Cluster:
    """The VM as a role of a failover cluster. `failure`: the cluster could not be asked."""

    group: str
    owner: str
    priority: int
    restart_action: int
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """The answer of power.ps1 (settings.ps1 has the part behind `record`). `record`: our line of the Notes."""

    state: int
    operational: tuple[int, ...]
    status: str
    uptime_s: int
    now_s: int
    record: str | None
    switches: Switches

    @property
    def power(self) -> PowerState:
        return power_state(self.state)

    @classmethod
    def parse(cls, value: Value, where: str) -> Facts:
        fields = Fields.of(value, where, "power")
        return cls(
            state=fields.number("state", most=1 << 32),
            operational=fields.numbers("operational"),
            status=fields.text("status"),
            uptime_s=fields.number("uptime"),
            now_s=fields.number("now"),
            record=fields.text_or_none("record"),
            switches=Switches.parse(fields),
        )


@dataclass(frozen=True, slots=True)
class Switches:
    """What settings.ps1 sets. None: the host has no such setting."""

    checkpoint_type: str | None
    automatic_checkpoints: bool | None
    auto_start: str
    cluster: Cluster | None

    @classmethod
    def parse(cls, fields: Fields) -> Switches:
        found = fields.item_or_none("cluster")
        if fields.truth("clustered") and found is None:
            raise fields.refuse("says that the VM is a cluster's role, but not how it stands there")
        return cls(
            checkpoint_type=fields.text_or_none("checkpointType"),
            automatic_checkpoints=fields.truth_or_none("automaticCheckpoints"),
            auto_start=fields.text("autoStart"),
            cluster=None if found is None else parse_cluster(found),
        )


def parse_cluster(fields: Fields) -> Cluster:
    failed = fields.item_or_none("error")
    if failed is not None:
        hresult = failed.number("hresult", least=-(1 << 31), most=1 << 32)
        return Cluster("", "", 0, 0, Failure(failed.text("type"), failed.text("message"), hresult, failed.text("id")))
    return Cluster(
        group=fields.text("group"),
        owner=fields.text("owner"),
        priority=fields.number("priority", most=1 << 31),
        restart_action=fields.number("restartAction", most=1 << 31),
    )


@dataclass(frozen=True, slots=True)
class Stack:
    """The answer of layers.ps1: where every disk's bytes lie at this moment."""

    state: int
    operational: tuple[int, ...]
    disks: tuple[RunningDisk, ...]
    checkpoints: tuple[Checkpoint, ...]

    @classmethod
    def parse(cls, value: Value, where: str) -> Stack:
        fields = Fields.of(value, where, "layers")
        return cls(
            state=fields.number("state", most=1 << 32),
            operational=fields.numbers("operational"),
            disks=parse_disks(fields),
            checkpoints=tuple(Checkpoint.parse(one) for one in fields.items("checkpoints")),
        )

    def disk(self, key: str) -> RunningDisk | None:
        return next((disk for disk in self.disks if disk.key == key), None)

    def checkpoint(self, checkpoint_id: str) -> Checkpoint | None:
        return next((one for one in self.checkpoints if one.id == checkpoint_id), None)

    def unmerged(self) -> set[str]:
        """Files that a merge has still to take away: Hyper-V made them at a checkpoint that is gone."""
        return unmerged(self.disks, self.checkpoints)


def unmerged(disks: tuple[RunningDisk, ...], checkpoints: tuple[Checkpoint, ...]) -> set[str]:
    frozen = {same(path) for checkpoint in checkpoints for path in checkpoint.frozen.values()}
    return {
        same(layer.path)
        for disk in disks
        for layer in disk.layers
        if is_checkpoint_file(layer.path) and layer.parent and same(layer.parent) not in frozen
    }


def parse_disks(fields: Fields) -> tuple[RunningDisk, ...]:
    """The disks in the guest's order. Two in one slot, or a chain that does not hang together, are refused."""
    # A drive with nothing in it has neither a path nor a disk of the host.
    filled = [one for one in fields.items("disks") if one.text("path") or one.raw("passThrough") is not None]
    found = [_parse_disk(one) for one in filled]
    slots = [disk.slot for disk in found]
    if len(set(slots)) != len(slots):
        raise fields.refuse("has two disks in one slot")
    return tuple(sorted(found, key=lambda disk: disk.slot))


def _parse_disk(fields: Fields) -> RunningDisk:
    layers = tuple(LayerFile.parse(one) for one in fields.items("layers"))
    path = fields.text("path")
    number = fields.number_or_none("passThrough", most=1 << 31)
    if number is None:
        _check_chain(fields, path, layers)
    volume = fields.item_or_none("volume")
    return RunningDisk(
        slot=Slot.parse(fields),
        path=path,
        layers=layers,
        pass_through=number,
        shared=fields.truth_or_none("shared") or False,
        volume=None if volume is None else _parse_volume(volume),
    )


def _check_chain(fields: Fields, path: str, layers: tuple[LayerFile, ...]) -> None:
    if not 1 <= len(layers) <= _MOST_LAYERS or same(layers[0].path) != same(path):
        raise fields.refuse(f"has {len(layers)} layers that do not begin with its own file")
    for child, parent in pairwise(layers):
        if same(child.parent) != same(parent.path):
            raise fields.refuse("has a layer that is not the parent of the one above it")
    if layers[-1].parent:
        raise fields.refuse(f"has more than {_MOST_LAYERS} layers, or a parent that was left out")
    if len({same(layer.path) for layer in layers}) != len(layers):
        raise fields.refuse("has one file twice among its layers")


def _parse_volume(fields: Fields) -> Volume:
    return Volume(fields.text("id"), fields.text("fileSystem"), fields.number("size"), fields.number("free"))
