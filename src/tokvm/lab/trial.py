"""Migrate a lab's guests with the real command, and judge what came of it from outside.

move (moving.py) ─► target boots ─► ledger checked, new writes acknowledged ─► tokvm finish ─► the source off, no snapshots left
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from tokvm.core.errors import TokvmError
from tokvm.lab.clock import Boot, OutsideClock
from tokvm.lab.command import Event, Finished, finish_argv, run_tokvm, target_folder
from tokvm.lab.errors import LabError
from tokvm.lab.home import LabRecord, try_virsh
from tokvm.lab.machines import LabMachine
from tokvm.lab.moving import Move, Moved, draw_report, move, predicted
from tokvm.lab.played import LabHost
from tokvm.lab.report import GuestReport, LabOutcome, downtime
from tokvm.lab.settings import LabSettings
from tokvm.testing import pids

log = logging.getLogger(__name__)

Progress = Callable[[str], None]
WARM_UP_WRITES = 20  # acknowledged before the migration begins
PROOF_WRITES = 5  # acknowledged by the target afterwards


@dataclass(frozen=True, slots=True)
class Lab:
    """A lab that lives."""

    folder: Path
    record: LabRecord
    host: LabHost
    clock: OutsideClock
    machines: tuple[LabMachine, ...]


def begin(lab: Lab, machines: Sequence[LabMachine], settings: LabSettings, progress: Progress) -> None:
    """Start guests, until all of them have written something."""
    for one in machines:
        lab.host.start(one.name)
    for one in machines:
        boot = lab.clock.wait_ready(one.name, timeout_s=settings.boot_timeout_s)
        progress(f"{one.name} runs on {boot.root}, writing its ledger")
    for one in machines:
        lab.clock.wait_acknowledged(one.name, WARM_UP_WRITES, timeout_s=settings.boot_timeout_s)


def migrate_all(lab: Lab, settings: LabSettings, progress: Progress) -> list[GuestReport]:
    """All guests at once, or as many as the settings say, and then only those run: one tokvm process for each. Interrupted,
    those are killed."""
    migrate = _in_its_turn if settings.at_once else _migrate
    with ThreadPoolExecutor(max_workers=settings.at_once or len(lab.machines)) as pool:
        under_way = [pool.submit(migrate, lab, one, settings, progress) for one in lab.machines]
        try:
            return [one.result() for one in under_way]
        except BaseException:
            for one in under_way:
                one.cancel()
            lab.clock.stop()  # ends every wait for a guest
            while wait(under_way, timeout=0.1).not_done:  # one of them may be about to start tokvm
                pids.kill_noted(lab.folder / "run")
            raise


def _in_its_turn(lab: Lab, machine: LabMachine, settings: LabSettings, progress: Progress) -> GuestReport:
    """Started for it, and switched off on the target when it was judged: guests that wait would take the others' CPU."""
    try:
        begin(lab, [machine], settings, progress)
    except TokvmError as exc:
        return _failure(lab, machine, str(exc))
    report = _migrate(lab, machine, settings, progress)
    if report.outcome is LabOutcome.MIGRATED:
        try_virsh(lab.record.libvirt, "destroy", machine.name)
    return report


def _migrate(lab: Lab, machine: LabMachine, settings: LabSettings, progress: Progress) -> GuestReport:
    target_folder(lab.folder, machine.name).mkdir(mode=0o700)
    try:
        moved = move(
            Move(
                lab.folder,
                lab.record,
                lab.clock,
                settings,
                machine.name,
                say=lambda text: progress(f"{machine.name}: {text}"),
                tell=lambda event: _tell(machine.name, event, progress),
            )
        )
        if moved.done.code != 0:
            return _failed(lab, machine, moved)
        boot = lab.clock.wait_ready(machine.name, timeout_s=settings.boot_timeout_s, known=moved.known)
        progress(f"{machine.name}: lives on the target, root is {boot.root}")
        _wait_for_new_writes(lab.clock, machine.name, boot, timeout_s=settings.boot_timeout_s)
        report = _report(lab, machine, moved, boot)
        finished = run_tokvm(finish_argv(lab.folder, machine.name), lab.folder, timeout_s=settings.migrate_timeout_s)
        if finished.code == 0 and settings.rehearse:
            drawn = draw_report(lab.folder, settings, machine.name, outside_s=report.downtime_s["total"])
            report = replace(report, rehearsal={**report.rehearsal, **drawn})
    except TokvmError as exc:
        return _failure(lab, machine, str(exc))
    if finished.code != 0:
        return _worse(report, f"tokvm finish ended with {finished.code}: {_error(finished)}")
    return report


