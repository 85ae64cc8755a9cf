"""Finish: our snapshots go; the fence of a migrated VM stays, so that nobody starts the old copy by accident."""

from __future__ import annotations

from tokvm.core.errors import DomainError, NeedsPerson
from tokvm.core.machine import PowerState
from tokvm.domain.base import DomainState
from tokvm.migration.phases import Event, Phase
from tokvm.migration.steps.fence import fence, refuse_two
from tokvm.migration.steps.freeze import remove_all
from tokvm.migration.work import Work


def finish(work: Work) -> tuple[int, tuple[str, ...]]:
    """From COMMITTED, STARTED (which commits: the operator says that it lives), COPY or ROLLED_BACK (which gives up).

    How many snapshots were removed, and what was left on the source on purpose."""
    migrated = work.phase in (Phase.STARTED, Phase.COMMITTED)
    if work.phase is Phase.STARTED:
        _commit_by_hand(work)
    left: tuple[str, ...] = ()
    if migrated:
        left = _keep_fenced(work)
    work.step("remove our snapshots")
    removed = remove_all(work)
    if not migrated:
        work.doors.source.release(work.uuid, work.owner)
    if work.doors.morpher is not None:
        work.doors.morpher.forget()
    work.book.finished()
    return removed, left


def _commit_by_hand(work: Work) -> None:
    refuse_two(work)
    if work.doors.host.state(work.uuid) is not DomainState.RUNNING:
        raise DomainError("the target does not run, so it is not committed", where=work.name, fix=f"tokvm cutover {work.id}")
    work.advance(Event.COMMIT, "the operator says that it lives")


def _keep_fenced(work: Work) -> tuple[str, ...]:
    """The source is off and stays fenced; the mark of its owner stays with it."""
    if work.ask(work.doors.source.power) is not PowerState.OFF:
        refuse_two(work)
        raise NeedsPerson(
            "the source is not off, though its target was committed",
            where=work.name,
            fix=f"to go back to it: tokvm rollback {work.id} --accept-data-loss. Else stop it by hand, then finish again",
        )
    fence(work)
    return (
        "the source VM stays off and fenced with our mark on it, so that nobody starts the old copy; delete it when you no "
        f"longer need it, or go back to it with: tokvm rollback {work.id} --accept-data-loss",
    )
