"""Row by row: what a resume does in each phase, by what the world looks like (docs/flow.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tokvm.core.errors import BudgetExceeded, DomainError, NeedsPerson, NotOff, RolledBack, SourceError, UsageError
from tokvm.migration.phases import Event, Phase
from tokvm.migration.records import PassKind, PassState, TargetRan
from tokvm.migration.reports import Outcome
from tokvm.testing.fakes import Death, FakeTarget, Fault

MakeSynced = Callable[[], Any]
OPTIONS: dict[str, Any] = {"deadline_s": 20.0, "proof_s": 20.0, "settle_s": 10.0}


def stopped_at(make_synced: MakeSynced, phase: Phase) -> Any:
    """A rig whose process died right after that phase was recorded."""
    number = 0
    while True:
        rig = make_synced()
        try:
            rig.migration(die_at=number, after=True).cutover(**OPTIONS)
        except Death:
            rig.world.lose_power()
        if rig.phase is phase:
            rig.world.log.clear()
            return rig
        number += 1
        assert number < 80, f"{phase} is never reached"


def acts(rig: Any) -> list[str]:
    """What was done, questions and chunks left out."""
    questions = {
        "power", "stop_pending", "off_evidence", "is_fenced", "inspect", "snapshots", "claim", "chunk", "open_disk",
        "host.state", "host.alive", "host.domain_xml",
    }  # fmt: skip
    names = [line.split()[1] for line in rig.world.log]
    return [name for name in names if name not in questions]


def finals(rig: Any) -> int:
    book = rig.book
    return sum(one.kind is PassKind.FINAL and one.state is PassState.DONE for one in book.passes())


def test_stop_intent_on_absent_fences_and_stops(make_synced: MakeSynced) -> None:
    rig = stopped_at(make_synced, Phase.STOP_INTENT)
    assert rig.world.source_on
    assert not rig.world.fenced
    assert rig.migration().cutover(**OPTIONS).outcome is Outcome.COMMITTED
    assert acts(rig) == ["fence", "shut_down", "snapshot", "host.define", "host.start"]


def test_stop_intent_on_absent_may_roll_back(make_synced: MakeSynced) -> None:
    rig = stopped_at(make_synced, Phase.STOP_INTENT)
    rig.migration().rollback()
    assert rig.phase is Phase.ROLLED_BACK
    assert rig.world.source_on
    assert not rig.world.fenced


@pytest.mark.parametrize("phase", [Phase.STOP_INTENT, Phase.FENCED])
def test_off_and_fenced_continues_with_the_final_delta(make_synced: MakeSynced, phase: Phase) -> None:
    rig = stopped_at(make_synced, phase)
    rig.world.source_on, rig.world.fenced = False, True
    rig.migration().cutover(**OPTIONS)
    assert acts(rig) == ["snapshot", "host.define", "host.start"]
    assert rig.world.violations == []


@pytest.mark.parametrize("phase", [Phase.FENCED, Phase.FINAL])
def test_a_source_that_runs_again_makes_the_copy_stale(make_synced: MakeSynced, phase: Phase) -> None:
    rig = stopped_at(make_synced, phase)
    rig.world.fenced = False
    rig.world.ha_starts_source()
    with pytest.raises(RolledBack, match="stale"):
        rig.migration().cutover(**OPTIONS)
    assert rig.phase is Phase.ROLLED_BACK
    assert rig.world.source_on
    assert "host.start" not in acts(rig)
    assert rig.migration().cutover(**OPTIONS).proved
    assert rig.world.violations == []


@pytest.mark.parametrize("phase", [Phase.FENCED, Phase.FINAL])
def test_off_but_not_fenced_repeats_the_final_delta(make_synced: MakeSynced, phase: Phase) -> None:
    rig = stopped_at(make_synced, phase)
    before = finals(rig)
    rig.world.fenced = False
    rig.world.ha_starts_source()
    rig.world.guests_write()
    rig.world.source_on = False
    rig.migration().cutover(**OPTIONS)
    assert acts(rig)[:2] == ["fence", "snapshot"]
    assert finals(rig) == before + 1
    assert rig.world.violations == []


def test_start_intent_off_off_starts_again(make_synced: MakeSynced) -> None:
    rig = stopped_at(make_synced, Phase.START_INTENT)
    assert not rig.world.target_on
    rig.migration().cutover(**OPTIONS)
    assert acts(rig) == ["host.define", "host.start"]


def test_start_intent_off_off_never_sent_may_roll_back(make_synced: MakeSynced) -> None:
    rig = stopped_at(make_synced, Phase.START_INTENT)
    rig.migration().rollback()
    assert acts(rig) == ["host.undefine", "unfence", "start"]


def test_start_intent_with_a_target_that_may_have_run_needs_consent(make_synced: MakeSynced) -> None:
    rig = stopped_at(make_synced, Phase.START_INTENT)
    rig.journal().book(rig.journals[0].migrations()[0].id).target_ran(TargetRan.MAYBE)
    with pytest.raises(NeedsPerson, match="accept-data-loss"):
        rig.migration().rollback()
    rig.migration().rollback(accept_data_loss=True)
    assert rig.phase is Phase.ROLLED_BACK


def test_start_intent_with_the_target_on_records_started(make_synced: MakeSynced) -> None:
    rig = stopped_at(make_synced, Phase.START_INTENT)
    rig.world.defined = True
    rig.world.target_starts("the lost start")
    assert rig.migration().cutover(**OPTIONS).outcome is Outcome.COMMITTED
    assert acts(rig) == []


def test_start_intent_with_the_source_on_never_starts_the_target(make_synced: MakeSynced) -> None:
    rig = stopped_at(make_synced, Phase.START_INTENT)
    rig.world.fenced = False
    rig.world.ha_starts_source()
    with pytest.raises(RolledBack):
        rig.migration().cutover(**OPTIONS)
    assert rig.world.source_on
    assert "host.start" not in acts(rig)


@pytest.mark.parametrize("phase", [Phase.START_INTENT, Phase.STARTED])
@pytest.mark.slow
def test_two_running_copies_need_a_person(make_synced: MakeSynced, phase: Phase) -> None:
    rig = stopped_at(make_synced, phase)
    world = rig.world
    world.defined = world.target_on = world.target_ever_ran = True
    world.fenced, world.source_on = False, True
    with pytest.raises(NeedsPerson, match="both run"):
        rig.migration().cutover(**OPTIONS)
    assert not world.target_linked
    assert world.source_on
    assert world.target_on
    assert acts(rig) == ["host.cut_network"]
    rig.migration().rollback(accept_data_loss=True)
    assert (world.source_on, world.target_on) == (True, False)


@pytest.mark.slow
def test_started_off_off_starts_the_target_only(make_synced: MakeSynced) -> None:
    rig = stopped_at(make_synced, Phase.STARTED)
    rig.world.target_on = False
    assert rig.migration().cutover(**OPTIONS).proved
    assert acts(rig) == ["host.define", "host.start"]
    assert not rig.world.source_on


@pytest.mark.slow
def test_started_with_the_source_on_and_the_target_off_needs_a_person(make_synced: MakeSynced) -> None:
    rig = stopped_at(make_synced, Phase.STARTED)
    rig.world.target_on, rig.world.fenced, rig.world.source_on = False, False, True
    with pytest.raises(NeedsPerson):
        rig.migration().cutover(**OPTIONS)
    assert acts(rig) == []


@pytest.mark.parametrize("target_on", [False, True])
@pytest.mark.slow
def test_rollback_intent_goes_on_whatever_the_target_does(make_synced: MakeSynced, *, target_on: bool) -> None:
    rig = stopped_at(make_synced, Phase.STARTED)
    rig.journal().book(rig.journals[0].migrations()[0].id).advance(Event.ROLL_BACK)
    rig.world.target_on = target_on
    with pytest.raises(RolledBack):
        rig.migration().cutover(**OPTIONS)
    assert rig.phase is Phase.ROLLED_BACK
    assert acts(rig)[-3:] == ["host.undefine", "unfence", "start"]


def test_a_target_that_somebody_else_started_is_left_alone(make_synced: MakeSynced) -> None:
    rig = stopped_at(make_synced, Phase.FENCED)
    rig.world.defined = rig.world.target_on = True
    with pytest.raises(NeedsPerson, match="did not start it"):
        rig.migration().cutover(**OPTIONS)
    assert rig.phase is Phase.FENCED
    assert acts(rig) == []


# ---- what fails, and what follows


def test_a_guest_that_does_not_stop_goes_on_running(make_synced: MakeSynced) -> None:
    rig = make_synced()
    rig.world.obeys = False
    with pytest.raises(NotOff):
        rig.migration().cutover(**OPTIONS)
    assert rig.phase is Phase.ROLLED_BACK
    assert rig.world.source_on
    assert not rig.world.fenced


def test_force_off_cuts_its_power(make_synced: MakeSynced) -> None:
    rig = make_synced()
    rig.world.obeys = False
    assert rig.migration().cutover(**OPTIONS, force_off=True).proved
    assert rig.world.violations == []


def test_a_disk_that_is_still_held_is_no_proof(make_synced: MakeSynced) -> None:
    rig = make_synced()
    rig.world.held = True
    with pytest.raises(NotOff, match="disks held"):
        rig.migration().cutover(**OPTIONS)
    assert rig.world.source_on
    assert "host.start" not in acts(rig)


def test_a_stop_that_never_ends_keeps_the_source_from_being_unfenced(make_synced: MakeSynced) -> None:
    rig = make_synced()
    rig.world.late_after = 10_000
    rig.world.always = {"shut_down": Fault.LATE}
    with pytest.raises(NeedsPerson, match="could not be rolled back yet"):
        rig.migration().cutover(**OPTIONS)
    assert rig.phase in {Phase.ROLLBACK_INTENT}
    rig.world.pending_stop = rig.world.calls
    rig.migration().rollback()
    assert rig.phase is Phase.ROLLED_BACK
    assert rig.world.source_on


def test_a_target_that_does_not_start_brings_the_source_back(make_synced: MakeSynced) -> None:
    rig = make_synced()
    rig.world.always = {"host.start": Fault.REFUSE}
    with pytest.raises(RolledBack, match="does not start"):
        rig.migration().cutover(**OPTIONS)
    assert rig.phase is Phase.ROLLED_BACK
    assert rig.world.source_on
    assert not rig.world.defined
    rig.world.always = {}
    assert rig.migration().cutover(**OPTIONS).proved
    assert rig.world.violations == []


def test_a_start_of_a_dead_run_that_fails_now_needs_a_person(make_synced: MakeSynced) -> None:
    """Nobody knows whether the target ran in between."""
    rig = stopped_at(make_synced, Phase.START_INTENT)
    rig.journal().book(rig.journals[0].migrations()[0].id).target_ran(TargetRan.MAYBE)
    rig.world.always = {"host.start": Fault.REFUSE}
    with pytest.raises(NeedsPerson, match="may have run"):
        rig.migration().cutover(**OPTIONS)
    assert rig.phase is Phase.START_INTENT
    assert not rig.world.source_on


def test_a_broken_target_brings_the_source_back(make_synced: MakeSynced) -> None:
    rig = make_synced()

    class Broken(FakeTarget):
        broken = True

    rig.open_target = lambda index: Broken(rig.world, index)
    with pytest.raises(RolledBack, match="Input/output error"):
        rig.migration().cutover(**OPTIONS)
    assert rig.phase is Phase.ROLLED_BACK
    rig.open_target = None
    assert rig.migration().cutover(**OPTIONS).proved
    assert rig.world.violations == []


def test_ctrl_c_in_the_downtime_brings_the_source_back(make_synced: MakeSynced) -> None:
    rig = make_synced()

    def interrupted(_index: int) -> FakeTarget:
        raise KeyboardInterrupt

    rig.open_target = interrupted
    with pytest.raises(KeyboardInterrupt):
        rig.migration().cutover(**OPTIONS)
    assert rig.phase is Phase.ROLLED_BACK
    assert rig.world.source_on


def test_a_source_that_is_gone_leaves_one_command(make_synced: MakeSynced) -> None:
    rig = make_synced()
    rig.world.always = dict.fromkeys(("snapshot", "start"), Fault.LOSE_REQUEST)
    with pytest.raises(NeedsPerson, match="tokvm rollback") as needs:
        rig.migration().cutover(**OPTIONS)
    assert needs.value.exit_code == 15
    assert rig.phase is Phase.ROLLBACK_INTENT
    rig.world.always = {}
    rig.migration().rollback()
    assert rig.world.source_on


# ---- budget


def test_a_downtime_predicted_too_long_stops_nothing(make_synced: MakeSynced) -> None:
    rig = make_synced()
    with pytest.raises(BudgetExceeded, match="was not stopped"):
        rig.migration().cutover(**OPTIONS, budget_s=1.0)
    assert rig.phase is Phase.COPY
    assert acts(rig) == []


@pytest.mark.parametrize("call", ["shut_down", "off_evidence", "snapshot", "open_disk", "chunk"])
@pytest.mark.slow
def test_a_downtime_over_the_budget_rolls_back(make_synced: MakeSynced, call: str) -> None:
    rig = make_synced()
    rig.world.always = {call: Fault.STALL}
    with pytest.raises(BudgetExceeded) as exceeded:
        rig.migration().cutover(**OPTIONS, budget_s=50.0)
    assert exceeded.value.exit_code == 7
    assert rig.phase is Phase.ROLLED_BACK
    assert rig.world.source_on
    assert not rig.world.fenced
    rig.world.always = {}
    assert rig.migration().cutover(**OPTIONS, budget_s=200.0).proved
    assert rig.world.violations == []


def test_a_stop_that_took_long_once_is_foreseen(make_synced: MakeSynced) -> None:
    rig = make_synced()
    rig.world.always = {"shut_down": Fault.STALL}
    with pytest.raises(BudgetExceeded, match="goes on"):
        rig.migration().cutover(**OPTIONS, budget_s=50.0)
    rig.world.log.clear()
    with pytest.raises(BudgetExceeded, match=r"stop 1 min|stop \d+"):
        rig.migration().cutover(**OPTIONS, budget_s=50.0)
    assert acts(rig) == []


def test_a_guest_that_stops_too_slowly_is_over_the_budget(make_synced: MakeSynced) -> None:
    rig = make_synced()
    rig.world.obeys = False
    with pytest.raises(BudgetExceeded, match="shutting down"):
        rig.migration().cutover(deadline_s=300.0, settle_s=10.0, budget_s=20.0)
    assert rig.world.source_on


def test_a_dead_run_s_time_counts_while_the_source_is_off(make_synced: MakeSynced) -> None:
    rig = stopped_at(make_synced, Phase.FINAL)
    rig.world.clock.sleep(3600)
    with pytest.raises(BudgetExceeded):
        rig.migration().cutover(**OPTIONS, budget_s=600.0)
    assert rig.world.source_on


def test_downtime_is_kept_in_parts(make_synced: MakeSynced) -> None:
    rig = make_synced()
    report = rig.migration().cutover(**OPTIONS)
    assert list(report.downtime_s) == ["stop", "delta", "start", "boot", "total"]
    assert report.downtime_s["total"] == pytest.approx(sum(list(report.downtime_s.values())[:-1]))
    assert rig.migration().status().downtime_s == report.downtime_s
    assert report.to_dict()["outcome"] == "committed"


# ---- proof of life


def test_a_target_without_a_sign_of_life_stays_started(make_synced: MakeSynced) -> None:
    rig = make_synced()
    rig.world.lives = False
    with pytest.raises(DomainError, match="no sign of life"):
        rig.migration().cutover(**OPTIONS)
    assert rig.phase is Phase.STARTED
    assert rig.world.target_on
    assert rig.world.fenced
    with pytest.raises(NeedsPerson, match="accept-data-loss"):
        rig.migration().rollback()
    rig.world.lives = True
    assert rig.migration().cutover(**OPTIONS).proved


def test_another_sign_of_life_counts(make_synced: MakeSynced) -> None:
    rig = make_synced()
    rig.world.lives = False
    rig.proof = lambda: True
    assert rig.migration().cutover(**OPTIONS).proved


def test_no_proof_asked_for_is_no_commit(make_synced: MakeSynced) -> None:
    rig = make_synced()
    report = rig.migration().cutover(deadline_s=20.0, proof_s=0.0)
    assert (report.outcome, report.proved, rig.phase) == (Outcome.STARTED, False, Phase.STARTED)
    assert "tokvm finish" in report.advice


def test_a_rollback_after_the_target_ran_makes_the_next_sync_a_base(make_synced: MakeSynced) -> None:
    rig = make_synced()
    rig.migration().cutover(**OPTIONS)
    rig.world.loss_accepted = True
    rig.migration().rollback(accept_data_loss=True)
    assert rig.world.source_on
    with pytest.raises(UsageError, match="sync"):
        rig.migration().cutover(**OPTIONS)
    report = rig.migration().sync(passes=1)
    assert [one.kind for one in report.passes] == ["base"]
    rig.world.target_ever_ran = rig.world.loss_accepted = False
    rig.migration().cutover(**OPTIONS)
    assert rig.world.violations == []


# ---- finish


def test_finish_keeps_the_migrated_source_off_and_fenced(make_synced: MakeSynced) -> None:
    rig = make_synced()
    rig.world.snapshots["somebody's"] = rig.world.snapshots[next(iter(rig.world.snapshots))]
    rig.migration().cutover(**OPTIONS)
    rig.world.fenced = False
    report = rig.migration().finish()
    assert report.snapshots_removed == 3
    assert list(rig.world.snapshots) == ["somebody's"]
    assert rig.world.fenced
    assert not rig.world.source_on
    assert "fenced" in report.left[0]
    with pytest.raises(SourceError, match="blocked"):
        rig.migration()._doors.source.start(rig.world.machine().uuid)


def test_finish_commits_what_was_only_started(make_synced: MakeSynced) -> None:
    rig = make_synced()
    rig.migration().cutover(proof_s=0.0)
    rig.migration().finish()
    assert rig.phase is Phase.COMMITTED


def test_finish_of_a_copy_gives_the_vm_free(make_synced: MakeSynced) -> None:
    rig = make_synced()
    assert rig.world.owner
    rig.migration().finish()
    assert rig.world.snapshots == {}
    assert rig.world.owner == ""
    assert rig.world.source_on
    with pytest.raises(UsageError, match="finished"):
        rig.migration().sync(passes=1)


def test_finish_in_the_middle_of_a_cutover_is_refused(make_synced: MakeSynced) -> None:
    rig = stopped_at(make_synced, Phase.FENCED)
    with pytest.raises(UsageError, match="under way"):
        rig.migration().finish()
    with pytest.raises(UsageError, match="under way"):
        rig.migration().sync(passes=1)


def test_an_interrupted_finish_goes_on(make_synced: MakeSynced) -> None:
    for number in range(30):
        rig = make_synced()
        rig.migration().cutover(**OPTIONS)
        rig.world.plan = {rig.world.calls + number: Fault.DIE_AFTER}
        try:
            rig.migration().finish()
        except Death:
            rig.migration().finish()
            assert rig.world.snapshots == {}
            continue
        assert number > 4
        return
    pytest.fail("finish never came to its end")
