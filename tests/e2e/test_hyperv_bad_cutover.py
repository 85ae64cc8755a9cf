"""Bad days while a Hyper-V VM is cut over: never two copies, never none, and what the message says leads home.

Home: exactly one copy runs; if it is the target, its disks hold what the source's held when it stopped.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.e2e.bench import Bench, Meanwhile, points
from tests.e2e.days import cases
from tests.e2e.hyperv_days import FAULTS, NodeMove, foreign, give_up, merge_at_once, others, ours
from tests.e2e.places import VM

from tokvm.testing.hyperv.host import HyperVHost
from tokvm.testing.hyperv.state import RECOVERY, STANDARD

ALL = 0
AT_NIGHT = {"lost_reply": ALL, "late": ALL}
ROLLED_BACK, NOT_OFF, NEEDS_PERSON = 16, 12, 15
nightly = pytest.mark.nightly
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
on_hyperv = pytest.mark.parametrize("bench", ["hyperv"], indirect=True)
on_a_cluster = pytest.mark.parametrize("bench", ["cluster"], indirect=True)

# In the order in which a cutover comes to them. Each is right before, or right behind, what changes the world.
FENCE, STOP, OFF = "phase:STOP_INTENT", "script:shutdown", "phase:FENCED"
FREEZE, FROZEN, COPY, COPIED = "script:checkpoint", "did:checkpoint", "target:pwrite", "phase:FINAL"
COMMIT, DEFINE, START, RUNS = "phase:START_INTENT", "define", "start", "phase:STARTED"
MOMENTS = (FENCE, STOP, OFF, FREEZE, FROZEN, COPY, COPIED, COMMIT, DEFINE, START, RUNS)
WINDOW = MOMENTS[2:7]


@on_hyperv
@pytest.mark.parametrize(
    ("fault", "places"),
    [("lost_reply", 2), *(pytest.param(name, AT_NIGHT.get(name, 9), marks=nightly) for name in FAULTS)],
)
def test_a_script_that_fails_anywhere(bench: Bench, host: HyperVHost, fault: str, places: int) -> None:
    bench.synced()
    saved = bench.save()
    before = len(host.commands())
    assert bench.cutover().code == 0
    total = len(host.commands()) - before
    assert total > 25
    for skip in points(total, places or total):
        bench.restore(saved)
        host.fault("", **{**FAULTS[fault], "skip": skip - 1})
        ended = bench.cutover(patience_s=3.0)
        assert host.faults_left() == [], f"place {skip} of {total} was never reached"
        if ended.code in (ROLLED_BACK, NOT_OFF):
            assert bench.source_runs
        bench.go_home(ended)


@on_hyperv
@pytest.mark.parametrize(("at", "kind"), cases(WINDOW[:4], ("die_after", "freeze_after"), daily=[]))
def test_files_that_cannot_be_read_in_the_downtime(bench: Bench, host: HyperVHost, at: str, kind: str) -> None:
    """Before the final delta's first byte has come, so that no connection ever brings it forward."""
    bench.afresh()
    bench.guest_writes()
    assert bench.sync("--silence", "2s").code == 0
    bench.guest_writes()
    ended = bench.cutover(meanwhile=Meanwhile(at, lambda: host.set_sftp(**{kind: 0})))
    host.set_sftp(**{kind: -1})
    if at != COPY:
        assert ended.code == ROLLED_BACK, ended.stderr
        assert bench.source_runs
    bench.go_home(ended)


@on_hyperv
@pytest.mark.parametrize("at", cases((FENCE, *WINDOW, DEFINE), daily=[(COPIED,)]))
def test_a_source_that_cannot_be_reached_for_a_while(bench: Bench, host: HyperVHost, at: str) -> None:
    """Longer than a rollback is tried: a person has to come back to it, and is told how."""
    bench.synced()
    sshd = host.sshd
    ended = bench.cutover(meanwhile=Meanwhile(at, sshd.stop), patience_s=2.0)
    assert ended.code in (5, NEEDS_PERSON), ended.stderr
    assert host.sshd is not None
    bench.go_home(ended)


# Who starts a source that is about to be, or is, off


