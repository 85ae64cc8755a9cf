"""Prove: the target runs; does it live? COMMITTED when it shows life, else it stays STARTED and a person decides."""

from __future__ import annotations

from tokvm.core.errors import ConnectionLost, DomainError, NeedsPerson
from tokvm.core.machine import PowerState
from tokvm.core.units import format_duration
from tokvm.domain.base import DomainState
from tokvm.migration.phases import Event
from tokvm.migration.records import DowntimePart
from tokvm.migration.steps.fence import Standing, choose, fence, refuse_two, standing
from tokvm.migration.work import Work


def prove(work: Work) -> bool:
    """STARTED: wait for a sign of life. True: committed. False: no proof was asked for. DomainError: none came in time."""
    _hold_the_source(work)
    if work.doors.host.state(work.uuid) is not DomainState.RUNNING:
        start_again(work)
    if work.options.proof_s <= 0:
        return False
    work.step("wait for a sign of life")
    until = work.doors.clock.monotonic() + work.options.proof_s
    while not alive(work):
        if work.doors.clock.monotonic() >= until:
            raise _no_life(work)
        work.sleep(work.options.poll_s)
    _hold_the_source(work)
    if DowntimePart.BOOT not in {timing.part for timing in work.book.timings(work.record.attempt)}:
        work.took(DowntimePart.BOOT)
    work.advance(Event.COMMIT, "the target showed life")
    return True


def alive(work: Work) -> bool:
    if work.doors.proof is not None and work.doors.proof():
        return True
    return work.doors.host.alive(work.uuid)


def start_again(work: Work) -> None:
    """The target ran and is off: only the target is started again, and only while the source is off."""
    if standing(work) is Standing.ON:
        what = "the target had been started and is off now; the source was started by somebody"
        raise NeedsPerson(what, where=work.name, fix=choose(work))
    fence(work)
    work.note("the target was off; it is started again")
    work.doors.host.define(work.plan())
    work.doors.host.start(work.uuid)
    if work.doors.host.state(work.uuid) is not DomainState.RUNNING:
        raise _no_life(work)


def _hold_the_source(work: Work) -> None:
    """Not two, and none later. A source that cannot be reached does not keep a living target from being committed."""
    try:
        refuse_two(work)
        if work.ask(work.doors.source.power) is PowerState.OFF:
            fence(work)
    except ConnectionLost as lost:
        work.note(f"the source could not be asked: {lost.what}")


def _no_life(work: Work) -> DomainError:
    return DomainError(
        f"the target runs, but showed no sign of life within {format_duration(work.options.proof_s)}; it is started, not "
        "committed, and the source stays off and fenced",
        where=work.name,
        fix=f"look at its console. It lives: tokvm finish {work.id}. Wait longer: tokvm cutover {work.id} --proof 10m. "
        f"Go back, losing what it wrote: tokvm rollback {work.id} --accept-data-loss",
    )
