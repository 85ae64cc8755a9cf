"""`tokvm morph` leaves the disks of a migration alone until that is finished, by whatever name they are given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.guest.disks import change
from tests.loops import attach_or_skip, detach

from tokvm.app import morph as app
from tokvm.app.claimed import refuse_claimed
from tokvm.core.errors import TargetError, UnsafeTarget
from tokvm.core.machine import Disk, VirtualMachine
from tokvm.core.units import MiB
from tokvm.guest.base import GuestDisk, Way
from tokvm.guest.engines import MorphReport
from tokvm.guest.morph_store import Undone
from tokvm.migration.book import Book
from tokvm.migration.journal import Journal
from tokvm.migration.phases import Event
from tokvm.targets.open import TargetSpec, open_target

GO_BACK = (Event.CUT_OVER, Event.ROLL_BACK, Event.SOURCE_BACK)


class Migrated:
    """An open migration of `web1` onto one disk, in a state directory."""

    def __init__(self, folder: Path, image_format: str = "raw") -> None:
        self.state = folder / "state"
        self.state.mkdir(mode=0o700, exist_ok=True)
        self.disk = folder / f"disk.{image_format}"
        self.journal = Journal.open(self.state)
        vm = VirtualMachine("uuid-1", "web1", 1, 1 << 30, (Disk(0, "vdi-0", MiB),))
        self.id = self.journal.create(vm=vm, source="fake://", plan={}, targets=[str(self.disk)]).id

    @property
    def book(self) -> Book:
        return self.journal.book(self.id)

    def synced(self, image_format: str = "raw") -> Migrated:
        target = open_target(TargetSpec(str(self.disk), format=image_format), size=MiB)
        self.book.disk_identity(0, target.identity)
        target.close()
        return self

    def refuse(self, path: Path | str) -> None:
        refuse_claimed([str(path)], self.state)


@pytest.fixture
def migrated(tmp_path: Path) -> Iterator[Migrated]:
    made = Migrated(tmp_path)
    yield made
    made.journal.close()


def test_the_target_of_an_open_migration_is_refused(migrated: Migrated) -> None:
    with pytest.raises(UnsafeTarget) as refused:
        migrated.synced().refuse(migrated.disk)

    assert "web1, COPY" in refused.value.what
    assert f"tokvm cutover {migrated.id}" in refused.value.fix
    assert f"tokvm finish {migrated.id}" in refused.value.fix


def test_it_is_refused_before_it_is_there(migrated: Migrated) -> None:
    """The first sync will make it."""
    with pytest.raises(UnsafeTarget):
        migrated.refuse(migrated.disk)


@pytest.mark.parametrize("rename", [os.symlink, os.link, os.rename])
def test_another_name_is_the_same_disk(rename: Callable[[Path, Path], None], migrated: Migrated, tmp_path: Path) -> None:
    rename(migrated.synced().disk, tmp_path / "other")

    with pytest.raises(UnsafeTarget):
        migrated.refuse(tmp_path / "other")


def test_a_qcow2_target_is_known_even_if_it_is_taken_for_raw(tmp_path: Path) -> None:
    migrated = Migrated(tmp_path, "qcow2").synced("qcow2")
    migrated.disk.rename(tmp_path / "other")

    with pytest.raises(UnsafeTarget):
        migrated.refuse(tmp_path / "other")
    migrated.journal.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_another_node_of_the_device_is_the_same_disk(migrated: Migrated, tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(MiB))
    device, node = attach_or_skip(backing), tmp_path / "node"
    try:
        found = Path(device).stat()
        os.mknod(node, found.st_mode, found.st_rdev)
        migrated.disk.symlink_to(device)  # as /dev/disk/by-id/…

        with pytest.raises(UnsafeTarget):
            migrated.refuse(node)
        migrated.synced().disk.unlink()
        with pytest.raises(UnsafeTarget):
            migrated.refuse(node)
    finally:
        detach(device)


def test_other_disks_are_not_refused(migrated: Migrated, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(migrated.synced().disk.read_bytes())

    migrated.refuse(tmp_path / "other")
    migrated.refuse(tmp_path / "nowhere")


def test_a_disk_that_cannot_be_looked_at_is_refused(migrated: Migrated, tmp_path: Path) -> None:
    (tmp_path / "ring").symlink_to(tmp_path / "ring")

    with pytest.raises(TargetError, match="cannot be opened"):
        migrated.refuse(tmp_path / "ring")


@pytest.mark.parametrize("events", [(), GO_BACK])
def test_a_finished_migration_claims_nothing(events: tuple[Event, ...], migrated: Migrated) -> None:
    migrated.synced()
    for event in events:
        migrated.book.advance(event)
    with pytest.raises(UnsafeTarget, match="ROLLED_BACK" if events else "COPY"):
        migrated.refuse(migrated.disk)
    migrated.book.finished()

    migrated.refuse(migrated.disk)


def test_a_migration_at_work_keeps_nobody_waiting(migrated: Migrated) -> None:
    with migrated.journal.lock(migrated.id), pytest.raises(UnsafeTarget):
        migrated.synced().refuse(migrated.disk)


def test_no_journal_is_made(tmp_path: Path) -> None:
    refuse_claimed([str(tmp_path / "disk")], tmp_path / "state")

    assert not (tmp_path / "state").exists()


def test_a_morph_asks_before_it_writes(migrated: Migrated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_engine", lambda *_: pytest.fail("a morph began"))
    wishes = app.MorphWishes(Way.MICRO)
    found = app.look(app.disks_of([str(migrated.synced().disk)], "raw"), wishes)

    with pytest.raises(UnsafeTarget):
        app.morph(found, migrated.state, wishes, print)
    assert not (migrated.state / "morphs").exists()


class Fake:
    """An engine that takes no time."""

    def morph(self, disks: tuple[GuestDisk, ...]) -> MorphReport:
        change(disks[0], "write -P 9 4096 4096")
        return MorphReport(Way.MICRO)


def test_what_was_before_a_morph_is_not_put_over_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that was morphed by itself became a target later. As long as nothing was written to it, the undo is exact."""
    monkeypatch.setattr(app, "_engine", lambda *_: Fake())
    disk, state = tmp_path / "disk.raw", tmp_path / "state"
    disk.write_bytes(bytes(MiB))
    wishes = app.MorphWishes(Way.MICRO)

    def morphed() -> None:
        app.morph(app.look(app.disks_of([str(disk)], "raw"), wishes), state, wishes, print)

    morphed()
    with closing(Migrated(tmp_path).journal):
        assert app.unmorph([str(disk)], state, forget=False)[0] is Undone.EXACT
    (state / "journal.db").rename(tmp_path / "journal.db")
    morphed()
    (tmp_path / "journal.db").rename(state / "journal.db")
    change(GuestDisk(str(disk)), "write -P 7 0 1M")
    synced = disk.read_bytes()

    with pytest.raises(UnsafeTarget):
        app.unmorph([str(disk)], state, forget=False)
    assert disk.read_bytes() == synced
    assert app.unmorph([str(disk)], state, forget=True) == (Undone.NOTHING, (str(disk),))


@pytest.mark.slow
def test_the_command_says_so_before_it_looks(migrated: Migrated) -> None:
    argv = [sys.executable, "-m", "tokvm", "morph", str(migrated.synced().disk), "--way", "micro", "--dry-run", "--json"]
    environment = dict(os.environ) | {"TOKVM_STATE_DIR": str(migrated.state)}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=environment, check=False)

    assert done.returncode == UnsafeTarget.exit_code, done.stderr
    assert json.loads(done.stdout)["error"]["where"] == str(migrated.disk)
