"""Final: the last delta, of a snapshot taken while the source was off and fenced."""

from __future__ import annotations

from tokvm.core.errors import UsageError
from tokvm.migration.phases import Event, Phase
from tokvm.migration.records import DowntimePart, PassKind, SnapshotState
from tokvm.migration.rounds import Round, newest_done, rounds_of, unfinished
from tokvm.migration.steps.claim import survey
from tokvm.migration.steps.copy import copy_round
from tokvm.migration.steps.fence import require_off
from tokvm.migration.steps.freeze import freeze, make, reconcile
from tokvm.migration.steps.stop import refuse_running_target
from tokvm.migration.work import Work


def final(work: Work) -> None:
    """FENCED: copy what changed since the newest complete pass; FINAL when the medium holds it and the source is still off."""
    refuse_running_target(work)
    if not require_off(work):
        return
    work.step("copy the last delta")
    work.undo_morph()
    vm = work.vm
    if vm is None:
        vm = survey(work)
        reconcile(work)
    rounds = rounds_of(work.book)
    base, begun = newest_done(rounds), unfinished(rounds)
    if base is None:
        raise UsageError("the copied disks can no longer be built upon", where=work.name, fix="sync again, then cut over")
    if begun is not None:
        at = begun.snapshot if begun.snapshot.state is SnapshotState.MADE else make(work, vm, begun.snapshot)
        copy_round(work, vm, at, base, in_downtime=True)
        base = newest_done(rounds_of(work.book)) or base
    if not _current(work, base):
        copy_round(work, vm, freeze(work, vm, PassKind.FINAL), base, in_downtime=True)
    work.check_budget("during the final delta")
    if not require_off(work):
        return
    work.took(DowntimePart.DELTA)
    work.advance(Event.FINAL_DONE)
    work.just_proved = not work.morphs


def _current(work: Work, newest: Round) -> bool:
    """Was it frozen after the source was last proved off and fenced?"""
    proved = [event.number for event in work.book.events() if event.target is Phase.FENCED and event.event != "note"]
    return newest.kind is PassKind.FINAL and newest.snapshot.after_event >= proved[-1]
