"""A migration that has synced real disks, for rehearsals in a real appliance, and a domain host that boots nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from tests.domain.conftest import make_plan
from tests.migration.conftest import Rig

from tokvm.app import guests
from tokvm.app.guests import GuestSide
from tokvm.app.morph import open_disk
from tokvm.app.plan import Plan, TargetChoice
from tokvm.app.rehearsals import RehearsalWishes
from tokvm.core.errors import Blocked
from tokvm.core.machine import Disk, Nic
from tokvm.domain.accel import kvm_works
from tokvm.domain.base import Accel, DomainPlan, LifeSign, LifeSigns, Outcome, Sign
from tokvm.domain.host import LibvirtHost
from tokvm.domain.rehearsal import PICTURE, RehearsalPlan
from tokvm.guest.base import GuestDisk
from tokvm.migration.doors import Silent
from tokvm.testing.fakes import World


@dataclass
class DeafHost:
    """Boots what it is given for no time at all: only a domain that `lives` says so of shows life."""

    lives: Callable[[DomainPlan], bool] = lambda plan: False
    booted: list[DomainPlan] = field(default_factory=list)

    def accel(self) -> Accel:
        return Accel.KVM if kvm_works() else Accel.TCG

    def rehearse(self, trial: RehearsalPlan, *, deadline_s: float) -> LifeSigns:
        self.booted.append(trial.plan)
        picture = trial.folder / PICTURE
        picture.write_bytes(b"png")
        if self.lives(trial.plan):
            return LifeSigns(Outcome.ALIVE, 2.0, "serial after 2.0 s", (LifeSign(Sign.SERIAL, 2.0),), picture=picture)
        return LifeSigns(Outcome.SILENT, deadline_s, "nothing proved that it lives", picture=picture)


@dataclass
class Notes(Silent):
    """What the operator reads meanwhile."""

    notes: list[str] = field(default_factory=list)

    def note(self, text: str, /) -> None:
        self.notes.append(text)


@dataclass(frozen=True)
class Answer:
    """A rehearsal as the journal has it."""

    works: bool
    way: str
    why: str
    fix: str
    document: dict[str, Any]


@dataclass
class Migration:
    """One that has synced these disks, as `tokvm rehearse` and `tokvm cutover` find it."""

    side: GuestSide
    domain: DomainPlan
    notes: Notes

    def rehearse(self, **wishes: Any) -> Answer:
        self.side.rehearse(self.domain, RehearsalWishes(**{"deadline_s": 120.0, **wishes}))
        record = self.side.book.rehearsals()[-1]
        return Answer(record.works, record.way, str(record.document["why"]), str(record.document["fix"]), {**record.document})

    def fails(self, **wishes: Any) -> Answer:
        """The rehearsal, having said why and what to do, and a cutover that refuses for this and no other reason."""
        answer = self.rehearse(**wishes)
        assert (answer.works, answer.document["works"], answer.document["replay"]) == (False, False, None)
        assert answer.why
        with pytest.raises(Blocked) as refused:
            self.side.refuse_failed_rehearsal(forced=False)
        assert answer.why in refused.value.what
        assert answer.fix in refused.value.fix
        assert "--despite-rehearsal" in refused.value.fix
        self.side.refuse_failed_rehearsal(forced=True)
        assert self.side.replay() is None
        return answer


Migrate = Callable[..., Migration]


@pytest.fixture
def migrate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Migrate]:
    """Makes one migration, and looks in the end that its rehearsals left nothing behind and nothing changed."""
    monkeypatch.setattr(guests, "find_virt_v2v", lambda: None)  # minutes, and a test of its own
    ended: list[Callable[[], None]] = []

    def make(host: DeafHost | LibvirtHost, *disks: Path) -> Migration:
        world = World.make(disks=len(disks))
        rig = Rig(tmp_path / "state", world)
        rig.path.mkdir(mode=0o700)
        rig.journal().create(vm=world.machine(), source="fake://source", plan={}, targets=[str(disk) for disk in disks])
        rig.migration().sync(passes=2)
        book = rig.book
        plan = Plan("fake://source", tuple(TargetChoice(str(disk)) for disk in disks))
        notes = Notes()
        made = GuestSide(
            *(rig.path, book, plan, cast(LibvirtHost, host), notes),
            lambda number, identity: open_disk(GuestDisk(str(disks[number])), identity),
        )
        before, calls = [digest(disk) for disk in disks], world.calls

        def looked_at() -> None:
            assert [digest(disk) for disk in disks] == before, "a rehearsal writes nothing to the synced disks"
            assert world.calls == calls, "a rehearsal asks nothing of the source, the targets or the domain"
            assert (world.source_on, world.violations) == (True, [])
            if not book.rehearsals()[-1].works:
                assert {file.suffix for file in made.folder.iterdir()} <= {".png"}, sorted(made.folder.iterdir())
            rig.close()

        ended.append(looked_at)
        return Migration(made, domain_of(disks), notes)

    yield make
    for check in ended:
        check()


def domain_of(disks: tuple[Path, ...]) -> DomainPlan:
    facts = tuple(Disk(n, f"vdi-{n}", disk.stat().st_size, bootable=n == 0) for n, disk in enumerate(disks))
    nics = (Nic(0, "00:50:56:00:00:01", "Pool-wide network"),)
    return make_plan(paths=tuple(map(str, disks)), disks=facts, nics=nics, vcpus=1)


def digest(disk: Path) -> str:
    with disk.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
