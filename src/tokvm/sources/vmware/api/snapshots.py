"""Freezing a VM, finding what we froze, and removing that again, and nothing else.

    snapshot n     freezes the file that the VM writes; it goes on in a new <name>-00000N.vmdk
    remove it      the server merges (consolidates) its file into a neighbour; a running VM is stunned for a moment

A snapshot's name is our mark, `tokvm-<migration>-<n>`, its key the server's id of it. Without memory, not quiesced: what is
copied last is what a guest that shut down left behind. Names decide what is ours, read again before each removal.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from typing import Any

from tokvm.core.errors import ConnectionLost, SourceError, UsageError
from tokvm.core.machine import Snapshot, VirtualMachine
from tokvm.sources.vmware.api import faults, properties, questions, tasks
from tokvm.sources.vmware.api.client import Client
from tokvm.sources.vmware.api.inventory import Facts, Machines
from tokvm.sources.vmware.api.machine import VmDisk, VmSnapshot, disks_of
from tokvm.sources.vmware.api.vmomi import vim
from tokvm.sources.vmware.marks import is_mark, is_uuid, number_of

log = logging.getLogger(__name__)

DESCRIPTION = "made by tokvm; it is removed when the migration is finished"
TAKE_S = 600.0
REMOVE_S = 3 * 3600.0  # the merge of a large delta; the task goes on without us, too
BUSY_S = 120.0
POLL_S = 1.0

_MOID = re.compile(r"[A-Za-z0-9-]{1,80}")
_PASSING = ("TaskInProgress", "FileLocked", "ConcurrentAccess", "FileFault")


def key_of(uuid: str, moid: str) -> str:
    return f"{uuid}/{moid}"


def ids_of(snapshot: Snapshot, where: str) -> tuple[str, str]:
    """(the VM's uuid, the server's id) of a snapshot of ours."""
    uuid, _, moid = snapshot.key.partition("/")
    if not (is_uuid(uuid) and _MOID.fullmatch(moid)):
        raise SourceError(
            f"{snapshot.key!r} is no key of a snapshot", where=where, fix="the journal belongs to another kind of source"
        )
    return uuid, moid


def take(client: Client, machines: Machines, vm: VirtualMachine, mark: str) -> Snapshot:
    """The snapshot with this mark: the one that is there or is being made, else a new one."""
    if not is_mark(mark):
        raise UsageError(f"{mark!r} is no mark for a snapshot", fix="marks are tokvm-<migration>-<number>")
    facts, made = _look(client, machines, vm.uuid, mark)
    deadline = time.monotonic() + tasks.BUSY_S
    while made is None:
        questions.raise_if_asked(facts.runtime.question, where=f"{client.where} VM {vm.uuid}")
        busy = _create(client, facts, mark)
        facts, made = _look(client, machines, vm.uuid, mark)
        if made is None and (busy is None or time.monotonic() > deadline):
            raise busy or SourceError(f"the server says that it made {mark}, but it is not there", where=client.where)
    return _complete(client, facts, vm, made, mark)


def _look(client: Client, machines: Machines, uuid: str, mark: str) -> tuple[Facts, VmSnapshot | None]:
    """When nothing is under way: a request whose reply was lost may still make it."""
    await_tasks(client, machines, uuid)
    facts = machines.facts(uuid)
    return facts, _made(facts, mark)


def await_tasks(client: Client, machines: Machines, uuid: str) -> None:
    """Wait for tasks of this VM that make or remove snapshots: one of them may be ours, its reply lost."""
    deadline = time.monotonic() + TAKE_S
    while True:
        recent = machines.read(uuid, ["recentTask"]).get("recentTask")
        busy = tasks.under_way(client, recent, "snapshot", "consolidate")
        if not busy:
            return
        if time.monotonic() > deadline:
            raise SourceError(
                f"a task of the VM ({busy[0].descriptionId}) goes on for more than {TAKE_S:g} s",
                where=f"{client.where} VM {uuid}",
                fix="wait until it is over, then run the same command again",
            )
        time.sleep(POLL_S)


def _create(client: Client, facts: Facts, mark: str) -> faults.VsphereError | None:
    """Sent once. The refusal, when another task is at work on the VM: then it is looked for again first."""
    try:
        tasks.run(
            client,
            lambda: facts.ref.CreateSnapshot_Task(name=mark, description=DESCRIPTION, memory=False, quiesce=False),
            f"taking the snapshot {mark}",
            timeout_s=TAKE_S,
            busy_s=0.0,
        )
    except faults.VsphereError as failed:
        if failed.fault != "TaskInProgress":
            raise
        time.sleep(POLL_S)
        return failed
    return None


def _made(facts: Facts, mark: str) -> VmSnapshot | None:
    found = sorted((one for one in facts.snapshots if one.name == mark), key=lambda one: (len(one.moid), one.moid))
    if len(found) > 1:  # two requests landed; both are whole, and everybody takes the same one
        log.warning("%d snapshots are called %s; using %s", len(found), mark, found[0].moid)
    return found[0] if found else None


def ours(client: Client, machines: Machines, uuid: str, prefix: str) -> list[Snapshot]:
    """Snapshots whose mark begins with `prefix`, in the order of the number at the mark's end. A disk whose frozen file is not
    in the running chain any more (somebody reverted) is left out: nothing can be read from it."""
    facts = machines.facts(uuid)
    made = [one for one in facts.snapshots if one.name.startswith(prefix) and is_mark(one.name)]
    made.sort(key=lambda one: (number_of(one.name), one.name, one.moid))
    frozen = frozen_disks(client, [one.ref for one in made])
    return [
        Snapshot(key_of(uuid, one.moid), one.name, _in_chain(facts, frozen[one.moid])) for one in made if one.moid in frozen
    ]


def frozen_disks(client: Client, refs: Sequence[Any]) -> dict[str, dict[int, VmDisk]]:
    """Of each snapshot that is there: device key → the disk as it was, with its chain and its changeId."""
    found = properties.read(client, refs, ["config.hardware"], doing="reading snapshots")
    return {one.moid: {disk.number: disk for disk in disks_of(one.need("config.hardware"), client.where)} for one in found}


def frozen_disk(client: Client, snapshot: Snapshot, number: int) -> VmDisk | None:
    """One disk as it was; None when the snapshot, or the disk in it, is not there."""
    _, moid = ids_of(snapshot, client.where)
    return frozen_disks(client, [client.ref(vim.vm.Snapshot, moid)]).get(moid, {}).get(number)


def _in_chain(facts: Facts, frozen: dict[int, VmDisk]) -> dict[str, str]:
    """Disk.key → the frozen file, for the disks whose chain it is in."""
    found: dict[str, str] = {}
    for disk in facts.disks:
        layers = frozen[disk.number].layers if disk.number in frozen else ()
        if layers and disk.depth_of(layers[0]) not in (None, 0):
            found[disk.key] = layers[0]
    return found


def _complete(client: Client, facts: Facts, vm: VirtualMachine, made: VmSnapshot, mark: str) -> Snapshot:
    """With its disks, which must be exactly the VM's."""
    frozen = _in_chain(facts, frozen_disks(client, [made.ref]).get(made.moid, {}))
    wanted = {disk.key for disk in vm.disks}
    if frozen.keys() != wanted:
        odd = ", ".join(sorted(frozen.keys() ^ wanted))
        raise SourceError(
            f"the snapshot {mark} does not hold the VM's disks: {odd} only in one of both",
            where=f"{client.where} VM {vm.uuid}",
            fix="a disk was added, removed, moved, or is independent of snapshots; see `tokvm check`",
        )
    return Snapshot(key_of(vm.uuid, made.moid), mark, frozen)


