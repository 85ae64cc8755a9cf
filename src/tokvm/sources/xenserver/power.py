"""On and off: asking the guest to stop, cutting its power, starting it, and the two witnesses that it is off.

    first witness    the VM's power-state is `halted` and its dom-id is -1: xapi believes it off and Xen has no domain of it
    second witness   every disk VBD is `currently-attached` false: the storage side has let go of the disks

`vm-shutdown` blocks until the VM is off, or as long as xapi likes (20 minutes). Its ssh session is given up at our deadline;
xapi may go on, so the order may land later: `stop_pending` says whether it has one in hand (current-operations).
"""

from __future__ import annotations

import logging
import re
import time

from tokvm.core.errors import ConnectionLost, NotOff, SourceError
from tokvm.core.machine import OffEvidence, PowerState
from tokvm.core.text import readable
from tokvm.sources.xenserver.faults import Fault, XenServerError
from tokvm.sources.xenserver.inventory import power_state
from tokvm.sources.xenserver.xe import Command, Xe, value_of

log = logging.getLogger(__name__)

FORCED_S = 120.0  # pulling the plug takes seconds; a busy tapdisk may take its time to flush
START_S = 300.0
POLL_S = 0.5
_STOPPING = {"shutdown", "clean_shutdown", "hard_shutdown"}


def power(xe: Xe, vm: str) -> PowerState:
    return power_state(xe.ask(*value_of("vm", vm, "power-state")))


def stop_pending(xe: Xe, vm: str) -> bool:
    return bool(_STOPPING & operations(xe, vm))


def operations(xe: Xe, vm: str) -> set[str]:
    """What xapi has in hand for the VM, by name."""
    return set(re.findall(r"\w+", xe.ask(*value_of("vm", vm, "current-operations"))))


def off_evidence(xe: Xe, vm: str) -> OffEvidence:
    listing: Command = ("vbd-list", f"vm-uuid={vm}", "type=Disk", "params=currently-attached", "--minimal")
    state, domain, attached = xe.ask_all([value_of("vm", vm, "power-state"), value_of("vm", vm, "dom-id"), listing])
    said = power_state(state)
    believed = PowerState.UNKNOWN if said is PowerState.OFF and domain != "-1" else said
    vbds = attached.split(",")
    detail = f"power-state {state}, dom-id {domain}, disks attached: {attached or 'the VM has no disk'}"
    return OffEvidence(believed, all(vbd == "false" for vbd in vbds), readable(detail))


def shut_down(xe: Xe, vm: str, *, deadline_s: float, force: bool) -> None:
    """Off, or NotOff. Cuts the power only if `force`: at the deadline, or when the guest cannot be asked."""
    deadline = time.monotonic() + deadline_s
    if _is_off(xe, vm):
        return
    refusal = _ask_guest(xe, vm, deadline)
    if _wait_for(xe, vm, PowerState.OFF, 0.0):
        return
    if not force:
        raise _not_off(xe, vm, refusal or f"the guest did not stop within {deadline_s:g} s")
    log.warning("VM %s did not stop (%s); cutting its power", vm, refusal or f"{deadline_s:g} s are over")
    refusal = _cut(xe, vm)
    if not _wait_for(xe, vm, PowerState.OFF, FORCED_S):
        raise _not_off(xe, vm, refusal or "its power was cut, but it is not off")


def _is_off(xe: Xe, vm: str) -> bool:
    state = power(xe, vm)
    if state in (PowerState.PAUSED, PowerState.SUSPENDED):
        raise NotOff(
            f"the VM is {state}: its memory holds what its disks do not",
            where=f"{xe.where} VM {vm}",
            fix=f"run `xe vm-{'unpause' if state is PowerState.PAUSED else 'resume'} uuid={vm}` on the host, then again",
        )
    return state is PowerState.OFF


def _ask_guest(xe: Xe, vm: str, deadline: float) -> str:
    """Ask for a clean shutdown until it is off or time is up. Returns why the host refused, if it did."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            xe.act("vm-shutdown", f"uuid={vm}", timeout_s=left)
        except XenServerError as failed:
            if failed.fault not in (Fault.BAD_POWER_STATE, Fault.BUSY, Fault.XAPI_AWAY):
                return failed.what
        except ConnectionLost as lost:
            log.warning("VM %s: %s", vm, lost.what)
        if _settled_off(xe, vm, deadline):
            return ""
        time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))
    return ""


def _settled_off(xe: Xe, vm: str, deadline: float) -> bool:
    """Wait while the host has the shutdown in hand. True when the VM is off, False when it must be asked again."""
    while time.monotonic() < deadline:
        try:
            if power(xe, vm) is PowerState.OFF:
                return True
            if not stop_pending(xe, vm):
                return power(xe, vm) is PowerState.OFF
        except ConnectionLost as lost:
            log.warning("VM %s: %s", vm, lost.what)
        time.sleep(POLL_S)
    return False


def _cut(xe: Xe, vm: str) -> str:
    try:
        xe.act("vm-shutdown", f"uuid={vm}", "force=true", timeout_s=FORCED_S)
    except XenServerError as failed:
        if failed.fault is not Fault.BAD_POWER_STATE:
            return failed.what
    except ConnectionLost as lost:
        return lost.what
    return ""


def start(xe: Xe, vm: str) -> None:
    """Running when this returns."""
    state = power(xe, vm)
    if state is PowerState.RUNNING:
        return
    if state is not PowerState.OFF:
        raise SourceError(
            f"the VM is {state}, so it cannot be started", where=f"{xe.where} VM {vm}", fix="resume or unpause it by hand"
        )
    refusal: SourceError | None = None
    try:
        xe.act("vm-start", f"uuid={vm}", timeout_s=START_S)
    except XenServerError as failed:
        if failed.fault not in (Fault.BAD_POWER_STATE, Fault.BUSY):
            raise
        refusal = failed
    except ConnectionLost as lost:  # it may have been started all the same: look
        refusal = lost
    if not _wait_for(xe, vm, PowerState.RUNNING, START_S if refusal is None or starting(xe, vm) else POLL_S):
        raise refusal or SourceError(
            "the host says that it started the VM, but it does not run",
            where=f"{xe.where} VM {vm}",
            fix="look at its console and at the host's log, and start it by hand",
        )


def starting(xe: Xe, vm: str) -> bool:
    return bool({"start", "start_on"} & operations(xe, vm))


def _wait_for(xe: Xe, vm: str, wanted: PowerState, timeout_s: float) -> bool:
    """Look until the VM is in this state, at least once."""
    deadline = time.monotonic() + timeout_s
    while power(xe, vm) is not wanted:
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True


def _not_off(xe: Xe, vm: str, why: str) -> NotOff:
    return NotOff(
        f"the VM is not off: {why}",
        where=f"{xe.where} VM {vm}",
        fix="shut it down from inside the guest, give it more time (--deadline), or let its power be cut (--force-off); "
        "then cut over again",
    )
