"""How long will the downtime be? From this VM's own measured passes.

    VM stopped ──► stop ──► final delta ──► morph ──► boot ──► it answers
                            what changed since the last pass began

Between the beginning of the last pass and the stop the guest goes on writing, so the final delta is predicted from how fast
this VM made changes so far: bytes of a delta over the time since the snapshot before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median


class PassKind(StrEnum):
    BASE = "base"
    DELTA = "delta"
    FINAL = "final"


@dataclass(frozen=True, slots=True)
class MeasuredPass:
    """One finished pass, of all disks together. period_s: from the snapshot before it to its own (0 for a base)."""

    kind: PassKind
    bytes: int
    seconds: float
    period_s: float = 0.0


@dataclass(frozen=True, slots=True)
class FixedTimes:
    """Seconds of the parts that do not depend on bytes: the last measured, or a careful guess before there is one.

    overhead_s: snapshot, witnesses, fence and define around the final delta.
    """

    stop_s: float = 20.0
    morph_s: float = 0.0
    boot_s: float = 30.0
    overhead_s: float = 3.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """delta_bytes, delta_s: the final delta. total_s: the whole downtime."""

    delta_bytes: int
    delta_s: float
    total_s: float


def change_rate(passes: Sequence[MeasuredPass]) -> float:
    """Bytes per second that the guest changes: the median of the last three deltas; 0 when none was measured."""
    rates = [done.bytes / done.period_s for done in passes if done.kind is not PassKind.BASE and done.period_s > 0]
    return median(rates[-3:]) if rates else 0.0


def copy_rate(passes: Sequence[MeasuredPass]) -> float:
    """Bytes per second that a pass moves, from all of them; small deltas are dominated by their fixed cost."""
    moved, seconds = sum(done.bytes for done in passes), sum(done.seconds for done in passes)
    return moved / seconds if seconds > 0 else 0.0


def predict_downtime(passes: Sequence[MeasuredPass], fixed: FixedTimes, *, since_last_snapshot_s: float) -> Prediction:
    """The downtime if the VM were stopped now. The fastest delta so far bounds the final one's time from below."""
    rate = copy_rate(passes)
    expected = int(change_rate(passes) * (since_last_snapshot_s + fixed.stop_s))
    deltas = [done.seconds for done in passes if done.kind is not PassKind.BASE]
    floor = min(deltas, default=0.0) if expected else 0.0
    delta_s = max(floor, expected / rate if rate else 0.0)
    return Prediction(expected, delta_s, fixed.stop_s + fixed.overhead_s + delta_s + fixed.morph_s + fixed.boot_s)
