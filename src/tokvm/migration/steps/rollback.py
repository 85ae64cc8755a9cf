"""Rollback: the target can never start any more, then the source runs again. Every part may run twice.

stop target ─► undefine ─► seen absent ─► undo morph ─► no stop pending ─► unfence ─► start source ─► seen running

xapi keeps a clean shutdown in hand for up to 20 minutes, whatever became of who asked for it. While the source runs that long
is waited: it costs nothing, and a source that was "started" before the stop lands would be off after it.
"""

from __future__ import annotations

from tokvm.core.errors import DomainError, NotOff, SourceError
from tokvm.core.machine import PowerState
from tokvm.core.units import format_duration
from tokvm.domain.base import DomainState
from tokvm.migration.phases import Event
from tokvm.migration.work import TRIES, Work

TOLD_EVERY_S = 30.0


def roll_back(work: Work) -> None:
    """ROLLBACK_INTENT: to ROLLED_BACK."""
    work.step("take the target away")
    _remove_target(work)
    work.undo_morph()
    work.step("start the source")
    _wait_for_late_stop(work)
    source = work.doors.source
    work.insist(lambda: source.unfence(work.uuid), lambda: not work.ask(source.is_fenced))
    work.insist(lambda: source.start(work.uuid), lambda: work.ask(source.power) is PowerState.RUNNING)
    _wait_until_it_runs(work)
    work.advance(Event.SOURCE_BACK)


def _remove_target(work: Work) -> None:
    """A start that was sent may land at any moment until the domain is gone; one that landed has written to the disks."""
    host = work.doors.host
    for _ in range(TRIES):
        if host.state(work.uuid) is DomainState.RUNNING:
            work.book.void_passes()
            host.stop(work.uuid)
        host.undefine(work.uuid)
        if host.state(work.uuid) is DomainState.ABSENT:
            return
    raise DomainError("the target cannot be removed, so the source is not started", where=work.name, fix=_again(work))


def _wait_for_late_stop(work: Work) -> None:
    """As long as `late_stop_s` while the source runs, `settle_s` once it does not: then somebody is without a VM."""
    clock, options = work.doors.clock, work.options
    begun = told = ran = clock.monotonic()
    while work.ask(work.doors.source.stop_pending):
        runs = work.ask(work.doors.source.power) is PowerState.RUNNING
        now = clock.monotonic()
        ran = now if runs else ran
        if now - begun >= options.late_stop_s or now - ran >= options.settle_s:
            raise NotOff("a stop of the source is still under way and may land late", where=work.name, fix=_again(work))
        if now - told >= TOLD_EVERY_S:
            told = now
            work.doors.observer.note(
                f"a stop of the source is still under way, for {format_duration(now - begun)} now; "
                f"{'the source runs meanwhile' if runs else 'the source is off'}"
            )
        work.sleep(options.poll_s)


def _wait_until_it_runs(work: Work) -> None:
    until = work.doors.clock.monotonic() + work.options.settle_s
    while work.ask(work.doors.source.power) is not PowerState.RUNNING:
        if work.doors.clock.monotonic() >= until:
            raise SourceError("the source does not start", where=work.name, fix=_again(work))
        work.sleep(work.options.poll_s)


def _again(work: Work) -> str:
    return f"see to it, then run: tokvm rollback {work.id}"
