"""Whose VM is it? The owner in our record: the first one sets it, nobody overwrites it."""

from __future__ import annotations

import logging
from dataclasses import replace

from tokvm.core.errors import UsageError
from tokvm.sources.vmware.api import record
from tokvm.sources.vmware.api.client import Client
from tokvm.sources.vmware.api.inventory import Machines
from tokvm.sources.vmware.api.record import Record

log = logging.getLogger(__name__)


def claim(client: Client, machines: Machines, uuid: str, name: str) -> str:
    """Set our mark unless there is one; returns the holder."""
    if not name or "\0" in name or name != name.strip():
        raise UsageError(f"{name!r} cannot own a VM", fix="give an owner that is not empty and has no blanks around it")
    held = record.change(client, machines, uuid, lambda found: found if found.owner else replace(found, owner=name))
    log.info("VM %s is held by %s", uuid, held.owner)
    return held.owner


def release(client: Client, machines: Machines, uuid: str, name: str) -> bool:
    """Remove the mark if it is ours, and when the guest was asked to stop, which nobody waits for any more. False: not ours."""
    now, _ = record.read(machines, uuid)
    if now.owner != name:
        return False

    def without(found: Record) -> Record:
        return replace(found, owner="", asked=None) if found.owner == name else found

    record.change(client, machines, uuid, without)
    return True
