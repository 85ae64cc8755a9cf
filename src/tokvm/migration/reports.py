"""What a verb answers. Every report is JSON-ready through `to_dict`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum

from tokvm.migration.phases import Phase


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


@dataclass(frozen=True, slots=True)
class SyncReport:
    """`passes`: those of this run. predicted_downtime_s: of a cutover now; None while nothing was measured."""

    id: str
    name: str
    phase: Phase
    passes: tuple[PassReport, ...]
    stopped_by: StopCause
    predicted_downtime_s: float | None

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "outcome": "synced"}


@dataclass(frozen=True, slots=True)
class CutoverReport:
    """downtime_s: the parts that were measured (stop, delta, morph, start, boot) and their `total`, by our own clock.
    passes: all passes of the migration that count, final one last."""

    id: str
    name: str
    phase: Phase
    outcome: Outcome
    proved: bool
    passes: tuple[PassReport, ...]
    downtime_s: dict[str, float]
    target: str
    advice: str = ""

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


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
    """What the journal says; nothing is asked of any host. `next`: what the operator does next."""

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

    @property
    def passes_done(self) -> int:
        return sum(one.done for one in self.passes)

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "passes_done": self.passes_done}
