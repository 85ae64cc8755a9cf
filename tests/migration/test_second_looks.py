"""What a cutover may not conclude from what it saw, and how long its way back is tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from dataclasses import replace as changed
from itertools import pairwise
from typing import Any

import pytest

from tokvm.core.errors import BudgetExceeded, ConnectionLost, DomainError, NeedsPerson, NotOff, RolledBack, SourceError
from tokvm.core.machine import OffEvidence, Snapshot
from tokvm.domain.base import StartUnknown
from tokvm.migration.doors import Silent
from tokvm.migration.phases import Event, Phase
from tokvm.migration.records import PassKind, PassState, SnapshotState, TargetRan
from tokvm.migration.reports import StopCause
from tokvm.migration.runner import Converge, CutoverOptions, Migration
from tokvm.migration.steps.fence import standing
from tokvm.migration.work import Work
from tokvm.testing.fakes import Death, FakeHost, FakeSource, Fault

MakeSynced = Callable[[], Any]
OPTIONS: dict[str, Any] = {"deadline_s": 20.0, "proof_s": 20.0, "settle_s": 10.0}


@dataclass
class Notes(Silent):
    """Keeps what is noted, and when by the world's clock."""

    clock: Any
    said: list[tuple[float, str]] = field(default_factory=list)

    def note(self, text: str, /) -> None:
        self.said.append((self.clock.monotonic(), text))


def watched(rig: Any) -> tuple[Migration, Notes]:
    """A migration as a new process finds it, and what it tells its observer."""
    migration = rig.migration()
    notes = Notes(rig.world.clock)
    doors = changed(migration._doors, observer=notes)
    return Migration(rig.journals[0], rig.journals[0].migrations()[0], doors), notes


# ---- a start that may have run


def starts_and_ends(rig: Any, monkeypatch: pytest.MonkeyPatch, then: list[DomainError | None]) -> None:
    """Each start lets the guest run and end again before anybody looks; its answer is the next of `then`. Then starts are
    refused."""

    def start(self: FakeHost, uuid: str) -> None:
        if not then:
            raise DomainError("refused", where=uuid)
        rig.world.target_starts("host.start")
        rig.world.guests_write()
        rig.world.target_on = False
        answer = then.pop(0)
        if answer is not None:
            raise answer

    monkeypatch.setattr(FakeHost, "start", start)


@pytest.mark.parametrize("answer", [None, StartUnknown("the reply was lost")])
def test_a_target_that_ran_for_a_moment_is_never_rolled_back_by_itself(
    make_synced: MakeSynced, monkeypatch: pytest.MonkeyPatch, answer: DomainError | None
) -> None:
    rig = make_synced()
    starts_and_ends(rig, monkeypatch, [answer])
    with pytest.raises(NeedsPerson, match="may have run"):
        rig.migration().cutover(**OPTIONS)
    assert (rig.phase, rig.book.record().target_ran) == (Phase.START_INTENT, TargetRan.MAYBE)
    assert not rig.world.source_on
    assert rig.world.fenced
    with pytest.raises(NeedsPerson, match="accept-data-loss"):
        rig.migration().rollback()
    rig.world.loss_accepted = True
    rig.migration().rollback(accept_data_loss=True)
    assert {one.state for one in rig.book.passes()} == {PassState.VOID}
    assert rig.world.violations == []


def test_a_start_that_was_refused_each_time_never_ran(make_synced: MakeSynced) -> None:
    rig = make_synced()
    rig.world.always = {"host.start": Fault.REFUSE}
    with pytest.raises(RolledBack, match="does not start"):
        rig.migration().cutover(**OPTIONS)
    assert PassState.VOID not in {one.state for one in rig.book.passes()}


# ---- the automatic rollback