def restart_by_cluster(host: HyperVHost) -> None:
    """The node fails, then the VM itself."""
    host.guest_stops(VM)
    host.cluster_acts(VM, failed="node")
    host.cluster_acts(VM, failed="resource")


def start_by_hand(host: HyperVHost) -> None:
    if not host.is_running(VM):
        host.start(VM)


@on_a_cluster
@pytest.mark.parametrize(
    ("at", "who"),
    cases(
        MOMENTS,
        (restart_by_cluster, HyperVHost.host_restarts),
        daily=[(OFF, HyperVHost.host_restarts)],
    ),
)
def test_machines_cannot_start_it(bench: Bench, host: HyperVHost, at: str, who: Callable[[HyperVHost], None]) -> None:
    bench.synced()
    ended = bench.cutover(meanwhile=Meanwhile(at, lambda: who(host)))
    assert ended.code == 0, ended.stderr
    bench.assert_home()
    assert bench.target_runs
    assert host.cluster_acts(VM) is False


@on_hyperv
@pytest.mark.parametrize("at", cases(MOMENTS, daily=[(COPIED,), (START,)]))
def test_a_person_starts_the_source(bench: Bench, host: HyperVHost, at: str) -> None:
    """No fence keeps a person from it: seen before the target starts, it is a rollback; behind that, an alarm."""
    bench.synced()

    def act() -> None:
        start_by_hand(host)
        bench.guest_writes()

    ended = bench.cutover(meanwhile=Meanwhile(at, act))
    too_late = at in (START, RUNS)
    if at in (FENCE, STOP):
        assert ended.code == 0, ended.stderr
    elif too_late:
        assert ended.code == NEEDS_PERSON, ended.stderr
        assert bench.alarms
    else:
        assert ended.code == ROLLED_BACK, ended.stderr
        assert bench.source_runs
    bench.go_home(ended, but_for="a person" if too_late else "")


@on_hyperv
@pytest.mark.parametrize("at", cases((START, RUNS), daily=[]))
def test_of_two_that_run_the_target_may_be_kept_as_well(bench: Bench, host: HyperVHost, at: str) -> None:
    bench.synced()
    ended = bench.cutover(meanwhile=Meanwhile(at, lambda: start_by_hand(host)))
    assert ended.code == NEEDS_PERSON, ended.stderr
    assert "To keep the target: stop the source by hand, then tokvm cutover" in " ".join(ended.stderr.split())
    host.guest_stops(VM)
    again = bench.cutover()
    assert again.code == 0, again.stderr
    bench.assert_home(but_for="a person")
    assert bench.target_runs


# Stopping


@on_hyperv
@pytest.mark.parametrize(("obeys", "option"), cases(("never", "late"), ("", "--force-off"), daily=[("never", "")]))
def test_a_guest_that_does_not_shut_down(bench: Bench, host: HyperVHost, obeys: str, option: str) -> None:
    """Late: after we gave up, while the rollback is on its way."""
    bench.synced()
    host.set_guest(VM, shutdown_s=5.0 if obeys == "late" else 0.0, ignores_shutdown=obeys == "never")
    ended = bench.tokvm("cutover", VM, "--deadline", "2s", *filter(None, [option]), patience_s=6.0)
    if option:
        assert ended.code == 0, ended.stderr
        assert bench.target_runs
        bench.assert_home()
        return
    assert ended.code == NOT_OFF, ended.stderr
    assert "--force-off" in ended.stderr
    bench.assert_home()
    assert bench.source_runs
    host.set_guest(VM, shutdown_s=0.0, ignores_shutdown=False)
    bench.go_home(ended)
    assert bench.target_runs


# Other people's checkpoints


@on_hyperv
@pytest.mark.parametrize(("at", "kind"), cases(MOMENTS[:7], (STANDARD, RECOVERY), daily=[(FREEZE, RECOVERY)]))
def test_a_checkpoint_made_by_someone_else(bench: Bench, host: HyperVHost, at: str, kind: str) -> None:
    bench.synced()
    ended = bench.cutover(meanwhile=Meanwhile(at, lambda: host.foreign_checkpoint(VM, "meanwhile", kind=kind)))
    bench.go_home(ended)
    assert len(foreign(host)) == 1


