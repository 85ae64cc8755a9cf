"""Switching changed block tracking on for a migration, and back to what it was.

enable     before our first snapshot: a VM with snapshots is refused; it begins with the next snapshot
put back   after our last snapshot is gone; what it was is in the record
"""

from __future__ import annotations

import logging
from dataclasses import replace

from tokvm.core.errors import SourceError
from tokvm.sources.vmware.api import record, tasks
from tokvm.sources.vmware.api.client import Client
from tokvm.sources.vmware.api.inventory import Facts, Machines
from tokvm.sources.vmware.api.machine import hardware_version
from tokvm.sources.vmware.api.vmomi import vim
from tokvm.sources.vmware.marks import is_mark

log = logging.getLogger(__name__)

OLDEST_HARDWARE = 7
RECONFIGURE_S = 120.0


def problem(facts: Facts) -> str:
    """Why blocks cannot be tracked; "" when they can, or are already."""
    if facts.config.changeTrackingEnabled:
        return ""
    if hardware_version(str(facts.config.version or "")) < OLDEST_HARDWARE:
        return f"its virtual hardware is {facts.config.version}; vmx-07 is the oldest that tracks changed blocks"
    if facts.snapshots:
        return "it has snapshots, and tracking can be switched on only without any"
    if any(disk.device.rdm == "physicalMode" or disk.device.mode.startswith("independent") for disk in facts.disks):
        return "it has a disk that cannot be tracked (independent, or a physical raw device mapping)"
    return ""


def enable(client: Client, machines: Machines, uuid: str) -> None:
    """On when this returns; noted first what it was."""
    facts = machines.facts(uuid)
    if facts.config.changeTrackingEnabled:
        return
    if why := problem(facts):
        raise SourceError(
            f"changed blocks cannot be tracked: {why}", where=f"{client.where} VM {uuid}", fix="leave --enable-cbt out"
        )
    record.change(client, machines, uuid, lambda found: found if found.cbt is not None else replace(found, cbt=False))
    _set(client, facts, wanted=True)
    log.info("VM %s: changed blocks are tracked for the time of the migration", uuid)


def put_back_if_last(client: Client, machines: Machines, uuid: str) -> None:
    """After a removal or a release: when no snapshot of any migration is left."""
    before, _ = record.read(machines, uuid)
    if before.cbt is None:
        return
    facts = machines.facts(uuid)
    if any(is_mark(one.name) for one in facts.snapshots):
        return
    if bool(facts.config.changeTrackingEnabled) != before.cbt:
        _set(client, facts, wanted=before.cbt)
    record.change(client, machines, uuid, lambda found: replace(found, cbt=None))


def _set(client: Client, facts: Facts, *, wanted: bool) -> None:
    spec = vim.vm.ConfigSpec(changeTrackingEnabled=wanted)
    doing = f"switching changed block tracking {'on' if wanted else 'off'}"
    tasks.run(client, lambda: facts.ref.ReconfigVM_Task(spec=spec), doing, timeout_s=RECONFIGURE_S)
