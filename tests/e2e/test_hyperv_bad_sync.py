"""Bad days while a Hyper-V VM is synced: whatever happens, no false success, and what the message says leads home.

Home: sync succeeded, the target is the disk byte for byte, the VM runs. After `finish` nothing of ours is left on the host, and
everything of other people is.
"""

from __future__ import annotations

import pytest
from tests.e2e.bench import Bench, Ended, Meanwhile, points
from tests.e2e.days import cases
from tests.e2e.hyperv_days import FAULTS, NodeMove, foreign, give_up, merge_at_once, others, ours
from tests.e2e.places import VM

from tokvm.testing.hyperv.host import HyperVHost
from tokvm.testing.hyperv.state import RECOVERY, STANDARD

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.parametrize("bench", ["hyperv"], indirect=True),
]
nightly = pytest.mark.nightly
ALL = 0


def home(bench: Bench, ended: Ended) -> None:
    bench.go_home(ended)
    bench.assert_identical()


@pytest.mark.parametrize(
    ("fault", "places"),
    [("lost_reply", 2), *(pytest.param(name, ALL, marks=nightly) for name in FAULTS)],
)
def test_a_script_that_fails_anywhere(bench: Bench, host: HyperVHost, fault: str, places: int) -> None:
    bench.guest_writes()
    bench.afresh()
    before = len(host.commands())
    assert bench.sync().code == 0
    total = len(host.commands()) - before
    assert total > 8
    for skip in points(total, places or total):
        bench.afresh()
        bench.guest_writes()
        host.fault("", **{**FAULTS[fault], "skip": skip - 1})
        ended = bench.sync(patience_s=3.0)
        assert host.faults_left() == [], f"place {skip} of {total} was never reached"
        home(bench, ended)
    give_up(bench, host)


@pytest.mark.parametrize(("kind", "bytes_"), cases(("die_after", "freeze_after"), (0, 1 << 20), daily=[("die_after", 1 << 20)]))
def test_files_that_cannot_be_read_on(bench: Bench, host: HyperVHost, kind: str, bytes_: int) -> None:
    """Each connection makes so many bytes and then no more: where they bring the pass forward it is gone on with, else not for
    ever."""
    bench.afresh()
    bench.guest_writes()
    host.set_sftp(**{kind: bytes_})
    ended = bench.sync("--silence", "2s")
    assert ended.code in ((0, 5) if bytes_ else (5,)), ended.stderr
    assert "lost" in ended.stderr
    host.set_sftp(**{kind: -1})
    home(bench, ended)


MOMENTS = ("script:checkpoint", "did:checkpoint", "script:layers", "did:layers", "target:pwrite")


@pytest.mark.parametrize(("at", "kind"), cases(MOMENTS, (STANDARD, RECOVERY), daily=[("did:checkpoint", STANDARD)]))
def test_a_checkpoint_made_by_someone_else(bench: Bench, host: HyperVHost, at: str, kind: str) -> None:
    """In the first pass, and between the passes; a backup's goes away again."""
    bench.afresh()
    bench.guest_writes()
    ended = bench.sync(meanwhile=Meanwhile(at, lambda: host.foreign_checkpoint(VM, "meanwhile", kind=kind)))
    assert ended.code == 0, ended.stderr
    bench.guest_writes()
    host.foreign_checkpoint(VM, "between", kind=kind)
    bench.guest_writes()
    ended = bench.sync()
    assert ended.code == 0, ended.stderr
    bench.assert_identical()
    if kind == RECOVERY:
        for one in foreign(host):
            host.delete_checkpoint(VM, one)
        bench.guest_writes()
    before = others(host)
    home(bench, bench.sync())
    give_up(bench, host)
    assert others(host) == before


