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
NOTED_S = 10.0  # how old the record of when we asked may be when we ask again
# Msvm_ShutdownComponent.InitiateShutdown, Microsoft's documentation: done, a job of its own, somebody asked already
_ACCEPTED = (0, 4096, 32782)
_NO_SERVICE = -1
_NOT_YET = {
    32768: "does not answer (32768): it is still booting, it hangs, or it lacks the integration services",
    32780: "is not ready (32780): it is still booting",
}


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
    """Off, or NotOff. Cuts the power only if `force`: at the deadline, or when the guest can never be asked.

    A guest that does not answer now may answer later. One that boots, or installs updates, is the last whose power to cut
    before the time is up that the operator gave.
    """
    deadline = time.monotonic() + deadline_s
    facts = record.look(shell, vm)
    if _is_off(shell, vm, facts):
        return
    _note_asked(shell, vm, facts)
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


def _note_asked(shell: Asking, vm: str, facts: Facts) -> None:
    """Whoever comes after us knows until when the guest may stop."""
    asked = facts.now_s
    record.change(shell, vm, lambda found: replace(found, asked=asked), known=facts)


def _ask_guest(shell: Asking, vm: str, deadline: float) -> str:
    """Ask, and look on until it is off or time is up. Returns why the guest could not be asked, if so."""
    ask, refusal, noted = True, "", time.monotonic()
    while (left := deadline - time.monotonic()) > 0:
        try:
            if ask and time.monotonic() - noted > NOTED_S:
                _note_asked(shell, vm, record.look(shell, vm))
                noted = time.monotonic()
            said, is_off = _watch(shell, vm, ask=ask, wait_s=min(WATCH_S, left))
        except HyperVError as failed:
            if failed.fault not in (Fault.BAD_STATE, Fault.TIMEOUT):
                return failed.what
            said, is_off = None, False
        except ConnectionLost as lost:
            log.warning("VM %s: %s", vm, lost.what)
            said, ask, is_off = None, True, False
        if is_off:
            return ""
        if said == _NO_SERVICE:
            return "the guest has no shutdown service (integration services), so it cannot be asked"
        if ask and said not in _ACCEPTED:
            refusal = _told(vm, said, refusal, left)
            time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))
        else:
            ask, refusal = False, ""
    return refusal


def _watch(shell: Asking, vm: str, *, ask: bool, wait_s: float) -> tuple[int | None, bool]:
    """(what the shutdown service answered, the VM is off)"""
    data: dict[str, object] = {"vm": vm, "ask": ask, "wait": round(wait_s, 2)}
    answer = Fields.of(shell.act("shutdown", data, timeout_s=wait_s + _SLACK_S), shell.where, "shutdown")
    said = answer.number_or_none("answer", least=-1, most=1 << 32)
    return said, answer.number("state", most=1 << 32) == OFF


def _told(vm: str, said: int | None, before: str, left_s: float) -> str:
    """Why the guest was not asked, told once as long as it stays the same."""
    if said is None:
        return ""
    why = f"the guest {_NOT_YET[said]}" if said in _NOT_YET else f"the guest's shutdown service answered {said}"
    if why != before:
        log.warning("VM %s cannot be shut down yet: %s; it is asked again for %.0f s", vm, why, left_s)
    return why


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
        fix="shut it down from inside the guest, give it more time (--deadline), or let its power be cut (--force-off); "
        "then cut over again",
    )
