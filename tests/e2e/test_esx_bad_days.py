"""Bad days of a cutover from VMware: never two copies, never none, and what the message says leads home.

Home: exactly one copy runs; if it is the target, its disks hold what the source's held when it stopped.

The same days over SSH (esx) and over vSphere's API: a vCenter with the host's files, one whose HA we may not change (no
rights), a vCenter alone (lease), an ESXi's own API over NFS (hostd). More of the API's own: test_vsphere_bad_days.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.e2e.bench import Bench, Meanwhile
from tests.e2e.days import cases, days
from tests.e2e.esx_days import (
    ASKED,
    COPIED,
    COPY,
    DEFINE,
    FENCE,
    FREEZE,
    HOW,
    KINDS,
    LATE,
    LOST,
    MOMENTS,
    NEEDS_PERSON,
    NOT_OFF,
    OFF,
    ROLLED_BACK,
    RUNNING,
    STOP,
    THEIRS,
    WINDOW,
    between_snapshots,
    delete,
    foreign,
    ordered_once,
    said,
)
from tests.e2e.places import VM, EsxPlace

from tokvm.testing.esxi.host import EsxHost

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ESX, API = ("esx",), ("vcenter", "hostd")
ALL = ESX + API


@pytest.fixture
def place(bench: Bench) -> EsxPlace:
    assert isinstance(bench.place, EsxPlace)
    return bench.place


@pytest.fixture
def host(place: EsxPlace) -> EsxHost:
    return place.host


# Who starts a source that is about to be, or is, off


def by_hand(place: EsxPlace) -> None:
    if not place.host.is_running(VM):
        place.host.start(VM)


def by_ha(place: EsxPlace) -> None:
    place.ha_restarts()


@days(
    "at who",
    cases(ESX, MOMENTS, (by_hand, by_ha), daily=[("esx", COPIED, by_ha)]),
    cases(API, MOMENTS, (by_hand,), daily=[("vcenter", COPIED, by_hand)]),
    cases(("vcenter", "no rights"), MOMENTS, (by_ha,), daily=[]),
)
def test_the_guest_is_started_again(
    bench: Bench, place: EsxPlace, host: EsxHost, at: str, who: Callable[[EsxPlace], None]
) -> None:
    """No fence keeps a person, or HA that takes a stop for a failure, from it: seen before the target starts, it is a rollback;
    behind that, an alarm. Only a vCenter's HA can be told to leave the VM alone."""
    bench.synced()

    def act() -> None:
        who(place)
        if host.is_running(VM):
            bench.guest_writes()

    before = len(host.starts_and_stops(VM))
    ended = bench.cutover(meanwhile=Meanwhile(at, act))
    started = [one for one in host.starts_and_stops(VM)[before:] if one in (("on", "a person"), ("on", "vSphere HA"))]
    if not started:
        assert ended.code == 0, ended.stderr
    elif at in LATE:
        assert ended.code == NEEDS_PERSON, ended.stderr
        assert bench.alarms
    else:  # who started while the guest was waited for looks like one that did not stop
        assert ended.code == ROLLED_BACK or (ended.code, at) == (NOT_OFF, ASKED), ended.stderr
        assert bench.source_runs
    assert started or at in RUNNING or who is by_ha
    assert not (started and who is by_ha and place.ha_can_be_told), "the fence does not hold HA"
    bench.go_home(ended, but_for="somebody" if started and at in LATE else "")


@days("at", cases(ALL, LATE, daily=[]))
def test_of_two_that_run_the_target_may_be_kept_as_well(bench: Bench, place: EsxPlace, host: EsxHost, at: str) -> None:
    bench.synced()
    ended = bench.cutover(meanwhile=Meanwhile(at, lambda: by_hand(place)))
    assert ended.code == NEEDS_PERSON, ended.stderr
    assert "To keep the target: stop the source by hand, then tokvm cutover" in said(ended)
    host.guest_stops(VM)
    again = bench.cutover()
    assert again.code == 0, again.stderr
    bench.assert_home(but_for="a person")
    assert bench.target_runs


@days("at", cases(ESX, MOMENTS, daily=[]), cases(("hostd",), (FENCE, *WINDOW), daily=[]))
def test_a_host_that_restarts_does_not_start_it(bench: Bench, host: EsxHost, at: str) -> None:
    bench.synced()
    ended = bench.cutover(meanwhile=Meanwhile(at, host.host_restarts))
    assert ended.code == 0, ended.stderr
    bench.assert_home()
    assert bench.target_runs


# Stopping, and starting again


@days("obeys option", cases(ALL, ("never", "late"), ("", "--force-off"), daily=[("hostd", "never", "--force-off")]))
def test_a_guest_that_does_not_shut_down(bench: Bench, host: EsxHost, obeys: str, option: str) -> None:
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


