"""Properties of VMs and of their snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pyVmomi import vim

from tokvm.testing.esxi import paths
from tokvm.testing.esxi.state import ON, Disk, Layer, Snapshot
from tokvm.testing.vsphere import hardware, places
from tokvm.testing.vsphere.clock import moment
from tokvm.testing.vsphere.machine import Machine, disk_key, escaped, frozen_tops, has_extents, size_of

if TYPE_CHECKING:
    from tokvm.testing.vsphere.inventory import Inventory, Property

CHOICES = ("button.uuid.cancel", "button.uuid.movedTheVM", "button.uuid.copiedTheVM")
QUESTION_ID = "_vmx1"


def _config(inventory: Inventory, this: Any) -> Any:
    return _config_of(inventory, inventory.machine(this), None)


def _snapshot_config(inventory: Inventory, this: Any) -> Any:
    machine = inventory.machine(this)
    return _config_of(inventory, machine, machine.snapshot_of(this._moId))


def _config_of(inventory: Inventory, machine: Machine, snapshot: Snapshot | None) -> Any:
    tracker = inventory.endpoint.tracker

    def change_id(disk: Disk) -> str | None:
        return tracker.change_id(machine, disk, snapshot)

    return hardware.config(
        machine,
        snapshot,
        change_version=change_version(inventory, machine),
        tracking=tracker.is_enabled(machine),
        extra=inventory.world.own["extra"].get(machine.vm["guest"], {}),
        ids=change_id,
    )


def change_version(inventory: Inventory, machine: Machine) -> str:
    """Another with every change of the configuration."""
    count = inventory.world.own["versions"].get(machine.vm["guest"], 0)
    return f"2026-01-01T00:00:00.{count:06}Z"


def _runtime(inventory: Inventory, this: Any) -> Any:
    machine = inventory.machine(this)
    vm = machine.vm
    running = vm["state"] == ON
    return vim.vm.RuntimeInfo(
        host=places.machine_host(inventory, vm["away"]),
        connectionState=vim.VirtualMachine.ConnectionState(machine.field("connectionState")),
        powerState=vim.VirtualMachine.PowerState(vm["state"]),
        faultToleranceState=vim.VirtualMachine.FaultToleranceState(machine.field("faultTolerance")),
        dasVmProtection=vim.vm.RuntimeInfo.DasProtectionState(dasProtected=running) if inventory.vcenter else None,
        toolsInstallerMounted=False,
        bootTime=moment(vm["since"]) if running else None,
        question=_question(vm["question"]) if vm["question"] else None,
        maxCpuUsage=2400,
        maxMemoryUsage=machine.field("memoryMB"),
        numMksConnections=0,
        recordReplayState=vim.VirtualMachine.RecordReplayState.inactive,
        onlineStandby=False,
        consolidationNeeded=bool(machine.field("consolidationNeeded")),
        cryptoState="safe" if machine.field("encrypted") else None,
    )


def _question(text: str) -> Any:
    choices = [vim.ElementDescription(key=str(key), label=label, summary=label) for key, label in enumerate(CHOICES)]
    choice = vim.option.ChoiceOption(choiceInfo=choices, defaultIndex=2)
    return vim.vm.QuestionInfo(
        id=QUESTION_ID, text=text, choice=choice, message=[vim.vm.Message(id="msg.uuid.altered", text=text)]
    )


def _guest(inventory: Inventory, this: Any) -> Any:
    machine = inventory.machine(this)
    running = machine.vm["state"] == ON
    tools = machine.field("tools") if running else "guestToolsNotRunning"
    installed = bool(machine.field("toolsInstalled"))
    status = "toolsOk" if tools == "guestToolsRunning" else "toolsNotRunning" if installed else "toolsNotInstalled"
    return vim.vm.GuestInfo(
        toolsStatus=vim.vm.GuestInfo.ToolsStatus(status),
        toolsVersionStatus2="guestToolsUnmanaged" if installed else "guestToolsNotInstalled",
        toolsRunningStatus=tools,
        guestId=machine.field("guestId") if tools == "guestToolsRunning" else None,
        guestState="running" if running else "notRunning",
        guestStateChangeSupported=tools == "guestToolsRunning",
    )


def _summary(inventory: Inventory, this: Any) -> Any:
    machine = inventory.machine(this)
    config = vim.vm.Summary.ConfigSummary(
        name=escaped(machine.name),
        template=bool(machine.field("template")),
        vmPathName=machine.vmx_path,
        memorySizeMB=machine.field("memoryMB"),
        numCpu=machine.field("numCPU"),
        numEthernetCards=len(machine.vm["nics"]),
        numVirtualDisks=len(machine.vm["disks"]),
        uuid=machine.uuid,
        instanceUuid=machine.instance_uuid,
        guestId=machine.field("guestId"),
        guestFullName=machine.field("guestFullName"),
        annotation=machine.field("annotation"),
        tpmPresent=bool(machine.field("vtpm")),
        hwVersion=machine.field("version"),
    )
    guest = _guest(inventory, this)
    return vim.vm.Summary(
        vm=this,
        runtime=_runtime(inventory, this),
        guest=vim.vm.Summary.GuestSummary(
            toolsStatus=guest.toolsStatus,
            toolsVersionStatus2=guest.toolsVersionStatus2,
            toolsRunningStatus=guest.toolsRunningStatus,
        ),
        config=config,
        quickStats=vim.vm.Summary.QuickStats(guestHeartbeatStatus=vim.ManagedEntity.Status.gray),
        overallStatus=places.GREEN,
    )


def _snapshot(inventory: Inventory, this: Any) -> Any:
    """None while there is none."""
    machine = inventory.machine(this)
    if not machine.vm["snapshots"]:
        return None
    current = next((one for one in machine.vm["snapshots"] if one["id"] == machine.vm["current"]), None)
    return vim.vm.SnapshotInfo(
        currentSnapshot=machine.snapshot_ref(current) if current else None, rootSnapshotList=_tree(machine, 0)
    )


def _tree(machine: Machine, parent: int) -> list[Any]:
    return [
        vim.vm.SnapshotTree(
            snapshot=machine.snapshot_ref(one),
            vm=machine.ref,
            name=one["name"],
            description=one["description"],
            id=one["id"],
            createTime=moment(one["created"]),
            state=vim.VirtualMachine.PowerState("poweredOn" if one["state"] == "powered on" else "poweredOff"),
            quiesced=False,
            childSnapshotList=_tree(machine, one["id"]),
            replaySupported=False,
        )
        for one in machine.vm["snapshots"]
        if one["parent"] == parent
    ]


def _root_snapshots(inventory: Inventory, this: Any) -> list[Any]:
    machine = inventory.machine(this)
    return [machine.snapshot_ref(one) for one in machine.vm["snapshots"] if one["parent"] == 0]


def _snapshot_machine(inventory: Inventory, this: Any) -> Any:
    return inventory.machine(this).ref


def _child_snapshots(inventory: Inventory, this: Any) -> list[Any]:
    machine = inventory.machine(this)
    parent = machine.snapshot_of(this._moId)
    return [machine.snapshot_ref(one) for one in machine.vm["snapshots"] if parent and one["parent"] == parent["id"]]


# layoutEx: which files there are


class _Files:
    """Numbers the files; a disk's layer is a descriptor and an extent."""

    def __init__(self, inventory: Inventory, machine: Machine) -> None:
        self._folder = inventory.endpoint.ground.folder
        self._machine = machine
        self._keys: dict[str, int] = {}
        self.infos: list[Any] = []

    def add(self, path: str, kind: str) -> int:
        if path not in self._keys:
            self._keys[path] = len(self._keys)
            size = size_of(self._folder, path)
            info = vim.vm.FileLayoutEx.FileInfo(
                key=self._keys[path], name=self._machine.bracketed(path), type=kind, size=size, uniqueSize=size, accessible=True
            )
            self.infos.append(info)
        return self._keys[path]

    def unit(self, layer: Layer) -> Any:
        keys = [self.add(layer["path"], "diskDescriptor")]
        if has_extents(self._machine.state, layer["path"]):
            keys.append(self.add(paths.extent_of(layer), "diskExtent"))
        return vim.vm.FileLayoutEx.DiskUnit(fileKey=keys)


