"""Bad days of a cutover over vSphere's API: orders whose answers do not come, sessions and services that end.

What else happens to a VM while it is cut over is the same as over SSH: test_esx_bad_days.
"""

from __future__ import annotations

import pytest
from tests.e2e.bench import Bench, Meanwhile
from tests.e2e.days import cases, days
from tests.e2e.esx_days import (
    ASKED,
    DEFINE,
    FENCE,
    LOST,
    NEEDS_PERSON,
    NOT_OFF,
    OFF,
    ROLLED_BACK,
    START,
    STOP,
    WINDOW,
    ordered_once,
)
from tests.e2e.places import CALLS, VM, VspherePlace

from tokvm.testing.esxi.host import EsxHost

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TASKS, ONCE = ("write", "update_ha", "power.off", "snapshot.create"), ("power.shutdown", "update_autostartentry")
BREAKS = ("lost_reply", "drop", "hang", "cut_answer", "logged_out", "fault", "fault_after")
KINDS = (*BREAKS, "task_error", "task_late_error")
DONE = ("lost_reply", "cut_answer", "logged_out")
"""It is carried out, and the server does not say that it failed."""


@pytest.fixture
def place(bench: Bench) -> VspherePlace:
    assert isinstance(bench.place, VspherePlace)
    return bench.place


@pytest.fixture
def host(place: VspherePlace) -> EsxHost:
    return place.host


at_vcenter = pytest.mark.parametrize("bench", ["vcenter"], indirect=True)


# Answers that do not come


@at_vcenter
@pytest.mark.parametrize(
    ("order", "kind"),
    [
        *cases(TASKS, KINDS, daily=[("snapshot.create", "lost_reply")]),
        *cases(ONCE, BREAKS, daily=[]),
    ],
)
def test_an_order_whose_answer_does_not_come(bench: Bench, place: VspherePlace, host: EsxHost, order: str, kind: str) -> None:
    """One that was carried out is not a failure, except where the server says that it is."""
    bench.synced()
    force = order == "power.off"
    host.set_guest(VM, ignores_shutdown=force)
    place.vsphere.fault(CALLS[order], kind)
    ended = bench.tokvm("cutover", VM, "--deadline", "2s", *(["--force-off"] if force else []), patience_s=6.0)
    assert place.vsphere.faults_left() == [], "it was never ordered"
    if kind in DONE:
        assert ended.code == 0, ended.stderr
    assert ordered_once(host)
    host.set_guest(VM, ignores_shutdown=False)
    bench.go_home(ended)


@at_vcenter
@pytest.mark.parametrize(
    ("order", "kind"),
    [
        *cases(("power.on", "update_ha", "write"), KINDS, daily=[("power.on", "lost_reply")]),
        *cases(("update_autostartentry",), BREAKS, daily=[]),
    ],
)
def test_an_order_of_the_rollback_whose_answer_does_not_come(bench: Bench, place: VspherePlace, order: str, kind: str) -> None:
    bench.synced()

    def act() -> None:
        place.refuses("snapshot.create")
        place.vsphere.fault(CALLS[order], kind)

    ended = bench.cutover(meanwhile=Meanwhile(OFF, act), patience_s=6.0)
    assert place.vsphere.faults_left() == [], "it was never ordered"
    assert ended.code in (ROLLED_BACK, NEEDS_PERSON), ended.stderr
    if ended.code == ROLLED_BACK:
        assert bench.source_runs
    bench.go_home(ended)
    assert not bench.source_runs or place.vsphere.override(VM)["restart_priority"] == "", "HA was not given it back"


@at_vcenter
@pytest.mark.parametrize("order", cases(TASKS, daily=[]))
def test_a_task_that_takes_its_time(bench: Bench, place: VspherePlace, host: EsxHost, order: str) -> None:
    bench.synced()
    force = order == "power.off"
    host.set_guest(VM, ignores_shutdown=force)
    place.vsphere.fault(CALLS[order], "slow_task", seconds=2.0)
    ended = bench.tokvm("cutover", VM, "--deadline", "2s", *(["--force-off"] if force else []))
    assert ended.code == 0, ended.stderr
    bench.assert_home()
    assert bench.target_runs


# The login, the service, the way to it


@days("at", cases(("vcenter", "hostd"), (FENCE, STOP, ASKED, *WINDOW, DEFINE), daily=[("vcenter", OFF)]))
def test_a_session_that_ends(bench: Bench, place: VspherePlace, at: str) -> None:
    """As after half an hour of nothing. Whatever is under way is met by a new login."""
    bench.synced()
    ended = bench.cutover(meanwhile=Meanwhile(at, place.vsphere.end_sessions))
    assert ended.code == 0, ended.stderr
    bench.assert_home()
    assert bench.target_runs


@days(
    "at",
    cases(("vcenter",), (FENCE, STOP, ASKED, *WINDOW, DEFINE, START), daily=[]),
    cases(("hostd",), WINDOW, daily=[]),
)
def test_a_management_service_that_restarts(bench: Bench, place: VspherePlace, host: EsxHost, at: str) -> None:
    """Connections, sessions and tasks are gone, also one that has not acted yet; the guest was not asked, perhaps."""
    bench.synced()
    ended = bench.cutover(meanwhile=Meanwhile(at, place.vsphere.restart), patience_s=6.0)
    assert ended.code in (0, LOST, ROLLED_BACK) or (ended.code, at) == (NOT_OFF, STOP), ended.stderr
    assert ordered_once(host)
    bench.go_home(ended)


@at_vcenter
@pytest.mark.parametrize("at", cases((FENCE, STOP, ASKED, *WINDOW, DEFINE), daily=[]))
def test_a_server_that_cannot_be_reached_for_a_while(bench: Bench, place: VspherePlace, at: str) -> None:
    """Longer than a rollback is tried: a person has to come back to it, and is told how."""
    bench.synced()
    ended = bench.cutover(meanwhile=Meanwhile(at, place.vsphere.close), patience_s=2.0)
    assert ended.code in (LOST, NEEDS_PERSON), ended.stderr
    place.vsphere.start()
    bench.go_home(ended)
