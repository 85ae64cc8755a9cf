"""The operator's drivers for Windows reach the micro-morph by every command, and every command judges by them alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.domain.conftest import make_plan
from tests.migration.conftest import Rig

from tokvm.app import guests, morph
from tokvm.app.guests import GuestSide, ModernWishes, with_way
from tokvm.app.modernise import Renewal
from tokvm.app.plan import Plan, TargetChoice
from tokvm.app.rehearsals import RehearsalWishes, Stage
from tokvm.app.ways import Replay
from tokvm.core.errors import Blocked
from tokvm.domain.base import Accel
from tokvm.domain.host import LibvirtHost
from tokvm.guest import engines
from tokvm.guest.base import GuestDisk, GuestFacts, Judgement, OsFamily, Verdict, Way
from tokvm.guest.engines import Conversion, Engine, Micro
from tokvm.migration.doors import Silent
from tokvm.testing.fakes import World

DISK = GuestDisk("/srv/win.raw")
WINDOWS = GuestFacts(OsFamily.WINDOWS, root="/dev/sda2", product="Windows Server 2022")


class FakeAppliance:
    @classmethod
    def launch(cls, disks: tuple[GuestDisk, ...], **_: object) -> FakeAppliance:
        return cls()

    def __enter__(self) -> FakeAppliance:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture(autouse=True)
def no_drivers_of_the_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTIO_WIN", str(tmp_path / "nowhere"))


@pytest.fixture
def iso(tmp_path: Path) -> str:
    path = tmp_path / "virtio-win.iso"
    path.touch()
    return str(path)


# ---- the micro-morph itself


def test_the_micro_morph_plans_with_the_drivers_and_the_nics(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, object] = {}

    class FakeMicro:
        @staticmethod
        def plan(appliance: object, facts: GuestFacts, store: Path, **more: object) -> SimpleNamespace:
            seen.update(more)
            return SimpleNamespace(left_out=("no agent",))

        @staticmethod
        def apply(appliance: object, plan: object, store: Path) -> None: ...

    monkeypatch.setattr(engines, "Appliance", FakeAppliance)
    monkeypatch.setattr(engines, "inspect", lambda appliance, root: WINDOWS)
    monkeypatch.setattr(engines, "micro", FakeMicro)
    report = Micro(tmp_path, tcg=True, virtio_win="/v.iso", macs=("00:50:56:00:00:01",), on_step=print).morph((DISK,))
    assert seen == {"virtio_win": "/v.iso", "macs": ("00:50:56:00:00:01",)}
    assert report.warnings == ("no agent",)


# ---- tokvm morph


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What `tokvm morph` told the judge of the drivers."""
    told: list[bool] = []

    def judge(facts: GuestFacts, disks: int, *, windows_drivers: bool, **_: object) -> Judgement:
        told.append(windows_drivers)
        return Judgement(Verdict.MICRO, "", (), (Way.MICRO,))

    monkeypatch.setattr(morph, "Appliance", FakeAppliance)
    monkeypatch.setattr(morph, "inspect", lambda appliance, root: WINDOWS)
    monkeypatch.setattr(morph, "judge", judge)
    return told


@pytest.mark.slow
def test_disks_alone_are_judged_by_the_drivers_that_are_there(
    judged: list[bool], iso: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    morph.look((DISK,), morph.MorphWishes(virtio_win=iso))
    morph.look((DISK,), morph.MorphWishes(virtio_win=iso + ".not"))
    morph.look((DISK,), morph.MorphWishes())
    monkeypatch.setenv("VIRTIO_WIN", iso)
    morph.look((DISK,), morph.MorphWishes())
    assert judged == [True, False, False, True], "named, named but not there, none, the environment's"


def test_disks_alone_are_morphed_with_the_drivers(
    judged: list[bool], iso: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Engine] = []

    def morphed(store: object, engine: Engine) -> engines.MorphReport:
        used.append(engine)
        return engines.MorphReport(Way.MICRO)

    monkeypatch.setattr(morph, "morph_disks", morphed)
    wishes = morph.MorphWishes(virtio_win=iso)
    morph.morph(morph.look((DISK,), wishes), tmp_path / "state", wishes, print)
    (engine,) = used
    assert isinstance(engine, Micro)
    assert engine.virtio_win == iso


# ---- a migrated VM


Make = Callable[..., GuestSide]


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Make]:
    """A Windows that was rehearsed by `way`, its migration begun with `virtio_win`."""
    rig = Rig(tmp_path / "state", World.make())

    def make(*, way: Way = Way.COMPATIBLE, windows: bool = True, virtio_win: str = "", root: str = "") -> GuestSide:
        rig.path.mkdir(mode=0o700)
        rig.begin()
        rig.migration().sync(passes=1)
        book = rig.book
        replay = Replay(
            way, family="windows" if windows else "linux", windows=windows, bus="sata", nic="e1000", root="/dev/sda2"
        )
        book.rehearsed(way, {"replay": replay.to_json()}, works=True)
        plan = Plan("fake://source", (TargetChoice("/fake/target-0"),), virtio_win=virtio_win, guest_root=root)
        host = cast(LibvirtHost, SimpleNamespace(accel=lambda: Accel.TCG))
        return GuestSide(rig.path, book, plan, host, Silent(), lambda number, identity: pytest.fail("no disk is opened"))

    yield make
    rig.close()


