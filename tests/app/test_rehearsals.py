"""A rehearsal without a guest: which ways are tried, what is kept of each, and that the synced disks are never written to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tests.domain.conftest import make_plan
from tests.guest.disks import change
from tests.migration.conftest import Rig

from tokvm.app import rehearsals
from tokvm.app.morph import open_disk
from tokvm.app.rehearsals import RehearsalWishes, Rehearser, Stage
from tokvm.app.ways import Replay, by_way
from tokvm.core.errors import DomainError, UsageError
from tokvm.core.machine import DiskBus, Finding, Severity
from tokvm.domain.base import DomainPlan, LifeSign, LifeSigns, Outcome, Sign
from tokvm.guest.base import GuestDisk, GuestError, GuestFacts, Judgement, LinuxFacts, OsFamily, Verdict, Way
from tokvm.guest.morph_store import MorphStore
from tokvm.migration.book import Book
from tokvm.migration.doors import Silent
from tokvm.testing.fakes import World

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
BYTES = bytes(range(256)) * 4096


NO_VIRTIO = Judgement(
    Verdict.MICRO, "no virtio", (), (Way.MICRO, Way.COMPATIBLE, Way.PRESTAGE), buses=(DiskBus.PVSCSI,), nics=("vmxnet3",)
)
DEBIAN = GuestFacts(OsFamily.LINUX, root="/dev/sda1", product="Debian 12", mounts={"/": "/dev/sda1"})


class FakeAppliance:
    """Counts launches; a plan's `apply` changes the overlay that it holds."""

    launched: list[tuple[GuestDisk, ...]]

    def __init__(self, disks: tuple[GuestDisk, ...]) -> None:
        self.disks = disks
        self.abandoned = False

    @classmethod
    def launch(cls, disks: tuple[GuestDisk, ...], *, readonly: bool, tcg: bool) -> FakeAppliance:
        cls.launched.append(disks)
        return cls(disks)

    def forget(self) -> None: ...

    def abandon(self) -> None:
        self.abandoned = True

    def __enter__(self) -> FakeAppliance:
        return self

    def __exit__(self, *_: object) -> None: ...


class FakeMicro:
    """The module that plans and applies."""

    broken = False
    leaves = ""

    def __init__(self) -> None:
        self.names: list[dict[str, str]] = []

    @staticmethod
    def windows_drivers_at_hand(virtio_win: str | None) -> bool:
        return False

    @dataclass(frozen=True)
    class Plan:
        def as_json(self) -> dict[str, Any]:
            return {"initrds": ["/boot/initrd.img"]}

    def plan(self, appliance: FakeAppliance, facts: GuestFacts, folder: Path, *, names: dict[str, str], **_: Any) -> Plan:
        self.names.append(names)
        if self.leaves:
            (folder / self.leaves).touch()
        return self.Plan()

    def apply(self, appliance: FakeAppliance, plan: Plan, folder: Path, *, throw_away: bool) -> None:
        assert throw_away
        if self.broken:
            raise GuestError("/boot is full", where="/boot", fix="remove old kernels")
        change(appliance.disks[0], "write -P 9 0 4096")


@dataclass
class Setting:
    book: Book
    disk: Path
    folder: Path
    micro: FakeMicro
    lives_by: set[Way] = field(default_factory=lambda: set(Way))
    judgement: Judgement = NO_VIRTIO
    facts: GuestFacts = DEBIAN
    booted: list[tuple[DomainPlan, bytes]] = field(default_factory=list)
    tried: list[Replay] = field(default_factory=list)
    boot_s: list[float] = field(default_factory=lambda: [2.5] * 9)
    found_written: list[bool] = field(default_factory=list)

    def by_way(self, replay: Replay) -> DomainPlan:
        self.tried.append(replay)
        return by_way(make_plan(paths=(str(self.disk),)), replay)

    def boots(self, plan: DomainPlan, overlays: tuple[str, ...], /) -> LifeSigns:
        self.booted.append((plan, Path(overlays[0]).read_bytes()[:4]))
        picture = self.folder / "screen.png"
        picture.write_bytes(b"png")
        with Path(overlays[0]).open("r+b") as overlay:
            self.found_written.append(overlay.read().endswith(b"a boot was here"))
            overlay.write(b"a boot was here")
        if self.tried[-1].way in self.lives_by and self.boot_s:
            after = self.boot_s.pop(0)
            signs = (LifeSign(Sign.ARP, 1.0), LifeSign(Sign.SERIAL, after, "login:"))
            return LifeSigns(Outcome.ALIVE, after, f"serial after {after} s", signs, picture=picture)
        return LifeSigns(Outcome.FAILED, 9.0, "ALERT! UUID=1 does not exist", picture=picture)

    def rehearse(self, *, convert: Any = None, **wishes: Any) -> dict[str, Any]:
        store = MorphStore(self.folder / "trial", [GuestDisk(str(self.disk))], open_disk)
        stage = Stage(
            self.book, make_plan(paths=(str(self.disk),)), store, self.folder, True, Silent(), self.boots, self.by_way, convert
        )
        return Rehearser(stage, RehearsalWishes(**wishes)).run()


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    rig = Rig(state, World.make())
    rig.begin()
    rig.migration().sync(passes=2)
    disk = tmp_path / "disk.raw"
    disk.write_bytes(BYTES)
    micro = FakeMicro()
    found = Setting(rig.book, disk, tmp_path / "guest", micro)
    FakeAppliance.launched = []
    monkeypatch.setattr(rehearsals, "Appliance", FakeAppliance)
    monkeypatch.setattr(rehearsals, "inspect", lambda appliance, root: found.facts)
    monkeypatch.setattr(rehearsals, "judge", lambda facts, disks, **_: found.judgement)
    monkeypatch.setattr(rehearsals, "micro", micro)
    yield found
    assert disk.read_bytes() == BYTES, "a rehearsal writes nothing to the synced disk"
    assert not (found.folder / "trial").exists(), "its overlays are gone"
    rig.close()


