"""Freezing a VM, finding what we froze, and removing that again, and nothing else.

    snapshot n      freezes the file that each disk writes; it goes on in a new <name>-00000N.vmdk
    remove it       merges the layer above into the file that it froze; files of later snapshots may be called otherwise then

A snapshot's name is our mark. It counts when snapshot.get and the .vmsd both have it, with one id: the tree holds anybody's
texts. Which file it froze is asked anew each time, and must be in the running chain. Without memory, and not quiesced: the
target's file systems see what a power failure would have left, as they do in every pass but the last, which is of a VM that is
off.
"""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass

from tokvm.core.errors import ConnectionLost, SourceError, UsageError
from tokvm.core.machine import Snapshot, VirtualMachine
from tokvm.core.text import readable
from tokvm.sources.vmware.faults import EsxError, Fault
from tokvm.sources.vmware.fields import value_of
from tokvm.sources.vmware.inventory import Inspection, inspection_of, questions, until_settled
from tokvm.sources.vmware.listings import possible_marks
from tokvm.sources.vmware.machines import Machines, Place
from tokvm.sources.vmware.marks import ids_of, is_mark, key_of, number_of
from tokvm.sources.vmware.shell import Answer, Command, Outcome, Shell, vim
from tokvm.sources.vmware.vmx import SnapshotEntry

log = logging.getLogger(__name__)

CREATE_S = 600.0  # it stuns the VM for a moment; the host gives up after some minutes
LANDING_S = 10.0  # how long an order whose answer was lost may take to show as a task
BUSY_S = 60.0
REMOVE_S = 3600.0  # a merge of a large layer under a running VM
POLL_S = 2.0
_TASK = re.compile(r"haTask-[A-Za-z0-9._-]{1,200}")
_CHANGES = ("createSnapshot", "removeSnapshot", "removeAllSnapshots", "consolidateDisks", "revertTo", "Snapshot.remove")


@dataclass(frozen=True, slots=True)
class Stack:
    """Where every disk's bytes lie at this moment, and which snapshots are ours. tasks: those of the VM that change its layers
    and are not over."""

    inside: Inspection
    ours: tuple[SnapshotEntry, ...]
    tasks: tuple[str, ...]

    def chain(self, key: str) -> tuple[str, ...] | None:
        """A disk's files as paths from the root, top first; None when there is no such disk."""
        disk = self.inside.hardware.disk(key)
        return None if disk is None else self.inside.paths(disk)

    def frozen(self, entry: SnapshotEntry) -> dict[str, str]:
        """What a snapshot froze: paths from the root, by node."""
        folder = self.inside.seen.place.folder
        return {node: self.inside.stores.beside(name, folder) for node, name in entry.frozen.items()}

    def entry(self, uid: int) -> SnapshotEntry | None:
        return next((one for one in self.ours if one.uid == uid), None)


def _questions(place: Place) -> list[Command]:
    return [*questions(place), vim("vmsvc/snapshot.get", place.vmid), vim("vmsvc/get.tasklist", place.vmid)]


def stack(machines: Machines, shell: Shell, uuid: str) -> Stack:
    return until_settled(lambda: _stack(machines, shell, uuid))


def _stack(machines: Machines, shell: Shell, uuid: str) -> Stack:
    seen, (devices, vmsd, tree, tasks) = machines.look(uuid, _questions)
    inside = inspection_of(machines, seen, [devices, vmsd])
    shown = possible_marks(tree.checked())
    if vmsd.code and "Snapshot Name" in tree.text:
        vmsd.checked()  # it is not missing, it could not be read: what it says of our snapshots is unknown
    ours = tuple(one for one in inside.snapshots.entries if is_mark(one.name) and (one.uid, one.name) in shown)
    return Stack(inside, ours, tuple(_under_way(shell, tasks, machines.over)))


def _under_way(shell: Shell, answer: Answer, over: set[str]) -> list[str]:
    """The list holds tasks that are over, too; each that changes layers is asked for its state, until it is over."""
    found = value_of(answer.checked(), answer.where, answer.what)
    names = [one.partition(":")[2] for one in found if isinstance(one, str)] if isinstance(found, list) else []
    wanted = [name for name in names if _TASK.fullmatch(name) and any(change in name for change in _CHANGES)]
    wanted = [name for name in wanted if name not in over]
    if not wanted:
        return []
    states = shell.ask([vim("vimsvc/task_info", name) for name in wanted])
    running = [name for name, state in zip(wanted, states, strict=True) if _is_under_way(state)]
    over.update(set(wanted) - set(running))
    return running


