"""tokvm sync, killed with -9 at hundreds of points, on a played XenServer behind a real sshd: the same command goes on, and the
target is byte for byte the disk that was frozen.

Two families: a first sync (claim, snapshot, base) from nothing, and delta passes on and on over the same target; each is killed
once at every one of its writes, flushes, journal transactions and programs started (over 200 points in all; see nursery.py).
"""

from __future__ import annotations

import pytest
from tests.e2e.conftest import Bench

DOUBLE_KILLS = 22


def kill_and_go_on(bench: Bench, at: int) -> None:
    killed = bench.sync(kill_at=at)
    assert killed.code in (-9, 0), killed.stderr
    finished = bench.sync()
    assert finished.code == 0, finished.stderr
    bench.assert_identical()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_first_sync_killed_anywhere_goes_on(bench: Bench) -> None:
    bench.guest_writes()
    bench.afresh()
    whole = bench.sync()
    assert whole.code == 0, whole.stderr
    bench.assert_identical()
    for at in range(1, whole.events + 1):
        bench.afresh()
        kill_and_go_on(bench, at)
    assert whole.events >= 110, "with the deltas' points below this is no longer 200 different ones"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_delta_passes_killed_anywhere_go_on(bench: Bench) -> None:
    bench.afresh()
    bench.guest_writes()
    assert bench.sync().code == 0
    bench.guest_writes()
    whole = bench.sync()
    assert whole.code == 0, whole.stderr
    for at in range(1, max(whole.events, 90) + 1):
        bench.guest_writes()
        kill_and_go_on(bench, at)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_twice_it_still_goes_on(bench: Bench) -> None:
    bench.guest_writes()
    bench.afresh()
    whole = bench.sync()
    assert whole.code == 0, whole.stderr
    for number in range(DOUBLE_KILLS):
        if number % 3 == 0:
            bench.afresh()
        bench.guest_writes()
        bench.sync(kill_at=1 + bench.chance.randrange(whole.events))
        bench.sync(kill_at=1 + bench.chance.randrange(whole.events))
        finished = bench.sync()
        assert finished.code == 0, finished.stderr
        finished = bench.sync()  # an interrupted pass may be of an older snapshot: one more holds the newest writes
        assert finished.code == 0, finished.stderr
        bench.assert_identical()
