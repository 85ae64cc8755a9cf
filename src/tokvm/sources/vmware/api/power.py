"""On and off: asking the guest to stop, cutting its power, starting it, and the two witnesses that it is off.

    first witness    the server: powerState is poweredOff on a connected host, and it knows of no boot (bootTime is cleared when
                     a VM goes off, says the API's reference)
    second witness   the storage: the file that the VM wrote last opens for reading. On VMFS a running VM's process holds a lock
                     on it, which `/folder` and SFTP run into, and which a host that lost its network still holds. NFS has no
                     such lock: there the file opens always, and proves nothing; the evidence says so

The guest is asked through VMware Tools (ShutdownGuest), which returns at once; whether it obeys shows in the state alone. One
that was asked may stop minutes later: when it was asked is in the record, and `stop_pending` is true for as long.
"""

from __future__ import annotations

import calendar
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tokvm.core.errors import ConnectionLost, NotOff, SourceError
from tokvm.core.machine import OffEvidence, PowerState
from tokvm.core.text import readable
from tokvm.sources.vmware.api import faults, questions, record, tasks
from tokvm.sources.vmware.api.client import Client
from tokvm.sources.vmware.api.inventory import Facts, Machines
from tokvm.sources.vmware.api.machine import power_state
from tokvm.sources.vmware.api.vmomi import vim

log = logging.getLogger(__name__)

LANDS_S = 300  # how long a guest may take to close its programs (the same as a Windows guest has elsewhere)
FORCED_S = 120.0
START_S = 300.0
POLL_S = 1.0
RUNTIME = ("runtime.powerState", "runtime.connectionState")

Held = Callable[[Facts], list[str]]
"""What the storage says: a text for each disk whose last file is held or cannot be opened."""


def power(machines: Machines, uuid: str) -> PowerState:
    found = machines.read(uuid, RUNTIME)
    return power_state(found.get("runtime.connectionState"), found.get("runtime.powerState"))


def stop_pending(client: Client, machines: Machines, uuid: str) -> bool:
    now, found = record.read(machines, uuid, *RUNTIME, "runtime.bootTime", "recentTask")
    if tasks.under_way(client, found.get("recentTask"), "poweroff", "shutdown", "suspend"):
        return True
    state = power_state(found.get("runtime.connectionState"), found.get("runtime.powerState"))
    if now.asked is None or state is not PowerState.RUNNING:
        return False
    booted = found.get("runtime.bootTime")
    if booted is not None and seconds(booted) > now.asked:
        return False  # one that booted after we asked has forgotten it
    return server_time(client) - now.asked < LANDS_S


def off_evidence(machines: Machines, uuid: str, held: Held) -> OffEvidence:
    facts = machines.facts(uuid)
    booted = facts.runtime.bootTime
    kept = held(facts) if facts.power is PowerState.OFF else ["not looked at"]
    detail = f"powerState {facts.runtime.powerState} ({facts.runtime.connectionState}), boot time {booted or 'none'}, "
    detail += f"files held: {', '.join(kept) or 'none'}"
    return OffEvidence(facts.power, not kept and booted is None, readable(detail))


def shut_down(client: Client, machines: Machines, uuid: str, *, deadline_s: float, force: bool) -> None:
    """Off, or NotOff. Cuts the power only if `force`: at the deadline, or when the guest cannot be asked."""
    deadline = time.monotonic() + deadline_s
    if _is_off(client, machines, uuid):
        return
    asked = server_time(client)
    record.change(client, machines, uuid, lambda found: replace(found, asked=asked))
    refusal = _ask_guest(client, machines, uuid)
    if not refusal and _wait_for(machines, uuid, PowerState.OFF, max(0.0, deadline - time.monotonic())):
        return
    if not force:
        raise _not_off(client, uuid, refusal or f"the guest did not stop within {deadline_s:g} s")
    log.warning("VM %s did not stop (%s); cutting its power", uuid, refusal or f"{deadline_s:g} s are over")
    refusal = _cut(client, machines, uuid)
    if not _wait_for(machines, uuid, PowerState.OFF, FORCED_S):
        raise _not_off(client, uuid, refusal or "its power was cut, but it is not off")


