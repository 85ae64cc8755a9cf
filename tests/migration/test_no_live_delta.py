"""A source that gives no delta of a VM that runs: sync makes the base and says so, the cutover brings the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tokvm.core.machine import PowerState, Snapshot, VirtualMachine
from tokvm.migration.records import SnapshotState
from tokvm.migration.reports import StopCause
from tokvm.sources.base import NoLiveDelta
from tokvm.testing.fakes import Death, FakeSource


@pytest.fixture
def base_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `vpx://` is where nothing but an export lease works while the VM runs."""
    take = FakeSource.snapshot

    def snapshot(self: FakeSource, vm: VirtualMachine, mark: str) -> Snapshot:
        if self.world.power() is PowerState.RUNNING and any(one != mark for one in self.world.snapshots):
            raise NoLiveDelta("its frozen files are locked")
        return take(self, vm, mark)

    monkeypatch.setattr(FakeSource, "snapshot", snapshot)


@pytest.mark.usefixtures("base_only")
def test_sync_ends_with_the_base_and_a_second_one_makes_no_pass(rig: Any) -> None:
    rig.begin()
    first = rig.migration().sync(passes=None)
    assert [(one.kind, one.done) for one in first.passes] == [("base", True)]
    assert first.stopped_by is StopCause.WAITS
    second = rig.migration().sync(passes=3)
    assert second.stopped_by is StopCause.WAITS
    assert len(rig.world.snapshots) == 1
    assert {one.state for one in rig.book.snapshots()} == {SnapshotState.MADE, SnapshotState.REMOVED}
    assert any("wait for the stop" in event.note for event in rig.book.events())


@pytest.mark.usefixtures("base_only")
def test_the_cutover_copies_all_that_changed_since_the_base(rig: Any) -> None:
    rig.begin()
    rig.migration().sync(passes=None)
    rig.world.guests_write()
    report = rig.migration().cutover()
    assert report.outcome == "committed"
    assert [(one.kind, one.done) for one in report.passes] == [("base", True), ("final", True)]
    assert rig.world.violations == []


@pytest.mark.usefixtures("base_only")
@pytest.mark.parametrize("after", [False, True])
def test_a_death_around_the_refusal_is_no_obstacle(make_rig: Callable[..., Any], *, after: bool) -> None:
    for die_at in range(40):
        rig = make_rig()
        rig.begin()
        rig.migration().sync(passes=1)
        try:
            rig.migration(die_at=die_at, after=after).sync(passes=2)
        except Death:
            assert rig.migration().cutover().outcome == "committed"
            assert rig.world.violations == []
        else:
            assert die_at >= 3
            return
    raise AssertionError("it never came to an end")


@pytest.mark.usefixtures("base_only")
def test_a_base_that_has_to_be_copied_anew_is_not_kept_from_it_by_our_older_snapshots(rig: Any) -> None:
    """The final delta's snapshot was removed by somebody when a part of it was copied, say."""
    rig.begin()
    rig.migration().sync(passes=None)
    (old,) = rig.world.snapshots
    rig.book.void_passes()
    again = rig.migration().sync(passes=None)
    assert [(one.kind, one.done) for one in again.passes] == [("base", True)]
    assert again.stopped_by is StopCause.WAITS
    assert len(rig.world.snapshots) == 1
    assert old not in rig.world.snapshots
    rig.world.guests_write()
    assert rig.migration().cutover().outcome == "committed"
    assert rig.world.violations == []


def test_no_way_at_all_to_the_base_is_an_error(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_disk(*_: object) -> object:
        raise NoLiveDelta("nothing can be read")

    monkeypatch.setattr(FakeSource, "open_disk", open_disk)
    rig.begin()
    with pytest.raises(NoLiveDelta):
        rig.migration().sync(passes=None)
