"""Sync: a base, then deltas while the VM runs, until the passes asked for are made or another would bring little."""

from __future__ import annotations

from dataclasses import dataclass

from tokvm.core.machine import VirtualMachine
from tokvm.core.units import MiB
from tokvm.migration.records import PassKind, SnapshotState
from tokvm.migration.reports import PassReport, StopCause
from tokvm.migration.rounds import Round, newest_done, rounds_of, unfinished
from tokvm.migration.steps.claim import claim, survey
from tokvm.migration.steps.copy import copy_round
from tokvm.migration.steps.freeze import freeze, make, prune, reconcile
from tokvm.migration.steps.stop import predict
from tokvm.migration.work import Work
from tokvm.sources.base import NoLiveDelta


@dataclass(frozen=True, slots=True)
class Converge:
    """When another delta brings little: it was small, it is not much smaller than the one before, or there were many."""

    small_bytes: int = 16 * MiB
    shrink: float = 0.8
    limit: int = 5


def sync(work: Work, passes: int | None, converge: Converge) -> tuple[tuple[PassReport, ...], StopCause]:
    """At least one pass; an interrupted one first. The passes of this run, and why there was no further one."""
    claim(work)
    made: list[PassReport] = []
    while True:
        vm = survey(work)
        reconcile(work)
        try:
            made.append(_one_round(work, vm).report())
        except NoLiveDelta as waits:
            if newest_done(rounds_of(work.book)) is None:
                raise
            work.note(f"further passes wait for the stop: {waits.what}")
            return tuple(made), StopCause.WAITS
        prune(work)
        cause = _enough(work, made, passes, converge)
        if cause is not None:
            return tuple(made), cause


def _one_round(work: Work, vm: VirtualMachine) -> Round:
    """Go on with the round that was interrupted, else make a new one."""
    rounds = rounds_of(work.book)
    base, begun = newest_done(rounds), unfinished(rounds)
    if begun is None:
        work.step("freeze the disks")
        at = freeze(work, vm, PassKind.BASE if base is None else PassKind.DELTA)
    elif begun.snapshot.state is SnapshotState.MADE:
        at = begun.snapshot
    else:
        at = make(work, vm, begun.snapshot)
    copy_round(work, vm, at, base)
    return next(one for one in rounds_of(work.book) if one.number == at.number)


def _enough(work: Work, made: list[PassReport], passes: int | None, converge: Converge) -> StopCause | None:
    done = [one for one in rounds_of(work.book) if one.done]
    if passes is not None:
        return StopCause.ASKED if len(done) >= passes else None
    if _whole(done[-1]):
        return None
    return _converged(work, done, made, converge)


def _whole(one: Round) -> bool:
    """It copied everything. A round begun as a delta does too when what it was to be since was voided meanwhile."""
    return one.kind is PassKind.BASE or any(copied.since is None for copied in one.passes)


def _converged(work: Work, done: list[Round], made: list[PassReport], converge: Converge) -> StopCause | None:
    budget, prediction = work.options.budget_s, predict(work)
    if budget is not None:
        fits = prediction is not None and prediction.budgeted_s <= budget
        return StopCause.BUDGET if fits else StopCause.LIMIT if len(made) > converge.limit else None
    moved, since = done[-1].report().bytes, {one.since for one in done[-1].passes}
    if moved <= converge.small_bytes:
        return StopCause.SMALL
    if len(made) > converge.limit:
        return StopCause.LIMIT
    before = next((one for one in done[:-1] if one.number in since and not _whole(one)), None)
    flat = before is not None and moved > before.report().bytes * converge.shrink
    return StopCause.FLAT if flat else None
