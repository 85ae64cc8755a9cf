"""Virtio at a planned restart: whatever goes wrong, and wherever, the VM runs afterwards, on disks that fit its hardware."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from tests.domain.conftest import make_plan
from tests.guest.disks import change

from tokvm.app.modernise import Renewal, modernise
from tokvm.app.morph import open_disk
from tokvm.core.errors import DomainError, UsageError
from tokvm.core.machine import DiskBus
from tokvm.core.units import MiB
from tokvm.domain.base import DomainPlan, DomainState, LifeSigns, Outcome
from tokvm.guest.base import GuestDisk, GuestError, Way
from tokvm.guest.engines import MorphReport
from tokvm.guest.morph_record import MorphState
from tokvm.guest.morph_store import MorphStore
from tokvm.migration.doors import Silent

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
OLD_BYTES = bytes(2 * MiB)
WRITTEN_SINCE = b"\x09" * 4096 + bytes(MiB - 4096) + b"\x05" * 4096 + bytes(MiB - 4096)


@dataclass
class Host:
    """A libvirt with one domain."""

    defined: DomainPlan
    on: bool = True
    obeys: bool = True
    lives_on: frozenset[DiskBus] = frozenset(DiskBus)
    began: list[DiskBus] = field(default_factory=list)

    def define(self, plan: DomainPlan) -> None:
        assert not self.on
        self.defined = plan

    def state(self, uuid: str) -> DomainState:
        return DomainState.RUNNING if self.on else DomainState.OFF

    def start(self, uuid: str) -> None:
        self.on = True
        self.began.append(self.defined.disks[0].bus)

    def stop(self, uuid: str) -> None:
        self.on = False

    def shut_down(self, uuid: str, deadline_s: float) -> bool:
        self.on = self.on and not self.obeys
        return self.obeys

    def alive(self, uuid: str) -> bool:
        return self.on and self.defined.disks[0].bus in self.lives_on


class Engine:
    """Writes 9s at the disk's beginning; `fails` afterwards."""

    fails = False

    def morph(self, disks: tuple[GuestDisk, ...]) -> MorphReport:
        change(disks[0], "write -P 9 0 4096")
        if self.fails:
            raise GuestError("no kernel is there", where="guest")
        return MorphReport(Way.MICRO)


