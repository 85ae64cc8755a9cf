"""What every step works with: the doors, the book, the operator's wishes, and the downtime so far."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tokvm.core.errors import BudgetExceeded, ConnectionLost
from tokvm.core.machine import VirtualMachine
from tokvm.core.units import format_duration
from tokvm.domain.base import DomainPlan
from tokvm.migration.book import Book
from tokvm.migration.doors import Doors, now, seconds_since
from tokvm.migration.phases import Event, Phase
from tokvm.migration.records import DowntimePart, MigrationRecord

log = logging.getLogger(__name__)

TRIES = 3
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CutoverOptions:
    """budget_s: the longest downtime accepted. deadline_s: how long the guest may take to stop. force_off: then cut its power.
    proof_s: how long the target may take to show life; 0 asks for no proof. settle_s: how long to wait for a hypervisor to
    finish what it has in hand. poll_s: between two looks. late_stop_s: how long a rollback waits for a stop that the hypervisor
    still has in hand while the source runs (xapi keeps a clean shutdown for 20 minutes). rescue_s: how long a rollback that
    nobody asked for is tried again while the source cannot be reached or refuses."""

    budget_s: float | None = None
    deadline_s: float = 300.0
    force_off: bool = False
    proof_s: float = 300.0
    settle_s: float = 60.0
    poll_s: float = 0.5
    late_stop_s: float = 1300.0
    rescue_s: float = 600.0


class Work:
    """One run on one migration.

    What this run asked before the stop is not asked again in the downtime (each `xe` call costs a good part of a second):
    vm: as surveyed by this run. just_proved: the last thing this run did was to see the source off and fenced.
    start_sent_here: every start of this cutover was sent by this run and refused, so the target never ran.
    """

    def __init__(self, book: Book, doors: Doors, options: CutoverOptions | None = None) -> None:
        self.book = book
        self.doors = doors
        self.options = options or CutoverOptions()
        self.start_sent_here = False
        self.just_proved = False
        self.vm: VirtualMachine | None = None
        self._plan: DomainPlan | None = None
        begun = book.record()
        self.id, self.uuid, self.name, self.owner = begun.id, begun.vm_uuid, begun.name, begun.owner
        self.mark_prefix = begun.mark_prefix

    @property
    def record(self) -> MigrationRecord:
        return self.book.record()

    @property
    def phase(self) -> Phase:
        return self.book.phase

    def advance(self, event: Event, note: str = "") -> None:
        phase = self.book.advance(event, note)
        log.info("migration %s of %r: %s%s", self.id, self.name, phase, f" ({note})" if note else "")
        self.doors.observer.phase(phase)

    def step(self, name: str) -> None:
        self.doors.observer.step(name)

    def note(self, text: str) -> None:
        """Kept in the journal and shown."""
        log.info("migration %s of %r: %s", self.id, self.name, text)
        self.book.note(text)
        self.doors.observer.note(text)

    def plan(self) -> DomainPlan:
        """The domain, worked out once in a run."""
        if self._plan is None:
            self._plan = self.doors.plan()
        return self._plan

    @property
    def morphs(self) -> bool:
        """Whether there is anything to do between the last delta and the start."""
        return self.doors.morpher is not None and self.doors.morpher.changes_disks

    def undo_morph(self) -> None:
        """Take the morph off the disks. Where that is not known to have been exact, they can no longer be built upon."""
        morpher = self.doors.morpher
        if morpher is not None and not morpher.undo():
            self.note("somebody else wrote to the copied disks since the morph: they are copied anew")
            self.book.void_passes()

    def sleep(self, seconds: float) -> None:
        self.doors.clock.sleep(seconds)

    # ---- downtime

    def down_begins(self) -> None:
        """The source is asked to stop now, or was found off."""
        self.book.down_since(now(self.doors.clock))

    def elapsed(self) -> float:
        """Seconds of downtime so far; 0 while the source was not asked to stop."""
        down = self.record.down
        return 0.0 if down is None else seconds_since(self.doors.clock, down)

    def took(self, part: DowntimePart) -> None:
        """A part of the downtime is over: what has passed since the parts before it."""
        attempt = self.record.attempt
        before = sum(t.seconds for t in self.book.timings(attempt) if t.part is not part)
        seconds = round(max(0.0, self.elapsed() - before), 3)
        self.book.timing(attempt, part, seconds)
        self.doors.observer.downtime(part, seconds)

    def downtime(self) -> dict[str, float]:
        """The parts measured in the newest cutover, and their total."""
        parts = {str(t.part): t.seconds for t in self.book.timings(self.record.attempt)}
        return {**parts, "total": round(sum(parts.values()), 3)} if parts else {}

    def left(self) -> float | None:
        """Seconds of the budget that are left; None without a budget."""
        budget = self.options.budget_s
        return None if budget is None else budget - self.elapsed()

    def over_budget(self) -> bool:
        left = self.left()
        return left is not None and left <= 0

    def check_budget(self, doing: str) -> None:
        if self.over_budget():
            raise self.too_long(doing)

    def too_long(self, doing: str) -> BudgetExceeded:
        budget = format_duration(self.options.budget_s or 0.0)
        return BudgetExceeded(
            f"the downtime passed the budget of {budget} {doing}; the source goes on",
            where=self.name,
            fix="run `tokvm sync` until a delta is small, or give a larger --budget",
        )

    # ---- replies that get lost

    def ask(self, question: Callable[[str], T]) -> T:
        """The answer to a question about the VM, asked again when a reply is lost. For what may be asked twice."""
        for _ in range(TRIES - 1):
            try:
                return question(self.uuid)
            except ConnectionLost as lost:
                log.warning("migration %s: reply lost: %s", self.id, lost.what)
                self.sleep(self.options.poll_s)
        return question(self.uuid)

    def insist(self, act: Callable[[], None], done: Callable[[], bool]) -> None:
        """Do it; when the reply is lost ask whether it was done, else do it again (a few times)."""
        for attempt in range(1, TRIES + 1):
            try:
                act()
                return
            except ConnectionLost as lost:
                if attempt == TRIES:
                    raise
                log.warning("migration %s: reply lost: %s", self.id, lost.what)
                self.sleep(self.options.poll_s)
                if done():
                    return
