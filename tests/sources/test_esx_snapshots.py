"""Snapshots: one for each mark whatever becomes of the reply; ours are found and removed and nobody else's; tasks end first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.sources.esx_double import DIR, KEY, LOST, OTHER, VM, FakeEsx, Words, connect, fault

from tokvm.core.errors import ConnectionLost, SourceError, UsageError
from tokvm.core.machine import Snapshot, VirtualMachine
from tokvm.sources.vmware import snapshots
from tokvm.sources.vmware.faults import EsxError, Fault
from tokvm.sources.vmware.source import EsxSource

MARK = "tokvm-ab12-"
BUSY = fault("TaskInProgress", "The operation is not allowed while another task is in progress.", title="Create Snapshot:")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeEsx:
    for name, value in (("POLL_S", 0.01), ("BUSY_S", 0.1), ("LANDING_S", 0.1), ("CREATE_S", 0.4), ("REMOVE_S", 0.4)):
        monkeypatch.setattr(snapshots, name, value)
    return FakeEsx(tmp_path)


@pytest.fixture
def source(host: FakeEsx) -> EsxSource:
    return connect(host)


@pytest.fixture
def vm(source: EsxSource) -> VirtualMachine:
    return source.inspect(VM)


def test_a_snapshot_says_what_it_froze(host: FakeEsx, source: EsxSource, vm: VirtualMachine) -> None:
    first = source.snapshot(vm, f"{MARK}1")
    assert first == Snapshot(f"{VM}/1", f"{MARK}1", {KEY: f"{DIR}/web.vmdk"})
    assert source.snapshot(vm, f"{MARK}2").disks == {KEY: f"{DIR}/web-000001.vmdk"}
    assert source.snapshot(vm, f"{MARK}1") == first
    assert host.sent("snapshot.create") == [
        ("vim-cmd", "vmsvc/snapshot.create", "12", f"{MARK}{number}", "tokvm", "0", "0") for number in (1, 2)
    ]


def test_a_lost_reply_leads_to_the_snapshot_that_was_made(host: FakeEsx, source: EsxSource, vm: VirtualMachine) -> None:
    host.after("snapshot.create", LOST)
    assert source.snapshot(vm, f"{MARK}1").key == f"{VM}/1"
    assert len(host.snapshots) == 1


def test_a_reply_lost_before_anything_was_done_is_the_callers_to_repeat(
    host: FakeEsx, source: EsxSource, vm: VirtualMachine
) -> None:
    host.script["snapshot.create"] = [LOST]
    with pytest.raises(ConnectionLost):
        source.snapshot(vm, f"{MARK}1")
    assert source.snapshot(vm, f"{MARK}1").key == f"{VM}/1"
    assert len(host.snapshots) == 1


def test_an_exit_code_is_not_believed(host: FakeEsx, source: EsxSource, vm: VirtualMachine) -> None:
    def made(words: Words) -> tuple[int, str, str]:
        return 1, host.do_snapshot_create(("vim-cmd", "", *words[1:])), ""

    host.script["snapshot.create"] = [made]
    assert source.snapshot(vm, f"{MARK}1").key == f"{VM}/1"


def test_a_snapshot_that_takes_its_time_is_waited_for(host: FakeEsx, source: EsxSource, vm: VirtualMachine) -> None:
    """The command ended, the task runs on, and lists the snapshot only at its end."""
    task = "haTask-12-vim.VirtualMachine.createSnapshot-182550283"

    def ordered(words: Words) -> str:
        host.tasks[task] = "running"
        host.script["task_info"] = [running, running, landed]
        return "Create Snapshot:\n"

    def running(words: Words) -> str:
        return f'(vim.TaskInfo) {{\n   key = "{task}", \n   state = "running"\n}}\n'

    def landed(words: Words) -> str:
        host.freeze(f"{MARK}1")
        host.tasks.clear()
        return running(words)

    host.script["snapshot.create"] = [ordered]
    assert source.snapshot(vm, f"{MARK}1").key == f"{VM}/1"
    assert len(host.sent("snapshot.create")) == 1


def test_a_refusal_is_explained(host: FakeEsx, source: EsxSource, vm: VirtualMachine) -> None:
    host.script["snapshot.create"] = [(0, fault("NoDiskSpace", "Insufficient disk space.", title="Create Snapshot:"), "")]
    with pytest.raises(EsxError, match="Insufficient disk space") as caught:
        source.snapshot(vm, f"{MARK}1")
    assert caught.value.fault is Fault.NO_ROOM


def test_a_busy_vm_is_asked_again_but_not_for_ever(host: FakeEsx, source: EsxSource, vm: VirtualMachine) -> None:
    host.script["snapshot.create"] = [BUSY, BUSY]
    assert source.snapshot(vm, f"{MARK}1").key == f"{VM}/1"
    host.script["snapshot.create"] = [BUSY] * 99
    with pytest.raises(EsxError, match="another task"):
        source.snapshot(vm, f"{MARK}2")


def test_a_question_is_told_before_anything_is_ordered(host: FakeEsx, source: EsxSource, vm: VirtualMachine) -> None:
    host.question = "There is no more space for virtual disk web.vmdk."
    with pytest.raises(SourceError, match="no more space"):
        source.snapshot(vm, f"{MARK}1")
    assert host.sent("snapshot.create") == []


def test_a_snapshot_without_one_of_the_disks_is_refused(host: FakeEsx, source: EsxSource, vm: VirtualMachine) -> None:
    host.freeze(f"{MARK}1")
    host.snapshots[0][2].clear()
    with pytest.raises(SourceError, match=r"does not hold the VM's disks: scsi0:0"):
        source.snapshot(vm, f"{MARK}1")


def test_a_snapshot_on_a_branch_that_was_left_is_refused(host: FakeEsx, source: EsxSource, vm: VirtualMachine) -> None:
    host.freeze(f"{MARK}1")
    host.freeze(f"{MARK}2")
    host.chains["scsi0:0"] = ["web-000007.vmdk", "web.vmdk"]  # reverted to the first one
    with pytest.raises(SourceError, match="not below the file"):
        source.snapshot(vm, f"{MARK}2")
    assert [one.disks for one in source.snapshots(VM, MARK)] == [{KEY: f"{DIR}/web.vmdk"}, {}]


def test_two_snapshots_with_one_mark_are_one(host: FakeEsx, source: EsxSource, vm: VirtualMachine) -> None:
    host.freeze(f"{MARK}1")
    host.freeze(f"{MARK}1")
    assert source.snapshot(vm, f"{MARK}1").key == f"{VM}/1"


def test_only_marks_are_asked_for(source: EsxSource, vm: VirtualMachine) -> None:
    for mark in ("nightly", "tokvm-", "tokvm-x y", "tokvm-$(reboot)", ""):
        with pytest.raises(UsageError):
            source.snapshot(vm, mark)


def test_ours_come_in_the_order_of_their_numbers_also_past_nine(host: FakeEsx, source: EsxSource, vm: VirtualMachine) -> None:
    for number in (1, 2, 10, 9, 11):
        host.freeze(f"{MARK}{number}")
    host.freeze("nightly")
    host.freeze("tokvm-ab123-1")
    assert [one.mark for one in source.snapshots(VM, MARK)] == [f"{MARK}{number}" for number in (1, 2, 9, 10, 11)]


def test_a_name_that_imitates_ours_in_the_tree_is_not_ours(host: FakeEsx, source: EsxSource, vm: VirtualMachine) -> None:
    host.freeze(f"x\n--Snapshot Name        : {MARK}1\n--Snapshot Id        : 1\n")
    assert source.snapshots(VM, MARK) == []
    with pytest.raises(SourceError, match="is not ours"):
        source.remove_snapshot(VM, Snapshot(f"{VM}/1", f"{MARK}1", {}))
    assert len(host.snapshots) == 1


@pytest.mark.parametrize("which", [0, 1, 2])
def test_removing_one_leaves_the_others_readable(host: FakeEsx, source: EsxSource, vm: VirtualMachine, which: int) -> None:
    made = [source.snapshot(vm, f"{MARK}{number}") for number in (1, 2, 3)]
    source.remove_snapshot(VM, made[which])
    source.remove_snapshot(VM, made[which])  # already gone
    left = source.snapshots(VM, MARK)
    assert [one.key for one in left] == [one.key for one in made if one is not made[which]]
    assert all(one.disks.keys() == {KEY} for one in left)
    assert len(host.sent("snapshot.remove")) == 1


def test_what_is_not_ours_stays(host: FakeEsx, source: EsxSource, vm: VirtualMachine) -> None:
    host.freeze("nightly")
    for snapshot in (
        Snapshot(f"{VM}/1", "nightly", {}),
        Snapshot(f"{VM}/1", f"{MARK}1", {}),
        Snapshot(f"{OTHER}/1", f"{MARK}1", {}),
        Snapshot("whatever", f"{MARK}1", {}),
    ):
        with pytest.raises(SourceError):
            source.remove_snapshot(VM, snapshot)
    assert host.sent("snapshot.remove") == []


def test_a_lost_reply_to_a_removal_is_bridged(host: FakeEsx, source: EsxSource, vm: VirtualMachine) -> None:
    made = source.snapshot(vm, f"{MARK}1")
    host.after("snapshot.remove", LOST)
    source.remove_snapshot(VM, made)
    assert host.snapshots == []
    again = source.snapshot(vm, f"{MARK}2")
    host.script["snapshot.remove"] = [LOST]
    source.remove_snapshot(VM, again)
    assert host.snapshots == []


def test_a_consolidation_is_waited_for(host: FakeEsx, source: EsxSource, vm: VirtualMachine) -> None:
    made = source.snapshot(vm, f"{MARK}1")
    task = "haTask-12-vim.vm.Snapshot.remove-182550274"

    def ordered(words: Words) -> str:
        host.tasks[task] = "running"
        return host.do_snapshot_remove(("", "", *words[1:]))

    host.script["snapshot.remove"] = [ordered]
    source.remove_snapshot(VM, made)
    assert host.tasks == {task: "success"}
    assert [words[2] for words in host.sent("task_info")].count(task) == 2


def test_a_removal_that_never_ends_is_not_waited_for_for_ever(
    host: FakeEsx, source: EsxSource, vm: VirtualMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = source.snapshot(vm, f"{MARK}1")
    host.tasks["haTask-12-vim.VirtualMachine.consolidateDisks-1"] = "running"
    always: Callable[[Words], str] = lambda _: '(vim.TaskInfo) {\n   state = "running"\n}\n'  # noqa: E731
    monkeypatch.setattr(host, "do_task_info", always)
    with pytest.raises(SourceError, match="not over yet"):
        source.remove_snapshot(VM, made)


def test_a_need_for_consolidation_is_reported(
    host: FakeEsx, source: EsxSource, vm: VirtualMachine, caplog: pytest.LogCaptureFixture
) -> None:
    made = source.snapshot(vm, f"{MARK}1")
    host.consolidation_needed = True
    source.remove_snapshot(VM, made)
    assert "need consolidation" in caplog.text


def test_a_refused_removal_is_explained(host: FakeEsx, source: EsxSource, vm: VirtualMachine) -> None:
    made = source.snapshot(vm, f"{MARK}1")
    host.script["snapshot.remove"] = [fault("FileLocked", "Unable to access file since it is locked", title="Remove Snapshot:")]
    with pytest.raises(EsxError, match="locked"):
        source.remove_snapshot(VM, made)


def test_a_list_of_snapshots_that_cannot_be_read_is_not_taken_for_none(
    host: FakeEsx, source: EsxSource, vm: VirtualMachine
) -> None:
    """Else a second snapshot would be made with the same mark."""
    source.snapshot(vm, f"{MARK}1")
    real = host.do_cat
    host.do_cat = lambda words: (1, "", "cat: read error\n") if words[1].endswith(".vmsd") else real(words)  # type: ignore[method-assign]
    with pytest.raises(SourceError, match=r"web\.vmsd"):
        source.snapshot(vm, f"{MARK}1")
    assert len(host.snapshots) == 1


def test_a_removal_that_does_nothing_is_told(host: FakeEsx, source: EsxSource, vm: VirtualMachine) -> None:
    made = source.snapshot(vm, f"{MARK}1")
    host.script["snapshot.remove"] = ["Remove Snapshot:\n"] * 99
    with pytest.raises(SourceError, match="still there"):
        source.remove_snapshot(VM, made)


def test_what_only_the_file_names_is_no_snapshot(host: FakeEsx, source: EsxSource, vm: VirtualMachine) -> None:
    """A .vmsd that is older than what the host knows, or younger."""
    host.freeze(f"{MARK}1")
    host.script["snapshot.get"] = ["Get Snapshot:\n"]
    assert source.snapshots(VM, MARK) == []
    assert [one.mark for one in source.snapshots(VM, MARK)] == [f"{MARK}1"]