@on_hyperv
@pytest.mark.parametrize(
    ("at", "whose", "how"),
    cases(
        (FENCE, *WINDOW),
        ("theirs, below ours", "theirs, between ours", "ours, the newest"),
        ("waits", "at once"),
        daily=[(COPY, "ours, the newest", "at once")],
    ),
)
def test_a_merge_that_starts_in_the_downtime(bench: Bench, host: HyperVHost, at: str, whose: str, how: str) -> None:
    bench.afresh()
    bench.guest_writes()
    below = host.foreign_checkpoint(VM, "below")["id"]
    bench.guest_writes()
    assert bench.sync().code == 0
    bench.guest_writes()
    between = host.foreign_checkpoint(VM, "between")["id"]
    bench.guest_writes()

    def act() -> None:
        chosen = {"theirs, below ours": below, "theirs, between ours": between, "ours, the newest": ours(host)[-1]}[whose]
        if how == "waits":
            host.delete_checkpoint(VM, chosen)
        else:
            merge_at_once(host, chosen)

    bench.go_home(bench.cutover(meanwhile=Meanwhile(at, act)))


@pytest.mark.parametrize("bench", ["slow merge"], indirect=True)
@pytest.mark.parametrize("at", cases((FENCE, *WINDOW[:3]), daily=[]))
def test_a_merge_that_takes_its_time_is_waited_for(bench: Bench, host: HyperVHost, at: str) -> None:
    bench.synced()
    made = host.foreign_checkpoint(VM, "theirs")
    ended = bench.cutover(meanwhile=Meanwhile(at, lambda: host.delete_checkpoint(VM, made["id"])))
    assert ended.code == 0, ended.stderr
    bench.assert_home()
    assert bench.target_runs


@on_hyperv
@pytest.mark.parametrize(
    ("at", "which"),
    cases((FENCE, *WINDOW), ("ours", "theirs, before us", "theirs, behind ours"), daily=[(OFF, "theirs, before us")]),
)
def test_a_checkpoint_applied_by_a_person(bench: Bench, host: HyperVHost, at: str, which: str) -> None:
    """What the target gets is what the disks held when they were frozen for the last delta, or a copy from anew."""
    bench.afresh()
    bench.guest_writes()
    before = host.foreign_checkpoint(VM, "before")["id"]
    bench.guest_writes()
    assert bench.sync().code == 0
    bench.guest_writes()
    behind = host.foreign_checkpoint(VM, "behind")["id"]
    bench.guest_writes()
    held = [host.read_disk(VM, disk) for disk in range(2)]

    def act() -> None:
        host.apply_checkpoint(VM, {"ours": ours(host)[0], "theirs, before us": before, "theirs, behind ours": behind}[which])

    ended = bench.cutover(meanwhile=Meanwhile(at, act))
    bench.assert_never_both()
    if ended.code == 0 and at in (FROZEN, COPY, COPIED):
        bench.assert_one_copy_runs()
        targets = [next(bench.target.glob(f"*-disk{disk}.raw")).read_bytes() for disk in range(2)]
        assert targets == held, "frozen before somebody went back to a checkpoint"
    else:
        bench.go_home(ended)


# The cluster


@on_a_cluster
@pytest.mark.parametrize("at", cases(MOMENTS, daily=[(OFF,)]))
def test_a_vm_that_moves_to_another_node(bench: Bench, host: HyperVHost, at: str) -> None:
    """It goes on when the VM is back; meanwhile nothing is started twice."""
    bench.synced()
    away = NodeMove(host)
    ended = bench.cutover(meanwhile=Meanwhile(at, away.leave), patience_s=3.0)
    if ended.code != 0:
        assert "move it back" in " ".join(ended.stderr.split()) or ended.code == NEEDS_PERSON
    away.come_back()
    bench.go_home(ended)


@nightly
@on_a_cluster
def test_going_back_leaves_the_host_as_it_was(bench: Bench, host: HyperVHost) -> None:
    bench.afresh()
    before = others(host)
    bench.synced()
    assert bench.cutover().code == 0
    back = bench.tokvm("rollback", VM, "--accept-data-loss")
    assert back.code == 0, back.stderr
    bench.assert_home()
    give_up(bench, host)
    assert others(host) == before
