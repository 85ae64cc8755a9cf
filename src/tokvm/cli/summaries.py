"""What the verbs of a migration print for people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from tokvm.app.workshop import Rehearsal
from tokvm.cli.output import print_fields, print_json, print_table, say
from tokvm.core.units import format_bytes, format_duration, format_rate
from tokvm.migration.reports import CutoverReport, FinishReport, PassReport, StatusReport, SyncReport


def print_passes(passes: Iterable[PassReport]) -> None:
    rows = [
        (
            one.number,
            one.kind,
            format_bytes(one.bytes),
            format_duration(one.seconds),
            format_rate(one.bytes / one.seconds) if one.seconds else "",
            "" if one.done else "not complete",
        )
        for one in passes
    ]
    if rows:
        print_table(("pass", "kind", "bytes", "time", "rate", ""), rows)


def print_sync(report: SyncReport) -> None:
    print_passes(report.passes)
    if report.predicted_downtime_s is not None:
        say(f"a cutover now would stop the VM for about {format_duration(report.predicted_downtime_s)}")
    say(f"synced ({report.stopped_by}); next: tokvm cutover {report.id}, or tokvm sync again for a smaller last delta")


def print_cutover(report: CutoverReport) -> None:
    print_passes(report.passes)
    for part, seconds in report.downtime_s.items():
        print_fields([(f"downtime {part}", format_duration(seconds))])
    print_fields((("target", report.target), ("outcome", report.outcome), ("", report.advice)))
    say(f"next: tokvm finish {report.id} when the VM is well; until then tokvm rollback {report.id} is possible")


def print_status(status: StatusReport) -> None:
    print_fields(
        (
            ("migration", status.id),
            ("vm", f"{status.name} ({status.vm_uuid})"),
            ("source", status.source),
            ("phase", status.phase),
            ("targets", ", ".join(status.targets)),
            ("snapshots", status.snapshots),
        )
    )
    print_passes(status.passes)
    for part, seconds in status.downtime_s.items():
        print_fields([(f"downtime {part}", format_duration(seconds))])
    say(f"next: {status.next}")


def print_finish(report: FinishReport) -> None:
    say(f"{report.name}: {report.snapshots_removed} snapshots of ours removed")
    for line in report.left:
        say(f"left as it is: {line}")


def print_lines(lines: list[str], *, json: bool) -> None:
    if json:
        print_json({"outcome": "dry-run", "steps": lines})
        return
    for number, line in enumerate(lines, 1):
        say(f"{number}. {line}")
    say("nothing was changed")


def print_dry_run(rehearsal: Rehearsal, *, json: bool) -> None:
    if json:
        print_json(
            {
                "outcome": "dry-run",
                "vm": asdict(rehearsal.vm),
                "plan": rehearsal.plan.to_json(),
                "findings": [asdict(finding) for finding in rehearsal.findings],
                "steps": list(rehearsal.steps),
            }
        )
        return
    for finding in rehearsal.findings:
        print_fields([(finding.severity, finding.what), ("   fix", finding.fix)])
    print_lines(list(rehearsal.steps), json=False)


def migrate_document(status: StatusReport, report: CutoverReport) -> dict[str, object]:
    """One document for both halves: every pass, the downtime's parts, the target, the outcome."""
    return {**status.to_dict(), **report.to_dict()}
