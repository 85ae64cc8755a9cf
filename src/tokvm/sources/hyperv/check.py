"""What is in the way of one VM, before anything is done to it. Reads only, and fresh, whatever the caller knew before."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tokvm.core.machine import Finding, PowerState, Severity, VirtualMachine
from tokvm.core.text import readable
from tokvm.core.units import format_bytes
from tokvm.sources.hyperv import inventory, record
from tokvm.sources.hyperv.faults import Fault, HyperVError, fault_of
from tokvm.sources.hyperv.inventory import UNSET_MAC, Inspection
from tokvm.sources.hyperv.machine import CHECKPOINTING, MERGING, MOVING, RunningDisk
from tokvm.sources.hyperv.paths import problem
from tokvm.sources.hyperv.powershell import Asking
from tokvm.sources.hyperv.snapshots import SUITABLE, is_mark

LONG_CHAIN = 40  # Hyper-V allows 50 checkpoints, and we add some
_THIN_MARGIN = 10  # a volume should have room for 1/10 of the disks while our checkpoints stand
_FORMATS = ("VHD", "VHDX")


Problem = Callable[[str], str]


def findings(shell: Asking, vm: VirtualMachine, own: set[str], *, unreachable: Problem = problem) -> list[Finding]:
    """`own`: owners' names under which this process holds VMs. `unreachable`: why a file cannot be read, "" if it can."""
    try:
        found = inventory.look_inside(shell, vm.uuid)
        record_line = record.look(shell, vm.uuid).record
    except HyperVError as failed:
        if failed.fault is not Fault.NO_SUCH_VM:
            raise
        return [_blocker("this host has no such VM (any more)", failed.fix, vm.uuid)]
    ready = _Ready(found)
    return [
        *_hardware(found, ready),
        *_state(found, ready),
        *_held(shell, found, record_line, own),
        *_cluster(found, ready),
        *_checkpoints(found, ready),
        *_disks(vm, found, ready, unreachable),
    ]


class _Ready:
    """The commands that lift a blocker, ready to be typed."""

    def __init__(self, found: Inspection) -> None:
        self.vm = f"Get-VM -Id {found.id}"

    def pipe(self, command: str) -> str:
        return f"{self.vm} | {command}"


def _blocker(what: str, fix: str, where: str = "") -> Finding:
    return Finding(Severity.BLOCKER, what, fix, where)


def _warning(what: str, fix: str, where: str = "") -> Finding:
    return Finding(Severity.WARNING, what, fix, where)


def _hardware(found: Inspection, ready: _Ready) -> Iterator[Finding]:
    if found.shielded:
        yield _blocker(
            "it is shielded: its disks can be read on its guarded hosts alone",
            f"{ready.pipe('Set-VMSecurityPolicy -Shielded $false')} (needs its key protector's owner), then decrypt its disks",
        )
    if found.tpm:
        yield _blocker(
            "it has a virtual TPM, whose secrets cannot be taken along; BitLocker would ask for its recovery key",
            "suspend or remove what uses it (BitLocker: manage-bde -protectors -disable), then, while it is off: "
            + ready.pipe("Disable-VMTPM"),
        )
    if found.memory_dynamic:
        yield _warning(
            f"its memory is dynamic (starts with {format_bytes(found.memory_startup)}, at most "
            f"{format_bytes(found.memory_maximum)}); the target gets {format_bytes(found.memory)}, fixed",
            "set the maximum that it needs: " + ready.pipe("Set-VMMemory -MaximumBytes …"),
        )
    yield from _adapters(found, ready)


def _adapters(found: Inspection, ready: _Ready) -> Iterator[Finding]:
    for index, adapter in enumerate(found.adapters):
        where = f"network adapter {index}"
        if adapter.mac == UNSET_MAC:
            yield _blocker(
                "it has no MAC address yet: a dynamic one is chosen when the VM first starts",
                "start it once, or give it one: "
                + ready.pipe("Get-VMNetworkAdapter | Set-VMNetworkAdapter -StaticMacAddress …"),
                where,
            )
        if adapter.vlan_mode != "Untagged":
            yield _warning(
                f"it is in VLAN {adapter.vlan} ({readable(adapter.vlan_mode)}) of {readable(adapter.switch, limit=60)}",
                "give the target a network that carries this VLAN",
                where,
            )