def test_a_source_that_is_away_for_minutes_is_rolled_back_in_the_end(
    make_synced: MakeSynced, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_synced()
    rig.world.always = {"snapshot": Fault.REFUSE}
    clock, begin = rig.world.clock, FakeSource.start
    back: list[float] = []

    def away(self: FakeSource, uuid: str) -> None:
        back.append(clock.monotonic())
        if clock.monotonic() < back[0] + 300:
            raise (ConnectionLost if len(back) % 2 else SourceError)("the toolstack restarts", where="fake")
        begin(self, uuid)

    monkeypatch.setattr(FakeSource, "start", away)
    migration, notes = watched(rig)
    with pytest.raises(RolledBack, match="snapshot: refused"):
        migration.cutover(**OPTIONS)
    assert rig.phase is Phase.ROLLED_BACK
    assert rig.world.source_on
    tries = [(at, text) for at, text in notes.said if "of the rollback failed" in text]
    gaps = [round(b[0] - a[0]) for a, b in pairwise(tries)]
    assert len(tries) > 8
    assert gaps[0] < gaps[-1] <= 33


@pytest.mark.parametrize("rescue_s", [0.0, 100.0])
def test_a_source_that_stays_away_ends_it_after_the_rescue(make_synced: MakeSynced, rescue_s: float) -> None:
    rig = make_synced()
    rig.world.always = {"snapshot": Fault.REFUSE, "start": Fault.REFUSE}
    began = rig.world.clock.monotonic()
    with pytest.raises(NeedsPerson, match="could not be rolled back yet"):
        rig.migration().cutover(**OPTIONS, rescue_s=rescue_s)
    assert rescue_s / 2 <= rig.world.clock.monotonic() - began < rescue_s + 30


# ---- the budget ends at the commit point


@pytest.mark.parametrize("phase", [Phase.FENCED, Phase.START_INTENT])
def test_the_budget_is_asked_only_before_the_commit_point(
    make_synced: MakeSynced, monkeypatch: pytest.MonkeyPatch, phase: Phase
) -> None:
    rig = make_synced()
    migration = rig.migration()
    book, clock = rig.book, rig.world.clock
    work = Work(book, migration._doors, CutoverOptions(budget_s=5.0, settle_s=10.0))
    for event in (Event.CUT_OVER, Event.SOURCE_OFF, Event.FINAL_DONE, Event.START):
        if work.phase is not phase:
            work.advance(event)
    rig.world.source_on, rig.world.fenced = False, True
    began: float = clock.monotonic()
    monkeypatch.setattr(
        FakeSource, "off_evidence", lambda self, _uuid: OffEvidence(self.world.power(), clock.monotonic() > began + 8)
    )
    work.down_begins()
    if phase is Phase.FENCED:
        with pytest.raises(BudgetExceeded, match="the source goes on"):
            standing(work)
        return
    assert standing(work).value == "off and fenced"
    assert clock.monotonic() > began + 8


# ---- a stop that lands late


def test_a_stop_that_lands_after_a_quarter_of_an_hour_is_waited_for(
    make_synced: MakeSynced, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_synced()
    world, clock = rig.world, rig.world.clock
    asked: list[float] = []

    def shut_down(_self: FakeSource, _uuid: str, *, deadline_s: float, force: bool) -> None:
        world.pending_stop = 1 << 60
        clock.sleep(deadline_s)
        asked.append(clock.monotonic())
        raise NotOff("the guest did not stop", where="guest")

    def stop_pending(self: FakeSource, _uuid: str) -> bool:
        if asked and world.pending_stop is not None and clock.monotonic() > asked[0] + 900:
            world.source_on, world.pending_stop = False, None
        return world.pending_stop is not None

    monkeypatch.setattr(FakeSource, "shut_down", shut_down)
    monkeypatch.setattr(FakeSource, "stop_pending", stop_pending)
    migration, notes = watched(rig)
    with pytest.raises(NotOff, match="did not stop"):
        migration.cutover(**OPTIONS)
    assert rig.phase is Phase.ROLLED_BACK
    assert world.source_on
    assert not world.fenced
    told = [at for at, text in notes.said if "still under way" in text]
    assert 25 <= len(told) <= 31
    assert world.violations == []


def test_a_stop_that_hangs_while_the_source_is_off_is_not_waited_for_that_long(make_synced: MakeSynced) -> None:
    rig = make_synced()
    rig.migration()
    book = rig.book
    book.advance(Event.CUT_OVER)
    rig.world.source_on, rig.world.fenced, rig.world.pending_stop = False, True, 1 << 60
    began = rig.world.clock.monotonic()
    with pytest.raises(NotOff, match="still under way"):
        rig.migration().rollback(settle_s=10.0)
    assert rig.world.clock.monotonic() - began < 15
    assert rig.world.fenced


# ---- passes and snapshots


def test_a_delta_that_had_to_copy_everything_counts_as_a_base(rig: Any) -> None:
    """Its snapshot was intended as a delta's; then all passes were voided."""
    rig.begin()
    rig.migration().sync(passes=1)
    book = rig.book
    book.snapshot_intended(PassKind.DELTA)
    book.void_passes()
    report = rig.migration().sync(converge=Converge(small_bytes=0))
    assert report.stopped_by is StopCause.FLAT
    assert [one.kind for one in report.passes][:2] == ["delta", "delta"]
    assert [one.since for one in rig.book.passes()][1:4] == [None, 2, 3]


def test_a_snapshot_that_lost_a_disk_counts_as_gone(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(disks=2)
    rig.begin()
    rig.migration().sync(passes=2)
    mark, (made, *rest) = list(rig.world.snapshots.items())[-1]
    rig.world.snapshots[mark] = (Snapshot(made.key, mark, {"vdi-0": made.disks["vdi-0"]}), *rest)
    report = rig.migration().sync(passes=1)
    assert [one.kind for one in report.passes] == ["base"]
    assert all(a == b for a, b in zip(rig.world.targets, list(rig.world.snapshots.values())[-1][1], strict=True))


@pytest.mark.parametrize("loss", ["gone", "a disk is gone", "taken back to the one before"])
@pytest.mark.slow
def test_a_pass_whose_snapshot_went_in_the_middle_is_not_built_over(make_rig: Callable[..., Any], loss: str) -> None:
    rig = make_rig(disks=2)
    rig.begin()
    rig.migration().sync(passes=1)
    while [one.state for one in rig.book.passes() if one.number == 2] != [PassState.DONE, PassState.RUNNING]:
        rig.world.plan = {rig.world.calls + 8: Fault.DIE_BEFORE}  # some blocks further each time
        with pytest.raises(Death):
            rig.migration().sync(passes=2)
        rig.world.lose_power()
    mark = next(one.mark for one in rig.book.snapshots() if one.number == 2)
    if loss != "a disk is gone":
        del rig.world.snapshots[mark]
        if loss != "gone":
            _, contents, changed = next(iter(rig.world.snapshots.values()))
            rig.world.disks = [bytearray(content) for content in contents]
            rig.world.changed = [dict(blocks) for blocks in changed]
    else:
        made, *rest = rig.world.snapshots[mark]
        rig.world.snapshots[mark] = (Snapshot(made.key, mark, {"vdi-0": "x"}), *rest)
    rig.world.plan = {}
    report = rig.migration().sync(passes=2)
    assert [(one.number, one.kind) for one in report.passes][:1] == [(3, "base")]
    assert {one.state for one in rig.book.passes() if one.number <= 2} == {PassState.VOID}
    assert next(one.state for one in rig.book.snapshots() if one.number == 2) is SnapshotState.REMOVED
    assert all(a == b for a, b in zip(rig.world.targets, list(rig.world.snapshots.values())[-1][1], strict=True))
