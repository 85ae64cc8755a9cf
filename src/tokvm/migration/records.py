"""Rows of the journal as values. Times are seconds since 1970; sizes and counts are bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from tokvm.core.machine import Snapshot
from tokvm.migration.phases import Phase
from tokvm.transfer.checkpoint import Checkpoint
from tokvm.transfer.predict import PassKind

__all__ = [
    "DiskRecord",
    "DowntimePart",
    "EventRecord",
    "Instant",
    "MigrationRecord",
    "PassKind",
    "PassRecord",
    "PassState",
    "RehearsalRecord",
    "SnapshotRecord",
    "SnapshotState",
    "StrangerTiming",
    "TargetRan",
    "TimingRecord",
]


class SnapshotState(StrEnum):
    """INTENDED is written before the hypervisor is asked; MADE after it said which; REMOVED after it is gone."""

    INTENDED = "intended"
    MADE = "made"
    REMOVED = "removed"


class PassState(StrEnum):
    """VOID: what it wrote is not on the target any more, or can no longer be built upon."""

    RUNNING = "running"
    DONE = "done"
    VOID = "void"


class TargetRan(StrEnum):
    """Could the target have written to its disks in this cutover? MAYBE is recorded before each start that is sent."""

    NO = "no"
    MAYBE = "maybe"
    YES = "yes"


class DowntimePart(StrEnum):
    """In the order they come. BOOT is from the start to the proof of life."""

    STOP = "stop"
    DELTA = "delta"
    MORPH = "morph"
    START = "start"
    BOOT = "boot"


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """`identity`: what the target said it is when it was first opened; "" before that."""

    index: int
    key: str
    size: int
    path: str
    identity: str = ""


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """`number` is the pass it is for. `after_event`: the newest event when it was intended."""

    number: int
    mark: str
    state: SnapshotState
    kind: PassKind
    wall: float
    after_event: int
    key: str = ""
    disks: dict[str, str] = field(default_factory=dict)

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot(key=self.key, mark=self.mark, disks=self.disks)


@dataclass(frozen=True, slots=True)
class PassRecord:
    """One pass over one disk. `since`: the pass whose snapshot it is a delta to; None for a base. `size`: the frozen disk's;
    the target holds the disk up to there once the pass is done, and behind it whatever it held before."""

    number: int
    disk: int
    kind: PassKind
    since: int | None
    fingerprint: str
    state: PassState
    checkpoint: Checkpoint | None = None
    bytes: int = 0
    seconds: float = 0.0
    size: int = 0


@dataclass(frozen=True, slots=True)
class EventRecord:
    """`source` and `target` are equal for a note."""

    number: int
    wall: float
    event: str
    source: Phase
    target: Phase
    note: str = ""


@dataclass(frozen=True, slots=True)
class TimingRecord:
    """One part of the downtime of cutover attempt number `attempt`."""

    attempt: int
    part: DowntimePart
    seconds: float
    wall: float


@dataclass(frozen=True, slots=True)
class StrangerTiming:
    """One part of the downtime of another migration's newest cutover. final_copy_s: what copying its final pass took."""

    source: str
    part: DowntimePart
    seconds: float
    final_copy_s: float


@dataclass(frozen=True, slots=True)
class RehearsalRecord:
    """One rehearsal of the boot on KVM. way: how the guest was made to boot. works: it showed life. document: what `tokvm
    rehearse` said (verdict, timings, picture) and what a cutover by this way needs to replay it (`replay`)."""

    number: int
    wall: float
    way: str
    works: bool
    document: dict[str, object]


@dataclass(frozen=True, slots=True)
class Instant:
    """A moment that other processes can count from: the monotonic clock while the machine (`boot`) is up, else the wall's."""

    wall: float
    monotonic: float
    boot: str


@dataclass(frozen=True, slots=True)
class MigrationRecord:
    """The journal's row of one migration.

    plan: what app/ decided (JSON). vm: the VM as it was when the migration began (JSON). attempt: cutovers begun so far.
    down: when the source was asked to stop in this attempt. finished: when `finish` was done with it.
    """

    id: str
    vm_uuid: str
    name: str
    source: str
    plan: dict[str, object]
    vm: dict[str, object]
    phase: Phase
    created: float
    owner: str
    target_ran: TargetRan = TargetRan.NO
    attempt: int = 0
    down: Instant | None = None
    finished: float | None = None

    @property
    def mark_prefix(self) -> str:
        return f"tokvm-{self.id}-"
