"""Freezing a VM, finding what we froze, and removing that again, and nothing else.

    VM  ── VBD userdevice 0 ── VDI a          snapshot ── VBD userdevice 0 ── VDI a' (snapshot-of: a)
        └─ VBD userdevice 1 ── VDI b                  └── VBD userdevice 1 ── VDI b' (snapshot-of: b)

A snapshot is a VM of its own with disks of its own; its name-label is our mark, `tokvm-<migration>-<n>`. What belongs to
which is said twice, by the position and by `snapshot-of`, and believed when both agree.

`snapshot-uninstall` destroys the VM record first and then each disk (xen-api, cli_operations.ml, vm_uninstall_common): with a
disk still attached to dom0 after an export (xen-api 4339) the snapshot is gone and its disk stays; a disk whose VBD has no
`owner` key is not even tried (xen-api 4145). So the disks are looked for afterwards and destroyed by their uuid.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable

from tokvm.core.errors import ConnectionLost, SourceError, UsageError
from tokvm.core.machine import Snapshot, VirtualMachine
from tokvm.sources.xenserver.faults import Fault, XenServerError
from tokvm.sources.xenserver.inventory import holds_disk
from tokvm.sources.xenserver.xe import NOTHING, Command, Row, Xe, is_uuid, value_of

log = logging.getLogger(__name__)

SNAPSHOT_S = 600.0  # a thick LVM SR inflates the new leaf first
LANDING_S = 60.0  # how long a snapshot whose answer was lost may take to appear
UNINSTALL_S = 600.0
IN_USE_DEADLINE_S = 300.0  # dom0 detaches a VDI seconds to minutes after its export (xen-api 4339, xen-orchestra 7826)
BUSY_S = 30.0
POLL_S = 1.0

_MARK = re.compile(r"tokvm-[A-Za-z0-9][A-Za-z0-9._-]*")
_NUMBER = re.compile(r"-([0-9]{1,18})\Z")
_PASSING = (Fault.IN_USE, Fault.BUSY, Fault.XAPI_AWAY)


def is_mark(text: str) -> bool:
    """True for a name that we give to snapshots."""
    return _MARK.fullmatch(text) is not None


def take(xe: Xe, vm: VirtualMachine, mark: str) -> Snapshot:
    """The snapshot with this mark: the one that is there, else a new one."""
    if not is_mark(mark):
        raise UsageError(f"{mark!r} is no mark for a snapshot", fix="marks are tokvm-<migration>-<number>")
    key = _find(xe, vm.uuid, mark) or _make(xe, vm.uuid, mark)
    return _complete(xe, vm, Snapshot(key, mark, {}))


def ours(xe: Xe, vm: str, prefix: str) -> list[Snapshot]:
    """Snapshots whose mark begins with `prefix`, in the order of the number at the mark's end."""
    rows = [row for row in _listing(xe, vm) if row["name-label"].startswith(prefix) and is_mark(row["name-label"])]
    rows.sort(key=lambda row: (_number(row["name-label"]), row["name-label"], row["uuid"]))
    return [Snapshot(row["uuid"], row["name-label"], _frozen(xe, row["uuid"])[0]) for row in rows]


def names(xe: Xe, vm: str) -> list[str]:
    """The name-labels of all snapshots of the VM, whoever made them."""
    return [row["name-label"] for row in _listing(xe, vm)]


def _listing(xe: Xe, vm: str) -> list[Row]:
    return xe.table(_of(vm), ["name-label"])


def _of(vm: str) -> Command:
    return ("snapshot-list", f"snapshot-of={vm}")


def _number(mark: str) -> int:
    match = _NUMBER.search(mark)
    return int(match[1]) if match else -1


def _find(xe: Xe, vm: str, mark: str) -> str | None:
    """The uuid of the snapshot with this mark. In one question when there is none, which is what happens at a cutover."""
    if mark not in xe.column(_of(vm), "name-label"):
        return None
    found = sorted(row["uuid"] for row in _listing(xe, vm) if row["name-label"] == mark)
    if len(found) > 1:  # two requests landed; both are whole, and everybody takes the same one
        log.warning("%s: %d snapshots are called %s; using %s", xe.where, len(found), mark, found[0])
    return found[0] if found else None


def _make(xe: Xe, vm: str, mark: str) -> str:
    command = ("vm-snapshot", f"uuid={vm}", f"new-name-label={mark}")
    try:
        answer = _when_idle(xe, command)
    except ConnectionLost:
        key = _landed(xe, vm, mark)
        if key is None:
            raise
        return key
    if is_uuid(answer):
        log.info("snapshot %s of VM %s is %s", mark, vm, answer)
        return answer
    key = _find(xe, vm, mark)  # by what the host lists, never by what it said
    return key or xe.uuid(answer, command)


def _when_idle(xe: Xe, command: Command) -> str:
    """The answer, asked for again while another operation on the VM (a backup's own snapshot) is in the way."""
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            return xe.act(*command, timeout_s=SNAPSHOT_S).strip()
        except XenServerError as failed:
            if failed.fault is not Fault.BUSY or time.monotonic() > deadline:
                raise
        time.sleep(POLL_S)


