"""On and off: asking the guest to stop, cutting its power, starting it, and the witnesses that it is off.

    first witness    hostd: `Powered off`, from power.getstate and get.summary
    second witness   the kernel: no process of the VM in `esxcli vm process list`, and the files that it writes can be read,
                     so nobody holds their locks, on another host neither

The guest is asked through VMware Tools, which returns at once; whether it obeys shows in the state alone. A guest that was
asked may stop at any time in the minutes after, whatever became of who asked: when it was asked is in tokvm.json.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from tokvm.core.errors import ConnectionLost, ImageError, NotOff, SourceError
from tokvm.core.machine import OffEvidence, PowerState
from tokvm.core.text import readable
from tokvm.remote.sftp import RemoteFileError
from tokvm.sources.lanes import Lanes
from tokvm.sources.vmware import record
from tokvm.sources.vmware.esxcli import parse_rows
from tokvm.sources.vmware.faults import EsxError, Fault
from tokvm.sources.vmware.fields import confused
from tokvm.sources.vmware.inventory import inspection_of, questions
from tokvm.sources.vmware.layers import Layers
from tokvm.sources.vmware.machines import Machines, Seen
from tokvm.sources.vmware.record import Asked
from tokvm.sources.vmware.shell import Answer, Command, Shell, vim

log = logging.getLogger(__name__)

LANDS_S = 300  # a Windows guest with unsaved data may take 5 minutes to close
FORCED_S = 120.0
START_S = 300.0
ON_S = 60.0  # for the command, which returns when the VM is on, and not while a question waits for its answer
LANDING_S = 10.0  # how long an order whose answer was lost may take to show
POLL_S = 1.0
_DATE: Command = ("date", "+%s")
_PROCESSES: Command = ("esxcli", "--formatter=xml", "vm", "process", "list")
_STATES = {"Powered on": PowerState.RUNNING, "Powered off": PowerState.OFF, "Suspended": PowerState.SUSPENDED}


def power(machines: Machines, uuid: str) -> PowerState:
    return machines.look(uuid)[0].summary.power


def stop_pending(machines: Machines, shell: Shell, uuid: str) -> bool:
    seen, (state, date) = machines.look(uuid, lambda place: [record.question(place), _DATE])
    if seen.summary.power is PowerState.OFF:
        return False
    asked = record.record_of(shell, state).asked
    if asked is None or asked.boot != seen.summary.boot:  # one that booted after we asked has forgotten it
        return False
    return _seconds(date) - asked.at < LANDS_S


def _seconds(answer: Answer) -> int:
    text = answer.checked().strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 14):
        raise confused(answer.where, answer.what, f"{readable(repr(text), limit=40)} is no number")
    return int(text)


def off_evidence(machines: Machines, shell: Shell, lanes: Lanes, uuid: str) -> OffEvidence:
    seen, (state, processes, *inside) = machines.look(
        uuid, lambda place: [vim("vmsvc/power.getstate", place.vmid), _PROCESSES, *questions(place)]
    )
    told = _state(state)
    power_now = told if told is seen.summary.power else PowerState.UNKNOWN
    running = _has_process(processes, seen)
    held = [] if power_now is not PowerState.OFF or running else _held(machines, shell, lanes, seen, inside)
    detail = f"getstate {told}, summary {seen.summary.power}, process {'there' if running else 'none'}, " + (
        f"locked: {', '.join(held)}"
        if held
        else "no file looked at"
        if power_now is not PowerState.OFF or running
        else "all files read"
    )
    return OffEvidence(power_now, power_now is PowerState.OFF and not running and not held, readable(detail))


def _state(answer: Answer) -> PowerState:
    lines = answer.checked().strip().split("\n")
    return _STATES.get(lines[-1].strip(), PowerState.UNKNOWN)


def _has_process(answer: Answer, seen: Seen) -> bool:
    """By its uuid, or by its .vmx, whichever way that is written."""
    try:
        rows = parse_rows(answer.checked())
    except ValueError as exc:
        raise confused(answer.where, answer.what, str(exc)) from exc
    uuid = seen.summary.uuid.replace("-", "")
    tail = "/".join(seen.place.vmx.split("/")[-2:])
    return any(
        row.get("UUID", "").replace(" ", "").replace("-", "").lower() == uuid or row.get("ConfigFile", "").endswith(f"/{tail}")
        for row in rows
    )


def _held(machines: Machines, shell: Shell, lanes: Lanes, seen: Seen, answers: list[Answer]) -> list[str]:
    """The disks whose top layer cannot be read."""
    found = inspection_of(machines, seen, answers)
    held: list[str] = []
    for disk in found.hardware.disks:
        layers = Layers(shell, lanes, found.stores)
        try:
            if disk.chain and not disk.rdm:
                layers.touch(found.paths(disk)[0])
        except (EsxError, RemoteFileError, ImageError) as refused:
            held.append(f"{disk.node} ({refused.what})")
        finally:
            layers.close()
    return held


def shut_down(machines: Machines, shell: Shell, uuid: str, *, deadline_s: float, force: bool) -> None:
    """Off, or NotOff. Cuts the power only if `force`: at the deadline, or when the guest cannot be asked."""
    deadline = time.monotonic() + deadline_s
    seen, (state, date) = machines.look(uuid, lambda place: [record.question(place), _DATE])
    if _is_off(shell, uuid, seen):
        return
    asked = Asked(_seconds(date), seen.summary.boot)
    record.write(shell, seen.place, replace(record.record_of(shell, state), asked=asked))
    refusal = _ask_guest(machines, shell, uuid, seen, deadline)
    if power(machines, uuid) is PowerState.OFF:
        return
    if not force:
        raise _not_off(shell, uuid, refusal or f"the guest did not stop within {deadline_s:g} s")
    log.warning("VM %s did not stop (%s); cutting its power", uuid, refusal or f"{deadline_s:g} s are over")
    refusal = _cut(machines, shell, uuid)
    if not _wait_for(machines, uuid, PowerState.OFF, FORCED_S):
        raise _not_off(shell, uuid, refusal or "its power was cut, but it is not off")


def _is_off(shell: Shell, uuid: str, seen: Seen) -> bool:
    if seen.summary.power is PowerState.SUSPENDED:
        raise NotOff(
            "the VM is suspended: its memory holds what its disks do not",
            where=f"{shell.where} VM {uuid}",
            fix="resume it in the host's client, then again",
        )
    return seen.summary.power is PowerState.OFF


def _ask_guest(machines: Machines, shell: Shell, uuid: str, seen: Seen, deadline: float) -> str:
    """Ask, and look on until it is off or time is up. Returns why the guest could not be asked, if so."""
    refusal, ask = "", True
    while True:
        if ask:
            ask, refusal = _ask_once(shell, seen)
        if not refusal or ask:
            seen = machines.look(uuid)[0]
        if seen.summary.power is PowerState.OFF or (refusal and not ask) or time.monotonic() >= deadline:
            return refusal
        time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))


def _ask_once(shell: Shell, seen: Seen) -> tuple[bool, str]:
    """(whether to ask again, why it was refused)."""
    try:
        ended = shell.act(vim("vmsvc/power.shutdown", seen.vmid))
    except ConnectionLost as lost:
        log.warning("VM %s: %s", seen.summary.uuid, lost.what)
        return True, ""
    if not ended.failed:
        return False, ""
    error = ended.error()
    if error.fault is Fault.NO_TOOLS:
        return False, "VMware Tools do not run in the guest, so it cannot be asked"
    return error.fault in (Fault.BUSY, Fault.BAD_STATE), error.what


def _cut(machines: Machines, shell: Shell, uuid: str) -> str:
    seen, _ = machines.look(uuid)
    try:
        ended = shell.act(vim("vmsvc/power.off", seen.vmid), timeout_s=FORCED_S)
    except ConnectionLost as lost:
        return lost.what
    return ended.error().what if ended.failed and ended.fault is not Fault.BAD_STATE else ""


def start(machines: Machines, shell: Shell, uuid: str) -> None:
    """Running when this returns."""
    seen, (state,) = machines.look(uuid, lambda place: [record.question(place)])
    if seen.summary.power is PowerState.RUNNING:
        return
    where = f"{shell.where} VM {uuid}"
    if record.record_of(shell, state).fence is not None:
        raise SourceError("its start is blocked by tokvm's fence", where=where, fix="`tokvm rollback` lifts it")
    if seen.summary.power is not PowerState.OFF:
        raise SourceError(f"the VM is {seen.summary.power}, so it cannot be started", where=where, fix="resume it by hand")
    refusal = _power_on(shell, seen)
    if not _wait_for(machines, uuid, PowerState.RUNNING, START_S if refusal is None else LANDING_S):
        raise _not_running(machines, shell, uuid, refusal)


def _power_on(shell: Shell, seen: Seen) -> SourceError | None:
    """Why it may not have been started."""
    try:
        ended = shell.act(vim("vmsvc/power.on", seen.vmid), timeout_s=ON_S)
    except ConnectionLost as lost:  # it may have been started all the same: look
        return lost
    return ended.error() if ended.failed else None


def _not_running(machines: Machines, shell: Shell, uuid: str, refusal: SourceError | None) -> SourceError:
    where = f"{shell.where} VM {uuid}"
    seen, (message,) = machines.look(uuid, lambda place: [vim("vmsvc/message", place.vmid)])
    if seen.summary.question or message.text.lstrip().startswith("Virtual machine message"):
        said = message.text.strip() or seen.summary.question
        return SourceError(
            f"the VM waits for an answer before it starts: {readable(' / '.join(said.split(chr(10))))}",
            where=where,
            fix="answer it in the host's client (tokvm moved and copied nothing: `I moved it` keeps its uuid and MAC)",
        )
    return refusal or SourceError(
        "the host says that it started the VM, but it does not run",
        where=where,
        fix="look at its console and its vmware.log, and start it by hand",
    )


def _wait_for(machines: Machines, uuid: str, wanted: PowerState, timeout_s: float) -> bool:
    """Look until the VM is in this state, at least once. A question ends the wait: nobody here answers it."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen, _ = machines.look(uuid)
        if seen.summary.power is wanted:
            return True
        if time.monotonic() >= deadline or (seen.summary.question and wanted is PowerState.RUNNING):
            return False
        time.sleep(POLL_S)


def _not_off(shell: Shell, uuid: str, why: str) -> NotOff:
    return NotOff(
        f"the VM is not off: {why}",
        where=f"{shell.where} VM {uuid}",
        fix="shut it down from inside the guest, give it more time, or allow cutting its power with --force-off",
    )