def _layout(inventory: Inventory, this: Any) -> Any:
    """Chains are told from the base up."""
    machine = inventory.machine(this)
    files = _Files(inventory, machine)
    stem = machine.vm["file"].removesuffix(".vmx")
    for suffix, kind in (("vmx", "config"), ("nvram", "nvram"), ("vmsd", "snapshotList")):
        files.add(f"{machine.folder}/{stem}.{suffix}", kind)
    if machine.vm["state"] == ON:
        files.add(f"{machine.folder}/{stem}.vswp", "swap")
    disks = list(_disk_layouts(machine, files, None))
    snapshots = []
    for one in machine.vm["snapshots"]:
        data = files.add(f"{machine.folder}/{stem}-Snapshot{one['id']}.vmsn", "snapshotData")
        layout = vim.vm.FileLayoutEx.SnapshotLayout(
            key=machine.snapshot_ref(one), dataKey=data, memoryKey=-1, disk=list(_disk_layouts(machine, files, one))
        )
        snapshots.append(layout)
    now = moment(inventory.endpoint.clock.now())
    return vim.vm.FileLayoutEx(file=files.infos, disk=disks, snapshot=snapshots, timestamp=now)


def _disk_layouts(machine: Machine, files: _Files, snapshot: Snapshot | None) -> Iterator[Any]:
    for disk, top in zip(machine.vm["disks"], frozen_tops(machine, snapshot), strict=True):
        if top:
            units = [files.unit(layer) for layer in reversed(machine.layers(top))]
            yield vim.vm.FileLayoutEx.DiskLayout(key=disk_key(disk), chain=units)


def _datastores(inventory: Inventory, this: Any) -> list[Any]:
    machine = inventory.machine(this)
    layers = [layer for disk in machine.vm["disks"] for layer in machine.layers(disk["top"])]
    uuids = dict.fromkeys([machine.vm["datastore"], *(layer["path"].split("/")[3] for layer in layers)])
    return [hardware.datastore_ref(uuid, machine) for uuid in uuids]


def _pool(inventory: Inventory, this: Any) -> Any:
    return places.pool(inventory, this)


ROWS: dict[str, Property] = {
    "config": _config,
    "runtime": _runtime,
    "guest": _guest,
    "summary": _summary,
    "snapshot": _snapshot,
    "rootSnapshot": _root_snapshots,
    "layoutEx": _layout,
    "datastore": _datastores,
    "resourcePool": _pool,
}
SNAPSHOT_ROWS: dict[str, Property] = {
    "config": _snapshot_config,
    "vm": _snapshot_machine,
    "childSnapshot": _child_snapshots,
}
