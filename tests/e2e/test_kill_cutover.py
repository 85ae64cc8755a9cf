"""tokvm cutover, killed with -9 at every step: the same command, or a rollback, ends with exactly one copy running.

The real command, journal and targets against a played XenServer behind a real sshd; libvirt's place is taken by a file of
domains that outlives each process, as libvirtd does.
"""

from __future__ import annotations

import pytest
from tests.e2e.conftest import Bench, points

POINTS = 30


def synced(bench: Bench) -> None:
    """A migration that is ready to be cut over, with writes behind its last pass."""
    bench.afresh()
    if not bench.host.is_running("web"):
        bench.host.start("web")
    bench.guest_writes()
    done = bench.sync()
    assert done.code == 0, done.stderr
    bench.guest_writes()


def assert_one_copy_runs(bench: Bench) -> None:
    source = bench.host.is_running("web")
    assert source != bench.target_runs, f"source {source}, target {bench.target_runs}"


def assert_never_both(bench: Bench) -> None:
    assert not (bench.host.is_running("web") and bench.target_runs), "two copies run"


CUTOVER = ("cutover", "web", "--deadline", "20s", "--proof", "10s")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_cutover_killed_anywhere_goes_on_to_one_copy(bench: Bench) -> None:
    synced(bench)
    saved = bench.save()
    whole = bench.tokvm(*CUTOVER)
    assert whole.code == 0, whole.stderr
    assert_one_copy_runs(bench)
    assert bench.target_runs
    bench.assert_identical()
    for at in points(whole.events, POINTS):
        bench.restore(saved)
        killed = bench.tokvm(*CUTOVER, kill_at=at)
        assert_never_both(bench)
        finished = bench.tokvm(*CUTOVER)
        assert finished.code in (0, 15), f"point {at}: {finished.stderr}"
        assert_never_both(bench)
        if finished.code == 15:  # a start was sent, and nobody lives to say what came of it: a person decides
            assert "--accept-data-loss" in finished.stderr
            assert killed.code == -9
            back = bench.tokvm("rollback", "web", "--accept-data-loss")
            assert back.code == 0, back.stderr
        assert_one_copy_runs(bench)
        if bench.target_runs:
            bench.assert_identical()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_cutover_killed_anywhere_can_be_rolled_back(bench: Bench) -> None:
    synced(bench)
    saved = bench.save()
    whole = bench.tokvm(*CUTOVER)
    assert whole.code == 0, whole.stderr
    for at in points(whole.events, POINTS // 3):
        bench.restore(saved)
        bench.tokvm(*CUTOVER, kill_at=at)
        back = bench.tokvm("rollback", "web")
        if back.code == 15:
            back = bench.tokvm("rollback", "web", "--accept-data-loss")
        assert back.code == 0, f"point {at}: {back.stderr}"
        assert bench.host.is_running("web")
        assert not bench.target_runs
