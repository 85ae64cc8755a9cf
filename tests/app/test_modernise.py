"""Virtio at a planned restart: whatever goes wrong, and wherever, the VM runs afterwards, on disks that fit its hardware."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
from tests.app.modern_bench import NEW, OLD, OLD_BYTES, WRITTEN_SINCE, Bench, Engine, Host, HungUp, Ledger, Told, Trial
from tests.domain.conftest import make_plan

from tokvm.app import modern_rescue
from tokvm.app import modernise as modernising
from tokvm.app.modernise import modernise
from tokvm.app.morph import open_disk
from tokvm.core.errors import DomainError, NeedsPerson, TargetError, UsageError
from tokvm.domain.base import DomainPlan, DomainState, Outcome
from tokvm.guest.base import GuestDisk, GuestError
from tokvm.guest.committing import Commit
from tokvm.guest.engines import MorphReport
from tokvm.guest.morph_advice import of_modernise
from tokvm.guest.morph_record import MorphState
from tokvm.guest.morph_store import MorphStore
from tokvm.guest.undo import UndoLog

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(modernising, "POLL_S", 0.01)
    disk = tmp_path / "disk.raw"
    disk.write_bytes(OLD_BYTES)
    store = MorphStore(tmp_path / "modern", [GuestDisk(str(disk))], open_disk, advice=of_modernise("web"))
    told = Told()
    return Bench(Host(), Ledger(), Engine(), Trial(Outcome.ALIVE), told, disk, store, make_plan(paths=(str(disk),)), told)


# ---- it works


def test_it_comes_up_on_virtio_with_the_morphed_disk(bench: Bench) -> None:
    document = bench.run()
    assert (bench.host.on, bench.host.began, bench.ledger.proved) == (True, [NEW], True)
    assert bench.store.state() is MorphState.NOTHING
    assert bench.morphed()
    assert set(document["downtime_s"]) == {"stop", "morph", "trial", "commit", "boot", "total"}  # type: ignore[call-overload]
    assert "replaced.xml" in bench.told.notes[-1]


def test_the_trial_is_of_overlays_on_the_new_hardware(bench: Bench) -> None:
    bench.run()
    ((plan, overlays),) = bench.trial.seen
    assert plan == bench.plan
    assert [Path(one).name for one in overlays] == ["trial-0.qcow2"]
    assert str(bench.disk) not in overlays


def test_a_domain_that_is_gone_cannot_be_modernised(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "state", lambda self, uuid: DomainState.ABSENT)
    bench.fails(UsageError, "not here")
    assert bench.host.began == []


def test_a_port_that_answers_is_a_sign_of_life_too(bench: Bench) -> None:
    bench.host.lives_on = frozenset()
    bench.answers = True
    assert bench.run()["outcome"] == "modernised"


def test_the_operator_may_say_that_it_lives(bench: Bench) -> None:
    bench.host.lives_on = frozenset()
    bench.fails(DomainError, "no sign of life")
    assert bench.run(proof_s=0)["outcome"] == "modernised"
    assert bench.host.began == [NEW], "not for that was it stopped again"


# ---- before the commit: it costs a restart at most


def test_a_morph_that_fails_costs_a_restart_only(bench: Bench) -> None:
    bench.engine.fails = True
    bench.fails(GuestError, "no kernel")
    assert (bench.host.on, bench.host.began, bench.disk.read_bytes()) == (True, [OLD], OLD_BYTES)


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.SILENT])
def test_a_copy_that_does_not_live_never_reaches_the_disk(bench: Bench, outcome: Outcome) -> None:
    bench.trial.outcome = outcome
    bench.fails(DomainError, "does not boot from virtio")
    assert (bench.host.on, bench.host.began, bench.disk.read_bytes()) == (True, [OLD], OLD_BYTES)


def test_a_terminal_that_is_gone_stops_nothing(bench: Bench) -> None:
    bench.observer = HungUp()
    bench.run()
    assert (bench.host.on, bench.host.began) == (True, [NEW])


def test_a_terminal_that_is_gone_leaves_no_vm_off(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.observer = HungUp()
    monkeypatch.setattr(bench.engine, "morph", interrupt)
    bench.fails(KeyboardInterrupt)
    assert (bench.host.on, bench.host.began, bench.disk.read_bytes()) == (True, [OLD], OLD_BYTES)


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def test_ctrl_c_as_the_guest_goes_off(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def shut_down(uuid: str, deadline_s: float) -> bool:
        bench.host.on = False
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.host, "shut_down", shut_down)
    bench.fails(KeyboardInterrupt)
    assert (bench.host.on, bench.host.began) == (True, [OLD])


def test_ctrl_c_while_the_guest_shuts_down_says_that_it_may_go_off_yet(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.host, "shut_down", interrupt)
    bench.fails(KeyboardInterrupt)
    assert (bench.host.on, bench.host.began) == (True, [])
    assert "may still go off" in bench.told.notes[-1]
    assert f"virsh -c qemu:///system start {bench.plan.vm.uuid}" in bench.told.notes[-1]


def test_a_guest_that_does_not_stop_is_left_alone(bench: Bench) -> None:
    bench.host.obeys = False
    said = bench.fails(DomainError, "did not shut down within 5 min.*may still go off")
    assert (bench.host.on, bench.host.began, bench.disk.read_bytes()) == (True, [], OLD_BYTES)
    assert f"virsh -c qemu:///system start {bench.plan.vm.uuid}" in said
    assert "`tokvm modernise web` goes on" in said


def test_a_guest_that_stops_late_is_started_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def shut_down(uuid: str, deadline_s: float) -> bool:
        bench.host.on = False
        return False

    monkeypatch.setattr(bench.host, "shut_down", shut_down)
    bench.fails(DomainError, "did not shut down")
    assert (bench.host.on, bench.host.began) == (True, [OLD])


def test_a_libvirt_that_restarts_is_asked_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modern_rescue, "PAUSE_S", 0.0)
    bench.engine.fails = True
    bench.host.refusals = 2
    with bench.store, pytest.raises(GuestError, match="no kernel"):
        modernise(bench.job(rescue_s=60.0))
    assert (bench.host.on, bench.host.began) == (True, [OLD])


def test_a_vm_that_cannot_be_started_is_said_to_be_off(bench: Bench) -> None:
    bench.engine.fails = True
    bench.host.refusals = 1
    said = bench.fails(DomainError, "no kernel.*starting it as it was failed too: libvirt does not start it")
    assert f"virsh -c qemu:///system start {bench.plan.vm.uuid}" in said


def test_a_domain_that_somebody_undefined_meanwhile_is_there_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def morph(disks: object) -> MorphReport:
        bench.host.defined = ""
        raise GuestError("no kernel is there", where="guest")

    monkeypatch.setattr(bench.engine, "morph", morph)
    bench.fails(GuestError, "no kernel")
    assert (bench.host.on, bench.host.began) == (True, [OLD])


# ---- half a morph


def break_commit(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    """The commit breaks off in the middle, and so does the undo."""

    def write_new(self: Commit, undo: object) -> None:
        self.disk.write(0, memoryview(b"\x09" * 512))
        raise TargetError("the disk fails", where="disk", fix="")

    def restore(self: UndoLog, disk: object) -> None:
        raise TargetError("the disk fails", where="disk", fix="")

    with monkeypatch.context() as broken:
        broken.setattr(Commit, "write_new", write_new)
        broken.setattr(UndoLog, "restore", restore)
        said = bench.fails(DomainError, "half a morph")
    assert "do not start it" in said
    assert "virsh" not in said
    assert (bench.host.on, bench.host.began) == (False, [])


def test_half_a_morph_is_not_started_and_the_next_run_puts_it_right(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    break_commit(monkeypatch, bench)
    bench.engine.fails = True
    bench.fails(GuestError, "no kernel")
    assert (bench.host.on, bench.host.began, bench.disk.read_bytes()) == (True, [OLD], OLD_BYTES)


def test_half_a_morph_that_somebody_started_is_a_persons(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    break_commit(monkeypatch, bench)
    bench.host.start("")
    bench.fails(NeedsPerson, "half a morph")
    assert bench.host.on


# ---- the guest ran on the morphed disks: nothing is undone


def test_a_guest_without_an_agent_is_not_killed(bench: Bench) -> None:
    """Its copy lived by a line on the serial port; the VM itself has only an agent, or a probe, to show its life by."""
    bench.host.lives_on = frozenset()
    said = bench.fails(DomainError, "no sign of life.*not proved")
    assert (bench.host.on, bench.host.began, bench.host.defined) == (True, [NEW], NEW)
    assert "--proof 0" in said
    assert not bench.ledger.proved


def test_ctrl_c_while_it_boots_on_virtio_lets_it_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.host, "alive", interrupt)
    bench.fails(KeyboardInterrupt)
    assert (bench.host.on, bench.host.began) == (True, [NEW])
    assert "not proved" in bench.told.notes[-1]


def test_another_run_waits_on_and_does_not_stop_it_again(bench: Bench) -> None:
    bench.host.lives_on = frozenset()
    bench.fails(DomainError, "not proved")
    bench.host.lives_on = frozenset({NEW})
    assert bench.run() == {"outcome": "modernised", "downtime_s": {"boot": pytest.approx(0, abs=0.5)}}
    assert (bench.host.began, bench.ledger.proved) == ([NEW], True)


def test_a_guest_that_crashes_gets_its_hardware_back_over_the_morphed_disks(bench: Bench) -> None:
    bench.host.dies_on = frozenset({NEW})
    bench.fails(DomainError, "went off on virtio")
    assert (bench.host.on, bench.host.began) == (True, [NEW, OLD]), "its own definition, to the letter"
    assert bench.morphed(), "its own writes may be among the morph's: an undo would tear them apart"
    assert bench.ledger.before() is None


def test_a_guest_shut_down_because_it_hung_gets_its_hardware_back(bench: Bench) -> None:
    bench.host.lives_on = frozenset({OLD})
    bench.fails(DomainError, "not proved")
    bench.host.on = False
    bench.fails(DomainError, "went off")
    assert (bench.host.on, bench.host.began) == (True, [NEW, OLD])


def test_another_try_after_the_guest_ran_undoes_nothing(bench: Bench) -> None:
    bench.host.dies_on = frozenset({NEW})
    bench.fails(DomainError, "went off")
    bench.guest_writes()
    bench.engine.fails = True
    bench.fails(GuestError, "no kernel")
    assert bench.host.on
    assert bench.disk.read_bytes() == WRITTEN_SINCE


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.slow
def test_a_run_that_died_before_it_forgot_and_a_guest_that_ran_since(bench: Bench, on: bool) -> None:
    """That morph is whole and was run on: it stays, and the next one goes on top of it."""
    commit_and_die(bench)
    bench.host.on = on
    bench.guest_writes()
    bench.run()
    assert (bench.host.on, bench.host.began) == (True, [NEW])
    assert bench.disk.read_bytes() == WRITTEN_SINCE


def test_a_whole_morph_stays_when_the_run_ends_before_it_is_forgotten(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(bench.store, "forget", interrupt)
        bench.fails(KeyboardInterrupt)
    assert (bench.host.on, bench.host.began, bench.store.state()) == (True, [OLD], MorphState.COMMITTED)
    bench.guest_writes()
    bench.run()
    assert (bench.host.began, bench.disk.read_bytes()) == ([OLD, NEW], WRITTEN_SINCE)


def test_a_domain_that_libvirt_does_not_take_leaves_no_vm_off(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def define(plan: DomainPlan) -> None:
        raise DomainError("libvirt does not take the domain", where="web")

    monkeypatch.setattr(bench.host, "define", define)
    bench.fails(DomainError, "does not take")
    assert (bench.host.on, bench.host.began, bench.ledger.before()) == (True, [OLD], None)


# ---- killed


def commit_and_die(bench: Bench) -> None:
    with bench.store:
        bench.engine.morph(bench.store.begin())
        bench.store.commit()


def test_killed_while_the_domain_was_off_it_is_begun_again(bench: Bench) -> None:
    bench.host.on = False
    commit_and_die(bench)
    bench.run()
    assert bench.host.began == [NEW]
    assert bench.morphed()


def test_killed_before_the_new_definition_it_is_begun_again(bench: Bench) -> None:
    bench.ledger.trying(OLD)
    bench.run()
    assert (bench.host.began, len(bench.trial.seen)) == ([NEW], 1)
