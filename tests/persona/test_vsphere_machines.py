"""What the played vSphere does to VMs, seen by SSH's side, too: snapshots, power, configuration, questions, fences."""

from __future__ import annotations

import time
from typing import Any

import pytest
from pyVmomi import vim, vmodl
from tests.persona.conftest import BuildVSphere, MiB
from tests.persona.vsphere_client import connected, machine, read, result, snapshot, wait

from tokvm.testing.esxi.host import AutostartSpec, DiskSpec, MachineSpec

pytestmark = pytest.mark.slow

MARK = "tokvm-0123-1"


def _spec(**settings: Any) -> MachineSpec:
    return MachineSpec("web", disks=[DiskSpec(MiB)], **settings)


def test_a_snapshot_of_the_api_shows_in_vim_cmd_and_the_reverse(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    host = vsphere.host
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        first = snapshot(vm, MARK)
        vmid = host.vmid("web")
        assert f"Snapshot Name        : {MARK}" in host.ask("vim-cmd", "vmsvc/snapshot.get", vmid).stdout
        host.vim("vmsvc/snapshot.create", vmid, "tokvm-0123-2", "tokvm", 0, 0)
        tree = read(vm, "snapshot")["snapshot"]
        root = tree.rootSnapshotList[0]
        assert (root.snapshot, root.name, root.childSnapshotList[0].name) == (first, MARK, "tokvm-0123-2")
        assert tree.currentSnapshot == root.childSnapshotList[0].snapshot
        result(first.RemoveSnapshot_Task(removeChildren=False, consolidate=True))
        assert [one["name"] for one in host.snapshots("web")] == ["tokvm-0123-2"]
        with pytest.raises(vmodl.fault.ManagedObjectNotFound):
            first.RemoveSnapshot_Task(removeChildren=False)
    assert host.violations() == []
    assert vsphere.violations() == []


def _until(task: Any, state: str) -> None:
    until = time.monotonic() + 20
    while read(task, "info.state")["info.state"] != state:
        assert time.monotonic() < until


def test_a_task_is_queued_then_runs_then_is_over(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere(queued_s=600, running_s=600)
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        task = vm.CreateSnapshot_Task("a", "", memory=False, quiesce=False)
        assert read(task, "info.state", "info.startTime") == {"info.state": "queued"}
        for state in ("running", "success"):
            assert vm.snapshot is None
            vsphere.clock.move(600)
            _until(task, state)
        info = task.info
        assert info.entity == vm
        assert info.entityName == "web"
        assert info.queueTime < info.startTime < info.completeTime
        assert info.result == vm.snapshot.currentSnapshot
        assert task in read(instance.content.taskManager, "recentTask")["recentTask"]
        assert task in vm.recentTask


def test_nothing_else_is_begun_while_a_task_is_under_way(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere(running_s=600)
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        task = vm.CreateSnapshot_Task("a", "", memory=False, quiesce=False)
        with pytest.raises(vim.fault.TaskInProgress) as refused:
            vm.PowerOffVM_Task()
        assert refused.value.task == task
        _until(task, "running")
        vsphere.clock.move(601)
        wait(task)
        vsphere.set_options(running_s=0)
        result(vm.PowerOffVM_Task())


def test_a_slow_host_keeps_the_task_running_until_the_snapshot_is_there(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere(esxi={"create_s": 0.4})
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        began = time.monotonic()
        assert snapshot(vm) == vm.snapshot.currentSnapshot
        assert time.monotonic() - began >= 0.4


def test_quiescing_without_tools_fails_and_leaves_no_snapshot(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere(_spec(fields={"tools": "guestToolsNotRunning"}))
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        info = wait(vm.CreateSnapshotEx_Task("a", "", memory=False, quiesceSpec=vim.vm.GuestQuiesceSpec(timeout=5)))
        assert isinstance(info.error, vim.fault.ApplicationQuiesceFault)
        assert vm.snapshot is None
        result(vm.CreateSnapshotEx_Task("a", "", memory=False, quiesceSpec=None))


def test_consolidation_is_a_task_and_leaves_what_a_snapshot_names(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        snapshot(vm)
        vsphere.host.set_fields("web", consolidationNeeded=True)
        assert read(vm, "runtime.consolidationNeeded") == {"runtime.consolidationNeeded": True}
        result(vm.ConsolidateVMDisks_Task())
        assert read(vm, "runtime.consolidationNeeded") == {"runtime.consolidationNeeded": False}
        assert len(vsphere.host.chain("web")) == 2


# Power


def test_power_off_and_on_again(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        booted = vm.runtime.bootTime
        result(vm.PowerOffVM_Task())
        assert (vm.runtime.powerState, vm.runtime.bootTime) == ("poweredOff", None)
        info = wait(vm.PowerOffVM_Task())
        assert isinstance(info.error, vim.fault.InvalidPowerState)
        assert info.error.existingState == "poweredOff"
        result(vm.PowerOnVM_Task())
        assert vm.runtime.bootTime > booted
        assert "Powered on" in vsphere.host.ask("vim-cmd", "vmsvc/power.getstate", vsphere.host.vmid("web")).stdout


def test_a_guest_shuts_down_in_its_own_time(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere(_spec(shutdown_s=2.0))
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        vm.ShutdownGuest()
        assert vm.runtime.powerState == "poweredOn"
        until = time.monotonic() + 10
        while read(vm, "runtime.powerState")["runtime.powerState"] != "poweredOff":
            assert time.monotonic() < until
        with pytest.raises(vim.fault.InvalidPowerState):
            vm.ShutdownGuest()


def test_a_guest_without_tools_cannot_be_asked(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere(_spec(fields={"tools": "guestToolsNotRunning"}))
    with connected(vsphere) as instance, pytest.raises(vim.fault.ToolsUnavailable):
        machine(instance, vsphere).ShutdownGuest()


@pytest.mark.parametrize(("choice", "state"), [("1", "success"), ("0", "error")])
def test_a_question_holds_the_power_on_up_until_it_is_answered(build_vsphere: BuildVSphere, choice: str, state: str) -> None:
    vsphere = build_vsphere(_spec(running=False, asks="Did you move this virtual machine, or did you copy it?"))
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        task = vm.PowerOnVM_Task()
        until = time.monotonic() + 10
        while (question := vm.runtime.question) is None:
            assert time.monotonic() < until
        assert question.text.startswith("Did you move")
        assert [one.label for one in question.choice.choiceInfo][1] == "button.uuid.movedTheVM"
        assert task.info.state == "running"
        with pytest.raises(vmodl.fault.InvalidArgument):
            vm.AnswerVM("another", choice)
        vm.AnswerVM(question.id, choice)
        assert wait(task).state == state
        assert vsphere.host.is_running("web") is (choice == "1")


# Configuration


def test_a_change_over_somebody_elses_is_concurrent_access(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        version = vm.config.changeVersion
        mine = vim.option.OptionValue(key="tokvm.owner", value="me")
        result(vm.ReconfigVM_Task(vim.vm.ConfigSpec(changeVersion=version, extraConfig=[mine])))
        info = wait(vm.ReconfigVM_Task(vim.vm.ConfigSpec(changeVersion=version, annotation="late")))
        assert isinstance(info.error, vim.fault.ConcurrentAccess)
        assert {one.key: one.value for one in vm.config.extraConfig}["tokvm.owner"] == "me"
        result(vm.ReconfigVM_Task(vim.vm.ConfigSpec(extraConfig=[vim.option.OptionValue(key="tokvm.owner", value="")])))
        assert vsphere.extra_config("web") == {}


def test_an_annotation_is_the_same_by_ssh(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        result(vm.ReconfigVM_Task(vim.vm.ConfigSpec(annotation="of two\nlines")))
        assert vm.config.annotation == "of two\nlines"
        vmx = vsphere.host.ask("cat", f"{vsphere.host.directory('web')}/web.vmx").stdout
        assert 'annotation = "of two|0Alines"' in vmx


def test_what_is_not_ours_to_reconfigure_is_refused_and_noted(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    with connected(vsphere) as instance, pytest.raises(vmodl.fault.NotSupported):
        machine(instance, vsphere).ReconfigVM_Task(vim.vm.ConfigSpec(memoryMB=1))
    assert len(vsphere.violations()) == 1


def _overrides(vm: Any, operation: str, priority: str = "disabled") -> Any:
    das = vim.cluster.DasVmConfigInfo(key=vm, dasSettings=vim.cluster.DasVmSettings(restartPriority=priority))
    drs = vim.cluster.DrsVmConfigInfo(key=vm, enabled=False)
    kept = operation != "remove"
    return vim.cluster.ConfigSpecEx(
        dasVmConfigSpec=[
            vim.cluster.DasVmConfigSpec(operation=operation, info=das if kept else None, removeKey=None if kept else vm)
        ],
        drsVmConfigSpec=[
            vim.cluster.DrsVmConfigSpec(operation=operation, info=drs if kept else None, removeKey=None if kept else vm)
        ],
    )


def test_overrides_in_the_cluster_are_added_once_and_removed(build_vsphere: BuildVSphere) -> None:
    vsphere = build_vsphere()
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        cluster = vm.runtime.host.parent
        assert cluster.configurationEx.dasVmConfig == []
        result(cluster.ReconfigureComputeResource_Task(_overrides(vm, "add"), True))
        assert cluster.configurationEx.dasVmConfig[0].dasSettings.restartPriority == "disabled"
        assert cluster.configurationEx.drsVmConfig[0].enabled is False
        assert vsphere.override("web") == {"restart_priority": "disabled", "drs": "disabled"}
        result(vm.PowerOffVM_Task())
        assert not vsphere.ha_restarts("web")
        assert not vsphere.drs_moves("web")
        assert wait(cluster.ReconfigureComputeResource_Task(_overrides(vm, "add"), True)).state == "error"
        result(cluster.ReconfigureComputeResource_Task(_overrides(vm, "edit", "high"), True))
        assert vsphere.override("web")["restart_priority"] == "high"
        result(cluster.ReconfigureComputeResource_Task(_overrides(vm, "remove"), True))
        assert cluster.configurationEx.drsVmConfig == []
        assert vsphere.ha_restarts("web")
        with pytest.raises(vmodl.fault.NotSupported):  # it would replace everything else
            cluster.ReconfigureComputeResource_Task(_overrides(vm, "add"), False)


@pytest.mark.parametrize("vcenter", [True, False])
def test_autostart_is_the_hosts_own_and_the_same_by_ssh(build_vsphere: BuildVSphere, vcenter: bool) -> None:
    vsphere = build_vsphere(_spec(autostart=AutostartSpec(order=3)), vcenter=vcenter)
    with connected(vsphere) as instance:
        vm = machine(instance, vsphere)
        manager = vm.runtime.host.configManager.autoStartManager
        info = manager.config.powerInfo[0]
        assert (info.key, info.startOrder, info.startAction) == (vm, 3, "powerOn")
        info.startAction = "none"
        manager.ReconfigureAutostart(vim.host.AutoStartManager.Config(powerInfo=[info]))
        assert manager.config.powerInfo[0].startAction == "none"
        assert 'startAction = "none"' in vsphere.host.ask("vim-cmd", "hostsvc/autostartmanager/get_autostartseq").stdout
        vsphere.host.host_restarts()
        assert not vsphere.host.is_running("web")
