"""Freezing, finding and removing: ours alone, whatever happens to the answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.sources.conftest import (
    DISK,
    FROZEN,
    LOST,
    OTHER_DISK,
    SNAPSHOT,
    UUID_INVALID,
    VDI_IN_USE,
    VM,
    ScriptedHost,
    Words,
    add_disk,
    add_snapshot,
    refusal,
)

from tokvm.core.errors import ConnectionLost, SourceError, UsageError
from tokvm.core.machine import Disk, Snapshot
from tokvm.sources.xenserver import disks, snapshots
from tokvm.sources.xenserver.disks import export_command
from tokvm.sources.xenserver.source import XenServerSource
from tokvm.sources.xenserver.xe import Xe

MARK = "tokvm-ab12cd34-1"
MAKE = ("vm-snapshot", f"uuid={VM}", f"new-name-label={MARK}")
LISTED = ("snapshot-list", f"snapshot-of={VM}")
OURS = Snapshot(SNAPSHOT, MARK, {DISK: FROZEN})


def make(host: ScriptedHost) -> Callable[[Words], str]:
    def work(_: Words) -> str:
        add_snapshot(host, MARK)
        return SNAPSHOT

    return work


def make_and_lose(host: ScriptedHost) -> Callable[[Words], str]:
    def work(_: Words) -> str:
        add_snapshot(host, MARK)
        raise LOST

    return work


def uninstalling(host: ScriptedHost, *, disks_too: bool = True) -> Callable[[Words], str]:
    def work(words: Words) -> str:
        uuid = words[1].removeprefix("uuid=")
        host.tables[LISTED] = [row for row in host.tables[LISTED] if row["uuid"] != uuid]
        if not disks_too:
            raise refusal(VDI_IN_USE)
        host.values.pop((FROZEN, "snapshot-of"), None)
        return "All objects destroyed"

    return work


def test_a_snapshot_maps_each_disk_to_its_frozen_image(host: ScriptedHost, source: XenServerSource) -> None:
    host.script[MAKE] = [make(host)]
    assert source.snapshot(source.inspect(VM), MARK) == OURS


def test_the_same_mark_gives_the_same_snapshot(host: ScriptedHost, source: XenServerSource) -> None:
    add_snapshot(host, MARK)
    assert source.snapshot(source.inspect(VM), MARK) == OURS
    assert host.sent("vm-snapshot") == []


def test_a_lost_answer_is_looked_up_not_repeated(host: ScriptedHost, source: XenServerSource) -> None:
    host.script[MAKE] = [make_and_lose(host)]
    assert source.snapshot(source.inspect(VM), MARK) == OURS
    assert len(host.sent("vm-snapshot")) == 1


def test_a_snapshot_that_is_still_being_made_is_waited_for(host: ScriptedHost, source: XenServerSource) -> None:
    vm = source.inspect(VM)
    current = ("vm-param-get", f"uuid={VM}", "param-name=current-operations")
    host.script[MAKE] = [LOST]

    def landed(_: Words) -> str:
        add_snapshot(host, MARK)
        return ""

    host.script[current] = ["OpaqueRef:1: snapshot", "snapshot", landed]
    assert source.snapshot(vm, MARK) == OURS


def test_a_request_that_never_arrived_is_a_lost_connection(host: ScriptedHost, source: XenServerSource) -> None:
    vm = source.inspect(VM)
    host.script[MAKE] = [LOST]
    with pytest.raises(ConnectionLost):
        source.snapshot(vm, MARK)


@pytest.mark.parametrize("answer", ["", "garbage", "/bin/sh", SNAPSHOT + "x"])
def test_an_answer_that_is_no_uuid_is_not_believed(host: ScriptedHost, source: XenServerSource, answer: str) -> None:
    vm = source.inspect(VM)
    host.script[MAKE] = [answer]
    with pytest.raises(SourceError, match="is not a uuid"):
        source.snapshot(vm, MARK)


def test_another_operation_in_the_way_is_waited_out(host: ScriptedHost, source: XenServerSource) -> None:
    host.script[MAKE] = [refusal("Another operation involving the object is currently in progress"), make(host)]
    assert source.snapshot(source.inspect(VM), MARK) == OURS


@pytest.mark.parametrize("mark", ["", "nightly", "tokvm-", "tokvm-a b", "tokvm-a\n", "-tokvm-a", "tokvm-$(id)"])
@pytest.mark.slow
def test_a_mark_that_is_not_ours_is_refused(source: XenServerSource, mark: str) -> None:
    with pytest.raises(UsageError, match="mark"):
        source.snapshot(source.inspect(VM), mark)


def test_a_snapshot_of_other_disks_is_refused(host: ScriptedHost, source: XenServerSource) -> None:
    vm = source.inspect(VM)
    add_snapshot(host, MARK, disk=OTHER_DISK)
    with pytest.raises(SourceError, match="does not hold the VM's disks"):
        source.snapshot(vm, MARK)


def test_a_disk_in_another_position_is_refused(host: ScriptedHost, source: XenServerSource) -> None:
    vm = source.inspect(VM)
    add_snapshot(host, MARK)
    host.tables["vbd-list", f"vm-uuid={SNAPSHOT}", "type=Disk"][0]["userdevice"] = "1"
    with pytest.raises(SourceError, match="position 1"):
        source.snapshot(vm, MARK)


def test_two_images_of_one_disk_are_refused(host: ScriptedHost, source: XenServerSource) -> None:
    vm = source.inspect(VM)
    add_snapshot(host, MARK)
    add_disk(host, vm=SNAPSHOT, vdi=OTHER_DISK, userdevice="1")
    host.values[OTHER_DISK, "snapshot-of"] = DISK
    with pytest.raises(SourceError, match="two disks"):
        source.snapshot(vm, MARK)


def test_ours_are_listed_by_their_number_and_nobody_elses(host: ScriptedHost, source: XenServerSource) -> None:
    marks = [
        "tokvm-ab12cd34-10",
        "tokvm-ab12cd34-9",
        "tokvm-ab12cd34-final-11",
        "tokvm-ab12cd345-1",
        "nightly",
        "tokvm-ab12cd34 x",
    ]
    for number, mark in enumerate(marks):
        add_snapshot(host, mark, uuid=f"{SNAPSHOT[:-2]}{number:02d}", frozen=f"{FROZEN[:-2]}{number:02d}")
    found = [snapshot.mark for snapshot in source.snapshots(VM, "tokvm-ab12cd34-")]
    assert found == ["tokvm-ab12cd34-9", "tokvm-ab12cd34-10", "tokvm-ab12cd34-final-11"]


def test_removal(host: ScriptedHost, source: XenServerSource) -> None:
    add_snapshot(host, MARK)
    host.actions["snapshot-uninstall"] = uninstalling(host)
    source.remove_snapshot(VM, OURS)
    assert host.sent("snapshot-uninstall") == [("snapshot-uninstall", f"uuid={SNAPSHOT}", "force=true")]
    assert host.sent("vdi-destroy") == []
    source.remove_snapshot(VM, OURS)  # already gone
    assert len(host.sent("snapshot-uninstall")) == 1


@pytest.mark.parametrize("label", ["nightly", "tokvm-ab12cd34-2", ""])
def test_a_snapshot_that_bears_another_name_now_stays(host: ScriptedHost, source: XenServerSource, label: str) -> None:
    add_snapshot(host, label)
    with pytest.raises(SourceError, match="not ours"):
        source.remove_snapshot(VM, OURS)
    assert host.sent("snapshot-uninstall") == []


@pytest.mark.parametrize("snapshot", [Snapshot(SNAPSHOT, "nightly", {}), Snapshot("x", MARK, {})])
def test_what_is_not_ours_by_its_own_words_is_not_even_looked_at(
    host: ScriptedHost, source: XenServerSource, snapshot: Snapshot
) -> None:
    with pytest.raises(SourceError, match="not ours"):
        source.remove_snapshot(VM, snapshot)
    assert host.log == []


def test_removal_waits_while_in_use_and_looks_at_the_name_each_time(host: ScriptedHost, source: XenServerSource) -> None:
    add_snapshot(host, MARK)
    uninstall = ("snapshot-uninstall", f"uuid={SNAPSHOT}", "force=true")
    host.script[uninstall] = [refusal(VDI_IN_USE), LOST, uninstalling(host)]
    source.remove_snapshot(VM, OURS)
    assert len(host.sent("snapshot-uninstall")) == 3
    assert len([words for words in host.log if words[0] == "snapshot-list" and "params=name-label" in words]) == 3


def test_a_disk_in_use_until_the_deadline_says_where_to_look(host: ScriptedHost) -> None:
    add_snapshot(host, MARK)
    host.script["snapshot-uninstall", f"uuid={SNAPSHOT}", "force=true"] = [refusal(VDI_IN_USE)] * 1000
    xe = Xe(host)
    with pytest.raises(SourceError, match="in use") as caught:
        snapshots.remove(xe, VM, OURS, deadline_s=0.1)
    assert "control domain" in caught.value.fix


def test_a_disk_that_outlives_its_snapshot_is_destroyed(host: ScriptedHost, source: XenServerSource) -> None:
    """xapi destroys the VM record first; a disk still in use stays behind."""
    add_snapshot(host, MARK)
    host.actions["snapshot-uninstall"] = uninstalling(host, disks_too=False)
    host.script["vdi-destroy", f"uuid={FROZEN}"] = [refusal(VDI_IN_USE), ""]
    source.remove_snapshot(VM, OURS)
    assert host.sent("vdi-destroy") == [("vdi-destroy", f"uuid={FROZEN}")] * 2


@pytest.mark.parametrize("origin", ["<not in database>", OTHER_DISK])
def test_a_disk_that_is_not_the_frozen_image_we_know_is_never_destroyed(
    host: ScriptedHost, source: XenServerSource, origin: str
) -> None:
    host.values[FROZEN, "snapshot-of"] = origin
    source.remove_snapshot(VM, OURS)
    assert host.sent("vdi-destroy") == []


def test_a_snapshot_that_vanishes_under_our_hands_is_success(host: ScriptedHost, source: XenServerSource) -> None:
    add_snapshot(host, MARK)
    host.values.pop((FROZEN, "snapshot-of"))
    host.script["snapshot-uninstall", f"uuid={SNAPSHOT}", "force=true"] = [refusal(UUID_INVALID)]
    source.remove_snapshot(VM, OURS)
    assert len(host.sent("snapshot-uninstall")) == 1


def test_export_lines() -> None:
    assert export_command(DISK, None, 0) == f"xe vdi-export uuid={DISK} format=vhd filename="
    assert (
        export_command(DISK, FROZEN, 4096)
        == f"set -o pipefail; xe vdi-export uuid={DISK} format=vhd base={FROZEN} filename= | tail -c +4097"
    )


def test_a_disk_without_frozen_image_is_refused_before_anything_is_sent(host: ScriptedHost, source: XenServerSource) -> None:
    disk = source.inspect(VM).disks[0]
    with pytest.raises(SourceError, match="holds no frozen image"):
        source.open_disk(disk, Snapshot(SNAPSHOT, MARK, {}), None)
    with pytest.raises(SourceError, match="holds no frozen image"):
        source.open_disk(disk, OURS, Snapshot(SNAPSHOT, MARK, {DISK: "$(id)"}))


class _Nothing:
    """A stream that ends at once."""

    def read_into(self, buffer: memoryview) -> int:
        return 0

    def finish(self) -> None: ...

    def close(self) -> None: ...


def test_the_frozen_image_says_how_large_it_is_and_skipping_has_its_time(
    host: ScriptedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VM's disk grew after the snapshot; and a host that reads past 6 GB sends nothing for long."""
    expected: dict[str, object] = {}
    patience: dict[str, float] = {}

    def stream(open_at: Callable[[int], object], **options: object) -> None:
        expected.update(options)
        open_at(0)
        open_at(6_000_000_000)

    def sent(command: str, *, first_byte_s: float = 0.0) -> _Nothing:
        patience[command] = first_byte_s
        return _Nothing()

    monkeypatch.setattr(disks, "VhdStream", stream)
    monkeypatch.setattr(host, "stream", sent)
    host.values[FROZEN, "virtual-size"] = "8192"
    disks.open_disk(host, Disk(0, DISK, 16384), OURS, None)
    assert expected["expect_size"] == 8192
    assert list(patience.values()) == [0.0, 300.0]
    host.values[FROZEN, "virtual-size"] = "-1"
    with pytest.raises(SourceError, match="does not understand"):
        disks.open_disk(host, Disk(0, DISK, 16384), OURS, None)
