"""Bad days while a VMware VM is synced: whatever happens, no false success, and what the message says leads home.

Home: sync succeeded, the target is the disk byte for byte, the VM runs.
"""

from __future__ import annotations

import pytest
from tests.e2e.bench import Bench, Ended, Meanwhile, next_commands
from tests.e2e.days import cases, days
from tests.e2e.esx_days import (
    COPY,
    FREEZE,
    HOW,
    KINDS,
    LOST,
    REFUSED,
    SYNC,
    THEIRS,
    between_snapshots,
    delete,
    ordered_once,
    ours,
    said,
)
from tests.e2e.places import VM, EsxPlace

from tokvm.testing.esxi.host import EsxHost

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ESX, ALL = ("esx",), ("esx", "vcenter", "hostd")


@pytest.fixture
def place(bench: Bench) -> EsxPlace:
    assert isinstance(bench.place, EsxPlace)
    return bench.place


@pytest.fixture
def host(place: EsxPlace) -> EsxHost:
    return place.host


def identical(bench: Bench, ended: Ended) -> None:
    """A sync's way home; once more, because what was frozen before the bad day is what an interrupted pass holds."""
    bench.go_home(ended)
    again = bench.sync()
    assert again.code == 0, again.stderr
    bench.assert_identical()


@days("order kind", cases(ESX, ("claim", "snapshot.create"), KINDS, daily=[]))
def test_an_order_whose_answer_does_not_come(bench: Bench, host: EsxHost, order: str, kind: str) -> None:
    bench.afresh()
    bench.guest_writes()
    host.fault(order, kind, seconds=1.0)
    ended = bench.sync(patience_s=6.0)
    assert host.faults_left() == [], "it was never ordered"
    assert ordered_once(host)
    identical(bench, ended)


@days("order kind", cases(ESX, ("snapshot.remove", "rm"), KINDS, daily=[]))
def test_giving_up_with_an_answer_that_does_not_come(bench: Bench, host: EsxHost, order: str, kind: str) -> None:
    """Nothing of ours is left, and the VM runs as before."""
    bench.afresh()
    before = host.vm(VM)["autostart"]
    bench.synced()
    host.fault(order, kind, seconds=1.0)
    ended = bench.tokvm("finish", VM, patience_s=6.0)
    assert host.faults_left() == [], "it was never ordered"
    if ended.code != 0:
        assert bench.tokvm(*next_commands(ended)[0]).code == 0, ended.stderr
    assert ours(host) == []
    assert not list(host.local(host.directory(VM)).glob("tokvm*"))
    assert host.vm(VM)["autostart"] == before
    assert bench.source_runs


@days("at", cases(ESX, SYNC, daily=[]))
def test_a_management_service_that_restarts_in_a_sync(bench: Bench, host: EsxHost, at: str) -> None:
    bench.synced()
    ended = bench.sync(meanwhile=Meanwhile(at, lambda: host.fault("", "hostd_down", times=25)), patience_s=4.0)
    assert ended.code in (0, LOST), ended.stderr
    host.clear_faults()
    identical(bench, ended)


@days("at whose how", cases(ESX, SYNC, THEIRS, HOW, daily=[("esx", COPY, "theirs, between ours", "at once")]))
def test_a_consolidation_in_mid_copy(bench: Bench, host: EsxHost, at: str, whose: str, how: str) -> None:
    theirs = between_snapshots(bench, host)
    ended = bench.sync(meanwhile=Meanwhile(at, lambda: delete(host, theirs, whose, how)))
    if ended.code == 0 and at != FREEZE:  # there the newest of ours was another one yet
        bench.assert_identical()
    identical(bench, ended)


@days(
    "part to",
    cases(ESX, (0.4, 0.6, 0.8), ("below", "since which", "the pass's own", "between"), daily=[("esx", 0.6, "since which")]),
)
def test_a_revert_behind_a_partly_copied_pass(bench: Bench, host: EsxHost, part: float, to: str) -> None:
    """The pass was killed; its newest writes are gone, and what was copied of them must not stay on the target."""
    theirs = between_snapshots(bench, host)
    saved = bench.save()
    whole = bench.sync()
    assert whole.code == 0, whole.stderr
    bench.restore(saved)
    killed = bench.sync(kill_at=int(part * whole.events))
    assert killed.code == -9, killed.stderr
    mine = ours(host)
    known = {"below": theirs["theirs, below ours"], "between": theirs["theirs, between ours"]}
    host.revert(VM, {**known, "since which": mine[0], "the pass's own": mine[-1]}[to])
    host.start(VM)
    bench.guest_writes()
    identical(bench, bench.sync())


@days("at", cases(ALL, ("between", *SYNC), daily=[]))
def test_a_vm_that_moves_away_between_passes(bench: Bench, place: EsxPlace, host: EsxHost, at: str) -> None:
    """Only a vCenter knows where it is then, and goes on."""
    bench.synced()
    if at == "between":
        host.vmotion_away(VM)
        ended = bench.sync()
        assert (ended.code == 0) is (place.name == "vcenter"), ended.stderr
    else:
        ended = bench.sync(meanwhile=Meanwhile(at, lambda: host.vmotion_away(VM)))
    if ended.code != 0:
        assert place.name != "vcenter", ended.stderr
        assert "name the host that runs it" in said(ended)
    host.vmotion_back(VM)
    identical(bench, ended)


@days("then", cases(ESX, ("a delta", "a new base"), daily=[]))
def test_a_base_that_becomes_locked_between_passes(bench: Bench, host: EsxHost, then: str) -> None:
    """A delta does not need it; a base that has to be copied anew is refused, with the way around."""
    below = between_snapshots(bench, host)["theirs, below ours"]
    with host.edit() as state:
        state["options"]["base_stays_locked"] = "files"
    if then == "a new base":
        host.revert(VM, below)
        host.start(VM)
        refused = bench.sync()
        assert refused.code == REFUSED, refused.stderr
        assert "--clone-base" in refused.stderr
        cloned = bench.sync("--clone-base")
        assert cloned.code == 0, cloned.stderr
        bench.assert_identical()
        bench.guest_writes()
    done = bench.sync()
    assert done.code == 0, done.stderr
    bench.assert_identical()
    bench.guest_writes()
    ended = bench.cutover()
    assert ended.code == 0, ended.stderr
    bench.assert_home()
    assert bench.target_runs
