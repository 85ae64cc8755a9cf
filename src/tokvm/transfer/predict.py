"""How long will the downtime be? From what was measured, and saying for each part by whom.

    VM stopped ──► stop ──► delta + overhead ──► morph ──► start ──► boot ──► it answers
                            what changed since the last pass began

Between the beginning of the last pass and the stop the guest goes on writing, so the final delta is predicted from how fast
this VM made changes so far (bytes of a delta over the time since the snapshot before it), and its time from how long this
VM's passes took: a fixed cost each, and seconds per byte. The overhead is what surrounds its copying: witnesses and snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations
from math import inf
from statistics import median

from tokvm.core.units import MiB, format_duration

PARTS = ("stop", "delta", "overhead", "morph", "start", "boot")
"""In the order they come, but that the overhead lies around the delta."""

ASSUMED_CHANGE = 1 * MiB
"""Bytes per second that a guest is taken to change before any delta was measured: a server at work."""

RECENT = 5
"""Deltas that count: how a guest writes changes from day to night."""


class PassKind(StrEnum):
    BASE = "base"
    DELTA = "delta"
    FINAL = "final"


class Basis(StrEnum):
    """Where a part's seconds come from, the best first. HERE: this VM's own passes and cutovers. SOURCE, HYPERVISOR: cutovers
    of other VMs from the same source, or from the same kind of source."""

    HERE = "measured here"
    REHEARSED = "rehearsed"
    SOURCE = "measured on this source"
    HYPERVISOR = "measured on this kind of source"
    ASSUMED = "assumed"


@dataclass(frozen=True, slots=True)
class MeasuredPass:
    """One finished pass, of all disks together. period_s: from the snapshot before it to its own (0 for a base)."""

    kind: PassKind
    bytes: int
    seconds: float
    period_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Estimate:
    seconds: float
    basis: Basis


ASSUMED: Mapping[str, Estimate] = {
    part: Estimate(seconds, Basis.ASSUMED)
    for part, seconds in {"stop": 10.0, "overhead": 2.0, "morph": 0.0, "start": 1.0, "boot": 30.0}.items()
}
"""Careful guesses before there is anything better. No morph: most guests of the last ten years have their virtio drivers."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """`parts`: one for each of PARTS, in their order. delta_bytes: what the final delta will bring."""

    delta_bytes: int
    parts: Mapping[str, Estimate]

    @property
    def total_s(self) -> float:
        """The whole downtime."""
        return sum(part.seconds for part in self.parts.values())

    @property
    def delta_s(self) -> float:
        return self.parts["delta"].seconds

    @property
    def budgeted_s(self) -> float:
        """What a budget is compared with: a delta, morph or boot that is only assumed stops no cutover, the real clock does."""
        guessed = [self.parts[name] for name in ("delta", "morph", "boot") if self.parts[name].basis is Basis.ASSUMED]
        return self.total_s - sum(part.seconds for part in guessed)

    def describe(self) -> str:
        """`stop 10.0 s (assumed), delta 0.30 s (measured here), …`; parts that take no time are left out."""
        return ", ".join(
            f"{name} {format_duration(part.seconds)} ({part.basis})" for name, part in self.parts.items() if part.seconds > 0
        )

    def to_dict(self) -> dict[str, object]:
        parts = {name: {"seconds": round(part.seconds, 3), "basis": str(part.basis)} for name, part in self.parts.items()}
        total = round(self.total_s, 3)
        return {"predicted_downtime_s": total, "predicted_parts": parts, "predicted_delta_bytes": self.delta_bytes}

    @classmethod
    def from_dict(cls, document: Mapping[str, object]) -> Prediction:
        """What `to_dict` said. ValueError when it did not say that."""
        parts, count = document.get("predicted_parts"), document.get("predicted_delta_bytes")
        if not isinstance(parts, dict) or set(parts) != set(PARTS) or not isinstance(count, int):
            raise ValueError("no prediction of all parts")
        try:
            found = {name: Estimate(float(parts[name]["seconds"]), Basis(parts[name]["basis"])) for name in PARTS}
        except (TypeError, KeyError) as exc:
            raise ValueError(f"a part without seconds or basis: {exc}") from exc
        if not all(0 <= part.seconds < inf for part in found.values()):
            raise ValueError("a part of no length")
        return cls(count, found)


def change_rate(passes: Sequence[MeasuredPass]) -> float:
    """Bytes per second that the guest changes: the median of the last three deltas; 0 when none was measured."""
    rates = [done.bytes / done.period_s for done in _deltas(passes) if done.period_s > 0]
    return median(rates[-3:]) if rates else 0.0


def copy_cost(passes: Sequence[MeasuredPass]) -> tuple[float, float]:
    """Seconds that a delta takes whatever is in it, and seconds per byte.

    A byte of a delta costs no less than one of the fastest pass; more (a delta is scattered) where deltas of clearly different
    sizes say so: the median of the slopes between them, which one pass over a broken line does not move.
    """
    deltas = _deltas(passes)[-RECENT:]
    sized = combinations(sorted(deltas, key=lambda one: one.bytes), 2)
    slopes = [(b.seconds - a.seconds) / (b.bytes - a.bytes) for a, b in sized if b.bytes > 2 * a.bytes]
    fastest = min((done.seconds / done.bytes for done in passes if done.bytes), default=0.0)
    per_byte = max(fastest, median(slopes)) if slopes else fastest
    return max(0.0, median(done.seconds - done.bytes * per_byte for done in deltas)) if deltas else 0.0, per_byte


def predict_downtime(
    passes: Sequence[MeasuredPass],
    known: Mapping[str, Estimate],
    *,
    since_last_snapshot_s: float,
    most_bytes: int | None = None,
) -> Prediction:
    """The downtime if the VM were stopped now. known: estimates of parts other than the delta; the rest is assumed.

    most_bytes: of all disks; no delta is larger, however long ago the last pass was.
    """
    fixed = {**ASSUMED, **known}
    measured = any(done.period_s > 0 for done in _deltas(passes))
    rate = change_rate(passes) if measured else ASSUMED_CHANGE if passes else 0.0
    expected = int(rate * (since_last_snapshot_s + fixed["stop"].seconds))
    if most_bytes is not None:
        expected = min(expected, most_bytes)
    once_s, per_byte_s = copy_cost(passes)
    delta = Estimate(once_s + expected * per_byte_s, Basis.HERE if measured else Basis.ASSUMED)
    return Prediction(expected, {name: delta if name == "delta" else fixed[name] for name in PARTS})


def typical(seconds: Iterable[float]) -> float | None:
    """The median of the newest few (oldest first); None of none."""
    newest = list(seconds)[-RECENT:]
    return median(newest) if newest else None


def _deltas(passes: Sequence[MeasuredPass]) -> list[MeasuredPass]:
    return [done for done in passes if done.kind is not PassKind.BASE]
