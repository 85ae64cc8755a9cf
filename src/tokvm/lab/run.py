"""A whole migration on trial: build the lab, let it live, migrate it with the real command, look from outside, report.

    run()  builds, migrates, reports, takes down      up()  builds and leaves it to the operator      down()  takes down

Everything a lab starts is written down in its folder before it is used, so `down` finds it after any crash.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokvm.lab import home as homes
from tokvm.lab.clock import OutsideClock
from tokvm.lab.errors import LabError
from tokvm.lab.home import LabRecord
from tokvm.lab.keeper import start_keeper
from tokvm.lab.libvirtd import ensure_libvirt
from tokvm.lab.link import Link
from tokvm.lab.machines import LabMachine, plan_machines
from tokvm.lab.played import LabHost, build
from tokvm.lab.report import LabOutcome, as_text, combined
from tokvm.lab.settings import LabSettings
from tokvm.lab.trial import Lab, Progress, begin, check_host, migrate_all

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LabReport:
    """`document` is what `--json` prints; `text` is for people; exit code 0 only when nothing was lost and all targets run."""

    document: dict[str, object]
    text: str
    exit_code: int


def silent(_text: str) -> None:
    """No progress."""


def run(settings: LabSettings, *, folder: Path | None = None, keep: bool = False, progress: Progress = silent) -> LabReport:
    """Once, from nothing to the report. Nothing is left behind unless `keep`; then `down` takes it away."""
    began = time.monotonic()
    if not settings.boots:
        raise LabError(
            f"a {settings.guest} never boots, so its move cannot be watched", fix="tokvm lab up, then try it by hand"
        )
    place = homes.new_home(folder)
    try:
        with _clock(place) as clock, _living(place, settings, clock, progress) as lab:
            reports = migrate_all(lab, settings, progress)
            reports = check_host(lab, reports)
    finally:
        (place / "run" / "lab.pid").unlink(missing_ok=True)
        if not keep:
            progress("taking the lab down")
            homes.take_down(place)
    shape: dict[str, object] = {
        "guest": settings.guest,
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
        clock_port = start_keeper(place, "clock")
        machines = plan_machines(settings.guests)
        progress("building guests")
        host = build(place, machines, settings, clock_port=clock_port)
        port = None
        if settings.shaped:
            port = start_keeper(place, "link", str(host.sshd.port), str(settings.link_rate or 0), str(settings.rtt_s))
        record = _record(place, host, machines, settings, progress, port=port)
        for one in machines if settings.boots else ():
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
    progress(f"building {settings.guests} guest{'s' if settings.guests > 1 else ''} and a {settings.source} host around")
    host = build(folder, machines, settings, clock_port=clock.port)
    link = Link(host.sshd.port, rate=settings.link_rate, rtt_s=settings.rtt_s).start() if settings.shaped else None
    try:
        record = _record(folder, host, machines, settings, progress, port=link.port if link else None)
        lab = Lab(folder, record, host, clock, tuple(machines))
        if not settings.at_once:
            begin(lab, lab.machines, settings, progress)
        yield lab
    finally:
        if link is not None:
            link.stop()


def _record(
    folder: Path,
    host: LabHost,
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
    url, options = host.reach(f"{sshd.user}@{sshd.host}:{port or sshd.port}")
    record = LabRecord(
        source=settings.source,
        url=url,
        options=options,
        ssh_config=str(sshd.config_file),
        libvirt=libvirt.uri,
        owner=libvirt.owner.value,
        machines={one.uuid: one.name for one in machines},
    )
    record.save(folder)
    return record