def _landed(xe: Xe, vm: str, mark: str) -> str | None:
    """After a lost answer: the snapshot once it is there; None when the host has nothing like it in hand (any more)."""
    deadline = time.monotonic() + LANDING_S
    while True:
        pending = "snapshot" in xe.ask(*value_of("vm", vm, "current-operations"))
        key = _find(xe, vm, mark)
        if key is not None or not pending or time.monotonic() > deadline:
            return key
        time.sleep(POLL_S)


def _frozen(xe: Xe, snapshot: str) -> tuple[dict[str, str], dict[str, str]]:
    """(disk → its frozen VDI, disk → userdevice) of one snapshot. A VDI that is gone, or a copy of nothing, is left out."""
    listing: Command = ("vbd-list", f"vm-uuid={snapshot}", "type=Disk")
    rows = [row for row in xe.fixed_table(listing, ["userdevice", "vdi-uuid"]) if holds_disk(xe, row, listing)]
    commands = [value_of("vdi", row["vdi-uuid"], "snapshot-of") for row in rows]
    frozen: dict[str, str] = {}
    places: dict[str, str] = {}
    for row, disk, command in zip(rows, xe.ask_all(commands), commands, strict=True):
        if disk in (NOTHING, ""):
            continue
        if xe.uuid(disk, command) in frozen:
            raise xe.confused(command, f"two disks of the snapshot {snapshot} are frozen from {disk}")
        frozen[disk] = row["vdi-uuid"]
        places[disk] = row["userdevice"]
    return frozen, places


def _complete(xe: Xe, vm: VirtualMachine, snapshot: Snapshot) -> Snapshot:
    """With its disks, which must be exactly the VM's, each in its place."""
    frozen, places = _frozen(xe, snapshot.key)
    wanted = {disk.key: disk.device for disk in vm.disks}
    if places != wanted:
        odd = sorted(places.items() ^ wanted.items())
        raise SourceError(
            f"the snapshot {snapshot.mark} does not hold the VM's disks: {', '.join(f'{d} at position {p}' for d, p in odd)} "
            "only in one of both",
            where=f"{xe.where} VM {vm.uuid}",
            fix="a disk was added, removed or moved since the VM was looked at; run the same command again",
        )
    return Snapshot(snapshot.key, snapshot.mark, frozen)


def remove(xe: Xe, vm: str, snapshot: Snapshot, *, deadline_s: float = IN_USE_DEADLINE_S) -> None:
    """Remove a snapshot of ours and its disks. What is not ours by name, read just now, stays and is an error."""
    if not is_mark(snapshot.mark) or not is_uuid(snapshot.key):
        raise _not_ours(xe, vm, snapshot, snapshot.mark)
    deadline = time.monotonic() + deadline_s
    _until_free(lambda: _uninstall(xe, vm, snapshot), deadline)
    for disk, frozen in snapshot.disks.items():
        _until_free(lambda disk=disk, frozen=frozen: _destroy_left(xe, disk, frozen), deadline)  # type: ignore[misc]
    log.info("snapshot %s of VM %s is removed", snapshot.mark, vm)


def _uninstall(xe: Xe, vm: str, snapshot: Snapshot) -> None:
    label = {row["uuid"]: row["name-label"] for row in _listing(xe, vm)}.get(snapshot.key)
    if label is None:
        return
    if label != snapshot.mark:
        raise _not_ours(xe, vm, snapshot, label)
    try:
        xe.act("snapshot-uninstall", f"uuid={snapshot.key}", "force=true", timeout_s=UNINSTALL_S)
    except XenServerError as failed:
        if failed.fault is not Fault.NO_SUCH_OBJECT:
            raise


def _destroy_left(xe: Xe, disk: str, frozen: str) -> None:
    """Destroy one frozen disk that outlived its snapshot, if it is what we know it as: a frozen image of `disk`."""
    if not (is_uuid(disk) and is_uuid(frozen)):
        return
    try:
        if xe.ask(*value_of("vdi", frozen, "snapshot-of")) == disk:
            log.info("the disk %s outlived its snapshot; removing it", frozen)
            xe.act("vdi-destroy", f"uuid={frozen}", timeout_s=UNINSTALL_S)
    except XenServerError as failed:
        if failed.fault is not Fault.NO_SUCH_OBJECT:
            raise


def _until_free(work: Callable[[], None], deadline: float) -> None:
    """Do idempotent `work`, again and again while what it needs is in use or the answer was lost."""
    pause = POLL_S
    while True:
        try:
            return work()
        except XenServerError as failed:
            if failed.fault not in _PASSING:
                raise
            if time.monotonic() > deadline:
                raise _still_in_use(failed) from failed
        except ConnectionLost:
            if time.monotonic() > deadline:
                raise
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(pause * 1.5, 15.0)


def _still_in_use(failed: XenServerError) -> XenServerError:
    return XenServerError(
        f"{failed.what}; it stayed so until the deadline",
        where=failed.where,
        fix="a broken export may have left the disk attached to the control domain: look with "
        "`xe vbd-list vdi-uuid=… params=uuid,vm-name-label`, unplug and destroy that VBD, then run the same command again",
        fault=failed.fault,
    )


def _not_ours(xe: Xe, vm: str, snapshot: Snapshot, label: str) -> SourceError:
    return SourceError(
        f"the snapshot {snapshot.key} is called {label!r}, not {snapshot.mark!r}: it is not ours and stays",
        where=f"{xe.where} VM {vm}",
        fix="somebody renamed it or the journal belongs to another host; remove it by hand if nobody needs it",
    )
