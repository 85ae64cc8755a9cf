"""Checkpoints: ours are found and removed and nobody else's; how they are made is put back; a merge is waited for."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
from tests.sources.hyperv_double import FOLDER, IN_USE, KEY, LOST, VM, FakeShell, connect, failure, guid

from tokvm.core.errors import ConnectionLost, SourceError, UsageError
from tokvm.core.machine import Snapshot, VirtualMachine
from tokvm.sources.hyperv import snapshots
from tokvm.sources.hyperv.powershell import Value
from tokvm.sources.hyperv.source import HyperVSource

MARK = "tokvm-ab12-"


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> FakeShell:
    for name, value in (("POLL_S", 0.01), ("BEGIN_S", 0.05), ("BUSY_S", 0.1), ("MERGE_S", 0.3), ("REMOVE_S", 0.2)):
        monkeypatch.setattr(snapshots, name, value)
    return FakeShell()


@pytest.fixture
def source(shell: FakeShell) -> HyperVSource:
    return connect(shell)


@pytest.fixture
def vm(source: HyperVSource, shell: FakeShell) -> VirtualMachine:
    found = source.inspect(VM)
    shell.log.clear()
    return found


def test_a_snapshot_is_one_question_and_says_what_froze(shell: FakeShell, source: HyperVSource, vm: VirtualMachine) -> None:
    made = source.snapshot(vm, f"{MARK}1")
    assert made == Snapshot(f"{VM}/{guid(1)}", f"{MARK}1", {KEY: f"{FOLDER}\\d.vhdx"})
    assert [script for script, _ in shell.log] == ["checkpoint"]
    assert source.snapshot(vm, f"{MARK}1") == made
    assert len(shell.vm.checks) == 1
    assert source.snapshots(VM, MARK) == [made]


def test_only_ours_are_listed_by_the_number_of_their_mark(shell: FakeShell, source: HyperVSource, vm: VirtualMachine) -> None:
    shell.vm.freeze("nightly")
    shell.vm.freeze("tokvm-ab123-1")
    made = [source.snapshot(vm, f"{MARK}{number}") for number in (10, 9)]
    assert source.snapshots(VM, MARK) == [made[1], made[0]]


@pytest.mark.parametrize("mark", ["", "nightly", "tokvm-", "tokvm-a b", "tokvm-a\n"])
def test_a_mark_that_is_none(source: HyperVSource, vm: VirtualMachine, mark: str) -> None:
    with pytest.raises(UsageError):
        source.snapshot(vm, mark)


def test_how_checkpoints_are_made_is_changed_for_the_job_and_put_back(
    shell: FakeShell, source: HyperVSource, vm: VirtualMachine
) -> None:
    before = {"checkpointType": "Standard", "automaticCheckpoints": True}
    shell.vm.switches |= before
    made = [source.snapshot(vm, f"{MARK}{number}") for number in (1, 2)]
    assert (shell.vm.switches["checkpointType"], shell.vm.switches["automaticCheckpoints"]) == ("Production", False)
    assert json.loads(shell.vm.line or "")["settings"] == {"checkpoint_type": "Standard", "automatic_checkpoints": True}
    source.remove_snapshot(VM, made[0])
    assert shell.vm.switches["checkpointType"] == "Production"
    source.remove_snapshot(VM, made[1])
    assert shell.vm.switches | before == shell.vm.switches
    assert shell.vm.line is None


def test_an_automatic_checkpoint_is_switched_off_although_the_type_suits(
    shell: FakeShell, source: HyperVSource, vm: VirtualMachine
) -> None:
    shell.vm.switches |= {"checkpointType": "ProductionOnly", "automaticCheckpoints": True}
    source.snapshot(vm, f"{MARK}1")
    assert (shell.vm.switches["checkpointType"], shell.vm.switches["automaticCheckpoints"]) == ("ProductionOnly", False)


def test_the_first_settings_saved_are_the_ones_put_back(shell: FakeShell, source: HyperVSource, vm: VirtualMachine) -> None:
    shell.vm.switches["checkpointType"] = "Standard"
    shell.script["settings"] = [LOST]
    with pytest.raises(ConnectionLost):
        source.snapshot(vm, f"{MARK}1")
    shell.vm.switches["automaticCheckpoints"] = True  # by a person, in between
    source.snapshot(vm, f"{MARK}1")
    assert json.loads(shell.vm.line or "")["settings"] == {"checkpoint_type": "Standard", "automatic_checkpoints": False}


def test_release_puts_back_what_no_checkpoint_needs(shell: FakeShell, source: HyperVSource, vm: VirtualMachine) -> None:
    shell.vm.switches["checkpointType"] = "Standard"
    source.claim(VM, "me")
    made = source.snapshot(vm, f"{MARK}1")
    connect(shell).release(VM, "somebody")
    source.release(VM, "me")
    assert shell.vm.switches["checkpointType"] == "Production"  # a checkpoint is left
    source.remove_snapshot(VM, made)
    assert (shell.vm.switches["checkpointType"], shell.vm.line) == ("Standard", None)


def test_an_off_vm_is_frozen_as_it_is(shell: FakeShell, source: HyperVSource, vm: VirtualMachine) -> None:
    shell.vm.state, shell.vm.switches["checkpointType"] = 3, "Standard"
    source.snapshot(vm, f"{MARK}final-2")
    assert [script for script, _ in shell.log] == ["checkpoint"]


def test_switched_off_checkpoints_are_a_persons(shell: FakeShell, source: HyperVSource, vm: VirtualMachine) -> None:
    shell.vm.switches["checkpointType"] = "Disabled"
    with pytest.raises(SourceError, match="switched off") as caught:
        source.snapshot(vm, f"{MARK}1")
    assert "Set-VM -CheckpointType Production" in caught.value.fix
    assert shell.vm.checks == []


def test_a_vm_that_is_busy_is_asked_again_and_then_given_up(shell: FakeShell, source: HyperVSource, vm: VirtualMachine) -> None:
    shell.script["checkpoint"] = [failure("InvalidState,x"), failure("ObjectInUse,x")]
    source.snapshot(vm, f"{MARK}1")
    assert len(shell.vm.checks) == 1
    shell.script["checkpoint"] = [failure("InvalidState,x")] * 1000
    with pytest.raises(SourceError, match="state"):
        source.snapshot(vm, f"{MARK}2")


def test_two_of_one_name_are_one_for_everybody(shell: FakeShell, source: HyperVSource, vm: VirtualMachine) -> None:
    shell.vm.freeze(f"{MARK}1")
    shell.vm.freeze(f"{MARK}1")
    assert source.snapshot(vm, f"{MARK}1").key == f"{VM}/{guid(1)}"


def test_a_checkpoint_of_other_disks_is_refused(shell: FakeShell, source: HyperVSource, vm: VirtualMachine) -> None:
    made = shell.vm.freeze(f"{MARK}1")
    more: Value = {"controller": "SCSI", "number": 0, "location": 1, "path": "C:\\other.vhdx"}
    cast("list[Any]", made["disks"]).append(more)
    with pytest.raises(SourceError, match="SCSI 0:1"):
        source.snapshot(vm, f"{MARK}1")


def test_a_frozen_file_that_the_vm_left_behind_is_listed_without_it(
    shell: FakeShell, source: HyperVSource, vm: VirtualMachine
) -> None:
    """Somebody applied an older checkpoint: what ours froze is in no chain any more."""
    source.snapshot(vm, f"{MARK}1")
    shell.vm.chain = ["C:\\elsewhere.vhdx"]
    assert [one.disks for one in source.snapshots(VM, MARK)] == [{}]


def test_a_removal_waits_for_the_merge(shell: FakeShell, source: HyperVSource, vm: VirtualMachine) -> None:
    made = source.snapshot(vm, f"{MARK}1")
    shell.vm.merging = True
    asked = 0

    def looked(data: Value) -> Value:
        nonlocal asked
        asked += 1
        if asked == 6:
            shell.vm.operational = [2]
            shell.vm.merge(f"{FOLDER}\\d.vhdx")
        return shell.vm.layers(data)

    shell.script["layers"] = [looked] * 100
    shell.script["layers"][3] = failure(hresult=-2147024894)  # the file is gone this very moment
    source.remove_snapshot(VM, made)
    assert asked >= 6
    assert shell.vm.chain == [f"{FOLDER}\\d.vhdx"]
    shell.script.clear()
    source.remove_snapshot(VM, made)  # already gone


def test_a_merge_that_has_not_begun_is_waited_for_too(shell: FakeShell, source: HyperVSource, vm: VirtualMachine) -> None:
    made = source.snapshot(vm, f"{MARK}1")
    shell.vm.merging = True
    shell.vm.operational = [2]
    shell.script["remove-checkpoint"] = [lambda data: _quietly(shell, data)]
    with pytest.raises(SourceError, match="not over yet") as caught:
        source.remove_snapshot(VM, made)
    assert "d_1.avhdx" in str(caught.value)
    source.remove_snapshot(VM, made)  # it is gone; what waits for a merge is told, not waited for


def _quietly(shell: FakeShell, data: Value) -> Value:
    answer = shell.vm.remove_checkpoint(data)
    shell.vm.operational = [2]
    return answer


def test_what_waited_for_a_merge_before_does_not_hold_us_up(shell: FakeShell, source: HyperVSource, vm: VirtualMachine) -> None:
    """A backup's leftover below, whose merge failed."""
    shell.vm.freeze("backup")
    shell.vm.checks.clear()
    made = source.snapshot(vm, f"{MARK}1")
    source.remove_snapshot(VM, made)
    assert shell.vm.chain == [f"{FOLDER}\\d.vhdx", f"{FOLDER}\\d_1.avhdx"]


