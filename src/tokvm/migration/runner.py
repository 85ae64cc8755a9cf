"""One migration, driven: every verb takes the lock, looks where the journal stands, asks the world, and goes on.

    while phase is not at rest:  STEPS[phase](work)        each step records what it saw and so moves the phase

A cutover that fails before its commit point is rolled back at once, whatever failed it. docs/flow.md has the resume table.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Self

from tokvm.core.errors import BudgetExceeded, NeedsPerson, NotOff, RolledBack, SourceError, TokvmError, UsageError
from tokvm.core.units import format_duration
from tokvm.migration.book import Book
from tokvm.migration.doors import Clock, Doors, Morpher, Observer, Silent, SystemClock, Unfailing
from tokvm.migration.forecast import expected, foreseen
from tokvm.migration.journal import Journal
from tokvm.migration.phases import LOSSLESS_ROLLBACK, Event, Phase
from tokvm.migration.records import MigrationRecord, SnapshotState, TargetRan
from tokvm.migration.reports import CutoverReport, FinishReport, Outcome, StatusReport, SyncReport
from tokvm.migration.rounds import reports, rounds_of
from tokvm.migration.steps.final import final
from tokvm.migration.steps.finish import finish
from tokvm.migration.steps.morph import morph
from tokvm.migration.steps.prove import prove
from tokvm.migration.steps.rollback import roll_back
from tokvm.migration.steps.start import intend, start
from tokvm.migration.steps.stop import predict, prepare, refuse_running_target, stop
from tokvm.migration.steps.sync import Converge, sync
from tokvm.migration.work import CutoverOptions, Work

log = logging.getLogger(__name__)

__all__ = [
    "Clock",
    "Converge",
    "CutoverOptions",
    "Doors",
    "Migration",
    "Morpher",
    "Observer",
    "Silent",
    "SystemClock",
    "status_of",
]

STEPS = {
    Phase.COPY: prepare,
    Phase.STOP_INTENT: stop,
    Phase.FENCED: final,
    Phase.FINAL: morph,
    Phase.MORPHED: intend,
    Phase.START_INTENT: start,
}
"""What moves a cutover on from each phase."""

NEXT = {
    Phase.COPY: "tokvm sync, then tokvm cutover {id}",
    Phase.STOP_INTENT: "tokvm cutover {id} goes on; tokvm rollback {id} goes back",
    Phase.FENCED: "tokvm cutover {id} goes on; tokvm rollback {id} goes back",
    Phase.FINAL: "tokvm cutover {id} goes on; tokvm rollback {id} goes back",
    Phase.MORPHED: "tokvm cutover {id} goes on; tokvm rollback {id} goes back",
    Phase.START_INTENT: "tokvm cutover {id} goes on",
    Phase.STARTED: "look at the target, then tokvm finish {id}; or tokvm rollback {id} --accept-data-loss",
    Phase.COMMITTED: "tokvm finish {id}",
    Phase.ROLLBACK_INTENT: "tokvm rollback {id} goes on",
    Phase.ROLLED_BACK: "tokvm sync, then tokvm cutover {id}; or tokvm finish {id} to give up",
}


RESCUE_PAUSES_S = (2.0, 4.0, 8.0, 16.0, 30.0)
"""Between two tries of a rollback that nobody asked for; the last one again and again."""


class Migration:
    """The verbs. Each may be run again after any interruption and goes on."""

    def __init__(self, journal: Journal, record: MigrationRecord, doors: Doors) -> None:
        self._journal = journal
        self._id = record.id
        self._doors = replace(doors, observer=Unfailing(doors.observer))

    def _work(self, options: CutoverOptions | None = None) -> Work:
        return Work(self._journal.book(self._id), self._doors, options)

    def sync(self, *, passes: int | None = None, budget_s: float | None = None, converge: Converge | None = None) -> SyncReport:
        """Snapshot and copy while the VM runs. `passes`: how many the migration shall have, base included; there is always one
        more. `budget_s`: until a cutover is predicted to fit."""
        with self._journal.lock(self._id):
            work = self._work(CutoverOptions(budget_s=budget_s))
            _refuse_finished(work)
            if work.phase is Phase.ROLLED_BACK:
                work.advance(Event.SYNC_AGAIN)
            if work.phase is not Phase.COPY:
                raise UsageError(
                    f"a cutover is under way or done (phase {work.phase})", where=work.name, fix=_next(work.phase, work.id)
                )
            made, cause = sync(work, passes, converge or Converge())
            return SyncReport(work.id, work.name, work.phase, made, cause, predict(work))

    def cutover(
        self,
        *,
        budget_s: float | None = None,
        force_off: bool = False,
        deadline_s: float = 300.0,
        proof_s: float = 300.0,
        settle_s: float = 60.0,
        late_stop_s: float = 1300.0,
        rescue_s: float = 600.0,
    ) -> CutoverReport:
        """Stop, last delta, morph, start, proof of life; from wherever an earlier run was interrupted."""
        options = CutoverOptions(budget_s, deadline_s, force_off, proof_s, settle_s, late_stop_s=late_stop_s, rescue_s=rescue_s)
        with self._journal.lock(self._id):
            work = self._work(options)
            _refuse_finished(work)
            self._finish_rollback(work)
            if work.phase is Phase.ROLLED_BACK:
                work.advance(Event.SYNC_AGAIN)
            with _released(self._doors.morpher), _Rescue(work):
                while work.phase in STEPS:
                    if work.phase in LOSSLESS_ROLLBACK and work.phase is not Phase.STOP_INTENT:
                        work.check_budget(f"in phase {work.phase}")
                    STEPS[work.phase](work)
            proved = work.phase is Phase.COMMITTED or prove(work)
            return _cutover_report(work, proved=proved)

    def _finish_rollback(self, work: Work) -> None:
        """A rollback that was begun is never turned back."""
        if work.phase is not Phase.ROLLBACK_INTENT:
            return
        roll_back(work)
        raise RolledBack(
            "the rollback of the last cutover was interrupted and is done now: the source runs",
            where=work.name,
            fix="cut over again",
        )

    def rollback(self, *, accept_data_loss: bool = False, settle_s: float = 60.0, late_stop_s: float = 1300.0) -> StatusReport:
        """The source runs again. Lossless before the commit point; behind it only with `accept_data_loss`."""
        with self._journal.lock(self._id):
            work = self._work(CutoverOptions(settle_s=settle_s, late_stop_s=late_stop_s))
            if work.phase not in (Phase.COPY, Phase.ROLLED_BACK):
                if work.phase is not Phase.ROLLBACK_INTENT:
                    _may_roll_back(work, accept_data_loss=accept_data_loss)
                    work.advance(Event.ROLL_BACK, "asked for" + (", data loss accepted" if accept_data_loss else ""))
                with _released(self._doors.morpher):
                    roll_back(work)
            return self.status()

    def finish(self) -> FinishReport:
        """Remove our snapshots; the migration is done with. A migrated source stays off and fenced."""
        with self._journal.lock(self._id):
            work = self._work()
            if work.phase not in (Phase.COPY, Phase.ROLLED_BACK, Phase.STARTED, Phase.COMMITTED):
                raise UsageError(
                    f"a cutover is under way (phase {work.phase})", where=work.name, fix=_next(work.phase, work.id)
                )
            removed, left = finish(work)
            for line in left:
                self._doors.observer.note(line)
            return FinishReport(work.id, work.name, work.phase, removed, left)

    def status(self) -> StatusReport:
        return status_of(self._journal, self._journal.book(self._id).record())


@contextmanager
def _released(morpher: Morpher | None) -> Iterator[None]:
    """Whatever becomes of the cutover, nothing is held open on its disks afterwards."""
    try:
        yield
    finally:
        if morpher is not None:
            morpher.release()


class _Rescue:
    """Never none: when a cutover ends by an error, or Ctrl-C, before its commit point, the source is started again first.

    Death (a kill, a power loss) runs no code: the next command finds the journal where it was.
    """

    def __init__(self, work: Work) -> None:
        self._work = work

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, Exception | KeyboardInterrupt) or isinstance(error, NeedsPerson):
            return
        work = self._work
        if not _lossless(work):
            return
        what = error.what if isinstance(error, TokvmError) else repr(error)
        try:
            work.advance(Event.ROLL_BACK, what)
            work.doors.observer.note(f"the cutover failed ({what}); going back to the source")
            _roll_back_patiently(work)
        except TokvmError as worse:
            raise NeedsPerson(
                f"the cutover failed ({what}) and could not be rolled back yet: {worse.what}; the VM may be off on both sides",
                where=work.name,
                fix=f"tokvm rollback {work.id}",
            ) from worse
        if isinstance(error, BudgetExceeded | NotOff | KeyboardInterrupt):
            return
        fix = error.fix if isinstance(error, TokvmError) else "report this, with the log"
        raise RolledBack(f"{what}; the cutover was rolled back and the source runs", where=work.name, fix=fix) from error


def _roll_back_patiently(work: Work) -> None:
    """Nobody may be at the terminal, and the VM is off: a source that restarts its toolstack, or refuses for a moment, is asked
    again until `rescue_s` is over. Every part of a rollback may run twice."""
    clock, tries = work.doors.clock, 0
    until = clock.monotonic() + work.options.rescue_s
    while True:
        try:
            roll_back(work)
            return
        except SourceError as failed:
            pause = RESCUE_PAUSES_S[min(tries, len(RESCUE_PAUSES_S) - 1)]
            tries += 1
            if clock.monotonic() + pause > until:
                raise
            log.warning("migration %s: try %d of the rollback failed: %s", work.id, tries, failed)
            work.doors.observer.note(
                f"try {tries} of the rollback failed ({failed.what}); again in {format_duration(pause)}. The VM may be off; "
                f"after Ctrl-C: tokvm rollback {work.id}"
            )
            work.sleep(pause)


def _lossless(work: Work) -> bool:
    """Going back by itself is allowed only while the target cannot have written anything."""
    phase = work.phase
    return phase in LOSSLESS_ROLLBACK or (phase is Phase.START_INTENT and work.record.target_ran is TargetRan.NO)


def _may_roll_back(work: Work, *, accept_data_loss: bool) -> None:
    if work.phase in LOSSLESS_ROLLBACK:
        refuse_running_target(work)
        return
    if _lossless(work) or accept_data_loss:
        return
    raise NeedsPerson(
        "the target has run or may have run: what it wrote would be lost",
        where=work.name,
        fix=f"tokvm rollback {work.id} --accept-data-loss",
    )


def _refuse_finished(work: Work) -> None:
    if work.record.finished is not None:
        raise UsageError("this migration is finished", where=work.id, fix="`tokvm sync` with its source begins another")


def _cutover_report(work: Work, *, proved: bool) -> CutoverReport:
    advice = "" if proved else f"nobody has proved that it lives; when you have seen it live: tokvm finish {work.id}"
    return CutoverReport(
        id=work.id,
        name=work.name,
        phase=work.phase,
        outcome=Outcome.COMMITTED if proved else Outcome.STARTED,
        proved=proved,
        passes=tuple(one for one in reports(rounds_of(work.book)) if one.done),
        downtime_s=work.downtime(),
        target=work.doors.host.url,
        advice=advice,
        prediction=foreseen(work.book).get(work.record.attempt),
    )


def _next(phase: Phase, migration: str) -> str:
    return NEXT[phase].format(id=migration)


def status_of(journal: Journal, record: MigrationRecord) -> StatusReport:
    """What the journal alone says."""
    book: Book = journal.book(record.id)
    record = book.record()
    timings = {str(t.part): t.seconds for t in book.timings(record.attempt)}
    return StatusReport(
        id=record.id,
        name=record.name,
        vm_uuid=record.vm_uuid,
        source=record.source,
        phase=record.phase,
        created=record.created,
        finished=record.finished,
        owner=record.owner,
        passes=reports(rounds_of(book)),
        snapshots=sum(one.state is SnapshotState.MADE for one in book.snapshots()),
        targets=tuple(disk.path for disk in book.disks()),
        attempt=record.attempt,
        downtime_s={**timings, "total": round(sum(timings.values()), 3)} if timings else {},
        next=_next(record.phase, record.id) if record.finished is None else "nothing: it is finished",
        prediction=expected(book),
    )
