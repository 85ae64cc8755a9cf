"""Which hardware a modernised VM is on is in the journal: later commands go by it, and none stops the VM to find out."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from tests.domain.conftest import make_plan
from tests.migration.conftest import Rig

from tokvm.app import guests
from tokvm.app.guests import GuestSide, ModernWishes
from tokvm.app.modern_ledger import ModernLedger
from tokvm.app.modernise import Renewal
from tokvm.app.plan import Plan, TargetChoice
from tokvm.app.ways import Replay
from tokvm.core.machine import DiskBus
from tokvm.domain.base import Accel
from tokvm.domain.host import LibvirtHost
from tokvm.guest.base import Way
from tokvm.migration.book import Book
from tokvm.migration.doors import Silent
from tokvm.migration.phases import Phase
from tokvm.testing.fakes import World

XML = "<domain>dev\u00f1o</domain>"


class Migrated:
    """A Linux that was cut over on SATA, asked for by the operator, and its folder."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        rig.path.mkdir(mode=0o700)
        rig.begin()
        rig.migration().sync(passes=1)
        self.book.replan(Plan("fake://source", (TargetChoice("/fake/target-0"),), way=Way.COMPATIBLE).to_json())
        replay = Replay(Way.COMPATIBLE, family="linux", bus="sata", nic="e1000")
        self.book.rehearsed(Way.COMPATIBLE, {"replay": replay.to_json()}, works=True)
        rig.migration().cutover(proof_s=0)
        self.folder = rig.path / "modern"
        self.folder.mkdir()

    @property
    def book(self) -> Book:
        journal = self.rig.journal()
        return journal.book(journal.migrations()[0].id)

    @property
    def side(self) -> GuestSide:
        """As a new process finds it."""
        book = self.book
        host = cast(LibvirtHost, SimpleNamespace(accel=lambda: Accel.TCG))
        plan = Plan.from_json(book.record().plan)
        return GuestSide(self.rig.path, book, plan, host, Silent(), lambda number, identity: pytest.fail("no disk is opened"))

    @property
    def ledger(self) -> ModernLedger:
        book = self.book
        return ModernLedger(book, Plan.from_json(book.record().plan), self.folder, Way.MICRO)

    def bus(self) -> DiskBus:
        """Of the domain that a `cutover` which goes on would define."""
        return self.side.domain(make_plan()).disks[0].bus


@pytest.fixture
def migrated(tmp_path: Path) -> Iterator[Migrated]:
    rig = Rig(tmp_path / "state", World.make())
    yield Migrated(rig)
    rig.close()


def test_nothing_is_known_at_first(migrated: Migrated) -> None:
    assert migrated.ledger.before() is None
    assert (migrated.rig.phase, migrated.bus()) == (Phase.STARTED, DiskBus.SATA)


def test_a_try_is_remembered_with_the_definition_from_before(migrated: Migrated) -> None:
    migrated.ledger.trying(XML)
    assert migrated.ledger.before() == XML
    assert migrated.bus() is DiskBus.VIRTIO_BLK, "a cutover that goes on must not take virtio away again"
    assert stat.S_IMODE((migrated.folder / "before.xml").stat().st_mode) == 0o600, "a console's password may be in it"


def test_hardware_given_back_is_the_cutovers(migrated: Migrated) -> None:
    migrated.ledger.trying(XML)
    migrated.ledger.given_back()
    assert migrated.ledger.before() is None
    assert migrated.bus() is DiskBus.SATA
    assert list(migrated.folder.iterdir()) == []


def test_a_file_that_the_journal_does_not_know_is_a_left_over(migrated: Migrated) -> None:
    (migrated.folder / "before.xml").write_text(XML)
    assert migrated.ledger.before() is None


def test_done_is_noted_and_not_done_again(migrated: Migrated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guests, "modernise", lambda job: pytest.fail("it would be shut down"))
    ledger = migrated.ledger
    ledger.trying(XML)
    ledger.done(41.0)
    assert migrated.ledger.before() is None
    assert migrated.bus() is DiskBus.VIRTIO_BLK
    assert Path(ledger.replaced).read_text() == XML
    assert "modernised by the way micro, down for 41" in migrated.book.events()[-1].note
    assert "nothing to do" in str(migrated.side.modernise(make_plan(), ModernWishes())["outcome"])


def test_done_by_a_later_run_that_waited_on(migrated: Migrated) -> None:
    migrated.ledger.trying(XML)
    migrated.ledger.done(None)
    assert migrated.ledger.before() is None
    assert migrated.bus() is DiskBus.VIRTIO_BLK


def test_the_next_cutover_knows_nothing_of_it(migrated: Migrated, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rollback the disks are copied anew, without virtio; an undo log of those from before is not for them."""
    jobs: list[Renewal] = []
    monkeypatch.setattr(guests, "modernise", jobs.append)
    migrated.ledger.trying(XML)
    migrated.side.modernise(make_plan(), ModernWishes())
    assert jobs[-1].ledger.before() is None, "the ledger's folder is the store's"
    migrated.ledger.done(1.0)
    migrated.rig.migration().rollback(accept_data_loss=True)
    migrated.rig.migration().sync(passes=1)
    assert migrated.bus() is DiskBus.SATA
    migrated.rig.migration().cutover(proof_s=0)
    assert migrated.bus() is DiskBus.SATA
    migrated.side.modernise(make_plan(), ModernWishes())
    assert [job.store.folder.name for job in jobs] == ["modern-1", "modern-2"]
