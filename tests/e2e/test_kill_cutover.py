"""tokvm cutover, killed with -9 at every step: the same command, or a rollback, ends with exactly one copy running.

The real command, journal and targets against a played XenServer or Hyper-V host behind a real sshd; libvirt's place is taken by
a file of domains that outlives each process, as libvirtd does.
"""

from __future__ import annotations

import pytest
from tests.e2e.bench import Bench, points

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

EVERY_DAY = [("xenserver", 30, 10), ("hyperv", 4, 3), ("esx", 3, 2)]
AT_NIGHT = [pytest.param(name, 70, 40, marks=pytest.mark.nightly) for name in ("hyperv", "esx")]
places = pytest.mark.parametrize(("bench", "on", "back"), [*EVERY_DAY, *AT_NIGHT], indirect=["bench"])


@places
def test_the_cutover_killed_anywhere_goes_on_to_one_copy(bench: Bench, on: int, back: int) -> None:
    del back
    bench.synced()
    saved = bench.save()
    whole = bench.cutover()
    assert whole.code == 0, whole.stderr
    bench.assert_home()
    assert bench.target_runs
    for at in points(whole.events, on):
        bench.restore(saved)
        killed = bench.cutover(kill_at=at)
        bench.assert_never_both()
        finished = bench.cutover()
        assert finished.code in (0, 15), f"point {at}: {finished.stderr}"
        bench.assert_never_both()
        if finished.code == 15:  # a start was sent, and nobody lives to say what came of it: a person decides
            assert "--accept-data-loss" in finished.stderr
            assert killed.code == -9
            bench.go_home(finished)
        bench.assert_home()


@places
def test_a_cutover_killed_anywhere_can_be_rolled_back(bench: Bench, on: int, back: int) -> None:
    del on
    bench.synced()
    saved = bench.save()
    whole = bench.cutover()
    assert whole.code == 0, whole.stderr
    for at in points(whole.events, back):
        bench.restore(saved)
        bench.cutover(kill_at=at)
        ended = bench.tokvm("rollback", "web")
        if ended.code == 15:
            ended = bench.tokvm("rollback", "web", "--accept-data-loss")
        assert ended.code == 0, f"point {at}: {ended.stderr}"
        bench.assert_home()
        assert bench.source_runs