def test_the_best_way_is_booted_and_kept_for_the_cutover(setting: Setting) -> None:
    document = setting.rehearse()
    assert (document["works"], document["way"], document["verdict"]) == (True, "micro", "micro-morph")
    assert document["proof"] == {"sign": "serial", "seconds": 2.5, "boots": [2.5]}
    assert set(document["timings"]) == {"inspection", "morph", "boot"}
    assert Path(document["screenshot"]).name == "rehearsal-1-micro.png"
    assert Path(document["screenshot"]).read_bytes() == b"png"
    (record,) = setting.book.rehearsals()
    assert (record.way, record.works) == ("micro", True)
    replay = Replay.from_json(record.document["replay"])
    assert (replay.way, replay.micro, replay.mounts) == (Way.MICRO, {"initrds": ["/boot/initrd.img"]}, {"/": "/dev/sda1"})


def test_of_several_boots_from_the_same_state_the_typical_one_is_foretold(setting: Setting) -> None:
    setting.boot_s = [7.0, 5.5, 9.0]
    document = setting.rehearse(boots=3)
    assert (document["timings"]["boot"], document["proof"]["boots"]) == (7.0, [7.0, 5.5, 9.0])
    assert setting.found_written == [False] * 3, "each boot has overlays that no boot wrote to"


def test_a_guest_that_lives_only_sometimes_does_not_work(setting: Setting) -> None:
    setting.boot_s = [7.0]
    document = setting.rehearse(boots=3, way=Way.MICRO)
    assert (document["works"], document["why"]) == (False, "boot 2 of 3: ALERT! UUID=1 does not exist")
    assert "boot" not in document["timings"]


def test_one_appliance_looks_and_morphs(setting: Setting) -> None:
    setting.rehearse()
    assert len(FakeAppliance.launched) == 1


def test_the_names_that_the_network_is_configured_for_are_kept_by_a_way_that_can(setting: Setting) -> None:
    setting.facts = replace(DEBIAN, linux=LinuxFacts(interfaces=("enX0", "enX1")))
    setting.judgement = replace(NO_VIRTIO, verdict=Verdict.READY, ways=(Way.NONE,))
    document = setting.rehearse()
    assert setting.micro.names == [{nic.mac: f"enX{nic.index}" for nic in make_plan().vm.nics}]
    assert document["way"] == Way.MICRO
    assert any("configured for enX0, enX1" in finding["what"] for finding in document["findings"])


def test_the_next_way_is_tried_when_one_shows_no_life(setting: Setting) -> None:
    setting.lives_by = {Way.COMPATIBLE}
    document = setting.rehearse()
    assert (document["works"], document["way"]) == (True, "compatible")
    assert [(one["way"], one["works"]) for one in document["attempts"]] == [("micro", False), ("compatible", True)]
    assert setting.booted[-1][0].disks[0].bus is DiskBus.PVSCSI
    assert document["timings"]["morph"] == 0


def test_a_morph_that_fails_is_an_answer_too(setting: Setting) -> None:
    setting.micro.broken = True
    document = setting.rehearse(way=Way.MICRO)
    assert (document["works"], document["why"], document["replay"]) == (False, "/boot is full", None)
    assert document["fix"] == "remove old kernels"
    assert not setting.book.rehearsals()[0].works
    assert setting.booted == []


def test_of_ways_that_all_fail_each_one_is_told(setting: Setting) -> None:
    setting.micro.broken = True
    setting.lives_by = set()
    assert setting.rehearse()["why"] == "micro: /boot is full; compatible: ALERT! UUID=1 does not exist"