def _state(found: Inspection, ready: _Ready) -> Iterator[Finding]:
    if found.power not in (PowerState.RUNNING, PowerState.OFF):
        lift = "Resume-VM" if found.power is PowerState.PAUSED else "Start-VM"
        said = found.power if found.power is not PowerState.UNKNOWN else f"in state {found.state}"
        yield _blocker(
            f"it is {said} ({readable(found.status, limit=60)}); its memory may hold what its disks do not",
            f"{ready.pipe(lift)}, or shut it down",
        )
    operational = set(found.operational)
    if MERGING in operational:
        yield _blocker(
            "its disks are being merged: the files change while they would be copied",
            f"wait until it is over: {ready.vm} | Select-Object Status",
        )
    if operational & CHECKPOINTING:
        yield _warning("a checkpoint is being made, removed or applied", "wait until it is over")
    if operational & MOVING:
        yield _blocker(
            f"it is being exported, moved or backed up ({readable(found.status, limit=60)})", "let it end first, then again"
        )
    if found.replication:
        yield _blocker(
            "it is replicated (Hyper-V Replica): the replica could be started elsewhere, whatever is fenced here",
            f"{ready.pipe('Remove-VMReplication')}, or plan the replica's end first",
        )
    if found.power is PowerState.RUNNING:
        yield from _shutdown_service(found, ready)


def _shutdown_service(found: Inspection, ready: _Ready) -> Iterator[Finding]:
    """Component ids are the same in all languages; the names by which it is enabled are not."""
    enable = (
        f"{ready.vm} | Get-VMIntegrationService | Where-Object Id -like '*{inventory.SHUTDOWN_SERVICE}' | "
        "Enable-VMIntegrationService"
    )
    if found.shutdown is None or not found.shutdown[0]:
        yield _blocker("its shutdown integration service is off, so the guest cannot be asked to stop", enable)
    elif found.shutdown[1] != 2:
        yield _warning(
            f"its shutdown integration service does not answer (status {found.shutdown[1]})",
            "install or start the integration services in the guest (Linux: hyperv-daemons, module hv_utils); "
            "else shut it down from inside, or allow cutting its power with --force-off",
        )


def _held(shell: Asking, found: Inspection, line: str | None, own: set[str]) -> Iterator[Finding]:
    ours = record.record_of(shell, found.id, line)
    if ours.owner and ours.owner not in own:
        yield _blocker(
            f"it is claimed by another run: {readable(ours.owner)}",
            "finish that migration; if nobody runs it, delete the line `#tokvm …` from the VM's Notes",
        )
    if ours.fence is not None:
        yield _warning("it is fenced by an earlier cutover", "if no cutover is under way, `tokvm rollback` unfences it")


def _cluster(found: Inspection, ready: _Ready) -> Iterator[Finding]:
    cluster = found.cluster
    if cluster is None:
        return
    if cluster.failure is not None:
        yield _blocker(
            f"it is a role of a failover cluster, which cannot be asked: {readable(cluster.failure.message, limit=120)}",
            "Install-WindowsFeature RSAT-Clustering-PowerShell on this node, and log in as the cluster's administrator",
        )
    elif cluster.owner.lower() != found.host.lower():
        yield _blocker(
            f"its owner in the cluster is {readable(cluster.owner, limit=60)}, not this node {readable(found.host, limit=60)}",
            f"name the owner in the source's URL: hyperv://{readable(cluster.owner, limit=60)}",
        )
    else:
        yield _warning(
            f"it is the cluster's role {readable(cluster.group, limit=60)}",
            "keep it on this node to the end (no live migration); the cutover stops its failover, a rollback puts it back",
        )


def _checkpoints(found: Inspection, ready: _Ready) -> Iterator[Finding]:
    if found.checkpoint_type == "Disabled":
        yield _blocker("checkpoints are switched off for it", ready.pipe("Set-VM -CheckpointType Production"))
    elif found.checkpoint_type is not None and found.checkpoint_type not in SUITABLE:
        yield _warning(
            f"its checkpoints are {readable(found.checkpoint_type, limit=20)} ones, which save the memory and pause the guest",
            "nothing: it is set to Production for the migration and put back at its end",
        )
    if found.automatic_checkpoints:
        yield _warning(
            "a checkpoint is made whenever it starts, and the one before is merged",
            "nothing: that is switched off for the migration and put back at its end",
        )
    yield from _others_checkpoints(found, ready)
    longest = max((len(disk.layers) for disk in found.disks), default=0)
    if longest >= LONG_CHAIN:
        yield _warning(
            f"its checkpoint chain is long ({longest} layers)", "remove checkpoints that nobody needs, wait for the merge"
        )
    left = found.unmerged() if MERGING not in found.operational else set()
    if left:
        shown = ", ".join(readable(path, limit=120) for path in sorted(left)[:5])
        yield _warning(
            f"files of checkpoints that are gone still wait to be merged: {shown}",
            "a merge begins by itself, at the latest when the VM is off; the event log Hyper-V-VMMS has failed ones (19100)",
        )


