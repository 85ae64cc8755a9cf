"""The real runner through everything that can happen to a cutover: death at every step, lost replies, HA, late commands.

Every plan ends the same way: no violation (never two, never a stale start), one copy running, the journal at rest.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tokvm.core.errors import NeedsPerson, TokvmError
from tokvm.domain.base import DomainState
from tokvm.migration import runner
from tokvm.migration.book import Book
from tokvm.migration.phases import Event, Phase
from tokvm.migration.rounds import Round
from tokvm.migration.steps import fence, final, prove, rollback, start, stop
from tokvm.testing.fakes import Death, Fault, World

MakeSynced = Callable[[], Any]
OPTIONS = {"deadline_s": 20.0, "proof_s": 20.0, "settle_s": 10.0}
AT_REST = {
    Phase.COPY: "source", Phase.ROLLED_BACK: "source", Phase.STARTED: "target", Phase.COMMITTED: "target",
}  # fmt: skip


def run(rig: Any, **die: Any) -> TokvmError | Death | None:
    """One process: how it ended."""
    return attempt(rig, lambda: rig.migration(**die).cutover(**OPTIONS))


def attempt(rig: Any, command: Callable[[], object]) -> TokvmError | Death | None:
    try:
        command()
    except (TokvmError, Death) as ended:
        if isinstance(ended, Death):
            rig.world.lose_power()
        return ended
    return None


def resume(rig: Any, runs: int = 6) -> None:
    """The same command again until it is at rest; a person follows the advice of NeedsPerson."""
    for _ in range(runs):
        ended = run(rig)
        if isinstance(ended, NeedsPerson) and not rig.world.violations:
            rig.world.loss_accepted = True
            attempt(rig, lambda: rig.migration().rollback(accept_data_loss=True, settle_s=10.0))
        if rig.phase in AT_REST and rig.phase is not Phase.COPY:
            return


def assert_settled(rig: Any, why: str) -> None:
    """Whatever is still under way lands first."""
    world = rig.world
    world.plan = {}
    for _ in range(100):
        world.call("time passes", lambda: None)
    story = f"{why}\n" + "\n".join(world.log[-180:-100])
    assert not world.violations, f"{world.violations} {story}"
    assert rig.phase in AT_REST, f"{rig.phase} {story}"
    running = "source" if world.source_on else "target" if world.target_on else "none"
    assert running == AT_REST[rig.phase], f"{rig.phase}, but {running} runs: {story}"
    assert world.fenced == (running == "target"), f"fence: {story}"
    assert world.defined == (running == "target"), f"domain: {story}"


@pytest.fixture
def calls(make_synced: MakeSynced) -> int:
    """How many calls a cutover makes when all goes well."""
    rig = make_synced()
    assert run(rig) is None
    made = int(rig.world.calls)
    assert_settled(rig, "nothing happens")
    assert rig.phase is Phase.COMMITTED
    return made


@pytest.mark.parametrize("fault", [Fault.DIE_BEFORE, Fault.DIE_AFTER])
@pytest.mark.slow
def test_death_at_any_call(make_synced: MakeSynced, calls: int, fault: Fault) -> None:
    for number in range(calls):
        rig = make_synced()
        rig.world.plan = {number: fault}
        assert isinstance(run(rig), Death)
        resume(rig)
        assert_settled(rig, f"{fault} at {number}")
        assert rig.phase is Phase.COMMITTED


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.slow
def test_death_at_any_journal_write(make_synced: MakeSynced, *, after: bool) -> None:
    number = 0
    while True:
        rig = make_synced()
        ended = run(rig, die_at=number, after=after)
        if ended is None:
            break
        assert isinstance(ended, Death)
        resume(rig)
        assert_settled(rig, f"death {'after' if after else 'before'} journal write {number}")
        assert rig.phase is Phase.COMMITTED
        number += 1
    assert number > 20


@pytest.mark.parametrize("fault", [fault for fault in Fault if "IE_" not in fault.name and "KILL" not in fault.name])
@pytest.mark.slow
def test_one_fault_at_any_call(make_synced: MakeSynced, calls: int, fault: Fault) -> None:
    for number in range(calls):
        rig = make_synced()
        rig.world.plan = {number: fault}
        run(rig)
        resume(rig)
        assert_settled(rig, f"{fault} at {number}")


@pytest.mark.slow
def test_a_lost_reply_does_not_make_a_cutover_fail(make_synced: MakeSynced, calls: int) -> None:
    ends = []
    for number in range(calls):
        rig = make_synced()
        rig.world.plan = {number: Fault.LOSE_REPLY}
        ended = run(rig)
        if ended is not None:
            ends.append((rig.world.log[number], str(ended)))
    assert {name.split()[1].split(".")[0] for name, _ in ends} <= {"host"}, ends  # libvirt is local: its errors are answers


@pytest.mark.parametrize("fault", [Fault.DIE_BEFORE, Fault.DIE_AFTER, Fault.REFUSE, Fault.LIFT, Fault.INTERLUDE])
@pytest.mark.slow
def test_a_morph_is_undone_before_anything_else_is_written(make_synced: MakeSynced, calls: int, fault: Fault) -> None:
    for number in range(9, calls + 8):
        rig = make_synced()
        rig.morphs = True
        rig.world.plan = {number: fault}
        run(rig)
        resume(rig)
        assert_settled(rig, f"{fault} at {number}")
        assert rig.world.morphed == rig.world.target_on


def test_a_way_that_changes_no_disk_takes_no_time_of_the_downtime(make_synced: MakeSynced) -> None:
    plain = make_synced()
    run(plain)
    calls = [entry.split()[1] for entry in plain.world.log]
    prepared = make_synced()
    prepared.morphs, prepared.changes_disks = True, False
    run(prepared)
    made = [entry.split()[1] for entry in prepared.world.log]
    assert [name for name in made if not name.startswith("morph")] == calls
    assert_settled(prepared, "a way that changes no disk")
    assert not prepared.world.morphed
    events = prepared.book.events()
    assert any("SKIPPED: the disks stay" in event.note for event in events)


def pairs(calls: int, count: int, seed: int) -> list[dict[int, Fault]]:
    """Plans of two to four events, anywhere; a death is followed by more in the runs after it."""
    chance = random.Random(seed)
    faults = [f for f in Fault if f not in (Fault.KILL_AFTER, Fault.KILL_BEFORE)]
    return [{chance.randrange(calls * 2): chance.choice(faults) for _ in range(chance.randint(2, 4))} for _ in range(count)]


def lifted_then_dead(calls: int) -> list[dict[int, Fault]]:
    """The fence is lifted for a moment, and the run that sees it is killed a few calls later."""
    return [{number: Fault.INTERLUDE, number + gap: Fault.DIE_AFTER} for number in range(calls) for gap in range(1, 9)]


LATE = (1, 3, 8, 20, 45, 80)
"""How many calls later something late lands."""


def check_plans(make_synced: MakeSynced, plans: list[dict[int, Fault]]) -> None:
    for number, plan in enumerate(plans):
        rig = make_synced()
        rig.world.plan = dict(plan)
        rig.world.late_after = LATE[number % len(LATE)]
        run(rig)
        resume(rig, runs=10)
        assert_settled(rig, str(plan))


@pytest.mark.slow
def test_some_plans_of_several_events(make_synced: MakeSynced, calls: int) -> None:
    check_plans(make_synced, pairs(calls, 60, seed=1))


def _only_stop(work: Any) -> None:
    if work.doors.host.state(work.uuid) is DomainState.RUNNING:
        work.doors.host.stop(work.uuid)


def _fence_and_go_on(work: Any) -> bool:
    fence.fence(work)
    return True


def _fence_first(work: Any) -> bool:
    if fence.standing(work) is fence.Standing.OFF_NOT_FENCED:
        fence.fence(work)
        work.advance(Event.REFENCED)
        return False
    return fence.require_off(work)


def _forgets(module: Any, name: str, instead: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(module, name, instead)


MUTANTS: dict[str, list[Callable[[pytest.MonkeyPatch], None]]] = {
    "no fence": [_forgets(module, "fence", lambda _work: None) for module in (stop, fence, start, prove)]
    + [_forgets(module, "require_off", lambda _work: True) for module in (final, start)]
    + [_forgets(module, "standing", lambda _work: fence.Standing.OFF_AND_FENCED) for module in (stop, start)],
    "no look before the start": [_forgets(start, "_require_startable", lambda _work: None)],
    "no second final delta when the fence was gone": [_forgets(m, "require_off", _fence_and_go_on) for m in (final, start)],
    "the fence is set again before that is recorded": [_forgets(m, "require_off", _fence_first) for m in (final, start)],
    "any final delta will do": [_forgets(final, "_current", lambda _work, _newest: True)],
    "rollback does not undefine": [_forgets(rollback, "_remove_target", _only_stop)],
    "rollback does not wait for a late stop": [_forgets(rollback, "_wait_for_late_stop", lambda _work: None)],
    "rollback by itself behind the commit point": [_forgets(runner, "_lossless", lambda _work: True)],
    "a pass that was interrupted counts as done": [_forgets(Round, "done", property(lambda one: bool(one.passes)))],
    "a start that was sent is not noted": [_forgets(Book, "target_ran", lambda _book, _ran: None)],
}


PATIENT = {
    "rollback does not wait for a late stop",
    "rollback does not undefine",
    "the fence is set again before that is recorded",
    "a pass that was interrupted counts as done",
}
"""Those that only show after hundreds of plans."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutant", [pytest.param(name, marks=[pytest.mark.nightly] if name in PATIENT else []) for name in MUTANTS]
)
def test_a_runner_with_one_rule_less_is_caught(
    make_synced: MakeSynced, calls: int, mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plans are worth something: each way of breaking the runner shows in one of them."""
    singles = [
        {number: fault}
        for fault in (Fault.HA, Fault.LIFT, Fault.INTERLUDE, Fault.DIE_AFTER, Fault.DIE_BEFORE)
        for number in range(calls)
    ]
    late = [{number: Fault.LATE} for number in range(calls) for _ in LATE]
    for change in MUTANTS[mutant]:
        change(monkeypatch)
    with pytest.raises((AssertionError, TokvmError)):
        check_plans(make_synced, late + singles + lifted_then_dead(calls) + pairs(calls, 600, seed=5))


@pytest.mark.slow
def test_more_plans_of_several_events(make_synced: MakeSynced, calls: int) -> None:
    check_plans(make_synced, lifted_then_dead(calls) + pairs(calls, 500, seed=2))


@pytest.mark.nightly
def test_very_many_plans_of_several_events(make_synced: MakeSynced, calls: int) -> None:
    check_plans(make_synced, pairs(calls, 10_000, seed=random.SystemRandom().randrange(1 << 30)))


def kill_for_real(rig: Any, fault: Fault, number: int) -> None:
    """The cutover in a child that is killed by SIGKILL at a call; the world it leaves is read back."""
    saved = rig.path / "world"
    child = os.fork()
    if child == 0:
        rig.world.save_to, rig.world.plan = saved, {number: fault}
        try:
            rig.migration().cutover(**OPTIONS)
        finally:
            os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    world: World = pickle.loads(saved.read_bytes())
    world.save_to, world.plan = None, {}
    world.lose_power()
    rig.world = world


@pytest.mark.parametrize("fault", [Fault.KILL_BEFORE, Fault.KILL_AFTER])
@pytest.mark.slow
def test_a_real_kill(make_synced: MakeSynced, calls: int, fault: Fault) -> None:
    for number in range(0, calls, 5):
        rig = make_synced()
        kill_for_real(rig, fault, number)
        resume(rig)
        assert_settled(rig, f"{fault} at {number}")
        assert rig.phase is Phase.COMMITTED
