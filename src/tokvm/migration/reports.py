"""What a verb answers. Every report is JSON-ready through `to_dict`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum

from tokvm.migration.phases import Phase
from tokvm.transfer.predict import Prediction


class Outcome(StrEnum):
    """COMMITTED: the target runs and showed life. STARTED: it runs; nobody has proved more."""

    STARTED = "started"
    COMMITTED = "committed"


class StopCause(StrEnum):
    """Why sync made no further pass."""

    ASKED = "passes-asked-for"
    BUDGET = "final-delta-fits-budget"
    SMALL = "delta-is-small"
    FLAT = "deltas-shrink-no-more"
    LIMIT = "pass-limit"
    WAITS = "delta-waits-for-the-stop"


@dataclass(frozen=True, slots=True)
class PassReport:
    """One pass over all disks. `bytes`: DATA that was copied; `done` is False while a disk is missing."""

    number: int
    kind: str
    bytes: int
    seconds: float
    done: bool
    wall: float

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def with_prediction(document: dict[str, object], prediction: Prediction | None) -> dict[str, object]:
    """The document of a report with its `prediction` as predicted_downtime_s (None: nothing was measured), predicted_parts and
    predicted_delta_bytes."""
    kept = {key: value for key, value in document.items() if key != "prediction"}
    return {**kept, **({"predicted_downtime_s": None} if prediction is None else prediction.to_dict())}


@dataclass(frozen=True, slots=True)
class SyncReport:
    """`passes`: those of this run. prediction: of a cutover now; None while nothing was measured."""

    id: str
    name: str
    phase: Phase
    passes: tuple[PassReport, ...]
    stopped_by: StopCause
    prediction: Prediction | None

    @property
    def predicted_downtime_s(self) -> float | None:
        return None if self.prediction is None else round(self.prediction.total_s, 3)

    def to_dict(self) -> dict[str, object]:
        return {**with_prediction(asdict(self), self.prediction), "outcome": "synced"}


@dataclass(frozen=True, slots=True)
class CutoverReport:
    """downtime_s: the parts that were measured (stop, delta, morph, start, boot) and their `total`, by our own clock.
    passes: all passes of the migration that count, final one last. prediction: made right before the stop."""

    id: str
    name: str
    phase: Phase
    outcome: Outcome
    proved: bool
    passes: tuple[PassReport, ...]
    downtime_s: dict[str, float]
    target: str
    advice: str = ""
    prediction: Prediction | None = None

    def to_dict(self) -> dict[str, object]:
        return with_prediction(asdict(self), self.prediction)


@dataclass(frozen=True, slots=True)
class FinishReport:
    """`left`: what we changed on the source and left so on purpose."""

    id: str
    name: str
    phase: Phase
    snapshots_removed: int
    left: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "outcome": "finished"}


@dataclass(frozen=True, slots=True)
class StatusReport:
    """What the journal says; nothing is asked of any host. `next`: what the operator does next. prediction: of a cutover now
    while none has begun, else the one that was made right before its stop."""

    id: str
    name: str
    vm_uuid: str
    source: str
    phase: Phase
    created: float
    finished: float | None
    owner: str
    passes: tuple[PassReport, ...]
    snapshots: int
    targets: tuple[str, ...]
    attempt: int
    downtime_s: dict[str, float]
    next: str
    prediction: Prediction | None = None

    @property
    def passes_done(self) -> int:
        return sum(one.done for one in self.passes)

    def to_dict(self) -> dict[str, object]:
        return {**with_prediction(asdict(self), self.prediction), "passes_done": self.passes_done}
