"""Stop: preflight, the intent, the fence, then the source's shutdown; FENCED only when two witnesses agree."""

from __future__ import annotations

import logging

from tokvm.core.errors import BudgetExceeded, ConnectionLost, NeedsPerson, NotOff, UsageError
from tokvm.core.machine import PowerState, VirtualMachine
from tokvm.core.units import format_duration
from tokvm.domain.base import DomainState
from tokvm.migration.forecast import as_note, forecast
from tokvm.migration.phases import Event
from tokvm.migration.records import DowntimePart, SnapshotState
from tokvm.migration.rounds import Round, newest_done, rounds_of, unfinished
from tokvm.migration.steps.claim import claim, survey
from tokvm.migration.steps.copy import copy_round
from tokvm.migration.steps.fence import Standing, fence, standing
from tokvm.migration.steps.freeze import make, reconcile
from tokvm.migration.work import Work
from tokvm.sources.base import NoLiveDelta
from tokvm.transfer.predict import Prediction

log = logging.getLogger(__name__)


def prepare(work: Work) -> None:
    """Everything that can fail while the source still runs; then the intent to stop it."""
    work.step("look before the stop")
    claim(work)
    vm = survey(work)
    reconcile(work)
    rounds = rounds_of(work.book)
    base, begun = newest_done(rounds), unfinished(rounds)
    if base is None:
        raise UsageError(
            "its disks are not copied yet", where=work.name, fix="run `tokvm sync` until it is done, then cut over"
        )
    if begun is not None:
        _finish_pass(work, vm, begun, base)
        survey(work)
    refuse_running_target(work)
    work.doors.host.domain_xml(work.plan())
    _refuse_long_downtime(work)
    if work.doors.morpher is not None:
        work.step("prepare the morph")
        work.doors.morpher.prepare(work.plan())
    work.advance(Event.CUT_OVER, _foresee(work))


def _finish_pass(work: Work, vm: VirtualMachine, begun: Round, base: Round) -> None:
    """The pass that was interrupted; where it cannot be read while the VM runs, the final one brings it all."""
    work.step("finish the pass that was interrupted")
    try:
        at = begun.snapshot if begun.snapshot.state is SnapshotState.MADE else make(work, vm, begun.snapshot)
        copy_round(work, vm, at, base)
    except NoLiveDelta as waits:
        work.note(f"the interrupted pass waits for the stop: {waits.what}")


def refuse_running_target(work: Work) -> None:
    """Before START_INTENT nobody but a person can have started the target: its disks must not be written to."""
    if work.doors.host.state(work.uuid) is DomainState.RUNNING:
        raise NeedsPerson(
            "the target runs, but this migration did not start it",
            where=work.name,
            fix=f"if it may be thrown away: virsh destroy {work.uuid}; then run the same command again",
        )


def predict(work: Work) -> Prediction | None:
    """The downtime of a cutover now; None before anything was measured."""
    return forecast(work.book, work.doors.clock.wall())


def _refuse_long_downtime(work: Work) -> None:
    budget, prediction = work.options.budget_s, predict(work)
    if budget is None or prediction is None or prediction.budgeted_s <= budget:
        return
    raise BudgetExceeded(
        f"the downtime would be {format_duration(prediction.total_s)}: {prediction.describe()}; over the budget of "
        f"{format_duration(budget)}, so it was not stopped",
        where=work.name,
        fix="run `tokvm sync` once more right before, or give a larger --budget, or none",
    )


def _foresee(work: Work) -> str:
    """The prediction, shown, and as the note that the intent to stop keeps."""
    prediction = predict(work)
    if prediction is not None:
        work.doors.observer.note(f"predicted downtime {format_duration(prediction.total_s)}: {prediction.describe()}")
    return as_note(prediction)


def stop(work: Work) -> None:
    """STOP_INTENT: fence, stop, prove it. Whatever an earlier run did of this is found out by asking."""
    refuse_running_target(work)
    work.step("stop the source")
    fence(work)
    source = work.doors.source
    if work.ask(source.power) is not PowerState.OFF:
        work.down_begins()
        _shut_down(work)
    elif work.record.down is None:
        work.down_begins()
    if standing(work) is not Standing.OFF_AND_FENCED:
        raise NotOff("the source did not stay off and fenced", where=work.name, fix="see who starts it, then cut over again")
    work.took(DowntimePart.STOP)
    work.advance(Event.SOURCE_OFF)
    work.just_proved = True


def _shut_down(work: Work) -> None:
    """A lost reply is no answer: what follows asks the witnesses."""
    options, left = work.options, work.left()
    deadline_s = options.deadline_s if left is None else max(0.0, min(options.deadline_s, left))
    try:
        work.doors.source.shut_down(work.uuid, deadline_s=deadline_s, force=options.force_off)
    except NotOff as running:
        if work.over_budget():
            raise work.too_long("while the guest was shutting down") from running
        raise
    except ConnectionLost as lost:
        log.warning("migration %s: reply to the shutdown lost: %s", work.id, lost.what)
        until = work.doors.clock.monotonic() + min(options.settle_s, deadline_s)
        while work.ask(work.doors.source.power) is not PowerState.OFF:
            work.check_budget("while the guest was shutting down")
            if work.doors.clock.monotonic() >= until:
                raise NotOff("the shutdown's reply was lost and the source still runs", where=work.name) from lost
            work.sleep(options.poll_s)