def _wait_for_new_writes(clock: OutsideClock, guest: str, boot: Boot, *, timeout_s: float) -> None:
    """The target does not only boot, it goes on writing where the source stopped."""
    wanted = len(clock.acknowledged(guest)) + PROOF_WRITES
    clock.wait_acknowledged(guest, wanted, timeout_s=timeout_s)
    if clock.last_heartbeat(boot.id) is None:
        raise LabError(f"{guest} writes but shows no heartbeat")


def _report(lab: Lab, machine: LabMachine, moved: Moved, boot: Boot) -> GuestReport:
    done = moved.done
    beats = [lab.clock.last_heartbeat(one) for one in moved.known]
    last = max((beat for beat in beats if beat is not None), default=None)
    first = lab.clock.first_heartbeat(boot.id)
    if last is None or first is None:
        raise LabError("the outside clock saw no heartbeat before, or none after", where=machine.name)
    ledger = lab.clock.ledger_report(machine.name, boot.id)
    troubles = lab.clock.troubles(machine.name)
    intact = ledger.intact and not troubles
    return GuestReport(
        guest=machine.name,
        source=lab.record.source,
        passes=_passes(done.document),
        downtime_s=downtime(last, first, done.events, _figures(done.document)),
        ledger={
            "acknowledged": ledger.acknowledged,
            "lost": ledger.lost,
            "present": ledger.present,
            "bad": ledger.bad,
            "missing": ledger.missing,
        },
        target={"domain": machine.name, "libvirt": lab.record.libvirt, "state": "running", "root": boot.root},
        outcome=LabOutcome.MIGRATED if intact else LabOutcome.LOST_WRITES,
        reason="" if intact else "; ".join(troubles) or "the target's ledger is not what was acknowledged",
        predicted=predicted(moved),
        rehearsal=moved.rehearsal,
    )


def _passes(document: dict[str, object]) -> tuple[dict[str, object], ...]:
    rows = document.get("passes")
    if not isinstance(rows, list):
        return ()
    return tuple({key: row.get(key) for key in ("kind", "bytes", "seconds")} for row in rows if isinstance(row, dict))


def _figures(document: dict[str, object]) -> dict[str, float]:
    parts = document.get("downtime_s")
    return {str(key): float(value) for key, value in parts.items()} if isinstance(parts, dict) else {}


def check_host(lab: Lab, reports: list[GuestReport]) -> list[GuestReport]:
    """Afterwards the source is off, our snapshots are gone, and nothing was sent that is not in the contract."""
    violations = lab.host.violations()
    checked = []
    for machine, report in zip(lab.machines, reports, strict=True):
        complaint = ""
        if report.outcome is LabOutcome.MIGRATED:
            if lab.host.is_running(machine.name):
                complaint = "two copies run: the source is on"
            elif lab.host.snapshots(machine.name):
                complaint = "snapshots of ours are left on the source"
            elif violations:
                complaint = f"commands outside the contract were sent: {violations[0]['command']!r}"
        checked.append(_worse(report, complaint) if complaint else report)
    return checked


def _worse(report: GuestReport, reason: str) -> GuestReport:
    return replace(report, outcome=LabOutcome.FAILED, reason=reason)


def _failed(lab: Lab, machine: LabMachine, moved: Moved) -> GuestReport:
    done = moved.done
    report = _failure(lab, machine, f"tokvm ended with {done.code}: {_error(done)}", _passes(done.document))
    return replace(report, rehearsal=moved.rehearsal)


def _failure(lab: Lab, machine: LabMachine, reason: str, passes: tuple[dict[str, object], ...] = ()) -> GuestReport:
    acknowledged = len(lab.clock.acknowledged(machine.name))
    ledger: dict[str, object] = {"acknowledged": acknowledged, "lost": 0, "checked": False}
    return GuestReport(machine.name, lab.record.source, passes, {}, ledger, {}, LabOutcome.FAILED, reason)


def _error(done: Finished) -> str:
    error = done.document.get("error")
    if isinstance(error, dict):
        return " ".join(str(error.get(key, "")) for key in ("where", "what", "fix"))
    if "works" in done.document:
        return f"the rehearsal did not boot: {done.document.get('why')}"
    return "\n".join(done.messages)


def _tell(name: str, event: Event, progress: Progress) -> None:
    fields = event.fields
    match event.name:
        case "phase":
            progress(f"{name}: phase {fields.get('phase')}")
        case "step":
            progress(f"{name}: {fields.get('step')}")
        case "note":
            progress(f"{name}: {fields.get('text')}")
        case "pass_end":
            progress(f"{name}: pass {fields.get('number')} ({fields.get('kind')}), {fields.get('bytes')} bytes")
        case "downtime":
            progress(f"{name}: {fields.get('part')} took {fields.get('seconds')} s")
