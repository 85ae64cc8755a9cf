"""The host does not start the source any more by itself. tokvm's own start refuses it, too.

    tokvm.json           how the host's autostart had the VM before; written first, removed last, never overwritten
    autostart entry      startAction none; a VM without an entry is not started anyway

ESXi has no lock that keeps a person from starting a VM. That one is seen: whether it runs is asked again before every step
that depends on it. vSphere HA of a vCenter restarts a VM that it finds failed, never one that was shut down; it cannot be told
so over SSH, and `check` warns.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from tokvm.core.errors import SourceError, UsageError
from tokvm.sources.vmware import record
from tokvm.sources.vmware.fields import Fields, items_of, value_of
from tokvm.sources.vmware.machines import Machines, Place, Seen
from tokvm.sources.vmware.record import AutoStart, Fence, Record
from tokvm.sources.vmware.shell import Answer, Command, Shell, vim

log = logging.getLogger(__name__)

NONE = "none"
_SEQUENCE = vim("hostsvc/autostartmanager/get_autostartseq")
_DEFAULT = "systemDefault"


def fence(machines: Machines, shell: Shell, uuid: str, reason: str) -> None:
    if not reason or "\0" in reason:
        raise UsageError("a fence needs a reason that people can read")
    seen, found, entry = _look(machines, shell, uuid)
    if found.fence is None:
        record.write(shell, seen.place, replace(found, fence=Fence(reason, entry)))
    if not _shut(entry):
        entry = _set(shell, seen, replace(entry or _unset(), action=NONE))
    if not _shut(entry):
        raise _refused(shell, uuid, "fenced", entry)
    log.info("VM %s is fenced", uuid)


def is_fenced(machines: Machines, shell: Shell, uuid: str) -> bool:
    _, found, entry = _look(machines, shell, uuid)
    return found.fence is not None and _shut(entry)


def unfence(machines: Machines, shell: Shell, uuid: str) -> None:
    seen, found, entry = _look(machines, shell, uuid)
    if found.fence is None:
        return
    before = found.fence.before
    if before is not None and before != entry:
        entry = _set(shell, seen, before)
        if entry is None or entry.action != before.action:
            raise _refused(shell, uuid, "unfenced", entry)
    record.write(shell, seen.place, replace(found, fence=None))
    log.info("VM %s is unfenced", uuid)


def _questions(place: Place) -> list[Command]:
    return [record.question(place), _SEQUENCE]


def _look(machines: Machines, shell: Shell, uuid: str) -> tuple[Seen, Record, AutoStart | None]:
    seen, (state, sequence) = machines.look(uuid, _questions)
    return seen, record.record_of(shell, state), _entry(sequence, seen.vmid)


def _entry(answer: Answer, vmid: int) -> AutoStart | None:
    """The VM's entry; None when the host has none for it."""
    value = value_of(answer.checked(), answer.where, answer.what)
    items = items_of([] if value is None else value, answer.where, answer.what)
    found = [one for one in items if one.reference("key") == f"vim.VirtualMachine:{vmid}"]
    if len(found) > 1:
        raise found[0].refuse("the VM has two entries")
    return _autostart(found[0]) if found else None


def _autostart(fields: Fields) -> AutoStart:
    def number(name: str) -> int:
        value = fields.number_or_none(name, least=-1, most=1 << 31)
        return -1 if value is None else value

    return AutoStart(
        action=fields.text("startAction"),
        delay=number("startDelay"),
        order=number("startOrder"),
        stop_action=fields.text_or_none("stopAction") or _DEFAULT,
        stop_delay=number("stopDelay"),
        heartbeat=fields.text_or_none("waitForHeartbeat") or _DEFAULT,
    )


def _unset() -> AutoStart:
    return AutoStart(NONE, -1, -1, _DEFAULT, -1, _DEFAULT)


def _shut(entry: AutoStart | None) -> bool:
    return entry is None or entry.action.lower() == NONE


def _set(shell: Shell, seen: Seen, wanted: AutoStart) -> AutoStart | None:
    """Set the entry; what it is then."""
    args = (wanted.action, wanted.delay, wanted.order, wanted.stop_action, wanted.stop_delay, wanted.heartbeat)
    shell.act(vim("hostsvc/autostartmanager/update_autostartentry", "--", seen.vmid, *args))
    return _entry(shell.ask([_SEQUENCE])[0], seen.vmid)


def _refused(shell: Shell, uuid: str, wanted: str, now: AutoStart | None) -> SourceError:
    return SourceError(
        f"the VM could not be {wanted}: read back, its autostart action is {'not there' if now is None else now.action!r}",
        where=f"{shell.where} VM {uuid}",
        fix="see whether somebody else is changing the host's autostart, then run the same command again",
    )
