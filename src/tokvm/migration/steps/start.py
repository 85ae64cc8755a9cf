"""Start: the commit point, then the target's first start. Asked before each start: is the source off, fenced, nothing pending?

MORPHED ── source off + fenced, target not running ──► START_INTENT ── define, ask again, note MAYBE, start ──► STARTED
"""

from __future__ import annotations

import logging

from tokvm.core.errors import DomainError, NeedsPerson
from tokvm.domain.base import DomainState, StartUnknown
from tokvm.migration.phases import Event
from tokvm.migration.records import DowntimePart, TargetRan
from tokvm.migration.steps.fence import SourceRuns, Standing, choose, fence, refuse_two, require_off, standing
from tokvm.migration.steps.stop import refuse_running_target
from tokvm.migration.work import Work

log = logging.getLogger(__name__)

STARTS = 2


def intend(work: Work, note: str = "") -> None:
    """FINAL or MORPHED: the last moment at which going back loses nothing."""
    refuse_running_target(work)
    if not require_off(work):
        return
    work.check_budget("before the start")
    work.advance(Event.START, note)


def start(work: Work) -> None:
    """START_INTENT: record what runs already, or start it."""
    refuse_two(work)
    if work.doors.host.state(work.uuid) is DomainState.RUNNING:
        _started(work)
        return
    work.step("start the target")
    for _ in range(STARTS):
        work.doors.host.define(work.plan())
        _require_startable(work)
        if start_once(work):
            _started(work)
            return
    _give_up(work)


def start_once(work: Work) -> bool:
    """Send one start and see what comes of it. True: it runs.

    Only a start that libvirt refused, of a domain then seen not running, never ran. One that was taken, or whose reply was
    lost, may have run and ended again before anybody looked: from then on this run knows no more than any other.
    """
    if work.record.target_ran is TargetRan.NO:
        work.start_sent_here = True
        work.book.target_ran(TargetRan.MAYBE)
    refused = False
    try:
        work.doors.host.start(work.uuid)
    except DomainError as failed:
        refused = not isinstance(failed, StartUnknown)
        log.warning("migration %s: start failed: %s", work.id, failed.what)
        work.doors.observer.note(f"start failed: {failed.what}")
        work.sleep(work.options.poll_s)
    work.start_sent_here = work.start_sent_here and refused
    return work.doors.host.state(work.uuid) is DomainState.RUNNING


def _require_startable(work: Work) -> None:
    """Unless the source is off and fenced: no start sent before can land any more, and an error says who decides.

    A fence that is gone is not set again here while no start was sent: the copy is stale, and the rollback that follows must be
    found necessary by the next run too, should this one be killed before it is recorded.
    """
    found = standing(work)
    if found is Standing.OFF_AND_FENCED:
        return
    if not _revoke(work):
        work.doors.host.define(work.plan())
        return
    if work.record.target_ran is not TargetRan.NO:
        if found is Standing.OFF_NOT_FENCED:
            fence(work)
        what = f"the source was {found.value} after the target may have run: either copy may hold the newer bytes"
        raise NeedsPerson(what, where=work.name, fix=choose(work))
    raise SourceRuns(f"the source was {found.value} right before the start", where=work.name, fix="cut over again")


def _revoke(work: Work) -> bool:
    """Undefine the target, so that a start already sent cannot land any more. False when it had landed: the target runs."""
    work.doors.host.undefine(work.uuid)
    refuse_two(work)
    return work.doors.host.state(work.uuid) is not DomainState.RUNNING


def _give_up(work: Work) -> None:
    """It does not start. Proved never to have run only when every start was sent by this very run, and refused."""
    if not _revoke(work):
        work.doors.host.define(work.plan())
        _started(work)
        return
    if not work.start_sent_here:
        raise NeedsPerson(
            "the target does not stay on; a start was sent that nobody saw refused, so it may have run and written",
            where=work.name,
            fix=f"to go back to the source: tokvm rollback {work.id} --accept-data-loss. To try again: tokvm cutover {work.id}",
        )
    work.book.target_ran(TargetRan.NO)
    raise DomainError(
        "the target does not start", where=work.name, fix="see libvirt's log (virsh start; journalctl -u libvirtd)"
    )


def _started(work: Work) -> None:
    work.book.target_ran(TargetRan.YES)
    work.took(DowntimePart.START)
    work.advance(Event.TARGET_ON)
