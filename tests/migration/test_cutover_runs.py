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
from tokvm.migration.phases import Phase
from tokvm.testing.fakes import Death, Fault, World

MakeSynced = Callable[[], Any]
OPTIONS = {"deadline_s": 20.0, "proof_s": 20.0, "settle_s": 10.0}
AT_REST = {
    Phase.COPY: "source", Phase.ROLLED_BACK: "source", Phase.STARTED: "target", Phase.COMMITTED: "target",
}  # fmt: skip


def run(rig: Any, **die: Any) -> TokvmError | Death | None:
    """One process: how it ended."""
    try:
        rig.migration(**die).cutover(**OPTIONS)
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
            rig.migration().rollback(accept_data_loss=True, settle_s=10.0)
        if rig.phase in AT_REST and rig.phase is not Phase.COPY:
            return


def assert_settled(rig: Any, why: str) -> None:
    world = rig.world
    story = f"{why}\n" + "\n".join(world.log[-80:])
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
    assert_settled(rig, "nothing happens")
    assert rig.phase is Phase.COMMITTED
    return int(rig.world.calls)


@pytest.mark.parametrize("fault", [Fault.DIE_BEFORE, Fault.DIE_AFTER])
def test_death_at_any_call(make_synced: MakeSynced, calls: int, fault: Fault) -> None:
    for number in range(calls):
        rig = make_synced()
        rig.world.plan = {number: fault}
        assert isinstance(run(rig), Death)
        resume(rig)
        assert_settled(rig, f"{fault} at {number}")
        assert rig.phase is Phase.COMMITTED


@pytest.mark.parametrize("after", [False, True])
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


@pytest.mark.parametrize("fault", [Fault.LOSE_REPLY, Fault.LOSE_REQUEST, Fault.LATE, Fault.REFUSE, Fault.HA, Fault.STALL])
def test_one_fault_at_any_call(make_synced: MakeSynced, calls: int, fault: Fault) -> None:
    for number in range(calls):
        rig = make_synced()
        rig.world.plan = {number: fault}
        run(rig)
        resume(rig)
        assert_settled(rig, f"{fault} at {number}")


def test_a_lost_reply_does_not_make_a_cutover_fail(make_synced: MakeSynced, calls: int) -> None:
    ends = []
    for number in range(calls):
        rig = make_synced()
        rig.world.plan = {number: Fault.LOSE_REPLY}
        ended = run(rig)
        if ended is not None:
            ends.append((rig.world.log[number], str(ended)))
    assert {name.split()[1].split(".")[0] for name, _ in ends} <= {"host"}, ends  # libvirt is local: its errors are answers


def pairs(calls: int, count: int, seed: int) -> list[dict[int, Fault]]:
    """Plans of two to four events, anywhere; a death is followed by more in the runs after it."""
    chance = random.Random(seed)
    faults = [f for f in Fault if f not in (Fault.KILL_AFTER, Fault.KILL_BEFORE)]
    return [{chance.randrange(calls * 2): chance.choice(faults) for _ in range(chance.randint(2, 4))} for _ in range(count)]


def check_plans(make_synced: MakeSynced, plans: list[dict[int, Fault]]) -> None:
    for plan in plans:
        rig = make_synced()
        rig.world.plan = dict(plan)
        rig.world.late_after = 1 + sum(plan) % 12
        run(rig)
        resume(rig, runs=10)
        assert_settled(rig, str(plan))


def test_some_plans_of_several_events(make_synced: MakeSynced, calls: int) -> None:
    check_plans(make_synced, pairs(calls, 60, seed=1))


@pytest.mark.slow
def test_more_plans_of_several_events(make_synced: MakeSynced, calls: int) -> None:
    check_plans(make_synced, pairs(calls, 500, seed=2))


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
def test_a_real_kill(make_synced: MakeSynced, calls: int, fault: Fault) -> None:
    for number in range(0, calls, 5):
        rig = make_synced()
        kill_for_real(rig, fault, number)
        resume(rig)
        assert_settled(rig, f"{fault} at {number}")
        assert rig.phase is Phase.COMMITTED
