"""Fence: nobody can start the source any more; and is it off? Asked again before everything that depends on it.

The fence is read first, the pending stop second, the witnesses last: what was fenced and is seen off after that stays off.
"""

from __future__ import annotations

from enum import Enum

from tokvm.core.errors import NeedsPerson, NotOff, SourceError
from tokvm.core.machine import PowerState
from tokvm.domain.base import DomainState
from tokvm.migration.phases import LOSSLESS_ROLLBACK, Event
from tokvm.migration.work import Work


class Standing(Enum):
    """How the source stands. UNCLEAR: neither on nor proved off (a disk is still held, a stop may still land)."""

    OFF_AND_FENCED = "off and fenced"
    OFF_NOT_FENCED = "off, but not fenced"
    ON = "on"
    UNCLEAR = "not proved off"


class SourceRuns(SourceError):
    """The source runs although it was stopped (HA, or a person): what was copied is stale, so the target is not started."""


def look(work: Work) -> tuple[Standing, str]:
    """Ask the source once; the standing and the witnesses' own words."""
    source = work.doors.source
    fenced = work.ask(source.is_fenced)
    pending = work.ask(source.stop_pending)
    evidence = work.ask(source.off_evidence)
    words = f"power {evidence.power}, disks {'released' if evidence.released else 'held'}; {evidence.detail}".rstrip("; ")
    if evidence.power in (PowerState.RUNNING, PowerState.PAUSED):
        return Standing.ON, words
    if not evidence.proved or pending:
        return Standing.UNCLEAR, words + ("; a stop is still under way" if pending else "")
    return (Standing.OFF_AND_FENCED if fenced else Standing.OFF_NOT_FENCED), words


def standing(work: Work) -> Standing:
    """The source's standing, waited for while it is UNCLEAR; NotOff when it stays so. The budget ends at the commit point."""
    until = work.doors.clock.monotonic() + work.options.settle_s
    while True:
        found, words = look(work)
        if found is not Standing.UNCLEAR:
            return found
        if work.phase in LOSSLESS_ROLLBACK:
            work.check_budget("while the source was stopped")
        if work.doors.clock.monotonic() >= until:
            raise NotOff(
                f"the source is not proved off: {words}",
                where=work.name,
                fix="see what holds it on the source; then cut over again, or with --force-off",
            )
        work.sleep(work.options.poll_s)


def fence(work: Work) -> None:
    """Set the fence, unless it is set; the source's `fence` reads it back."""
    source = work.doors.source
    reason = f"tokvm {work.id} moves this VM to KVM; `tokvm rollback {work.id}` brings it back here"
    if not work.ask(source.is_fenced):
        work.step("fence the source")
        work.insist(lambda: source.fence(work.uuid, reason), lambda: work.ask(source.is_fenced))


def require_off(work: Work) -> bool:
    """True: off by two witnesses, fenced, nothing pending. False: it was off but not fenced, so it may have run; the journal
    is back in FENCED, for another final delta, and it is fenced again. SourceRuns when it is on."""
    if work.just_proved:
        work.just_proved = False
        return True
    match standing(work):
        case Standing.OFF_AND_FENCED:
            return True
        case Standing.OFF_NOT_FENCED:
            # recorded first: were it fenced first and this run killed, the next one would find all well and the copy stale
            work.advance(Event.REFENCED, "the fence was gone; the final delta is taken again")
            fence(work)
            return False
        case _:
            raise SourceRuns(
                "the source runs again, so what was copied is stale",
                where=work.name,
                fix="find out who started it (HA, a person), then sync and cut over again",
            )


def choose(work: Work) -> str:
    """The two ways out when both copies have, or may have, run."""
    return (
        f"to keep the source: tokvm rollback {work.id} --accept-data-loss. To keep the target: stop the source by hand, "
        f"then tokvm cutover {work.id}"
    )


def refuse_two(work: Work) -> None:
    """When both run: take the target off the network, stop nothing, ask a person."""
    if work.doors.host.state(work.uuid) is not DomainState.RUNNING:
        return
    if work.ask(work.doors.source.power) is not PowerState.RUNNING:
        return
    work.doors.host.cut_network(work.uuid)
    work.note("ALARM: source and target both run; the target's network links were set down, nothing was stopped")
    raise NeedsPerson(
        "source and target both run; the target was taken off the network, nothing was stopped",
        where=work.name,
        fix=f"{choose(work)}, then set the target's links up (virsh domif-setlink)",
    )
