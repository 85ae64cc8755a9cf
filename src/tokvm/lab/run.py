"""A whole migration on trial: build the lab, let it live, migrate it with the real command, look from outside, report.

    run()  builds, migrates, reports, takes down      up()  builds and leaves it to the operator      down()  takes down

Everything a lab starts is written down in its folder before it is used, so `down` finds it after any crash.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokvm.core.errors import TokvmError
from tokvm.lab import home as homes
from tokvm.lab.clock import Boot, OutsideClock
from tokvm.lab.command import Event, Finished, finish_argv, migrate_argv, run_tokvm, target_folder
from tokvm.lab.errors import LabError
from tokvm.lab.home import LabRecord
from tokvm.lab.libvirtd import ensure_libvirt
from tokvm.lab.link import Link
from tokvm.lab.report import GuestReport, LabOutcome, as_text, combined, downtime
from tokvm.lab.settings import LabSettings
from tokvm.lab.xenserver import LabMachine, build_xenserver, plan_machines
from tokvm.testing import pids
from tokvm.testing.xenserver.host import XenHost

log = logging.getLogger(__name__)

Progress = Callable[[str], None]

WARM_UP_WRITES = 20  # acknowledged before the migration begins
PROOF_WRITES = 5  # acknowledged by the target afterwards
SETTLE_S = 30.0
KEEPER_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class LabReport:
    """`document` is what `--json` prints; `text` is for people; exit code 0 only when nothing was lost and all targets run."""

    document: dict[str, object]
    text: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Lab:
    """A lab that lives."""

    folder: Path
    record: LabRecord
    host: XenHost
    clock: OutsideClock
    machines: tuple[LabMachine, ...]


def silent(_text: str) -> None:
    """No progress."""


def run(settings: LabSettings, *, folder: Path | None = None, keep: bool = False, progress: Progress = silent) -> LabReport:
    """Once, from nothing to the report. Nothing is left behind unless `keep`; then `down` takes it away."""
    began = time.monotonic()
    place = homes.new_home(folder)
    try:
        with _clock(place) as clock, _living(place, settings, clock, progress) as lab:
            reports = _migrate_all(lab, settings, progress)
            reports = _check_host(lab, reports)
    finally:
        (place / "run" / "lab.pid").unlink(missing_ok=True)
        if not keep:
            progress("taking the lab down")
            homes.take_down(place)
    shape: dict[str, object] = {
        "guests": settings.guests,
        "disk_size": settings.disk_size,
        "write_rate": settings.write_rate,
        "link_rate": settings.link_rate,
        "rtt_s": settings.rtt_s,
        "seconds": round(time.monotonic() - began, 1),
    }
    good = all(report.outcome is LabOutcome.MIGRATED for report in reports)
    text = "\n".join(as_text(report) for report in reports)
    return LabReport(combined(settings.source, reports, shape), text, 0 if good else 1)


def up(settings: LabSettings, *, folder: Path | None = None, progress: Progress = silent) -> tuple[Path, LabRecord]:
    """A lab that stays until `down`: guests run, the clock listens in a process of its own. For trying tokvm by hand."""
    place = homes.new_home(folder)
    try:
        clock_port = _start_keeper(place)
        machines = plan_machines(settings.guests)
        progress("building guests")
        host = build_xenserver(place, machines, settings, clock_port=clock_port)
        record = _record(place, host, machines, settings, progress)
        for one in machines:
            progress(f"starting {one.name}")
            host.start(one.name)
    except BaseException:
        (place / "run" / "lab.pid").unlink(missing_ok=True)
        homes.take_down(place)
        raise
    (place / "run" / "lab.pid").unlink(missing_ok=True)
    return place, record


def down(folder: Path | None = None, *, progress: Progress = silent) -> int:
    """Take down the lab in `folder`, or all of them. Returns how many there were."""
    found = [folder] if folder is not None else homes.all_homes()
    for place in found:
        progress(f"taking {place} down")
        homes.take_down(place)
    return len(found)


@contextmanager
def _clock(folder: Path) -> Iterator[OutsideClock]:
    with OutsideClock(folder / "clock.jsonl") as clock:
        yield clock


@contextmanager
def _living(folder: Path, settings: LabSettings, clock: OutsideClock, progress: Progress) -> Iterator[Lab]:
    """Guests that run and have written something."""
    machines = plan_machines(settings.guests)
    progress(f"building {settings.guests} guest{'s' if settings.guests > 1 else ''} and a XenServer around")
    host = build_xenserver(folder, machines, settings, clock_port=clock.port)
    link = Link(host.sshd.port, rate=settings.link_rate, rtt_s=settings.rtt_s).start() if settings.shaped else None
    try:
        record = _record(folder, host, machines, settings, progress, port=link.port if link else None)
        for one in machines:
            host.start(one.name)
        for one in machines:
            boot = clock.wait_ready(one.name, timeout_s=settings.boot_timeout_s)
            progress(f"{one.name} runs on {boot.root}, writing its ledger")
        for one in machines:
            clock.wait_acknowledged(one.name, WARM_UP_WRITES, timeout_s=settings.boot_timeout_s)
        yield Lab(folder, record, host, clock, tuple(machines))
    finally:
        if link is not None:
            link.stop()


def _record(
    folder: Path,
    host: XenHost,
    machines: Sequence[LabMachine],
    settings: LabSettings,
    progress: Progress,
    *,
    port: int | None = None,
) -> LabRecord:
    progress("starting libvirt")
    libvirt = ensure_libvirt(folder)
    sshd = host.sshd
    if port is not None:
        sshd.also_at(port)
    record = LabRecord(
        source=settings.source,
        url=f"xenserver://{sshd.user}@{sshd.host}:{port or sshd.port}",
        ssh_config=str(sshd.config_file),
        libvirt=libvirt.uri,
        owner=libvirt.owner.value,
        machines={one.uuid: one.name for one in machines},
    )
    record.save(folder)
    return record


def _migrate_all(lab: Lab, settings: LabSettings, progress: Progress) -> list[GuestReport]:
    """All guests at once: one tokvm process for each."""
    with ThreadPoolExecutor(max_workers=len(lab.machines)) as pool:
        return list(pool.map(lambda one: _migrate(lab, one, settings, progress), lab.machines))


def _migrate(lab: Lab, machine: LabMachine, settings: LabSettings, progress: Progress) -> GuestReport:
    known = frozenset(boot.id for boot in lab.clock.boots(machine.name))
    target_folder(lab.folder, machine.name).mkdir(mode=0o700)
    argv = migrate_argv(lab.record, lab.folder, machine.name, passes=settings.passes)
    progress(f"{machine.name}: tokvm {' '.join(argv[:3])} …")
    try:
        done = run_tokvm(
            argv,
            lab.folder,
            timeout_s=settings.migrate_timeout_s,
            on_event=lambda event: _tell(machine.name, event, progress),
        )
        if done.code != 0:
            return _failed(lab, machine, done)
        boot = lab.clock.wait_ready(machine.name, timeout_s=settings.boot_timeout_s, known=known)
        progress(f"{machine.name}: lives on the target, root is {boot.root}")
        _wait_for_new_writes(lab.clock, machine.name, boot, timeout_s=settings.boot_timeout_s)
        report = _report(lab, machine, done, boot, known)
        finished = run_tokvm(finish_argv(lab.folder, machine.name), lab.folder, timeout_s=settings.migrate_timeout_s)
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


def _report(lab: Lab, machine: LabMachine, done: Finished, boot: Boot, known: frozenset[str]) -> GuestReport:
    beats = [lab.clock.last_heartbeat(one) for one in known]
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
    )


def _passes(document: dict[str, object]) -> tuple[dict[str, object], ...]:
    rows = document.get("passes")
    if not isinstance(rows, list):
        return ()
    return tuple({key: row.get(key) for key in ("kind", "bytes", "seconds")} for row in rows if isinstance(row, dict))


def _figures(document: dict[str, object]) -> dict[str, float]:
    parts = document.get("downtime_s")
    return {str(key): float(value) for key, value in parts.items()} if isinstance(parts, dict) else {}


def _check_host(lab: Lab, reports: list[GuestReport]) -> list[GuestReport]:
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
    return GuestReport(
        report.guest,
        report.source,
        report.passes,
        report.downtime_s,
        report.ledger,
        report.target,
        LabOutcome.FAILED,
        reason,
    )


def _failed(lab: Lab, machine: LabMachine, done: Finished) -> GuestReport:
    return _failure(lab, machine, f"tokvm ended with {done.code}: {_error(done)}", _passes(done.document))


def _failure(lab: Lab, machine: LabMachine, reason: str, passes: tuple[dict[str, object], ...] = ()) -> GuestReport:
    acknowledged = len(lab.clock.acknowledged(machine.name))
    ledger: dict[str, object] = {"acknowledged": acknowledged, "lost": 0, "checked": False}
    return GuestReport(machine.name, lab.record.source, passes, {}, ledger, {}, LabOutcome.FAILED, reason)


def _error(done: Finished) -> str:
    error = done.document.get("error")
    if isinstance(error, dict):
        return " ".join(str(error.get(key, "")) for key in ("where", "what", "fix"))
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


def _start_keeper(folder: Path) -> int:
    """The outside clock in a process that stays. Returns its port."""
    log_file = (folder / "keeper.log").open("wb")
    with log_file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tokvm.lab.run", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            start_new_session=True,
        )
    pids.note(folder / "run", "keeper", process.pid)
    port_file = folder / "clock.port"
    until = time.monotonic() + KEEPER_TIMEOUT_S
    while not port_file.exists():
        if process.poll() is not None or time.monotonic() > until:
            raise LabError("the outside clock did not start", where=str(folder / "keeper.log"))
        time.sleep(0.02)
    return int(port_file.read_text())


def keep_clock(folder: Path) -> None:
    """The keeper's life: until it is killed."""
    with OutsideClock(folder / "clock.jsonl") as clock:
        fresh = folder / "clock.port.new"
        fresh.write_text(f"{clock.port}\n")
        fresh.replace(folder / "clock.port")
        threading.Event().wait()


if __name__ == "__main__":
    keep_clock(Path(sys.argv[1]))
