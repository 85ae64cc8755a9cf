"""The story of one migration, from the journal alone: phases, passes, rehearsals, each cutover's predicted and actual downtime.

    journal ──► Report ──► JSON (`to_dict`), text (cli/), SVG (report_svg)

Nothing is asked of any host, so it works after `finish` too. Only the pictures of rehearsals are files of their own, and the
outside clock's figures are handed in.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from tokvm.app.report_picture import Picture, read_bounded, read_picture
from tokvm.core.errors import UsageError
from tokvm.core.text import readable
from tokvm.core.units import MiB, parse_duration
from tokvm.migration.book import Book
from tokvm.migration.forecast import Comparison, compared, error_percent, foreseen, prediction_in, spent
from tokvm.migration.journal import Journal
from tokvm.migration.phases import Event, Phase
from tokvm.migration.records import EventRecord, MigrationRecord, RehearsalRecord
from tokvm.migration.reports import PassReport
from tokvm.migration.rounds import reports, rounds_of
from tokvm.transfer.predict import Prediction

MAX_DOCUMENT = 16 * MiB
SHOWN = ("verdict", "why", "ways", "screenshot", "predicted_downtime_s", "predicted_parts", "timings", "proof")
"""What is repeated of a rehearsal's document; the rest is what a cutover needs to replay it."""


@dataclass(frozen=True, slots=True)
class PhaseSpan:
    """`event`: what led to it; "" at the beginning. Seconds since 1970."""

    phase: Phase
    event: str
    begin: float
    end: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class Note:
    wall: float
    text: str


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """`shown`: the document's fields of SHOWN. picture: None where there is none (any more)."""

    number: int
    wall: float
    way: str
    works: bool
    shown: Mapping[str, object]
    picture: Picture | None = None

    def text(self, field: str) -> str:
        value = self.shown.get(field)
        return "" if value is None else readable(str(value))

    def verdict(self) -> str:
        """`works by micro: micro-morph`."""
        return f"{'works' if self.works else 'fails'} by {readable(self.way)}: {self.text('verdict')}"

    def seconds(self) -> dict[str, float]:
        """Its timings by part."""
        timings = self.shown.get("timings")
        found = timings.items() if isinstance(timings, dict) else ()
        return {readable(str(part)): float(value) for part, value in found if isinstance(value, int | float)}

    def to_dict(self) -> dict[str, object]:
        return {**self.shown, "number": self.number, "wall": self.wall, "way": self.way, "works": self.works}


@dataclass(frozen=True, slots=True)
class Attempt:
    """One cutover. wall: of the intent to stop. `end`: the phase it led to. actual: seconds by part, as far as it came."""

    number: int
    wall: float
    end: Phase
    prediction: Prediction | None
    actual: Mapping[str, float]

    @property
    def actual_s(self) -> float:
        return sum(self.actual.values())

    @property
    def comparison(self) -> Comparison | None:
        return None if self.prediction is None or not self.actual else compared(self.prediction, self.actual)

    def to_dict(self) -> dict[str, object]:
        return {
            "attempt": self.number,
            "wall": self.wall,
            "end": str(self.end),
            "predicted": None if self.prediction is None else self.prediction.to_dict(),
            "actual_parts": dict(self.actual),
            "actual_downtime_s": round(self.actual_s, 3),
            "comparison": None if self.comparison is None else asdict(self.comparison),
        }


@dataclass(frozen=True, slots=True)
class Outside:
    """The downtime that somebody outside of tokvm measured; `parts` may be empty. error_percent: the prediction's, of it."""

    total_s: float
    parts: Mapping[str, float]
    error_percent: float | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """`until`: the last moment that is known of it."""

    record: MigrationRecord
    targets: tuple[str, ...]
    until: float
    phases: tuple[PhaseSpan, ...]
    passes: tuple[PassReport, ...]
    rehearsals: tuple[Rehearsed, ...]
    attempts: tuple[Attempt, ...]
    notes: tuple[Note, ...]
    outside: Outside | None = None

    def to_dict(self) -> dict[str, object]:
        record = self.record
        return {
            "outcome": "report",
            "id": record.id,
            "name": record.name,
            "vm_uuid": record.vm_uuid,
            "source": record.source,
            "phase": str(record.phase),
            "created": record.created,
            "finished": record.finished,
            "targets": list(self.targets),
            "phases": [asdict(span) for span in self.phases],
            "passes": [one.to_dict() for one in self.passes],
            "rehearsals": [one.to_dict() for one in self.rehearsals],
            "cutovers": [one.to_dict() for one in self.attempts],
            "notes": [asdict(note) for note in self.notes],
            "outside": None if self.outside is None else asdict(self.outside),
        }