class Trial:
    """What became of the copy."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.seen: list[tuple[DomainPlan, tuple[str, ...]]] = []

    def __call__(self, plan: DomainPlan, overlays: tuple[str, ...], /) -> LifeSigns:
        self.seen.append((plan, overlays))
        return LifeSigns(self.outcome, 1.0, "the kernel panicked" if self.outcome is Outcome.FAILED else "it answers")


Made = Callable[..., tuple[Renewal, Host, Path]]


@pytest.fixture
def job(tmp_path: Path) -> Made:
    def make(*, outcome: Outcome = Outcome.ALIVE) -> tuple[Renewal, Host, Path]:
        disk = tmp_path / "disk.raw"
        disk.write_bytes(OLD_BYTES)
        new = make_plan(paths=(str(disk),))
        old = replace(new, disks=tuple(replace(one, bus=DiskBus.PVSCSI) for one in new.disks))
        host = Host(old)
        store = MorphStore(tmp_path / "modern", [GuestDisk(str(disk))], open_disk)
        made = Renewal(new.vm.uuid, "web", old, new, host, store, Engine(), Trial(outcome), Silent(), proof_s=1.0)
        return made, host, disk

    return make


def test_it_comes_up_on_virtio_with_the_morphed_disk(job: Made) -> None:
    made, host, disk = job()
    with made.store:
        document = modernise(made)
        assert made.store.state() is MorphState.NOTHING
    assert host.on
    assert host.began == [DiskBus.VIRTIO_BLK]
    assert disk.read_bytes()[:4096] == b"\x09" * 4096
    assert set(document["downtime_s"]) == {"stop", "morph", "trial", "commit", "boot", "total"}  # type: ignore[call-overload]


def test_the_trial_is_of_overlays_on_the_new_hardware(job: Made) -> None:
    made, _, disk = job()
    with made.store:
        modernise(made)
    ((plan, overlays),) = made.boots.seen  # type: ignore[attr-defined]
    assert plan == made.new
    assert [Path(one).name for one in overlays] == ["trial-0.qcow2"]
    assert str(disk) not in overlays


def test_a_guest_that_does_not_stop_is_left_alone(job: Made) -> None:
    made, host, disk = job()
    host.obeys = False
    with made.store, pytest.raises(DomainError, match="did not shut down"):
        modernise(made)
    assert (host.on, host.began, disk.read_bytes()) == (True, [], OLD_BYTES)


def test_a_morph_that_fails_costs_a_restart_only(job: Made) -> None:
    made, host, disk = job()
    made.engine.fails = True  # type: ignore[attr-defined]
    with made.store, pytest.raises(GuestError, match="no kernel"):
        modernise(made)
    assert (host.on, host.began, disk.read_bytes()) == (True, [DiskBus.PVSCSI], OLD_BYTES)


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.SILENT])
def test_a_copy_that_does_not_live_never_reaches_the_disk(job: Made, outcome: Outcome) -> None:
    made, host, disk = job(outcome=outcome)
    with made.store, pytest.raises(DomainError, match="does not boot from virtio"):
        modernise(made)
    assert (host.on, host.began, disk.read_bytes()) == (True, [DiskBus.PVSCSI], OLD_BYTES)


def test_a_guest_that_ran_on_the_morphed_disk_is_not_undone(job: Made) -> None:
    made, host, disk = job()
    host.lives_on = frozenset({DiskBus.PVSCSI})
    with made.store, pytest.raises(DomainError, match="no sign of life"):
        modernise(made)
    assert host.on
    assert host.began == [DiskBus.VIRTIO_BLK, DiskBus.PVSCSI]
    assert disk.read_bytes()[:4096] == b"\x09" * 4096, "its own writes may be among the morph's: an undo would tear them apart"


def test_another_try_after_the_guest_ran_undoes_nothing(job: Made) -> None:
    made, host, disk = job()
    host.lives_on = frozenset({DiskBus.PVSCSI})
    with made.store, pytest.raises(DomainError, match="no sign of life"):
        modernise(made)
    guest_writes(disk)
    made.engine.fails = True  # type: ignore[attr-defined]
    with made.store, pytest.raises(GuestError, match="no kernel"):
        modernise(made)
    assert host.on
    assert disk.read_bytes() == WRITTEN_SINCE


def test_a_run_that_died_before_it_forgot_and_a_guest_that_ran_since(job: Made) -> None:
    made, host, disk = job()
    with made.store:
        made.engine.morph(made.store.begin())
        made.store.commit()
    guest_writes(disk)
    with made.store, pytest.raises(GuestError, match="somebody wrote"):
        modernise(made)
    assert host.on
    assert disk.read_bytes() == WRITTEN_SINCE


def test_a_domain_that_libvirt_does_not_take_leaves_no_vm_off(job: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    made, host, _ = job()
    really = Host.define

    def define(self: Host, plan: DomainPlan) -> None:
        if plan == made.new:
            raise DomainError("libvirt does not take the domain", where="web")
        really(self, plan)

    monkeypatch.setattr(Host, "define", define)
    with made.store, pytest.raises(DomainError, match="does not take"):
        modernise(made)
    assert (host.on, host.began) == (True, [DiskBus.PVSCSI])


def guest_writes(disk: Path) -> None:
    with disk.open("r+b") as file:
        file.seek(MiB)
        file.write(b"\x05" * 4096)


def test_killed_while_the_domain_was_off_it_is_begun_again(job: Made) -> None:
    made, host, disk = job()
    with made.store:
        host.on = False
        made.engine.morph(made.store.begin())
        made.store.commit()
    with made.store:
        modernise(made)
    assert host.began == [DiskBus.VIRTIO_BLK]
    assert disk.read_bytes()[:4096] == b"\x09" * 4096


def test_a_domain_that_is_gone_cannot_be_modernised(job: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    made, host, _ = job()
    monkeypatch.setattr(Host, "state", lambda self, uuid: DomainState.ABSENT)
    with pytest.raises(UsageError, match="not here"):
        modernise(made)
    assert host.began == []
