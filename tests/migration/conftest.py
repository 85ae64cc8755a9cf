"""A migration of a fake world, and the ways to kill it."""

from __future__ import annotations

import os
import pickle
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tokvm.migration.book import Book
from tokvm.migration.doors import Doors
from tokvm.migration.journal import Journal
from tokvm.migration.phases import Phase
from tokvm.migration.runner import Migration
from tokvm.testing.fakes import Death, FakeHost, FakeMorpher, FakeSource, FakeTarget, World, fake_plan
from tokvm.transfer.checkpoint import PassLimits

LIMITS = PassLimits(workers=1, checkpoint_bytes=2 * 8192, checkpoint_s=5.0, reseal_s=0.0)


class DyingJournal(Journal):
    """Dies before, or right after, the n-th transaction."""

    die_at: int | None = None
    after: bool = False
    writes: int = 0

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        number = self.writes
        self.writes += 1
        if number == self.die_at and not self.after:
            raise Death(f"before journal write {number}")
        with super().transaction() as connection:
            yield connection
        if number == self.die_at and self.after:
            raise Death(f"after journal write {number}")


@dataclass
class Rig:
    """One world, one state directory; a new process (journal, doors, runner) for each run."""

    path: Path
    world: World
    journals: list[DyingJournal] = field(default_factory=list)
    proof: Callable[[], bool] | None = None
    open_target: Callable[[int], FakeTarget] | None = None
    morphs: bool = False
    changes_disks: bool = True

    def journal(self) -> DyingJournal:
        for old in self.journals:
            old.close()
        self.journals = [DyingJournal.open(self.path, wall=self.world.clock.wall)]
        return self.journals[0]

    def begin(self) -> None:
        targets = [f"/fake/target-{n}" for n in range(len(self.world.disks))]
        self.journal().create(vm=self.world.machine(), source="fake://source", plan={}, targets=targets)

    def migration(self, *, die_at: int | None = None, after: bool = False) -> Migration:
        """As a new process finds it."""
        journal = self.journal()
        record = journal.migrations()[0]
        doors = Doors(
            source=FakeSource(self.world),
            open_target=self.open_target or (lambda index: FakeTarget(self.world, index)),
            host=FakeHost(self.world),
            plan=lambda: fake_plan(self.world),
            manifest_path=lambda number, disk: self.path / "manifests" / f"{number}-{disk}",
            clock=self.world.clock,
            proof=self.proof,
            morpher=FakeMorpher(self.world, changes_disks=self.changes_disks) if self.morphs else None,
            limits=LIMITS,
        )
        journal.die_at, journal.after, journal.writes = die_at, after, 0
        return Migration(journal, record, doors)

    @property
    def book(self) -> Book:
        journal = self.journals[0]
        return journal.book(journal.migrations()[0].id)

    @property
    def phase(self) -> Phase:
        return self.book.phase

    def synced(self, passes: int = 2) -> Rig:
        self.begin()
        self.migration().sync(passes=passes)
        return self

    def close(self) -> None:
        for journal in self.journals:
            journal.close()


@pytest.fixture
def fast_dir(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: thousands of journals are made, each synced many times."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="tokvm-test-") as path:
        yield Path(path)


@pytest.fixture
def make_synced(fast_dir: Path) -> Iterator[Callable[[], Rig]]:
    """A new rig each time, synced twice: copies of one that was."""
    first = Rig(fast_dir / "template", World.make(blocks=6))
    first.path.mkdir()
    first.synced(2).close()
    first.world.calls = 0
    first.world.log.clear()
    world, rigs = pickle.dumps(first.world), [first]

    def make() -> Rig:
        rigs[-1].close()
        path = fast_dir / f"state-{len(rigs)}"
        shutil.copytree(first.path, path)
        rigs.append(Rig(path, pickle.loads(world)))
        return rigs[-1]

    yield make
    rigs[-1].close()


@pytest.fixture
def make_rig(fast_dir: Path) -> Iterator[Callable[..., Rig]]:
    """A new rig each time: `make_rig(disks=2)`."""
    rigs: list[Rig] = []

    def make(*, disks: int = 1, blocks: int = 16) -> Rig:
        path = fast_dir / f"state-{len(rigs)}"
        path.mkdir(mode=0o700)
        rigs.append(Rig(path, World.make(disks=disks, blocks=blocks)))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make_rig: Callable[..., Rig]) -> Rig:
    return make_rig()