def moment(wall: float) -> str:
    """`2026-11-26 07:43:04 UTC`."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(wall))


def report_of(journal: Journal, state_dir: Path, name: str, *, outside: str | None = None) -> Report:
    """By the migration's id, the VM's name or uuid. outside: a downtime (`28s`), or a JSON document with `downtime_s` in it
    (the lab's). state_dir: where pictures with a relative name lie. UsageError when `outside` is neither."""
    record = journal.find(name)
    book = journal.book(record.id)
    events, passes = book.events(), reports(rounds_of(book))
    rehearsals = tuple(_rehearsed(one, state_dir) for one in book.rehearsals())
    ends = [record.created, *(e.wall for e in events), *(p.wall + p.seconds for p in passes), *(r.wall for r in rehearsals)]
    until = record.finished or max(ends)
    attempts = _attempts(book, events)
    return Report(
        record=record,
        targets=tuple(disk.path for disk in book.disks()),
        until=until,
        phases=_phases(record, events, until),
        passes=passes,
        rehearsals=rehearsals,
        attempts=attempts,
        notes=tuple(Note(event.wall, event.note) for event in events if event.source is event.target and event.event == "note"),
        outside=None if outside is None else _outside(outside, record.name, attempts),
    )


def _phases(record: MigrationRecord, events: list[EventRecord], until: float) -> tuple[PhaseSpan, ...]:
    moves = [event for event in events if event.event != "note"]
    ends = [*(event.wall for event in moves), until]
    first = PhaseSpan(Phase.COPY, "", record.created, ends[0])
    later = (
        PhaseSpan(event.target, event.event, event.wall, end, "" if prediction_in(event.note) else event.note)
        for event, end in zip(moves, ends[1:], strict=True)
    )
    return (first, *later)


def _attempts(book: Book, events: list[EventRecord]) -> tuple[Attempt, ...]:
    predictions, found = foreseen(book), []
    moves = [event for event in events if event.event != "note"]
    begun = [at for at, event in enumerate(moves) if event.event == Event.CUT_OVER]
    for number, (at, next_at) in enumerate(pairwise([*begun, len(moves)]), 1):
        inside = [event.target for event in moves[at:next_at] if event.event != Event.SYNC_AGAIN]
        found.append(Attempt(number, moves[at].wall, inside[-1], predictions.get(number), spent(book, number)))
    return tuple(found)


def _rehearsed(record: RehearsalRecord, state_dir: Path) -> Rehearsed:
    shown = {key: record.document[key] for key in SHOWN if key in record.document}
    path = shown.get("screenshot")
    picture = read_picture(state_dir / path) if isinstance(path, str) and path else None
    return Rehearsed(record.number, record.wall, record.way, record.works, shown, picture)


def _outside(text: str, name: str, attempts: tuple[Attempt, ...]) -> Outside:
    try:
        total, parts = parse_duration(text), dict[str, float]()
    except ValueError:
        total, parts = _from_document(text, name)
    lived = [one.prediction for one in attempts if "start" in one.actual]
    predicted = lived[-1] if lived else None
    return Outside(total, parts, None if predicted is None else error_percent(predicted.total_s, total))


def _from_document(path: str, name: str) -> tuple[float, dict[str, float]]:
    """`downtime_s` of a JSON document: {"total": seconds, part: seconds, …}; of several guests, the one with the VM's name."""
    fix = "give seconds (28s), or a JSON file with downtime_s.total in it, as `tokvm-lab --json` writes"
    try:
        document = json.loads(read_bounded(Path(path), MAX_DOCUMENT))
    except (OSError, ValueError, RecursionError) as exc:
        raise UsageError(f"the outside clock's figures cannot be read: {exc}", where=path, fix=fix) from exc
    guests = document.get("guests") if isinstance(document, dict) else None
    for one in guests if isinstance(guests, list) else ():
        if isinstance(one, dict) and one.get("guest") == name:
            document = one
    figures = document.get("downtime_s") if isinstance(document, dict) else None
    seconds = {
        str(part): float(value)
        for part, value in (figures.items() if isinstance(figures, dict) else ())
        if isinstance(value, int | float) and 0 <= value < float("inf")
    }
    if "total" not in seconds:
        raise UsageError("the document holds no downtime_s with a total", where=path, fix=fix)
    return seconds.pop("total"), seconds