def _is_under_way(answer: Answer) -> bool:
    if answer.refusal() is not None or answer.code:  # it is so long over that the host has forgotten it
        return False
    return answer.fields().text("state") in ("queued", "running")


def take(machines: Machines, shell: Shell, vm: VirtualMachine, mark: str) -> Snapshot:
    """The snapshot with this mark: the one that is there, else a new one."""
    if not is_mark(mark):
        raise UsageError(f"{mark!r} is no mark for a snapshot", fix="marks are tokvm-<migration>-<number>")
    found = stack(machines, shell, vm.uuid)
    made = _made(found, mark)
    if made is None:
        found, made = _create(machines, shell, found, mark)
    return _complete(found, vm, made, shell.where)


def _made(found: Stack, mark: str) -> SnapshotEntry | None:
    same = sorted((one for one in found.ours if one.name == mark), key=lambda one: one.uid)
    if len(same) > 1:  # two requests landed; both are whole, and everybody takes the same one
        log.warning("%d snapshots are called %s; using the one with id %d", len(same), mark, same[0].uid)
    return same[0] if same else None


def _create(machines: Machines, shell: Shell, found: Stack, mark: str) -> tuple[Stack, SnapshotEntry]:
    """Ordered once, and again only when the host says that another task has the VM in hand."""
    busy_until = time.monotonic() + BUSY_S
    uuid = found.inside.seen.summary.uuid
    while True:
        _refuse_question(found, shell.where)
        ended = _order(shell, vim("vmsvc/snapshot.create", found.inside.seen.vmid, mark, "tokvm", 0, 0), CREATE_S)
        found, made = _await_snapshot(machines, shell, uuid, mark, ended)
        if made is not None:
            return found, made
        error = ended if isinstance(ended, ConnectionLost) else ended.error()
        if not isinstance(error, EsxError) or error.fault is not Fault.BUSY or time.monotonic() > busy_until:
            raise error
        time.sleep(POLL_S)


def _order(shell: Shell, command: Command, timeout_s: float) -> Outcome | ConnectionLost:
    try:
        return shell.act(command, timeout_s=timeout_s)
    except ConnectionLost as lost:
        return lost


def _await_snapshot(
    machines: Machines, shell: Shell, uuid: str, mark: str, ended: Outcome | ConnectionLost
) -> tuple[Stack, SnapshotEntry | None]:
    """Look until it is there and its task is over; (…, None) when it will not come."""
    begun = time.monotonic()
    told_failure = isinstance(ended, Outcome) and ended.failed
    while True:
        found = stack(machines, shell, uuid)
        made = _made(found, mark)
        waited = time.monotonic() - begun
        if not found.tasks and (made is not None or told_failure or waited > LANDING_S):
            return found, made
        if waited > CREATE_S:
            raise SourceError(
                f"the snapshot {mark} was ordered {CREATE_S:g} s ago and is not there yet",
                where=f"{shell.where} VM {uuid}",
                fix="see the VM's tasks in the host's client; when they are over, run the same command again",
            )
        time.sleep(POLL_S)


def _refuse_question(found: Stack, where: str) -> None:
    question = found.inside.seen.summary.question
    if question:
        raise SourceError(
            f"the VM waits for an answer: {readable(question)}",
            where=f"{where} VM {found.inside.seen.summary.uuid}",
            fix="answer it in the host's client, then run the same command again",
        )


def _complete(found: Stack, vm: VirtualMachine, made: SnapshotEntry, where: str) -> Snapshot:
    """With its disks, which must be exactly the VM's, each frozen below what the VM writes."""
    frozen = found.frozen(made)
    wanted = {disk.device: disk.key for disk in vm.disks}
    if frozen.keys() != wanted.keys():
        odd = sorted(frozen.keys() ^ wanted.keys())
        raise SourceError(
            f"the snapshot {made.name} does not hold the VM's disks: {', '.join(odd)} only in one of both",
            where=f"{where} VM {vm.uuid}",
            fix="a disk is independent, or was added or moved since the VM was looked at; see `tokvm check`",
        )
    for node, path in frozen.items():
        if path not in (found.chain(wanted[node]) or ())[1:]:
            raise SourceError(
                f"the snapshot {made.name} froze {readable(path)}, which is not below the file that {node} writes now",
                where=f"{where} VM {vm.uuid}",
                fix="a snapshot was reverted to, or a disk replaced; run the same command again",
            )
    return Snapshot(key_of(vm.uuid, made.uid), made.name, {wanted[node]: frozen[node] for node in sorted(frozen)})