def _others_checkpoints(found: Inspection, ready: _Ready) -> Iterator[Finding]:
    recovery = [one for one in found.checkpoints if one.type == "Recovery"]
    if recovery:
        yield _blocker(
            "a backup has a recovery checkpoint on it, which is merged when the backup ends",
            "let the backup end; if none runs any more: "
            + ready.pipe("Get-VMSnapshot -SnapshotType Recovery | Remove-VMSnapshot"),
        )
    others = [one.name for one in found.checkpoints if one.type != "Recovery" and not is_mark(one.name)]
    if others:
        shown = ", ".join(readable(repr(name), limit=60) for name in others[:5])
        yield _warning(
            f"it has {len(others)} checkpoint(s) of somebody else: {shown}",
            "they stay, and must stay until the end: removing one merges files that are being copied",
        )


def _disks(vm: VirtualMachine, found: Inspection, ready: _Ready, unreachable: Problem) -> Iterator[Finding]:
    copied = inventory.copied_disks(found)
    if not found.disks:
        yield _blocker("it has no disk", "nothing to copy: make a new VM on the target")
        return
    if [disk.key for disk in copied] != [disk.key for disk in vm.disks]:
        yield _blocker("its disks changed while it was looked at", "run the same command again")
        return
    for disk in found.disks:
        yield from _disk(disk, ready, unreachable)
    yield from _room(copied)


def _disk(disk: RunningDisk, ready: _Ready, unreachable: Problem) -> Iterator[Finding]:
    where = f"disk {disk.slot}"
    if disk.pass_through is not None:
        yield _blocker(
            f"it is disk {disk.pass_through} of the host itself (pass-through), which has no checkpoints",
            "convert it first: New-VHD -SourceDisk, or detach it from the VM and move it by itself",
            where,
        )
        return
    if disk.shared or any(layer.format == "VHDSet" for layer in disk.layers):
        yield _blocker(
            "it may be written by several VMs (shared disk), so a checkpoint of one is no moment of it",
            "detach it from the VM; move its cluster's data by other means",
            where,
        )
    if disk.slot.controller == "PMEM":
        yield _blocker("it is persistent memory, not a disk", "copy what it holds inside the guest, then remove it", where)
    yield from _layers(disk, where, ready, unreachable)


def _layers(disk: RunningDisk, where: str, ready: _Ready, unreachable: Problem) -> Iterator[Finding]:
    far = next(((layer.path, why) for layer in disk.layers if (why := unreachable(layer.path))), None)
    if far is not None:
        path, why = far
        yield _blocker(
            f"{readable(path, limit=200)}: {why}",
            ready.pipe("Move-VMStorage -DestinationStoragePath …") + " (a volume of this host with a drive letter)",
            where,
        )
    elif disk.failure is not None:
        what = f"a layer cannot be looked at: {fault_of(disk.failure)} ({readable(disk.failure.message, limit=200)})"
        yield _blocker(what, "look at it with Get-VHD and Test-VHD on the host", where)
    odd = next((layer for layer in disk.layers if layer.format not in (*_FORMATS, "VHDSet") and layer.failure is None), None)
    if odd is not None:
        yield _blocker(
            f"{readable(odd.path, limit=200)} is a {readable(odd.format, limit=20)}", "convert it with Convert-VHD", where
        )
    if any(layer.logical_sector == 4096 for layer in disk.layers):
        yield _warning(
            "its logical sectors have 4096 bytes (4Kn)",
            "give the target's disk logical_block_size 4096 (libvirt: <blockio logical_block_size='4096'/>), else the guest "
            "finds no partitions on it",
            where,
        )


def _room(disks: list[RunningDisk]) -> Iterator[Finding]:
    """What is written while our checkpoints stand goes to new files on the same volumes."""
    for name in dict.fromkeys(disk.volume.id for disk in disks if disk.volume is not None):
        here = [disk for disk in disks if disk.volume is not None and disk.volume.id == name]
        free, need = min(disk.volume.free for disk in here if disk.volume is not None), sum(disk.size for disk in here)
        if free < need // _THIN_MARGIN:
            yield _warning(
                f"little room for checkpoints: {format_bytes(free)} free, its disks have {format_bytes(need)}",
                "free space; Hyper-V pauses the guest when the volume is full",
                f"volume of {here[0].slot}",
            )
