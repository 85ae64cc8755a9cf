"""tokvm sync, killed with -9 at hundreds of points, on a played host behind a real sshd: the same command goes on, and the
target is byte for byte the disk that was frozen.

Two families: a first sync (claim, snapshot, base) from nothing, and delta passes on and on over the same target; each is killed
once at its writes, flushes, journal transactions and programs started (over 200 points in all; see nursery.py): at every one of
them at night, at some every day.
"""

from __future__ import annotations

import pytest
from tests.e2e.bench import Bench, points

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ALL = 0
EVERY_DAY = [("xenserver", 40), ("hyperv", 4), ("esx", 4)]
AT_NIGHT = [pytest.param(name, ALL, marks=pytest.mark.nightly) for name in ("xenserver", "hyperv", "esx")]
places = pytest.mark.parametrize(("bench", "count"), [*EVERY_DAY, *AT_NIGHT], indirect=["bench"])
LEAST = {"xenserver": 110, "hyperv": 100, "esx": 100}


def kill_and_go_on(bench: Bench, at: int) -> None:
    killed = bench.sync(kill_at=at)
    assert killed.code in (-9, 0), killed.stderr
    finished = bench.sync()
    assert finished.code == 0, f"point {at}: {finished.stderr}"
    bench.assert_identical()


@places
def test_a_first_sync_killed_anywhere_goes_on(bench: Bench, count: int) -> None:
    bench.guest_writes()
    bench.afresh()
    whole = bench.sync()
    assert whole.code == 0, whole.stderr
    bench.assert_identical()
    for at in points(whole.events, count or whole.events):
        bench.afresh()
        kill_and_go_on(bench, at)
    assert whole.events >= LEAST[bench.place.name], "with the deltas' points below this is no longer 200 different ones"


@places
def test_delta_passes_killed_anywhere_go_on(bench: Bench, count: int) -> None:
    bench.afresh()
    bench.guest_writes()
    assert bench.sync().code == 0
    bench.guest_writes()
    whole = bench.sync()
    assert whole.code == 0, whole.stderr
    total = max(whole.events, 90)
    for at in points(total, count or total):
        bench.guest_writes()
        kill_and_go_on(bench, at)


@pytest.mark.parametrize(
    ("bench", "count"),
    [("xenserver", 8), ("hyperv", 1), *(pytest.param(name, 22, marks=pytest.mark.nightly) for name in ("xenserver", "hyperv"))],
    indirect=["bench"],
)
def test_killed_twice_it_still_goes_on(bench: Bench, count: int) -> None:
    bench.guest_writes()
    bench.afresh()
    whole = bench.sync()
    assert whole.code == 0, whole.stderr
    for number in range(count):
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
