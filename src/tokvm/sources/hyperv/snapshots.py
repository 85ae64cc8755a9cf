"""Freezing a VM, finding what we froze, and removing that again, and nothing else. Hyper-V's word is checkpoint.

    checkpoint n     freezes the file that the VM writes; it goes on in a new <name>_<GUID>.avhdx
    remove it        the record goes at once; the merge of what lay above it runs on by itself, for seconds or hours

A checkpoint's name is our mark, `tokvm-<migration>-<n>`. Its key is `<VM>/<checkpoint>`. For the job the VM's CheckpointType is
Production (the guest's file systems are asked to be quiet, no memory is saved) and automatic checkpoints are off: one of those,
replaced at the VM's next start, would merge our layers. What it was is in the record, and is put back with our last checkpoint.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import replace

from tokvm.core.errors import ConnectionLost, SourceError, UsageError
from tokvm.core.machine import Snapshot, VirtualMachine
from tokvm.sources.hyperv import record
from tokvm.sources.hyperv.answers import Fields, is_guid
from tokvm.sources.hyperv.faults import Fault, HyperVError
from tokvm.sources.hyperv.machine import CHECKPOINTING, MERGING, Checkpoint, Stack
from tokvm.sources.hyperv.powershell import Asking
from tokvm.sources.hyperv.record import Settings

log = logging.getLogger(__name__)

SUITABLE = ("Production", "ProductionOnly")
CHECKPOINT_S = 600.0  # VSS in the guest may take minutes
BUSY_S = 60.0
REMOVE_S = 300.0
MERGE_S = 1800.0
BEGIN_S = 5.0  # a merge begins that long after the checkpoint is gone, at most
POLL_S = 2.0

_MARK = re.compile(r"tokvm-[A-Za-z0-9][A-Za-z0-9._-]*")
_NUMBER = re.compile(r"-([0-9]{1,18})\Z")
_PASSING = (Fault.IN_USE, Fault.BAD_STATE, Fault.MERGING, Fault.TIMEOUT)
_UNDER_WAY = (*_PASSING, Fault.NO_SUCH_FILE)


def is_mark(text: str) -> bool:
    """True for a name that we give to checkpoints."""
    return _MARK.fullmatch(text) is not None


def key_of(vm: str, checkpoint: str) -> str:
    return f"{vm}/{checkpoint}"


def ids_of(snapshot: Snapshot, where: str) -> tuple[str, str]:
    """(VM, checkpoint) of a snapshot of ours."""
    vm, _, checkpoint = snapshot.key.partition("/")
    if not (is_guid(vm) and is_guid(checkpoint)):
        raise SourceError(
            f"{snapshot.key!r} is no key of a checkpoint", where=where, fix="the journal belongs to another kind of source"
        )
    return vm, checkpoint


def stack(shell: Asking, vm: str) -> Stack:
    return Stack.parse(shell.ask("layers", {"vm": vm}), shell.where)


def take(shell: Asking, vm: VirtualMachine, mark: str) -> Snapshot:
    """The snapshot with this mark: the one that is there, else a new one."""
    if not is_mark(mark):
        raise UsageError(f"{mark!r} is no mark for a snapshot", fix="marks are tokvm-<migration>-<number>")
    answer = _checkpoint(shell, vm.uuid, mark)
    made = _made(answer, mark)
    if made is None or answer.truth_or_none("automaticCheckpoints"):
        _prepare(shell, vm.uuid, answer)
    if made is None:
        made = _made(_checkpoint(shell, vm.uuid, mark), mark)
    if made is None:
        raise answer.refuse("made no checkpoint, though its type is the one that was set")
    return _complete(shell, vm, made, mark)


def _checkpoint(shell: Asking, vm: str, mark: str) -> Fields:
    """Asked again while the VM is busy (a backup's checkpoint); the script itself takes care that there is one at the end."""
    deadline = time.monotonic() + BUSY_S
    data: dict[str, object] = {"vm": vm, "mark": mark, "types": list(SUITABLE)}
    while True:
        try:
            return Fields.of(shell.act("checkpoint", data, timeout_s=CHECKPOINT_S), shell.where, "checkpoint")
        except HyperVError as failed:
            if failed.fault not in _PASSING or time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


def _made(answer: Fields, mark: str) -> Checkpoint | None:
    found = sorted((Checkpoint.parse(one) for one in answer.items("checkpoints")), key=lambda one: one.id)
    if any(one.name != mark for one in found):
        raise answer.refuse("is about a checkpoint of another name")
    if len(found) > 1:  # two requests landed; both are whole, and everybody takes the same one
        log.warning("%d checkpoints are called %s; using %s", len(found), mark, found[0].id)
    return found[0] if found else None


def _prepare(shell: Asking, vm: str, answer: Fields) -> None:
    """Set how checkpoints are made, for the time of the job; what it was is saved first."""
    kind, automatic = answer.text_or_none("checkpointType"), answer.truth_or_none("automaticCheckpoints")
    if kind == "Disabled":
        raise SourceError(
            "checkpoints are switched off for this VM",
            where=f"{shell.where} VM {vm}",
            fix=f"Get-VM -Id {vm} | Set-VM -CheckpointType Production",
        )
    before = Settings(kind, automatic)
    record.change(shell, vm, lambda found: found if found.settings else replace(found, settings=before))
    wanted: dict[str, object] = {"vm": vm}
    if kind is not None and kind not in SUITABLE:
        wanted["checkpointType"] = SUITABLE[0]
    if automatic:
        wanted["automaticCheckpoints"] = False
    shell.act("settings", wanted)
    log.info("VM %s: checkpoints are of type Production for the time of the migration (it was %s)", vm, before)


def put_back(shell: Asking, vm: str) -> None:
    """Checkpoints are made as they were before us. Nothing saved is nothing to do."""
    facts = record.look(shell, vm)
    before = record.record_of(shell, vm, facts.record).settings
    if before is None:
        return
    wanted: dict[str, object] = {"vm": vm}
    if before.checkpoint_type is not None and before.checkpoint_type != facts.switches.checkpoint_type:
        wanted["checkpointType"] = before.checkpoint_type
    if before.automatic_checkpoints is not None and before.automatic_checkpoints != facts.switches.automatic_checkpoints:
        wanted["automaticCheckpoints"] = before.automatic_checkpoints
    if len(wanted) > 1:
        shell.act("settings", wanted)
    record.change(shell, vm, lambda found: replace(found, settings=None), known=facts)


def put_back_if_last(shell: Asking, vm: str) -> None:
    """After a removal or a release: when no checkpoint of any migration is left."""
    answer = Fields.of(shell.ask("checkpoints", {"vm": vm}), shell.where, "checkpoints")
    if not any(is_mark(one.text("name")) for one in answer.items("checkpoints")):
        put_back(shell, vm)


def ours(shell: Asking, vm: str, prefix: str) -> list[Snapshot]:
    """Snapshots whose mark begins with `prefix`, in the order of the number at the mark's end. A disk whose frozen file is not
    in the running chain any more (somebody applied a checkpoint) is left out: nothing can be read from it."""
    found = stack(shell, vm)
    made = [one for one in found.checkpoints if one.name.startswith(prefix) and is_mark(one.name)]
    made.sort(key=lambda one: (_number(one.name), one.name, one.id))
    keys = {disk.slot: disk for disk in found.disks}
    return [
        Snapshot(
            key_of(vm, one.id),
            one.name,
            {
                keys[slot].key: path
                for slot, path in sorted(one.frozen.items())
                if slot in keys and keys[slot].depth_of(path) is not None
            },
        )
        for one in made
    ]


def _number(mark: str) -> int:
    match = _NUMBER.search(mark)
    return int(match[1]) if match else -1


def _complete(shell: Asking, vm: VirtualMachine, made: Checkpoint, mark: str) -> Snapshot:
    """With its disks, which must be exactly the VM's, each in its slot."""
    frozen = {str(slot): path for slot, path in made.frozen.items()}
    wanted = {disk.device: disk.key for disk in vm.disks}
    if frozen.keys() != wanted.keys():
        odd = sorted(frozen.keys() ^ wanted.keys())
        raise SourceError(
            f"the snapshot {mark} does not hold the VM's disks: {', '.join(odd)} only in one of both",
            where=f"{shell.where} VM {vm.uuid}",
            fix="a disk was added, removed or moved since the VM was looked at; run the same command again",
        )
    return Snapshot(key_of(vm.uuid, made.id), mark, {wanted[slot]: frozen[slot] for slot in sorted(frozen)})


def remove(shell: Asking, vm: str, snapshot: Snapshot) -> None:
    """Remove a checkpoint of ours and wait for its merge. What is not ours by name, read just now, stays and is an error."""
    owner, checkpoint = ids_of(snapshot, shell.where)
    if owner != vm or not is_mark(snapshot.mark):
        raise _not_ours(shell, vm, snapshot, snapshot.mark)
    deadline = time.monotonic() + MERGE_S
    before = _unmerged(shell, vm)
    found = _until_free(lambda: _order(shell, vm, snapshot, checkpoint), min(deadline, time.monotonic() + REMOVE_S), shell)
    _await_merge(shell, vm, snapshot, before if found else None, deadline)
    put_back_if_last(shell, vm)
    log.info("snapshot %s of VM %s is removed", snapshot.mark, vm)


def _unmerged(shell: Asking, vm: str) -> set[str]:
    """Files that wait for a merge already, before ours is ordered; none known while a merge hides them."""
    try:
        return stack(shell, vm).unmerged()
    except HyperVError as failed:
        if failed.fault not in _UNDER_WAY:
            raise
        return set()


def _order(shell: Asking, vm: str, snapshot: Snapshot, checkpoint: str) -> bool:
    """False when it was gone already."""
    data: dict[str, object] = {"vm": vm, "id": checkpoint, "mark": snapshot.mark}
    answer = Fields.of(shell.act("remove-checkpoint", data, timeout_s=REMOVE_S), shell.where, "remove-checkpoint")
    if answer.truth("found") and not answer.truth("removed"):
        raise _not_ours(shell, vm, snapshot, answer.text("name"))
    return answer.truth("removed")


def _until_free(work: Callable[[], bool], deadline: float, shell: Asking) -> bool:
    """Do idempotent `work`, again and again while what it needs is in use or the answer was lost."""
    removed = False
    while True:
        try:
            return work() or removed
        except HyperVError as failed:
            if failed.fault not in _PASSING or time.monotonic() > deadline:
                raise
            if failed.fault is Fault.IN_USE:
                end_leftovers(shell)
        except ConnectionLost:
            if time.monotonic() > deadline:
                raise
            removed = True  # perhaps by the order whose answer was lost
        time.sleep(POLL_S)


def _await_merge(shell: Asking, vm: str, snapshot: Snapshot, before: set[str] | None, deadline: float) -> None:
    """Until nothing more waits for a merge than did before. before None: the checkpoint was gone already, so who knows."""
    begun, told = time.monotonic(), 0.0
    while True:
        left = _merge_left(shell, vm, before)
        now = time.monotonic()
        if not left:
            return
        if before is None and "status" not in left and now - begun > BEGIN_S:
            log.warning("VM %s: %s waits for a merge that nobody does", vm, ", ".join(sorted(left)))
            return
        if now > deadline:
            raise SourceError(
                f"the merge of {snapshot.mark} is not over yet ({', '.join(sorted(left))}); the host goes on with it by itself",
                where=f"{shell.where} VM {vm}",
                fix="wait until Hyper-V Manager shows no merge, then run the same command again",
            )
        if now - told > 60:
            told = now
            log.info("VM %s: waiting for the merge of %s", vm, snapshot.mark)
            end_leftovers(shell)
        time.sleep(POLL_S)


def _merge_left(shell: Asking, vm: str, before: set[str] | None) -> set[str]:
    """Files that are still to be merged, and `status` while the host says that it is at it."""
    try:
        found = stack(shell, vm)
    except HyperVError as failed:
        if failed.fault in _UNDER_WAY:
            return {"status"}
        raise
    busy = {"status"} if set(found.operational) & {MERGING, *CHECKPOINTING} else set()
    return (found.unmerged() - (before or set())) | busy


def end_leftovers(shell: Asking) -> None:
    """End our sftp-servers whose connection broke: their open files stop merges."""
    answer = Fields.of(shell.act("leftovers", {"end": True}), shell.where, "leftovers")
    for one in answer.items("processes"):
        ended = "was ended" if one.truth("ended") else "could not be ended"
        log.warning("%s: sftp-server.exe %d of a broken connection %s", shell.where, one.number("pid"), ended)


def _not_ours(shell: Asking, vm: str, snapshot: Snapshot, name: str) -> SourceError:
    return SourceError(
        f"the checkpoint {snapshot.key} is called {name!r}, not {snapshot.mark!r}: it is not ours and stays",
        where=f"{shell.where} VM {vm}",
        fix="somebody renamed it or the journal belongs to another host; remove it by hand if nobody needs it",
    )