def ours(machines: Machines, shell: Shell, uuid: str, prefix: str) -> list[Snapshot]:
    """Snapshots whose mark begins with `prefix`, in the order of the number at the mark's end. A disk whose frozen file is not
    in the running chain any more (somebody reverted to a snapshot) is left out: nothing can be read from it."""
    found = stack(machines, shell, uuid)
    made = sorted((one for one in found.ours if one.name.startswith(prefix)), key=lambda one: (number_of(one.name), one.uid))
    keys = {str(disk.node): disk.key for disk in found.inside.hardware.disks}
    return [
        Snapshot(
            key_of(uuid, one.uid),
            one.name,
            {
                keys[node]: path
                for node, path in sorted(found.frozen(one).items())
                if node in keys and path in (found.chain(keys[node]) or ())[1:]
            },
        )
        for one in made
    ]


def remove(machines: Machines, shell: Shell, uuid: str, snapshot: Snapshot) -> None:
    """Remove a snapshot of ours and wait for the merge. What is not ours by name, read just now, stays and is an error."""
    owner, uid = ids_of(snapshot, shell.where)
    if owner != uuid or not is_mark(snapshot.mark):
        raise _not_ours(shell.where, uuid, snapshot, snapshot.mark)
    begun, order = time.monotonic(), _Removal(shell, uid)
    while True:
        found = stack(machines, shell, uuid)
        named = found.inside.snapshots.with_uid(uid)
        if named is not None and named.name != snapshot.mark:
            raise _not_ours(shell.where, uuid, snapshot, named.name)
        if not found.tasks and named is None:
            break
        if not found.tasks:
            order.again(found)
        if time.monotonic() - begun > REMOVE_S:
            raise SourceError(
                f"the removal of {snapshot.mark} is not over yet; the host goes on with it by itself",
                where=f"{shell.where} VM {uuid}",
                fix="see the VM's tasks in the host's client; when they are over, run the same command again",
            )
        if named is not None or found.tasks:
            time.sleep(POLL_S)
    if found.inside.seen.summary.consolidation_needed or found.inside.snapshots.needs_consolidation:
        log.warning("VM %s: its disks need consolidation; something holds a file of it open (a backup?)", uuid)
    log.info("snapshot %s of VM %s is removed", snapshot.mark, uuid)


class _Removal:
    """Orders the removal, again when the one before was lost or the VM was busy."""

    def __init__(self, shell: Shell, uid: int) -> None:
        self._shell = shell
        self._uid = uid
        self._busy_until = time.monotonic() + BUSY_S
        self._done = False

    def again(self, found: Stack) -> None:
        command = vim("vmsvc/snapshot.remove", found.inside.seen.vmid, self._uid, 0)
        if self._done and time.monotonic() > self._busy_until:
            raise SourceError(
                f"the host says that it removed snapshot {self._uid}, but it is still there",
                where=f"{self._shell.where} VM {found.inside.seen.summary.uuid}",
                fix="remove it in the host's client; /var/log/hostd.log says more",
            )
        ended = _order(self._shell, command, REMOVE_S)
        if isinstance(ended, ConnectionLost):
            if time.monotonic() > self._busy_until:
                raise ended
            return
        if ended.failed and (ended.fault is not Fault.BUSY or time.monotonic() > self._busy_until):
            raise ended.error()
        self._done = not ended.failed


def _not_ours(where: str, uuid: str, snapshot: Snapshot, name: str) -> SourceError:
    return SourceError(
        f"the snapshot {snapshot.key} is called {readable(repr(name))}, not {snapshot.mark!r}: it is not ours and stays",
        where=f"{where} VM {uuid}",
        fix="somebody renamed it or the journal belongs to another host; remove it by hand if nobody needs it",
    )
