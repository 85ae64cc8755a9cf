"""The words of a pass: what it knows of the target, how far it came, how it is limited, how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum

from tokvm.core.errors import TokvmError
from tokvm.core.units import MiB


class TargetState(Enum):
    """What the target holds where the reader says nothing (ABSENT).

    UNKNOWN: anything at all, so it must be made to read as zeros (a base pass). PREVIOUS_PASS: the right bytes already
    (a delta pass), so it is left alone.
    """

    UNKNOWN = "unknown"
    PREVIOUS_PASS = "previous-pass"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything the reader handed out before `position` is on the medium. JSON-ready through `dataclasses.asdict`.

    data_bytes: bytes of DATA chunks so far, over all runs of this pass. zero_bytes: ZERO chunks and zeroed ABSENT ranges.
    zeroed: the ABSENT ranges need no more zeroing. zeroed_to: those below this guest offset are done already.
    """

    position: int
    data_bytes: int
    zero_bytes: int
    zeroed: bool
    zeroed_to: int = 0


@dataclass(frozen=True, slots=True)
class PassLimits:
    """workers: threads that hash and write. A checkpoint is made about twice per `checkpoint_bytes` and at least every
    `checkpoint_s` seconds, so that a resumed run re-sends no more than one of them. rate_limit: bytes of DATA per second.
    reseal_s: how long a delta pass may re-read partly overwritten cells at its end to keep them verifiable (0: not at all;
    in a downtime every second counts). It costs one 64 KiB read for each cell that was only partly written.
    """

    workers: int = 3
    checkpoint_bytes: int = 64 * MiB
    checkpoint_s: float = 5.0
    rate_limit: float | None = None
    reseal_s: float = 10.0


@dataclass(frozen=True, slots=True)
class PassResult:
    """data_bytes, zero_bytes: of the whole pass, all its runs together. run_bytes, seconds: of this run (DATA only), for rates.
    unsealed_cells: partly overwritten cells that `reseal_s` left no time for."""

    data_bytes: int
    zero_bytes: int
    seconds: float
    run_bytes: int = 0
    unsealed_cells: int = 0


class StopReason(StrEnum):
    CANCELLED = "cancelled"
    DEADLINE = "deadline"


class PassStopped(TokvmError):
    """The pass was asked to stop, or its deadline passed. `checkpoint` was recorded before this was raised."""

    meaning = "a pass was stopped on request or by its deadline; run the same command again to go on"

    def __init__(self, reason: StopReason, checkpoint: Checkpoint) -> None:
        super().__init__(f"the pass was stopped ({reason})", fix="run the same command again to go on from here")
        self.reason = reason
        self.checkpoint = checkpoint
