"""What the lab reports: passes, downtime by the outside clock, the ledger, the target, the outcome.

    last heartbeat of the source   stop done    delta done    morph done    start done     first heartbeat of the target
    ├── stop ──────────────────────┤── delta ───┤── (morph) ──┤── start ────┤── boot ──────┤
    ├── total ─────────────────────────────────────────────────────────────────────────────┤

The ends are the outside clock's. Where one part ends and the next begins is when tokvm's event about it arrived, by the same
clock, so that the parts add up to the total; a cutover that morphs nothing has no such part. Without the events, tokvm's own
figures stand and boot is the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum

from tokvm.core.units import format_bytes, format_duration
from tokvm.lab.command import Event

MEASURED = ("stop", "delta", "morph", "start")
PARTS = (*MEASURED, "boot")
SEEN = (("picture", "screenshot"), ("drawn", "drawn"))
OPTIONAL = frozenset({"morph"})


class LabOutcome(StrEnum):
    MIGRATED = "migrated"
    LOST_WRITES = "lost-writes"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class GuestReport:
    """One guest's migration. ledger: acknowledged and lost, with what was seen of the records besides. predicted: the downtime
    that tokvm expected right before the stop, `total` and parts. rehearsal: what `tokvm rehearse` said; empty without one."""

    guest: str
    source: str
    passes: tuple[dict[str, object], ...]
    downtime_s: dict[str, float]
    ledger: dict[str, object]
    target: dict[str, object]
    outcome: LabOutcome
    reason: str = ""
    predicted: dict[str, float] = field(default_factory=dict)
    rehearsal: dict[str, object] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def downtime(last: float, first: float, events: Sequence[Event], own: dict[str, float]) -> dict[str, float]:
    """total and parts in seconds, for a last and a first heartbeat on CLOCK_MONOTONIC. `own`: tokvm's figures."""
    total = first - last
    ends = {str(event.fields.get("part")): event.at for event in events if event.name == "downtime"}
    parts: dict[str, float] = {}
    if all(part in ends for part in MEASURED if part not in OPTIONAL):
        before = last
        for part in (part for part in MEASURED if part in ends):
            end = min(max(ends[part], before), first)
            parts[part] = end - before
            before = end
        parts["boot"] = first - before
    else:
        parts = {part: own.get(part, 0.0) for part in MEASURED if part in own or part not in OPTIONAL}
        parts["boot"] = max(0.0, total - sum(parts.values()))
    return {"total": round(total, 3), **{part: round(parts[part], 3) for part in PARTS if part in parts}}


def combined(source: str, reports: Sequence[GuestReport], shape: dict[str, object]) -> dict[str, object]:
    """The one JSON document. With several guests: all passes, the longest downtime, the sum of the ledgers, and `guests`."""
    if len(reports) == 1:
        document = reports[0].to_dict()
        del document["guest"]
        return {**document, "lab": shape}
    worst = max(reports, key=lambda one: one.downtime_s.get("total", 0.0))
    ranked = [LabOutcome.MIGRATED, LabOutcome.LOST_WRITES, LabOutcome.FAILED]
    return {
        "source": source,
        "passes": [{**one, "guest": report.guest} for report in reports for one in report.passes],
        "downtime_s": worst.downtime_s,
        "ledger": {key: sum(_count(report, key) for report in reports) for key in ("acknowledged", "lost")},
        "target": [report.target for report in reports],
        "outcome": max((report.outcome for report in reports), key=ranked.index),
        "guests": [report.to_dict() for report in reports],
        "lab": shape,
    }


def _count(report: GuestReport, key: str) -> int:
    value = report.ledger.get(key, 0)
    return value if isinstance(value, int) else 0


def as_text(report: GuestReport) -> str:
    """For a person."""
    lines = [f"{report.guest}: {report.outcome}" + (f": {report.reason}" if report.reason else "")]
    if report.rehearsal:
        lines.append(
            f"  rehearsal {report.rehearsal.get('verdict')}, by {report.rehearsal.get('way')}: {report.rehearsal.get('why')}"
        )
        lines += [f"  {key:<9} {report.rehearsal[name]}" for key, name in SEEN if report.rehearsal.get(name)]
    for one in report.passes:
        size, seconds = _number(one.get("bytes")), _number(one.get("seconds"))
        lines.append(f"  pass      {one.get('kind', '?')!s:<6} {format_bytes(size):>9}  {format_duration(seconds)}")
    if report.downtime_s:
        parts = ", ".join(f"{part} {format_duration(report.downtime_s[part])}" for part in PARTS if part in report.downtime_s)
        lines.append(f"  downtime  {format_duration(report.downtime_s['total'])} seen from outside ({parts})")
    if report.predicted:
        lines.append(f"  predicted {format_duration(report.predicted['total'])} right before the stop")
    if report.ledger:
        lines.append(f"  ledger    {report.ledger['acknowledged']} writes acknowledged, {report.ledger['lost']} lost")
    if report.target:
        lines.append("  target    " + ", ".join(f"{key} {value}" for key, value in report.target.items()))
    return "\n".join(lines)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
