"""The downtime that is to be expected, the one that was foreseen at the stop, and the one that came: from the journal alone.

    passes, earlier cutovers, rehearsals, other VMs' cutovers ──► forecast ──► note of the CUT_OVER event ──► foreseen
    timings, final pass ──► spent                                             (never changed after it: events stay)

The n-th CUT_OVER event is attempt n. The `delta` of a timing holds the snapshot and the witnesses around the copying too;
here they are the overhead, so that what the bytes cost and what the asking costs can each be foreseen.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tokvm.migration.book import Book
from tokvm.migration.phases import Event, Phase
from tokvm.migration.records import DowntimePart, EventRecord, RehearsalRecord, StrangerTiming
from tokvm.migration.rounds import measured, newest_done, rounds_of
from tokvm.transfer.predict import PARTS, Basis, Estimate, PassKind, Prediction, predict_downtime, typical

ALIKE = ("stop", "overhead", "start")
"""Parts that other VMs' cutovers say something about: their hypervisor's ways, not their guests'."""


CONVERSION = Estimate(180.0, Basis.ASSUMED)
"""A virt-v2v that was never tried: 250-550 s without KVM on two busy cores, for a small Debian."""


def forecast(book: Book, wall: float) -> Prediction | None:
    """The downtime of a cutover at `wall` (seconds since 1970); None before a pass is done."""
    rounds = rounds_of(book)
    last = newest_done(rounds)
    if last is None:
        return None
    return predict_downtime(
        measured(rounds),
        _known(book),
        since_last_snapshot_s=max(0.0, wall - last.snapshot.wall),
        most_bytes=sum(disk.size for disk in book.disks()),
    )


def expected(book: Book) -> Prediction | None:
    """For a status: of a cutover now while none has begun, else what was foreseen when the newest one did."""
    record = book.record()
    if record.finished is None and record.phase in (Phase.COPY, Phase.ROLLED_BACK):
        return forecast(book, book.now())
    return foreseen(book).get(record.attempt)


def as_note(prediction: Prediction | None) -> str:
    """For the CUT_OVER event."""
    return "" if prediction is None else json.dumps(prediction.to_dict())


def foreseen(book: Book) -> dict[int, Prediction]:
    """What was predicted right before the stop, by the attempt's number; attempts without a prediction are left out."""
    found = {}
    for attempt, event in enumerate(_cutovers(book), 1):
        prediction = prediction_in(event.note)
        if prediction is not None:
            found[attempt] = prediction
    return found


def prediction_in(note: str) -> Prediction | None:
    """The one that an event's note holds; None when it holds none (journals of before predictions were kept)."""
    try:
        document = json.loads(note) if note.startswith("{") else None
        return None if not isinstance(document, dict) else Prediction.from_dict(document)
    except ValueError:
        return None


def spent(book: Book, attempt: int) -> dict[str, float]:
    """Seconds of the parts that were measured in an attempt, in the order of PARTS; what is missing was not come to."""
    parts = {str(timing.part): timing.seconds for timing in book.timings(attempt)}
    if DowntimePart.DELTA in parts:
        copying = min(parts["delta"], _final_copy_s(book, attempt))
        parts |= {"delta": round(copying, 3), "overhead": round(parts["delta"] - copying, 3)}
    return {name: parts[name] for name in PARTS if name in parts}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Predicted and actual seconds of the parts that an attempt came to. error_percent: how far the prediction lay from what
    came, of what came: 25.0 where 10 s were foreseen and 8 s came; None of 0 s."""

    predicted_s: float
    actual_s: float
    error_percent: float | None


def compared(prediction: Prediction, actual: Mapping[str, float]) -> Comparison:
    """Like with like: parts that were not come to (no proof of life was asked for; it was rolled back) are on neither side. A
    morph that was foreseen and not needed counts as foreseen in vain."""
    names = set(actual) | ({"morph"} if "start" in actual else set())
    predicted_s = sum(prediction.parts[name].seconds for name in PARTS if name in names)
    actual_s = sum(actual.values())
    return Comparison(round(predicted_s, 3), round(actual_s, 3), error_percent(predicted_s, actual_s))


def error_percent(predicted_s: float, actual_s: float) -> float | None:
    return round(100 * (predicted_s - actual_s) / actual_s, 1) if actual_s > 0 else None


def _known(book: Book) -> dict[str, Estimate]:
    """The parts that are not the delta, each by the best that is known: an earlier attempt of this VM, unless it was rehearsed
    since (it may have been by another way)."""
    record, strangers = book.record(), book.stranger_timings()
    source, way = record.source, record.plan.get("way")
    newest = next((one for one in reversed(book.rehearsals()) if one.works and way in (None, one.way)), None)
    begun = [event.wall for event in _cutovers(book)]
    own, rehearsed = (Basis.HERE, _own_parts(book)), (Basis.REHEARSED, _rehearsed_parts(newest))
    found: dict[str, Estimate] = {}
    for basis, measured_parts in (
        *([rehearsed, own] if newest is not None and begun and newest.wall > begun[-1] else [own, rehearsed]),
        (Basis.SOURCE, _strangers_parts(one for one in strangers if one.source == source)),
        (Basis.HYPERVISOR, _strangers_parts(one for one in strangers if _scheme(one.source) == _scheme(source))),
    ):
        for part, seconds in measured_parts.items():
            found.setdefault(part, Estimate(seconds, basis))
    return {"morph": CONVERSION, **found} if way == "virt-v2v" else found


def _own_parts(book: Book) -> dict[str, float]:
    attempts = [spent(book, attempt) for attempt in range(1, book.record().attempt + 1)]
    parts = {name: typical(one[name] for one in attempts if name in one) for name in PARTS if name != "delta"}
    return {name: seconds for name, seconds in parts.items() if seconds is not None}


def _rehearsed_parts(rehearsal: RehearsalRecord | None) -> dict[str, float]:
    """Morph and boot."""
    timings = None if rehearsal is None else rehearsal.document.get("timings")
    if not isinstance(timings, dict):
        return {}
    return {part: float(timings[part]) for part in ("morph", "boot") if isinstance(timings.get(part), int | float)}


def _strangers_parts(timings: Iterable[StrangerTiming]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {}
    for one in timings:
        if one.part is DowntimePart.DELTA:
            seconds.setdefault("overhead", []).append(max(0.0, one.seconds - one.final_copy_s))
        else:
            seconds.setdefault(one.part, []).append(one.seconds)
    parts = {part: typical(seconds.get(part, ())) for part in ALIKE}
    return {part: found for part, found in parts.items() if found is not None}


def _final_copy_s(book: Book, attempt: int) -> float:
    """Seconds of copying in an attempt's downtime: of the final passes whose snapshots were taken after it began."""
    begun = [event.number for event in _cutovers(book)]
    if not 0 < attempt <= len(begun):
        return 0.0
    end = begun[attempt] if attempt < len(begun) else None
    return sum(
        sum(one.seconds for one in found.passes)
        for found in rounds_of(book)
        if found.kind is PassKind.FINAL
        and found.snapshot.after_event >= begun[attempt - 1]
        and (end is None or found.snapshot.after_event < end)
    )


def _cutovers(book: Book) -> list[EventRecord]:
    return [event for event in book.events() if event.event == Event.CUT_OVER]


def _scheme(source: str) -> str:
    return source.partition(":")[0]