@nightly
def test_a_backup_that_runs_already_is_waited_for(bench: Bench, host: HyperVHost) -> None:
    bench.afresh()
    made = host.foreign_checkpoint(VM, "backup", kind=RECOVERY)
    ended = bench.sync()
    assert ended.code == 10, ended.stderr
    assert "let the backup end" in ended.stderr
    host.delete_checkpoint(VM, made["id"])
    home(bench, bench.sync())


@pytest.mark.parametrize(
    ("at", "whose", "how"),
    cases(
        MOMENTS,
        ("theirs, below ours", "theirs, between ours", "ours, the newest", "ours, since which"),
        ("waits", "at once"),
        daily=[("target:pwrite", "ours, since which", "at once")],
    ),
)
def test_a_merge_that_starts_in_mid_copy(bench: Bench, host: HyperVHost, at: str, whose: str, how: str) -> None:
    """While a delta is read, the layers of some checkpoint are merged."""
    bench.afresh()
    bench.guest_writes()
    below = host.foreign_checkpoint(VM, "below")["id"]
    bench.guest_writes()
    assert bench.sync().code == 0
    bench.guest_writes()
    between = host.foreign_checkpoint(VM, "between")["id"]
    bench.guest_writes()

    def act() -> None:
        mine = ours(host)
        theirs = {"theirs, below ours": below, "theirs, between ours": between}
        chosen = {**theirs, "ours, the newest": mine[-1], "ours, since which": mine[0]}[whose]
        if how == "waits":
            host.delete_checkpoint(VM, chosen)
        else:
            merge_at_once(host, chosen)

    ended = bench.sync(meanwhile=Meanwhile(at, act))
    if ended.code == 0 and at != "script:checkpoint":  # there the newest of ours was another one yet
        bench.assert_identical()
    home(bench, ended)


@pytest.mark.parametrize(
    ("at", "which"),
    cases(
        ("between", *MOMENTS),
        ("ours, the newest", "ours, an older one", "theirs, before us", "theirs, behind ours"),
        daily=[("between", "ours, an older one")],
    ),
)
def test_a_checkpoint_applied_by_a_person(bench: Bench, host: HyperVHost, at: str, which: str) -> None:
    """The VM is off then and its newest writes are gone; the person starts it again."""
    bench.afresh()
    bench.guest_writes()
    before = host.foreign_checkpoint(VM, "before")["id"]
    for _ in range(2):
        bench.guest_writes()
        assert bench.sync().code == 0
    behind = host.foreign_checkpoint(VM, "behind")["id"]
    bench.guest_writes()

    def act() -> None:
        mine, theirs = ours(host), {"theirs, before us": before, "theirs, behind ours": behind}
        host.apply_checkpoint(VM, {**theirs, "ours, the newest": mine[-1], "ours, an older one": mine[0]}[which])
        host.start(VM)
        bench.guest_writes()

    if at == "between":
        act()
        ended = bench.sync()
    else:
        ended = bench.sync(meanwhile=Meanwhile(at, act))
    bench.go_home(ended)
    again = bench.sync()  # one more: what was frozen before is what an interrupted pass holds
    assert again.code == 0, again.stderr
    bench.assert_identical()


@pytest.mark.parametrize("at", cases(MOMENTS, daily=[("script:layers",)]))
def test_a_vm_that_moves_to_another_node(bench: Bench, host: HyperVHost, at: str) -> None:
    bench.afresh()
    bench.guest_writes()
    away = NodeMove(host)
    ended = bench.sync(meanwhile=Meanwhile(at, away.leave))
    if ended.code != 0:
        assert "no such VM" in ended.stderr
        assert "move it back" in ended.stderr
    away.come_back()
    home(bench, ended)


@pytest.mark.parametrize("at", cases(MOMENTS, daily=[]))
def test_a_host_that_restarts(bench: Bench, host: HyperVHost, at: str) -> None:
    bench.afresh()
    bench.guest_writes()
    ended = bench.sync(meanwhile=Meanwhile(at, host.host_restarts))
    home(bench, ended)
