"""The passes of a migration as rounds: one snapshot, and a pass over each disk.

    round 1 base   snapshot tokvm-ID-1        disk 0, disk 1, …
    round 2 delta  snapshot tokvm-ID-2        since round 1
    round 3 final  snapshot tokvm-ID-final-3  since round 2

A round is done when every disk's pass is; the next delta is taken since the newest round that is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokvm.migration.book import Book
from tokvm.migration.records import PassRecord, PassState, SnapshotRecord, SnapshotState
from tokvm.migration.reports import PassReport
from tokvm.transfer.predict import MeasuredPass, PassKind


@dataclass(frozen=True, slots=True)
class Round:
    """`disks`: how many the VM has."""

    snapshot: SnapshotRecord
    passes: tuple[PassRecord, ...]
    disks: int

    @property
    def number(self) -> int:
        return self.snapshot.number

    @property
    def kind(self) -> PassKind:
        return self.snapshot.kind

    @property
    def void(self) -> bool:
        return any(one.state is PassState.VOID for one in self.passes)

    @property
    def done(self) -> bool:
        return len(self.passes) == self.disks and all(one.state is PassState.DONE for one in self.passes)

    @property
    def open(self) -> bool:
        """Begun, and its snapshot may still be there to go on with."""
        return not self.done and not self.void and self.snapshot.state is not SnapshotState.REMOVED

    def report(self) -> PassReport:
        return PassReport(
            number=self.number,
            kind=str(self.kind),
            bytes=sum(one.bytes for one in self.passes),
            seconds=round(sum(one.seconds for one in self.passes), 3),
            done=self.done,
            wall=self.snapshot.wall,
        )


def rounds_of(book: Book) -> list[Round]:
    """All of them, oldest first."""
    disks, passes = len(book.disks()), book.passes()
    return [
        Round(snapshot, tuple(one for one in passes if one.number == snapshot.number), disks) for snapshot in book.snapshots()
    ]


def newest_done(rounds: Sequence[Round]) -> Round | None:
    """What the target holds, if nothing was begun since."""
    return next((one for one in reversed(rounds) if one.done), None)


def unfinished(rounds: Sequence[Round]) -> Round | None:
    """The round that was begun last, if it can be gone on with."""
    return rounds[-1] if rounds and rounds[-1].open else None


def reports(rounds: Sequence[Round]) -> tuple[PassReport, ...]:
    """The rounds that count."""
    return tuple(one.report() for one in rounds if one.done or one.open)


def measured(rounds: Sequence[Round]) -> list[MeasuredPass]:
    """The rounds that are done, with the time in which their changes were made."""
    done = [one for one in rounds if one.done]
    before = [None, *done[:-1]]
    found = []
    for one, previous in zip(done, before, strict=True):
        moved, seconds = sum(p.bytes for p in one.passes), sum(p.seconds for p in one.passes)
        period = 0.0 if previous is None else max(0.0, one.snapshot.wall - previous.snapshot.wall)
        found.append(MeasuredPass(one.kind, moved, seconds, period))
    return found