@days("answer", cases(ALL, (0, 1), daily=[]))
def test_a_question_on_the_way_back(bench: Bench, place: EsxPlace, host: EsxHost, answer: int) -> None:
    """Nobody here answers it; a person is told its words. 0 cancels the power-on."""
    bench.synced()

    def act() -> None:
        place.refuses("snapshot.create")
        with host.edit() as state:
            state["vms"][0]["asks"] = "Did you move this virtual machine, or did you copy it?"

    ended = bench.cutover(meanwhile=Meanwhile(OFF, act), patience_s=4.0)
    assert ended.code == NEEDS_PERSON, ended.stderr
    assert "waits for an answer" in said(ended)
    assert "did you copy it?" in said(ended)
    with host.edit() as state:
        state["vms"][0]["asks"] = ""
    host.answer(VM, answer)
    bench.go_home(ended)
    assert bench.source_runs


# Answers that do not come

ORDERS = ("write", "update_autostartentry", "power.shutdown", "power.off", "snapshot.create")


@days(
    "order kind",
    cases(ESX, ORDERS, KINDS, daily=[("esx", "snapshot.create", "lost_reply"), ("esx", "power.off", "lost_reply")]),
)
def test_an_order_whose_answer_does_not_come(bench: Bench, host: EsxHost, order: str, kind: str) -> None:
    """One that was carried out is not a failure, except where the host says that it is."""
    bench.synced()
    force = order == "power.off"
    host.set_guest(VM, ignores_shutdown=force)
    host.fault(order, kind, seconds=1.0)
    ended = bench.tokvm("cutover", VM, "--deadline", "2s", *(["--force-off"] if force else []), patience_s=6.0)
    assert host.faults_left() == [], "it was never ordered"
    if kind == "lost_reply":
        assert ended.code == 0, ended.stderr
    assert ordered_once(host)
    host.set_guest(VM, ignores_shutdown=False)
    bench.go_home(ended)


@days(
    "order kind",
    cases(ESX, ("power.on", "update_autostartentry", "write"), KINDS, daily=[("esx", "update_autostartentry", "lost_reply")]),
)
def test_an_order_of_the_rollback_whose_answer_does_not_come(bench: Bench, host: EsxHost, order: str, kind: str) -> None:
    bench.synced()

    def act() -> None:
        host.fault("snapshot.create", "error")
        host.fault(order, kind, seconds=1.0)

    ended = bench.cutover(meanwhile=Meanwhile(OFF, act), patience_s=6.0)
    assert host.faults_left() == [], "it was never ordered"
    assert ended.code in (ROLLED_BACK, NEEDS_PERSON), ended.stderr
    if ended.code == ROLLED_BACK:
        assert bench.source_runs
    bench.go_home(ended)


@days("at", cases(ESX, (FENCE, STOP, ASKED, *WINDOW, DEFINE), daily=[]))
def test_a_management_service_that_restarts(bench: Bench, host: EsxHost, at: str) -> None:
    """As many commands go unanswered as are sent in its minute."""
    bench.synced()
    ended = bench.cutover(meanwhile=Meanwhile(at, lambda: host.fault("", "hostd_down", times=25)), patience_s=4.0)
    assert ended.code in (0, LOST, NEEDS_PERSON, ROLLED_BACK), ended.stderr
    host.clear_faults()
    bench.go_home(ended)


# Other people's snapshots


@days("at", cases(("esx", "lease", "hostd"), MOMENTS[:8], daily=[("esx", FREEZE)]))
def test_a_foreign_snapshot_in_the_downtime(bench: Bench, host: EsxHost, at: str) -> None:
    bench.synced()
    ended = bench.cutover(meanwhile=Meanwhile(at, lambda: host.foreign_snapshot(VM, "meanwhile")))
    bench.go_home(ended)
    assert foreign(host) == ["meanwhile"]


@days(
    "at whose how",
    cases(ESX, (FENCE, *WINDOW), THEIRS[:3], HOW, daily=[]),
    cases(("vcenter", "lease"), (COPY,), THEIRS[:3], HOW[1:], daily=[]),
)
def test_a_consolidation_in_the_downtime(bench: Bench, host: EsxHost, at: str, whose: str, how: str) -> None:
    theirs = between_snapshots(bench, host)
    bench.go_home(bench.cutover(meanwhile=Meanwhile(at, lambda: delete(host, theirs, whose, how))))


# Places


@days("at", cases(ALL, MOMENTS, daily=[("vcenter", OFF)]))
def test_a_vm_that_moves_away_in_the_downtime(bench: Bench, place: EsxPlace, host: EsxHost, at: str) -> None:
    """A vCenter knows where it is. One host: it goes on when the VM is back; meanwhile nothing is started twice."""
    bench.synced()
    ended = bench.cutover(meanwhile=Meanwhile(at, lambda: host.vmotion_away(VM)), patience_s=3.0)
    if ended.code != 0:
        assert place.name != "vcenter", ended.stderr
        assert "name the host that runs it" in said(ended) or ended.code == NEEDS_PERSON
    host.vmotion_back(VM)
    bench.go_home(ended)
