"""Whose VM is it? The file tokvm-owner in its directory: who makes it holds the VM, nobody overwrites it."""

from __future__ import annotations

import logging

from tokvm.core.errors import SourceError, UsageError
from tokvm.sources.vmware import record
from tokvm.sources.vmware.machines import Machines
from tokvm.sources.vmware.shell import Shell

log = logging.getLogger(__name__)


def claim(machines: Machines, shell: Shell, uuid: str, name: str) -> str:
    """Set our mark unless there is one; returns the holder."""
    if not name or "\0" in name or name != name.strip():
        raise UsageError(f"{name!r} cannot own a VM", fix="give an owner that is not empty and has no blanks around it")
    seen, (answer,) = machines.look(uuid, lambda place: [record.owner_question(place)])
    held = record.owner_of(shell, answer)
    if not held:
        record.write_owner(shell, seen.place, name)
        held = record.owner_of(shell, shell.ask([record.owner_question(seen.place)])[0])
    if not held:
        raise SourceError(
            f"{seen.place.file(record.OWNER)} could not be written",
            where=f"{shell.where} VM {uuid}",
            fix="see whether the datastore is full, or read-only",
        )
    log.info("VM %s is held by %s", uuid, held)
    return held


def release(machines: Machines, shell: Shell, uuid: str, name: str) -> bool:
    """Remove the mark if it is ours, and when the guest was asked to stop, which nobody waits for any more. False: not ours."""
    seen, (owner, state) = machines.look(uuid, lambda place: [record.owner_question(place), record.question(place)])
    if record.owner_of(shell, owner) != name:
        return False
    found = record.record_of(shell, state)
    if found.asked is not None:
        record.write(shell, seen.place, record.Record(fence=found.fence))
    record.remove_owner(shell, seen.place)
    return True