def remove(client: Client, machines: Machines, uuid: str, snapshot: Snapshot) -> None:
    """Remove a snapshot of ours and what it froze. What is not ours by name, read just now, stays and is an error."""
    owner, moid = ids_of(snapshot, client.where)
    if owner != uuid or not is_mark(snapshot.mark):
        raise _not_ours(client, uuid, snapshot, snapshot.mark)
    await_tasks(client, machines, uuid)
    deadline = time.monotonic() + BUSY_S
    while (there := _there(machines, uuid, moid)) is not None:
        if there.name != snapshot.mark:
            raise _not_ours(client, uuid, snapshot, there.name)
        _remove_once(client, machines, uuid, there, deadline)
    consolidate(client, machines, uuid)
    log.info("snapshot %s of VM %s is removed", snapshot.mark, uuid)


def _there(machines: Machines, uuid: str, moid: str) -> VmSnapshot | None:
    return next((one for one in machines.facts(uuid).snapshots if one.moid == moid), None)


def _remove_once(client: Client, machines: Machines, uuid: str, there: VmSnapshot, deadline: float) -> None:
    try:
        tasks.run(
            client,
            lambda: there.ref.RemoveSnapshot_Task(removeChildren=False, consolidate=True),
            f"removing the snapshot {there.name}",
            timeout_s=REMOVE_S,
        )
        return
    except faults.VsphereError as failed:
        if failed.fault != "ManagedObjectNotFound" and (failed.fault not in _PASSING or time.monotonic() > deadline):
            raise
    except ConnectionLost:
        if time.monotonic() > deadline:
            raise
        await_tasks(client, machines, uuid)
    time.sleep(POLL_S)


def consolidate(client: Client, machines: Machines, uuid: str) -> None:
    """Merge what a removal left behind. A refusal is told, not raised: the snapshot is gone all the same."""
    found = machines.read(uuid, ["runtime.consolidationNeeded"])
    if not found.get("runtime.consolidationNeeded"):
        return
    doing = "consolidating the disks"
    try:
        tasks.run(client, found.ref.ConsolidateVMDisks_Task, doing, timeout_s=REMOVE_S)
    except faults.VsphereError as failed:
        log.warning("VM %s: %s; consolidate it in the vSphere client", uuid, failed.what)


def _not_ours(client: Client, uuid: str, snapshot: Snapshot, name: str) -> SourceError:
    return SourceError(
        f"the snapshot {snapshot.key} is called {name!r}, not {snapshot.mark!r}: it is not ours and stays",
        where=f"{client.where} VM {uuid}",
        fix="somebody renamed it or the journal belongs to another server; remove it by hand if nobody needs it",
    )