def test_files_held_by_a_broken_connection_are_let_go(shell: FakeShell, source: HyperVSource, vm: VirtualMachine) -> None:
    made = source.snapshot(vm, f"{MARK}1")
    shell.script["remove-checkpoint"] = [IN_USE]
    shell.script["leftovers"] = [{"processes": [{"pid": 4711, "ended": True}]}]
    source.remove_snapshot(VM, made)
    assert shell.sent("leftovers") == [{"end": True}]
    assert shell.vm.checks == []


def test_a_lost_answer_to_a_removal_is_bridged(shell: FakeShell, source: HyperVSource, vm: VirtualMachine) -> None:
    made = source.snapshot(vm, f"{MARK}1")

    def lose(data: Value) -> Value:
        shell.vm.remove_checkpoint(data)
        raise LOST

    shell.script["remove-checkpoint"] = [lose]
    source.remove_snapshot(VM, made)
    assert shell.vm.checks == []


@pytest.mark.parametrize(
    "wrong",
    [
        Snapshot(f"{VM}/{guid(1)}", "nightly", {}),
        Snapshot(f"{VM}/{guid(1)}", f"{MARK}7", {}),
        Snapshot(f"{guid(8)}/{guid(1)}", f"{MARK}1", {}),
        Snapshot(f"{VM}/*", f"{MARK}1", {}),
        Snapshot(guid(1), f"{MARK}1", {}),
    ],
)
def test_what_is_not_ours_stays(shell: FakeShell, source: HyperVSource, vm: VirtualMachine, wrong: Snapshot) -> None:
    source.snapshot(vm, f"{MARK}1")
    with pytest.raises(SourceError):
        source.remove_snapshot(VM, wrong)
    assert len(shell.vm.checks) == 1


def test_one_that_a_person_renamed_stays(shell: FakeShell, source: HyperVSource, vm: VirtualMachine) -> None:
    made = source.snapshot(vm, f"{MARK}1")
    shell.vm.checks[0]["name"] = "keep this"
    with pytest.raises(SourceError, match="keep this"):
        source.remove_snapshot(VM, made)
    assert len(shell.vm.checks) == 1