def test_what_made_the_verdict_is_told_first_when_the_way_that_is_left_fails(setting: Setting) -> None:
    damaged = Finding(Severity.WARNING, "the initramfs is damaged", "rebuild it")
    setting.judgement = replace(
        NO_VIRTIO, verdict=Verdict.COMPATIBLE, why=damaged.what, ways=(Way.COMPATIBLE,), findings=(damaged,)
    )
    setting.lives_by = set()
    document = setting.rehearse()
    assert document["why"] == "the initramfs is damaged; compatible: ALERT! UUID=1 does not exist"
    assert document["fix"] == "rebuild it"


@pytest.mark.parametrize("wishes", [{}, {"way": Way.NONE}])
def test_a_guest_that_cannot_be_inspected_is_an_answer_too(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, wishes: dict[str, Any]
) -> None:
    def refuse(appliance: FakeAppliance, root: str | None) -> GuestFacts:
        raise GuestError("2 operating systems are on the disks", fix="give --root")

    monkeypatch.setattr(rehearsals, "inspect", refuse)
    document = setting.rehearse(**wishes)
    assert (document["works"], document["verdict"], document["way"]) == (False, "cannot", "")
    assert (document["why"], document["fix"]) == ("2 operating systems are on the disks", "give --root")
    assert [record.works for record in setting.book.rehearsals()] == [False]
    assert setting.booted == []


def test_what_a_way_that_failed_had_prepared_goes(setting: Setting) -> None:
    """And nothing else: an earlier rehearsal's files are still to be replayed."""
    setting.folder.mkdir()
    (setting.folder / "segment-1.cpio").write_bytes(b"earlier")
    setting.lives_by = set()
    setting.micro.leaves = "segment-2.cpio"
    setting.rehearse()
    assert sorted(file.suffix for file in setting.folder.iterdir()) == [".cpio", ".png", ".png"]
    assert (setting.folder / "segment-1.cpio").exists()


def test_a_boot_that_could_not_be_tried_is_no_answer_about_the_guest(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> LifeSigns:
        raise DomainError("libvirt is gone", where="qemu:///system")

    monkeypatch.setattr(Setting, "boots", gone)
    with pytest.raises(DomainError, match="libvirt is gone"):
        setting.rehearse()
    assert setting.book.rehearsals() == []


def test_nothing_that_works_is_said_and_remembered(setting: Setting) -> None:
    setting.lives_by = set()
    document = setting.rehearse()
    assert document["works"] is False
    assert "does not exist" in document["why"]
    assert [record.works for record in setting.book.rehearsals()] == [False]


def test_a_guest_that_cannot_be_helped_is_not_booted(setting: Setting) -> None:
    blocker = Finding(Severity.BLOCKER, "Windows is hibernated", "shut it down")
    setting.judgement = Judgement(Verdict.CANNOT, "Windows is hibernated", (), (), findings=(blocker,))
    document = setting.rehearse()
    assert (document["works"], document["why"], document["way"]) == (False, "Windows is hibernated", "")
    assert document["findings"] == [{"severity": "blocker", "what": "Windows is hibernated", "fix": "shut it down"}]
    assert setting.booted == []


def test_a_way_that_was_asked_for_is_the_only_one(setting: Setting) -> None:
    setting.lives_by = {Way.COMPATIBLE}
    document = setting.rehearse(way=Way.NONE)
    assert [one["way"] for one in document["attempts"]] == ["none"]
    assert document["works"] is False


def test_compatible_hardware_needs_a_bus_that_the_guest_drives(setting: Setting) -> None:
    setting.judgement = replace(setting.judgement, buses=(DiskBus.VIRTIO_BLK,))
    assert "no hardware" in setting.rehearse(way=Way.COMPATIBLE)["why"]


def test_virt_v2v_morphs_the_overlays(setting: Setting) -> None:
    seen: list[tuple[GuestDisk, ...]] = []
    document = setting.rehearse(way=Way.VIRT_V2V, convert=seen.append)
    assert document["works"]
    assert [Path(layer.path).name for layer in seen[0]] == ["disk-0.qcow2"]


def test_virt_v2v_that_is_not_installed_is_said(setting: Setting) -> None:
    assert "not installed" in setting.rehearse(way=Way.VIRT_V2V)["why"]


def test_in_the_middle_of_a_pass_nothing_is_rehearsed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    rig = Rig(state, World.make())
    rig.begin()
    with pytest.raises(UsageError, match="no pass is whole"):
        rehearsals.require_frozen(rig.book)
    rig.migration().sync(passes=1)
    rehearsals.require_frozen(rig.book)
    rig.migration().cutover()
    with pytest.raises(UsageError, match="under way or done"):
        rehearsals.require_frozen(rig.book)
    rig.close()