@pytest.fixture
def renewals(monkeypatch: pytest.MonkeyPatch) -> list[Renewal]:
    found: list[Renewal] = []

    def modernise(job: Renewal) -> dict[str, object]:
        found.append(job)
        return {}

    monkeypatch.setattr(guests, "modernise", modernise)
    return found


@pytest.mark.parametrize("said", ["now", "at the rehearsal", "in the environment"])
def test_a_migrated_vm_is_modernised_with_the_drivers_and_its_nics(
    said: str, side: Make, renewals: list[Renewal], iso: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if said == "in the environment":
        monkeypatch.setenv("VIRTIO_WIN", iso)
    made = side(virtio_win={"now": "/another.iso", "at the rehearsal": iso}.get(said, ""))
    made.modernise(make_plan(), ModernWishes(virtio_win=iso if said == "now" else None))
    engine = renewals[0].engine
    assert isinstance(engine, Micro)
    assert engine.virtio_win == (None if said == "in the environment" else iso)
    assert engine.macs == ("52:54:00:12:34:56", "52:54:00:12:34:57")
    assert engine.root == "/dev/sda2"


def test_virt_v2v_gets_the_drivers_too(side: Make, renewals: list[Renewal], iso: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guests, "find_virt_v2v", lambda: "/usr/bin/virt-v2v-in-place")
    side(virtio_win=iso).modernise(make_plan(), ModernWishes(way=Way.VIRT_V2V))
    engine = renewals[0].engine
    assert isinstance(engine, Conversion)
    assert engine.program.virtio_win == iso


def test_without_drivers_a_windows_is_not_even_shut_down(side: Make, renewals: list[Renewal]) -> None:
    with pytest.raises(Blocked, match="no virtio drivers") as refused:
        side().modernise(make_plan(), ModernWishes(virtio_win="/not/there.iso"))
    assert "--virtio-win" in refused.value.fix
    assert renewals == []


def test_a_linux_needs_none_of_them(side: Make, renewals: list[Renewal]) -> None:
    side(windows=False).modernise(make_plan(), ModernWishes())
    assert len(renewals) == 1


@pytest.mark.parametrize(
    ("now", "expected"),
    [({}, ("/v.iso", "/dev/sda2")), ({"virtio_win": "/w.iso", "root": "/dev/sdb1"}, ("/w.iso", "/dev/sdb1"))],
)
def test_a_rehearsal_goes_by_what_was_said_before(
    now: dict[str, str], expected: tuple[str, str], side: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RehearsalWishes] = []

    class FakeRehearser:
        def __init__(self, stage: Stage, wishes: RehearsalWishes) -> None:
            seen.append(wishes)

        def run(self) -> dict[str, object]:
            return {}

    monkeypatch.setattr(guests, "Rehearser", FakeRehearser)
    side(virtio_win="/v.iso", root="/dev/sda2").rehearse(make_plan(), RehearsalWishes(**cast(Any, now)))
    assert [(one.virtio_win, one.root) for one in seen] == [expected]


@pytest.mark.parametrize("said", [["--virtio-win", "drivers"], []])
def test_where_the_drivers_are_is_kept_for_commands_run_elsewhere(
    said: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = Plan("fake://source", (), virtio_win="/v.iso")
    kept = with_way(plan, None, said[1] if said else None, None)
    assert kept.virtio_win == (str(tmp_path / "drivers") if said else "/v.iso")
