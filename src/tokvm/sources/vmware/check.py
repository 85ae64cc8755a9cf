"""What is in the way of one VM, before anything is done to it. Reads only, and fresh, whatever the caller knew before."""

from __future__ import annotations

from collections.abc import Iterator

from tokvm.core.errors import SourceError
from tokvm.core.machine import Finding, VirtualMachine
from tokvm.core.text import readable
from tokvm.sources.vmware import obstacles, record
from tokvm.sources.vmware.faults import EsxError, Fault
from tokvm.sources.vmware.hardware import DiskDevice
from tokvm.sources.vmware.inventory import Inspection, inspection_of, questions
from tokvm.sources.vmware.machines import Machines, Place
from tokvm.sources.vmware.obstacles import blocker, warning
from tokvm.sources.vmware.shell import Answer, Command, Shell, vim

_HOST = vim("hostsvc/hostsummary")
API_RECORD = "tokvm.record"


def findings(machines: Machines, shell: Shell, vm: VirtualMachine, own: set[str]) -> list[Finding]:
    """`own`: owners' names under which this process holds VMs."""

    def more(place: Place) -> list[Command]:
        return [*questions(place), record.owner_question(place), record.question(place), _HOST]

    try:
        seen, (devices, vmsd, owner, state, host) = machines.look(vm.uuid, more)
    except EsxError as failed:
        if failed.fault is not Fault.NO_SUCH_VM:
            raise
        return [blocker(failed.what, failed.fix, vm.uuid)]
    found = inspection_of(machines, seen, [devices, vmsd], anew=True)
    return [
        *_hardware(found),
        *_state(found),
        *_held(shell, owner, state, own),
        *_held_by_api(found),
        *_host(host),
        *_snapshots(found),
        *_disks(vm, found),
    ]


def _hardware(found: Inspection) -> Iterator[Finding]:
    hardware = found.hardware
    return obstacles.hardware(
        template=found.seen.summary.template,
        encrypted=found.encrypted,
        tpm=found.tpm,
        persistent_memory=hardware.persistent_memory,
        passed_through=hardware.passed_through,
        macs=[nic.mac for nic in hardware.nics],
    )


def _state(found: Inspection) -> Iterator[Finding]:
    summary = found.seen.summary
    return obstacles.state(
        power=summary.power,
        question=summary.question,
        fault_tolerance=summary.fault_tolerance,
        tools_running=summary.tools_running,
    )


def _held(shell: Shell, owner: Answer, state: Answer, own: set[str]) -> Iterator[Finding]:
    try:
        holder = record.owner_of(shell, owner)
        fence = record.record_of(shell, state).fence
    except SourceError as odd:
        yield blocker(odd.what, odd.fix)
        return
    if holder and holder not in own:
        yield blocker(
            f"another tokvm migrates this VM: {readable(holder)}",
            f"go on there, or `tokvm finish` it there; only when that state is lost: rm '{owner.command[-1]}' on the host",
        )
    if fence is not None and holder not in own:
        yield blocker(
            f"it is fenced: {readable(fence.reason)}",
            "it was migrated already, or a cutover is under way: `tokvm status` there, `tokvm rollback` lifts the fence",
        )


def _held_by_api(found: Inspection) -> Iterator[Finding]:
    """Who migrates it over vSphere's API has a record in its settings (`api.record`)."""
    there = found.seen.settings.get(API_RECORD)
    if there:
        yield blocker(
            f"another tokvm migrates this VM over vSphere's API: {readable(there, limit=200)}",
            f"go on there, or `tokvm finish` it there; only when that state is lost: remove {API_RECORD} from its settings",
        )


def _host(answer: Answer) -> Iterator[Finding]:
    vcenter = answer.fields().text_or_none("managementServerIp")
    if vcenter:
        yield warning(
            f"the host is managed by vCenter {readable(vcenter, limit=60)}: DRS or a person may move the VM elsewhere, HA "
            "may restart it, and neither can be told so over SSH",
            "for the time of the migration: set the VM's DRS automation and its HA restart priority to disabled; or "
            "use vpx://, which does that",
        )


def _snapshots(found: Inspection) -> Iterator[Finding]:
    snapshots = found.snapshots
    return obstacles.snapshots(
        [one.name for one in snapshots.entries],
        needs_consolidation=found.seen.summary.consolidation_needed or snapshots.needs_consolidation,
    )


def _disks(vm: VirtualMachine, found: Inspection) -> Iterator[Finding]:
    disks = found.hardware.disks
    if not disks:
        yield obstacles.no_disk()
        return
    if [disk.key for disk in disks] != [disk.key for disk in vm.disks]:
        yield blocker("its disks changed while it was looked at", "run the same command again")
        return
    for disk in disks:
        yield from obstacles.disk(disk)
        yield from _files(disk, found)
    yield from _room(found)


def _files(disk: DiskDevice, found: Inspection) -> Iterator[Finding]:
    for store in dict.fromkeys(found.stores.find(path)[0] for path in disk.chain):
        if not store.has_files and not disk.rdm:
            yield blocker(
                f"it lies on {readable(store.name, limit=60)}, a datastore of type {readable(store.type, limit=20)}, without "
                "files to read",
                "move it to a VMFS or NFS datastore (storage vMotion), or use vpx://",
                f"disk {disk.node}",
            )


def _room(found: Inspection) -> Iterator[Finding]:
    needs: dict[str, int] = {}
    for disk in found.hardware.disks:
        if disk.chain:
            store = found.stores.find(disk.chain[0])[0]
            needs[store.mount] = needs.get(store.mount, 0) + disk.size
    for mount, need in needs.items():
        store = found.stores.of(f"{mount}/")
        yield from obstacles.room(store.name, free=store.free, need=need)
