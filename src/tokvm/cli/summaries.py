"""What the verbs of a migration print for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict

from tokvm.app.report import Attempt, Report, moment
from tokvm.app.workshop import Outline
from tokvm.cli.output import print_fields, print_json, print_table, say
from tokvm.core.text import readable
from tokvm.core.units import format_bytes, format_duration, format_rate
from tokvm.migration.forecast import error_percent
from tokvm.migration.phases import Phase
from tokvm.migration.reports import CutoverReport, FinishReport, PassReport, StatusReport, SyncReport
from tokvm.transfer.predict import PARTS, Prediction


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
    if report.prediction is not None:
        _print_now(report.prediction)
    say(f"synced ({report.stopped_by}); next: tokvm cutover {report.id}, or tokvm sync again for a smaller last delta")


def print_cutover(report: CutoverReport) -> None:
    print_passes(report.passes)
    _print_downtime(report.downtime_s, report.prediction)
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
    if status.finished is None and status.phase in (Phase.COPY, Phase.ROLLED_BACK):
        _print_downtime(status.downtime_s, None)
        if status.prediction is not None:
            _print_now(status.prediction)
    else:
        _print_downtime(status.downtime_s, status.prediction)
    say(f"next: {status.next}")


def _print_downtime(parts: dict[str, float], prediction: Prediction | None) -> None:
    """What was measured, and what had been predicted before the stop."""
    for part, seconds in parts.items():
        print_fields([(f"downtime {part}", format_duration(seconds))])
    if prediction is not None:
        print_fields([("predicted", f"{format_duration(prediction.total_s)}: {prediction.describe()}")])


def _print_now(prediction: Prediction) -> None:
    say(f"a cutover now would stop the VM for about {format_duration(prediction.total_s)}: {prediction.describe()}")


def print_report(report: Report) -> None:
    """Everything in the order it happened, then predicted beside actual for each cutover."""
    record = report.record
    print_fields(
        (
            ("migration", record.id),
            ("vm", f"{record.name} ({record.vm_uuid})"),
            ("source", record.source),
            ("targets", ", ".join(report.targets)),
            ("took", format_duration(report.until - record.created)),
        )
    )
    print_table(
        ("since", "phase", "for", "by", "note"),
        (
            (moment(one.begin), one.phase, format_duration(one.end - one.begin), one.event, readable(one.note))
            for one in report.phases
        ),
    )
    print_passes(report.passes)
    for rehearsal in report.rehearsals:
        timings = ", ".join(f"{part} {format_duration(seconds)}" for part, seconds in rehearsal.seconds().items())
        print_fields(
            (
                (f"rehearsal {rehearsal.number}", f"{moment(rehearsal.wall)} {rehearsal.verdict()}"),
                ("", rehearsal.text("why")),
                ("  timings", timings),
                ("  picture", rehearsal.text("screenshot") + ("" if rehearsal.picture else " (gone)")),
            )
        )
    for note in report.notes:
        say(f"{moment(note.wall)} {readable(note.text)}")
    for attempt in report.attempts:
        _print_attempt(attempt)
    if report.outside is not None:
        error = report.outside.error_percent
        off = "" if error is None else f"; the prediction was off by {error:+.1f} %"
        say(f"downtime by the outside clock: {format_duration(report.outside.total_s)}{off}")


def _print_attempt(attempt: Attempt) -> None:
    say(f"cutover {attempt.number}, {moment(attempt.wall)}: {attempt.end}")
    foreseen = {} if attempt.prediction is None else attempt.prediction.parts
    rows = []
    for part in PARTS:
        predicted, actual = foreseen.get(part), attempt.actual.get(part)
        if predicted is None and actual is None:
            continue
        rows.append(
            (
                part,
                "" if predicted is None else format_duration(predicted.seconds),
                "" if predicted is None else predicted.basis,
                "" if actual is None else format_duration(actual),
                "" if predicted is None or actual is None else _percent(error_percent(predicted.seconds, actual)),
            )
        )
    found = attempt.comparison
    if found is not None:
        total = (format_duration(found.predicted_s), "", format_duration(found.actual_s), _percent(found.error_percent))
        rows.append(("total", *total))
    print_table(("part", "predicted", "from", "actual", "off by"), rows)


def _percent(error: float | None) -> str:
    return "" if error is None else f"{error:+.1f} %"


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


def print_dry_run(outline: Outline, *, json: bool) -> None:
    if json:
        print_json(
            {
                "outcome": "dry-run",
                "vm": asdict(outline.vm),
                "plan": outline.plan.to_json(),
                "findings": [asdict(finding) for finding in outline.findings],
                "steps": list(outline.steps),
            }
        )
        return
    for finding in outline.findings:
        print_fields([(finding.severity, finding.what), ("   fix", finding.fix)])
    print_lines(list(outline.steps), json=False)


def migrate_document(status: StatusReport, report: CutoverReport) -> dict[str, object]:
    """One document for both halves: every pass, the downtime's parts, the target, the outcome."""
    return {**status.to_dict(), **report.to_dict()}


def print_rehearsal(document: Mapping[str, object]) -> None:
    """What `tokvm rehearse` found."""
    timings, attempts = document.get("timings"), document.get("attempts")
    taken = timings if isinstance(timings, dict) else {}
    proof = document.get("proof")
    boots = proof.get("boots", []) if isinstance(proof, dict) else []
    say(f"{'works' if document['works'] else 'does not work'}: {document['why']}")
    print_fields(
        (
            ("fix", str(document["fix"])),
            ("verdict", str(document["verdict"])),
            ("way", str(document["way"])),
            *((f"tried {one['way']}", str(one["why"])) for one in (attempts if isinstance(attempts, list) else [])),
            ("timings", ", ".join(f"{part} {format_duration(seconds)}" for part, seconds in taken.items())),
            ("boots", ", ".join(format_duration(seconds) for seconds in boots) if len(boots) > 1 else ""),
            ("picture", str(document["screenshot"])),
        )
    )
    predicted = document.get("predicted_downtime_s")
    if document["works"] and isinstance(predicted, float):
        say(f"a cutover now would stop the VM for about {format_duration(predicted)}")
