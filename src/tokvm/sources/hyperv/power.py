"""On and off: asking the guest to stop, cutting its power, starting it, and the two witnesses that it is off.

    first witness    the VM's state is Off, and no merge is under way
    second witness   each disk's file can be opened shared with nobody: no worker process, merge or backup holds it

The guest is asked through its shutdown service (InitiateShutdown), which returns at once; whether it obeys shows in the state
alone. A guest that was asked may stop at any time in the minutes after, whatever became of who asked: when it was asked is in
the record, and `stop_pending` is true for as long as Windows lets programs take to close.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from tokvm.core.errors import ConnectionLost, NotOff, SourceError
from tokvm.core.machine import OffEvidence, PowerState
from tokvm.core.text import readable
from tokvm.sources.hyperv import fence, record
from tokvm.sources.hyperv.answers import Fields
from tokvm.sources.hyperv.faults import Fault, HyperVError
from tokvm.sources.hyperv.machine import CHECKPOINTING, MERGING, OFF, RUNNING, SHUTTING_DOWN, STOPPING, Facts, power_state
from tokvm.sources.hyperv.powershell import Asking

log = logging.getLogger(__name__)

LANDS_S = 300  # a Windows guest with unsaved data has 5 minutes to close (Stop-VM -Force, Microsoft's documentation)
WATCH_S = 20.0  # how long one script looks on; a cut connection leaves it behind for no longer
FORCED_S = 120.0
START_S = 300.0
POLL_S = 1.0
_SLACK_S = 120.0  # for PowerShell to load and the module to answer
_ACCEPTED = (0, 4096)
_NO_SERVICE = -1


def power(shell: Asking, vm: str) -> PowerState:
    return record.look(shell, vm).power


def stop_pending(shell: Asking, vm: str) -> bool:
    facts = record.look(shell, vm)
    if facts.state in (STOPPING, SHUTTING_DOWN):
        return True
    asked = record.record_of(shell, vm, facts.record).asked
    if asked is None or facts.state != RUNNING:
        return False
    since_s = facts.now_s - asked
    return since_s < LANDS_S and facts.uptime_s >= since_s  # one that booted after we asked has forgotten it


def off_evidence(shell: Asking, vm: str) -> OffEvidence:
    answer = Fields.of(shell.ask("evidence", {"vm": vm}), shell.where, "evidence")
    state, operational = answer.number("state", most=1 << 32), answer.numbers("operational")
    held = [
        f"{one.text('path')} ({one.number('hresult', least=-(1 << 31), most=1 << 32) & 0xFFFFFFFF:#010x})"
        for one in answer.items("files")
        if not one.truth("free")
    ]
    busy = sorted(set(operational) & {MERGING, *CHECKPOINTING})
    detail = f"state {state}, operational {list(operational)}, files held: {', '.join(held) or 'none'}"
    return OffEvidence(power_state(state), not held and not busy, readable(detail))


def shut_down(shell: Asking, vm: str, *, deadline_s: float, force: bool) -> None:
    """Off, or NotOff. Cuts the power only if `force`: at the deadline, or when the guest cannot be asked."""
    deadline = time.monotonic() + deadline_s
    facts = record.look(shell, vm)
    if _is_off(shell, vm, facts):
        return
    asked = facts.now_s
    record.change(shell, vm, lambda found: replace(found, asked=asked), known=facts)
    refusal = _ask_guest(shell, vm, deadline)
    if power(shell, vm) is PowerState.OFF:
        return
    if not force:
        raise _not_off(shell, vm, refusal or f"the guest did not stop within {deadline_s:g} s")
    log.warning("VM %s did not stop (%s); cutting its power", vm, refusal or f"{deadline_s:g} s are over")
    refusal = _cut(shell, vm)
    if not _wait_for(shell, vm, PowerState.OFF, FORCED_S):
        raise _not_off(shell, vm, refusal or "its power was cut, but it is not off")


def _is_off(shell: Asking, vm: str, facts: Facts) -> bool:
    if facts.power in (PowerState.PAUSED, PowerState.SUSPENDED):
        what = "Resume-VM" if facts.power is PowerState.PAUSED else "Start-VM"
        raise NotOff(
            f"the VM is {facts.power}: its memory holds what its disks do not",
            where=f"{shell.where} VM {vm}",
            fix=f"run `Get-VM -Id {vm} | {what}` on the host, then again",
        )
    return facts.power is PowerState.OFF


def _ask_guest(shell: Asking, vm: str, deadline: float) -> str:
    """Ask, and look on until it is off or time is up. Returns why the guest could not be asked, if so."""
    ask, refusal = True, ""
    while (left := deadline - time.monotonic()) > 0:
        wait_s = min(WATCH_S, left)
        try:
            data: dict[str, object] = {"vm": vm, "ask": ask, "wait": round(wait_s, 2)}
            answer = Fields.of(shell.act("shutdown", data, timeout_s=wait_s + _SLACK_S), shell.where, "shutdown")
            said = answer.number_or_none("answer", least=-1, most=1 << 32)
            if answer.number("state", most=1 << 32) == OFF:
                return ""
        except HyperVError as failed:
            if failed.fault not in (Fault.BAD_STATE, Fault.TIMEOUT):
                return failed.what
            said = None
        except ConnectionLost as lost:
            log.warning("VM %s: %s", vm, lost.what)
            said, ask = None, True
        if said == _NO_SERVICE:
            return "the guest has no shutdown service (integration services), so it cannot be asked"
        if ask and said not in _ACCEPTED:
            refusal = "" if said is None else f"the guest's shutdown service answered {said}"
            time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))
        else:
            ask, refusal = False, ""
    return refusal


def _cut(shell: Asking, vm: str) -> str:
    try:
        shell.act("turn-off", {"vm": vm}, timeout_s=FORCED_S + _SLACK_S)
    except HyperVError as failed:
        if failed.fault is not Fault.BAD_STATE:
            return failed.what
    except ConnectionLost as lost:
        return lost.what
    return ""


def start(shell: Asking, vm: str) -> None:
    """Running when this returns."""
    facts = record.look(shell, vm)
    if facts.power is PowerState.RUNNING:
        return
    where = f"{shell.where} VM {vm}"
    if fence.has_fence(shell, vm, facts):
        raise SourceError("its start is blocked by tokvm's fence", where=where, fix="`tokvm rollback` lifts it")
    if facts.power in (PowerState.PAUSED, PowerState.SUSPENDED):
        raise SourceError(f"the VM is {facts.power}, so it cannot be started", where=where, fix="resume it by hand")
    refusal: SourceError | None = None
    try:
        shell.act("start", {"vm": vm}, timeout_s=START_S)
    except HyperVError as failed:
        if failed.fault not in (Fault.BAD_STATE, Fault.TIMEOUT):
            raise
        refusal = failed
    except ConnectionLost as lost:  # it may have been started all the same: look
        refusal = lost
    if not _wait_for(shell, vm, PowerState.RUNNING, START_S if refusal is None else LANDING_S):
        raise refusal or SourceError(
            "the host says that it started the VM, but it does not run",
            where=where,
            fix="look at its console and at the event log Hyper-V-Worker, and start it by hand",
        )


LANDING_S = 10.0  # how long an order whose answer was lost may take to show


def _wait_for(shell: Asking, vm: str, wanted: PowerState, timeout_s: float) -> bool:
    """Look until the VM is in this state, at least once."""
    deadline = time.monotonic() + timeout_s
    while power(shell, vm) is not wanted:
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True


def _not_off(shell: Asking, vm: str, why: str) -> NotOff:
    return NotOff(
        f"the VM is not off: {why}",
        where=f"{shell.where} VM {vm}",
        fix="shut it down from inside the guest, give it more time, or allow cutting its power with --force-off",
    )