def _is_off(client: Client, machines: Machines, uuid: str) -> bool:
    state = power(machines, uuid)
    if state in (PowerState.PAUSED, PowerState.SUSPENDED):
        raise NotOff(
            f"the VM is {state}: its memory holds what its disks do not",
            where=f"{client.where} VM {uuid}",
            fix="resume it in the vSphere client, then again",
        )
    return state is PowerState.OFF


def _ask_guest(client: Client, machines: Machines, uuid: str) -> str:
    """Returns why the guest could not be asked, if so. A reply that was lost: it was asked, perhaps."""
    ref = machines.ref(uuid)
    try:
        client.act(ref.ShutdownGuest, "asking the guest to shut down")
    except ConnectionLost as lost:
        log.warning("VM %s: %s", uuid, lost.what)
    except faults.VsphereError as failed:
        if failed.fault != "InvalidPowerState" or power(machines, uuid) is not PowerState.OFF:
            return failed.what
    return ""


def _cut(client: Client, machines: Machines, uuid: str) -> str:
    ref = machines.ref(uuid)
    try:
        tasks.run(client, ref.PowerOffVM_Task, "cutting the VM's power", timeout_s=FORCED_S)
    except (faults.VsphereError, ConnectionLost) as failed:
        return failed.what
    return ""


def start(client: Client, machines: Machines, uuid: str) -> None:
    """Running when this returns."""
    where = f"{client.where} VM {uuid}"
    now, found = record.read(machines, uuid, *RUNTIME, "runtime.question")
    state = power_state(found.get("runtime.connectionState"), found.get("runtime.powerState"))
    if state is PowerState.RUNNING:
        return
    if now.fence is not None:
        raise SourceError("its start is blocked by tokvm's fence", where=where, fix="`tokvm rollback` lifts it")
    if state in (PowerState.PAUSED, PowerState.SUSPENDED):
        raise SourceError(f"the VM is {state}, so it cannot be started", where=where, fix="resume it by hand")

    def watch() -> None:
        asked = machines.read(uuid, ["runtime.question"]).get("runtime.question")
        questions.raise_if_asked(asked, where=where)

    refusal: SourceError | None = None
    try:
        begin: Any = found.ref.PowerOnVM_Task
        tasks.run(client, begin, "starting the VM", timeout_s=START_S, watch=watch)
    except faults.VsphereError as failed:
        if failed.fault != "InvalidPowerState":
            raise
        refusal = failed
    except ConnectionLost as lost:  # it may have been started all the same: look
        refusal = lost
    if not _wait_for(machines, uuid, PowerState.RUNNING, START_S if refusal is None else LANDING_S):
        raise refusal or SourceError("the server says that it started the VM, but it does not run", where=where)


LANDING_S = 10.0  # how long an order whose answer was lost may take to show


def _wait_for(machines: Machines, uuid: str, wanted: PowerState, timeout_s: float) -> bool:
    """Look until the VM is in this state, at least once."""
    deadline = time.monotonic() + timeout_s
    while power(machines, uuid) is not wanted:
        if time.monotonic() >= deadline:
            return False
        time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))
    return True


def server_time(client: Client) -> int:
    """Seconds since 1970 by the server's clock."""
    instance = client.ref(vim.ServiceInstance, "ServiceInstance")
    return seconds(client.ask(instance.CurrentTime, "asking for the time"))


def seconds(moment: Any) -> int:
    """The API's times bear their zone; one that does not is UTC."""
    return calendar.timegm(moment.utctimetuple())


def _not_off(client: Client, uuid: str, why: str) -> NotOff:
    return NotOff(
        f"the VM is not off: {why}",
        where=f"{client.where} VM {uuid}",
        fix="shut it down from inside the guest, give it more time, or allow cutting its power with --force-off",
    )
