"""The morph of a cutover: prepared over a disk that is still written to, replayed after the last delta, and undone exactly."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.domain.conftest import make_plan
from tests.guest.disks import change

from tokvm.app import morphers
from tokvm.app.morph import open_disk
from tokvm.app.morphers import WayMorpher
from tokvm.app.ways import Replay
from tokvm.core.units import MiB
from tokvm.guest.base import GuestDisk, GuestError, Way
from tokvm.guest.morph_record import MorphState
from tokvm.guest.morph_store import MorphStore

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
SIZE = 2 * MiB
PLAN = make_plan()


@dataclass
class Guest:
    """A disk, and what stands in for libguestfs and the planner. `log`: everything in the order it happened."""

    disk: Path
    folder: Path
    log: list[str] = field(default_factory=list)
    changed: bool = False
    writes_early: bool = False
    layout_changed: bool = False

    @property
    def store(self) -> MorphStore:
        return MorphStore(self.folder / "morph", [GuestDisk(str(self.disk))], open_disk)

    def morpher(self, way: Way = Way.MICRO, **more: Any) -> WayMorpher:
        micro: dict[str, Any] | None = {"initrds": []} if way is Way.MICRO else None
        replay = Replay(way, family="linux", micro=micro)
        return WayMorpher(replay, self.store, self.folder, True, **more)

    def delta(self) -> None:
        """The last delta, as a target writes it: held exclusively, while an appliance may be over it."""
        with closing(open_disk(GuestDisk(str(self.disk)), None)) as target:
            target.write(MiB, memoryview(b"\x05" * 4096))
            target.flush()


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guest:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"\x01" * SIZE)
    found = Guest(disk, tmp_path / "guest")
    found.folder.mkdir(mode=0o700)

    class FakeAppliance:
        def __init__(self, disks: tuple[GuestDisk, ...]) -> None:
            self.disks = disks

        @classmethod
        def launch(cls, disks: tuple[GuestDisk, ...], *, readonly: bool, tcg: bool, deadline_s: float = 900.0) -> FakeAppliance:
            found.log.append("look" if readonly else "launch")
            return cls(disks)

        def give(self, deadline_s: float) -> None:
            assert deadline_s < morphers.WAITING_S

        def note_layout(self) -> None: ...

        def forget(self) -> None:
            found.log.append("forget")
            if found.layout_changed:
                raise GuestError("partitions or logical volumes changed")

        def abandon(self) -> None:
            found.log.append("abandon")

        def __enter__(self) -> FakeAppliance:
            return self

        def __exit__(self, *_: object) -> None:
            found.log.append("close")

    class FakeMicro:
        @staticmethod
        def parse(family: str, raw: dict[str, Any]) -> dict[str, Any]:
            return raw

        @staticmethod
        def check(appliance: FakeAppliance, plan: object) -> None:
            if found.changed:
                raise GuestError("the guest's boot files changed since the rehearsal", fix="rehearse again")

        @staticmethod
        def ready(appliance: FakeAppliance, plan: object) -> None:
            if found.writes_early:
                change(appliance.disks[0], "write -P 7 0 512")

        @staticmethod
        def apply(appliance: FakeAppliance, plan: object, folder: Path) -> None:
            change(appliance.disks[0], "write -P 9 0 4096")

    monkeypatch.setattr(morphers, "Appliance", FakeAppliance)
    monkeypatch.setattr(morphers, "micro", FakeMicro)
    return found


def content(first: int, middle: int) -> bytes:
    made = bytearray(b"\x01" * SIZE)
    made[:4096] = bytes([first]) * 4096
    made[MiB : MiB + 4096] = bytes([middle]) * 4096
    return bytes(made)


def test_the_appliance_waits_below_the_last_delta_and_is_undone_exactly(guest: Guest) -> None:
    morpher = guest.morpher()
    assert morpher.changes_disks
    morpher.prepare(PLAN)
    assert guest.log == ["look", "close", "launch"]
    assert morpher.undo(), "the step of the last delta asks for it: what waits must not be lost by that"
    guest.delta()
    morpher.morph(PLAN)
    assert guest.log[2:] == ["launch", "forget", "close"], "no appliance is booted in the downtime"
    assert guest.disk.read_bytes() == content(9, 5)
    assert morpher.undo()
    assert guest.disk.read_bytes() == content(1, 5)
    morpher.release()


def test_what_was_written_before_the_last_delta_never_hides_it(guest: Guest) -> None:
    guest.writes_early = True
    morpher = guest.morpher()
    morpher.prepare(PLAN)
    guest.delta()
    morpher.morph(PLAN)
    assert guest.log[2:] == ["launch", "abandon", "launch", "close"], "what waited is of no use: another is started"
    assert guest.disk.read_bytes() == content(9, 5)
    assert morpher.undo()
    assert guest.disk.read_bytes() == content(1, 5)
    morpher.release()


def test_an_appliance_that_holds_an_old_layout_of_the_disks_is_not_used(guest: Guest) -> None:
    guest.layout_changed = True
    morpher = guest.morpher()
    morpher.prepare(PLAN)
    guest.delta()
    morpher.morph(PLAN)
    assert guest.log[2:] == ["launch", "forget", "abandon", "launch", "close"]
    assert guest.disk.read_bytes() == content(9, 5)
    morpher.release()


def test_a_guest_that_changed_since_the_rehearsal_is_found_before_the_stop(guest: Guest) -> None:
    guest.changed = True
    morpher = guest.morpher()
    with pytest.raises(GuestError, match="since the rehearsal"):
        morpher.prepare(PLAN)
    morpher.release()
    assert "launch" not in guest.log


def test_a_run_that_goes_on_for_a_dead_one_launches_its_own(guest: Guest) -> None:
    first = guest.morpher()
    first.prepare(PLAN)
    first.store.close()  # as its death does
    guest.delta()
    second = guest.morpher()
    second.morph(PLAN)
    assert guest.log[-2:] == ["launch", "close"]
    assert guest.disk.read_bytes() == content(9, 5)
    second.release()


def test_a_morph_that_was_committed_is_begun_from_the_synced_bytes_again(guest: Guest) -> None:
    first = guest.morpher()
    first.morph(PLAN)
    first.store.close()
    second = guest.morpher()
    assert second.undo()
    assert guest.disk.read_bytes() == b"\x01" * SIZE
    guest.delta()
    second.morph(PLAN)
    assert guest.disk.read_bytes() == content(9, 5)
    second.release()


def test_release_leaves_nothing_open_and_no_overlay(guest: Guest) -> None:
    morpher = guest.morpher()
    morpher.prepare(PLAN)
    morpher.release()
    assert guest.log[-1] == "abandon"
    assert guest.store.state() is MorphState.NOTHING
    assert list((guest.folder / "morph").glob("*.qcow2")) == []
    morpher.release()


def test_release_after_the_morph_keeps_what_undoes_it(guest: Guest) -> None:
    morpher = guest.morpher()
    morpher.morph(PLAN)
    morpher.release()
    assert guest.store.state() is MorphState.COMMITTED
    assert guest.morpher().undo()
    assert guest.disk.read_bytes() == b"\x01" * SIZE


def test_disks_that_a_guest_wrote_to_are_said_to_be_inexact(guest: Guest) -> None:
    morpher = guest.morpher()
    morpher.morph(PLAN)
    guest.delta()
    assert not morpher.undo()
    morpher.release()


def test_nothing_to_undo_is_exact(guest: Guest) -> None:
    assert guest.morpher(Way.KERNEL).undo()


def test_the_kernel_way_leaves_the_disk_alone(guest: Guest) -> None:
    morpher = guest.morpher(Way.KERNEL)
    assert not morpher.changes_disks
    morpher.prepare(PLAN)
    morpher.morph(PLAN)
    morpher.release()
    assert guest.disk.read_bytes() == b"\x01" * SIZE
    assert guest.log == []


def test_a_kernel_that_was_renewed_since_the_rehearsal_is_found_before_the_stop(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    monkeypatch.setattr("tokvm.guest.kernel_way.check", lambda appliance, mounts, files: seen.append((mounts, files)))
    known = {"/boot/initrd.img": [7, 8]}
    replay = Replay(Way.KERNEL, family="linux", mounts={"/": "/dev/sda1"}, boot_files=known)
    morpher = WayMorpher(replay, guest.store, guest.folder, True)
    morpher.prepare(PLAN)
    morpher.release()
    assert seen == [({"/": "/dev/sda1"}, known)]
    assert guest.log == ["look", "close"]


def test_virt_v2v_works_on_overlays_and_is_committed(guest: Guest) -> None:
    def convert(disks: tuple[GuestDisk, ...]) -> None:
        change(disks[0], "write -P 9 0 4096")

    morpher = guest.morpher(Way.VIRT_V2V, convert=convert)
    morpher.prepare(PLAN)
    guest.delta()
    morpher.morph(PLAN)
    assert guest.disk.read_bytes() == content(9, 5)
    assert morpher.undo()
    assert guest.disk.read_bytes() == content(1, 5)
    morpher.release()


def test_a_conversion_that_fails_leaves_the_synced_bytes(guest: Guest) -> None:
    def convert(disks: tuple[GuestDisk, ...]) -> None:
        change(disks[0], "write -P 9 0 4096")
        raise GuestError("update-initramfs failed")

    morpher = guest.morpher(Way.VIRT_V2V, convert=convert)
    with pytest.raises(GuestError, match="update-initramfs"):
        morpher.morph(PLAN)
    assert guest.disk.read_bytes() == b"\x01" * SIZE
    assert morpher.undo()
    morpher.release()


def test_forgetting_keeps_the_morphed_disk(guest: Guest) -> None:
    morpher = guest.morpher()
    morpher.morph(PLAN)
    morpher.release()
    guest.morpher().forget()
    assert guest.store.state() is MorphState.NOTHING
    assert guest.disk.read_bytes()[:4096] == b"\x09" * 4096


def test_the_overlays_of_a_waiting_appliance_are_opened_by_qemu_while_the_delta_is_written(guest: Guest) -> None:
    """QEMU must not lock the disk below: the last delta's target locks every byte of it."""
    store = guest.store
    (layer,) = store.begin(shared=True)
    with closing(open_disk(GuestDisk(str(guest.disk)), None)):
        change(layer, "read 0 512")
    (locked,) = store.begin()
    with closing(open_disk(GuestDisk(str(guest.disk)), None)), pytest.raises(AssertionError, match="lock byte"):
        change(locked, "read 0 512")
    store.undo()
    store.close()
