"""Control over vSphere's API: logins, pages, tasks, lost replies, claims, fences, power; against a played vCenter and ESXi."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.sources.vsphere_rig import MiB, Rig, rigs

from tokvm.core.errors import ConnectionLost, HostKeyError, NotOff, SourceError, UsageError
from tokvm.core.machine import PowerState, Severity
from tokvm.remote.tls import TlsTrust
from tokvm.sources.vmware.api import fence, power, record
from tokvm.sources.vmware.api.faults import VsphereError
from tokvm.sources.vmware.api.record import Record
from tokvm.sources.vmware.api.vmomi import vim
from tokvm.sources.vmware.source import EsxSource
from tokvm.testing.esxi.host import AutostartSpec, DatastoreSpec, DiskSpec, HostOptions
from tokvm.testing.esxi.vmx import escaped

pytestmark = pytest.mark.slow
Make = Callable[..., Rig]
MARK = "tokvm-ab12cd34-"
BOTH = pytest.mark.parametrize("vcenter", [True, False], ids=["vcenter", "esxi"])


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    yield from rigs(tmp_path, monkeypatch)


# ---- logging in


def test_a_wrong_password_is_told_as_that(make: Make) -> None:
    rig = make()
    with pytest.raises(VsphereError, match="InvalidLogin") as refused:
        rig.connect(password="wrong").list_machines()
    assert "user and password" in refused.value.fix


def test_nobody_logs_in_to_a_server_that_is_not_the_one(make: Make) -> None:
    rig = make()
    before = len(rig.vsphere.calls())
    for trust in (TlsTrust.of(fingerprints=("00" * 32,)), TlsTrust()):
        with pytest.raises(HostKeyError):
            rig.connect(trust=trust).list_machines()
    assert len(rig.vsphere.calls()) == before


def test_a_certificate_that_changed_under_a_pin_is_refused(make: Make) -> None:
    rig = make()
    source = rig.connect(trust=TlsTrust.of(fingerprints=(rig.vsphere.fingerprint,)))
    assert source.list_machines()
    rig.vsphere.new_certificate()
    rig.vsphere.cut_connections()
    with pytest.raises(HostKeyError):
        source.list_machines()


def test_the_password_is_in_no_message_and_asked_for_once(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    rig = make()
    caplog.set_level("DEBUG")
    rig.source.list_machines()
    rig.vsphere.end_sessions()
    rig.source.list_machines()
    assert rig.vsphere.password not in caplog.text
    assert "logging in again" in caplog.text


LISTING = ["RetrievePropertiesEx", "ContinueRetrievePropertiesEx", "CreateContainerView", "DestroyView"]


@pytest.mark.parametrize("method", LISTING)
def test_a_session_that_ends_within_a_listing_is_made_anew(make: Make, method: str) -> None:
    rig = make(api={"page": 1})
    rig.source.list_machines()
    rig.vsphere.fault(method, "logged_out")
    assert [one.name for one in rig.source.list_machines()] == ["web"]


def test_a_connection_that_breaks_under_a_question_is_made_again(make: Make) -> None:
    rig = make()
    uuid = rig.uuid
    rig.source.power(uuid)
    for kind in ("drop", "lost_reply", "cut_answer"):
        rig.vsphere.fault("RetrievePropertiesEx", kind)
        assert rig.source.power(uuid) is PowerState.RUNNING
    rig.vsphere.restart()
    assert rig.source.power(uuid) is PowerState.RUNNING


def test_a_server_that_is_gone_is_a_lost_connection(make: Make) -> None:
    rig = make()
    uuid = rig.uuid
    rig.vsphere.close()
    with pytest.raises(ConnectionLost):
        rig.source.power(uuid)
    rig.vsphere.start()
    assert rig.source.power(uuid) is PowerState.RUNNING


# ---- the inventory


@BOTH
@pytest.mark.parametrize("page", [1, 2])
def test_every_page_of_the_inventory_is_read(make: Make, *, vcenter: bool, page: int) -> None:
    rig = make(vcenter=vcenter, api={"page": page})
    vm = rig.vm
    assert (vm.name, vm.disks[0].key, vm.nics[0].network) == ("web", "scsi0:0:[datastore1] web/web.vmdk", "VM Network")
    assert vm.nics[0].slot == 192, "the guest calls it ens192"


def test_a_datacenter_narrows_the_search(make: Make) -> None:
    rig = make()
    options = rig.vsphere.options
    path = f"{options['datacenter_folder']}/{options['datacenter']}"
    place = rig.source._client.place
    for given, there in ((path, True), (options["datacenter"], True), ("Elsewhere", False)):
        source = rig.connect()
        source._client.place = replace(place, datacenter=given)
        if there:
            assert [one.name for one in source.list_machines()] == ["web"]
        else:
            with pytest.raises(UsageError, match="no datacenter"):
                source.list_machines()


def test_a_vm_that_was_registered_anew_is_found_again(make: Make) -> None:
    rig = make()
    uuid = rig.uuid
    rig.source.power(uuid)
    rig.source._machines._known[uuid] = rig.source._client.ref(type(rig.source._machines.ref(uuid)), "vm-999")
    assert rig.source.power(uuid) is PowerState.RUNNING


def test_uuids_and_names_that_are_none_are_refused(make: Make) -> None:
    rig = make()
    for name in ("nobody", "", "WEB"):
        with pytest.raises(UsageError):
            rig.source.find(name)
    with pytest.raises(UsageError):
        rig.source.power("web; reboot")


# ---- snapshots


@BOTH
def test_a_snapshot_whose_reply_is_lost_while_it_is_made_is_made_once(make: Make, *, vcenter: bool) -> None:
    rig = make(vcenter=vcenter)
    vm = rig.vm
    rig.vsphere.fault("CreateSnapshot_Task", "lost_reply")
    rig.vsphere.fault("CreateSnapshot_Task", "slow_task", seconds=1.0)
    with pytest.raises(ConnectionLost):
        rig.source.snapshot(vm, f"{MARK}1")
    made = rig.source.snapshot(vm, f"{MARK}1")
    assert rig.snapshot_names() == [f"{MARK}1"]
    assert rig.source.snapshots(rig.uuid, MARK) == [made]


def test_a_snapshot_whose_task_failed_after_all_was_done_is_the_one(make: Make) -> None:
    rig = make()
    rig.vsphere.fault("CreateSnapshot_Task", "task_late_error", name="vmodl.fault.SystemError")
    with pytest.raises(VsphereError, match="SystemError"):
        rig.source.snapshot(rig.vm, f"{MARK}1")
    rig.source.snapshot(rig.vm, f"{MARK}1")
    assert rig.snapshot_names() == [f"{MARK}1"]


def test_a_session_that_ends_while_a_task_runs_does_not_lose_it(make: Make) -> None:
    rig = make()
    rig.vsphere.fault("CreateSnapshot_Task", "slow_task", seconds=0.8)
    timer = threading.Timer(0.4, rig.vsphere.end_sessions)
    timer.start()
    rig.source.snapshot(rig.vm, f"{MARK}1")
    timer.join()
    assert rig.snapshot_names() == [f"{MARK}1"]


def test_a_task_that_is_queued_for_long_is_waited_for(make: Make) -> None:
    rig = make(api={"queued_s": 0.7})
    rig.source.snapshot(rig.vm, f"{MARK}1")
    assert rig.snapshot_names() == [f"{MARK}1"]


def test_a_free_licence_is_told_with_what_works_instead(make: Make) -> None:
    rig = make(vcenter=False, api={"free_licence": True})
    with pytest.raises(VsphereError, match="RestrictedVersion") as refused:
        rig.source.snapshot(rig.vm, f"{MARK}1")
    assert "esx://" in refused.value.fix


def test_a_busy_vm_is_waited_for(make: Make) -> None:
    rig = make()
    vm = rig.vm
    rig.vsphere.fault("ReconfigVM_Task", "slow_task", seconds=0.8)
    other = threading.Thread(target=rig.connect().claim, args=(rig.uuid, "me"))
    other.start()
    time.sleep(0.4)
    rig.source.snapshot(vm, f"{MARK}1")
    other.join()
    assert rig.vsphere.calls().count("CreateSnapshot_Task") > 1
    assert rig.snapshot_names() == [f"{MARK}1"]


def test_a_call_that_outlives_the_login_leaves_no_connection_open(make: Make) -> None:
    rig = make()
    client = rig.source._client
    instance = client.ref(vim.ServiceInstance, "ServiceInstance")
    stub = client._stub
    rig.vsphere.fault("CurrentTime", "wait", seconds=0.5)
    late = threading.Thread(target=client.ask, args=(instance.CurrentTime, "asking for the time"))
    late.start()
    time.sleep(0.2)
    rig.source.close()
    assert late.is_alive()
    late.join()
    assert stub.pool == []


def test_only_what_bears_our_name_now_is_removed(make: Make) -> None:
    rig = make()
    made = rig.source.snapshot(rig.vm, f"{MARK}1")
    with rig.host.edit() as state:
        state["vms"][0]["snapshots"][0]["name"] = "mine, now"
    with pytest.raises(SourceError, match="not ours"):
        rig.source.remove_snapshot(rig.uuid, made)
    assert rig.snapshot_names() == ["mine, now"]


@pytest.mark.parametrize("kind", ["lost_reply", "drop", "task_late_error"])
def test_a_removal_whose_answer_is_lost_is_looked_after(make: Make, kind: str) -> None:
    rig = make(options=HostOptions(merge_s=0.2))
    made = rig.source.snapshot(rig.vm, f"{MARK}1")
    rig.vsphere.fault("RemoveSnapshot_Task", kind, name="vim.fault.FileLocked", fields={"file": "x"})
    rig.source.remove_snapshot(rig.uuid, made)
    assert rig.snapshot_names() == []


def test_files_that_a_removal_left_behind_are_consolidated(make: Make) -> None:
    rig = make()
    made = rig.source.snapshot(rig.vm, f"{MARK}1")
    rig.host.set_fields("web", consolidationNeeded=True)
    rig.source.remove_snapshot(rig.uuid, made)
    assert "ConsolidateVMDisks_Task" in rig.vsphere.calls()


# ---- our record


def test_who_writes_second_reads_again_and_decides_anew(make: Make) -> None:
    rig = make()
    one, two = rig.source, rig.connect()
    read, first = record.read, True

    def meanwhile(machines: Any, uuid: str, *also: str) -> Any:
        nonlocal first
        found = read(machines, uuid, *also)
        if first:
            first = False
            assert two.claim(uuid, "two") == "two"
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "read", meanwhile)
        assert one.claim(rig.uuid, "one") == "two"
    two.release(rig.uuid, "two")
    assert rig.vsphere.extra_config("web") == {}


@pytest.mark.parametrize("kind", ["lost_reply", "drop"])
def test_a_claim_whose_answer_is_lost_is_one_all_the_same(make: Make, kind: str) -> None:
    rig = make()
    rig.vsphere.fault("ReconfigVM_Task", kind)
    assert rig.source.claim(rig.uuid, "me") == "me"


def test_a_record_that_somebody_edited_is_refused(make: Make) -> None:
    rig = make()
    rig.source.claim(rig.uuid, "me")
    with rig.vsphere.store.change() as state:
        (extra,) = state["extra"].values()
        extra[record.KEY] = '{"v":1,"owner":[]}'
    with pytest.raises(SourceError, match="not what this tokvm wrote"):
        rig.source.claim(rig.uuid, "me")


# ---- the fence


def test_a_fence_takes_the_vm_from_its_clusters_ha_and_gives_it_back(make: Make) -> None:
    rig = make()
    rig.source.fence(rig.uuid, "moved")
    assert rig.vsphere.override("web")["restart_priority"] == "disabled"
    assert rig.source.is_fenced(rig.uuid)
    rig.source.unfence(rig.uuid)
    assert rig.vsphere.override("web")["restart_priority"] == ""
    assert rig.vsphere.extra_config("web") == {}


def test_a_priority_of_the_vms_own_is_put_back(make: Make) -> None:
    rig = make()
    rig.source.fence(rig.uuid, "moved")
    with rig.vsphere.store.change() as state:
        (override,) = state["overrides"].values()
        override["restart_priority"] = "high"
    assert not rig.source.is_fenced(rig.uuid)
    rig.source.unfence(rig.uuid)
    with rig.vsphere.store.change() as state:
        next(iter(state["overrides"].values()))["restart_priority"] = "high"
    rig.source.fence(rig.uuid, "moved")
    assert rig.vsphere.override("web")["restart_priority"] == "disabled"
    rig.source.unfence(rig.uuid)
    assert rig.vsphere.override("web")["restart_priority"] == "high"


def test_who_may_not_change_the_cluster_is_warned_and_fences_without_it(make: Make) -> None:
    rig = make(api={"denied": ["Host.Inventory.EditCluster"]})
    found = rig.source.check(rig.vm)
    assert [one.severity for one in found if "HA" in one.what] == [Severity.WARNING]
    rig.source.fence(rig.uuid, "moved")
    assert rig.source.is_fenced(rig.uuid)
    assert rig.connect().is_fenced(rig.uuid)
    rig.source.unfence(rig.uuid)
    assert not rig.source.is_fenced(rig.uuid)


@pytest.mark.parametrize("kind", ["lost_reply", "drop"])
def test_a_fence_whose_answer_is_lost_is_set_when_asked_again(make: Make, kind: str) -> None:
    rig = make()
    rig.vsphere.fault("ReconfigureComputeResource_Task", kind)
    with pytest.raises(ConnectionLost):
        rig.source.fence(rig.uuid, "moved")
    rig.source.fence(rig.uuid, "moved")
    assert rig.source.is_fenced(rig.uuid)
    rig.source.unfence(rig.uuid)
    assert rig.vsphere.override("web")["restart_priority"] == ""


def test_our_own_change_that_lands_between_look_and_act_is_no_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reply was lost; the task ends after the VM was looked at again, and the second "add" finds it there."""
    rig, looks, really = make(), [], fence.look

    def look(client: Any, vm: Any) -> Any:
        seen = really(client, vm)
        looks.append(seen)
        if len(looks) == 2:
            fence.set_priority(client, seen.cluster, vm, now=seen.priority, wanted=fence.DISABLED)
        return seen

    monkeypatch.setattr(fence, "look", look)
    rig.source.fence(rig.uuid, "moved")
    assert rig.source.is_fenced(rig.uuid)
    rig.source.unfence(rig.uuid)
    assert rig.vsphere.override("web")["restart_priority"] == ""


def test_an_esxi_hosts_autostart_is_stopped_and_put_back(make: Make) -> None:
    rig = make(vcenter=False, autostart=AutostartSpec(order=3, delay=45))
    before = rig.host.vm("web")["autostart"]
    rig.source.fence(rig.uuid, "moved")
    assert rig.host.vm("web")["autostart"]["startAction"].lower() == "none"  # type: ignore[index]
    assert rig.source.is_fenced(rig.uuid)
    rig.source.unfence(rig.uuid)
    assert rig.host.vm("web")["autostart"] == before


# ---- power


def test_a_guest_without_tools_is_not_asked_and_not_cut_unless_allowed(make: Make) -> None:
    rig = make()
    rig.host.set_fields("web", tools="guestToolsNotRunning")
    assert any("Tools" in one.what for one in rig.source.check(rig.vm))
    with pytest.raises(NotOff, match="ToolsUnavailable"):
        rig.source.shut_down(rig.uuid, deadline_s=5, force=False)
    assert rig.host.is_running("web")
    rig.source.shut_down(rig.uuid, deadline_s=5, force=True)
    assert rig.source.off_evidence(rig.uuid).proved


def test_a_guest_that_was_asked_may_still_stop_for_a_while(make: Make) -> None:
    rig = make(ignores_shutdown=True)
    assert not rig.source.stop_pending(rig.uuid)
    with pytest.raises(NotOff, match="did not stop"):
        rig.source.shut_down(rig.uuid, deadline_s=0.3, force=False)
    assert rig.connect().stop_pending(rig.uuid)
    rig.vsphere.clock.move(power.LANDS_S + 5)
    assert not rig.connect().stop_pending(rig.uuid)


def test_one_that_booted_after_it_was_asked_has_forgotten_it(make: Make) -> None:
    rig = make(ignores_shutdown=True)
    with pytest.raises(NotOff):
        rig.source.shut_down(rig.uuid, deadline_s=0.3, force=False)
    rig.source.shut_down(rig.uuid, deadline_s=0.3, force=True)
    time.sleep(1.1)
    rig.source.start(rig.uuid)
    assert not rig.source.stop_pending(rig.uuid)


def test_a_suspended_vm_is_neither_stopped_nor_started(make: Make) -> None:
    rig = make()
    rig.host.suspend("web")
    with pytest.raises(NotOff, match="suspended"):
        rig.source.shut_down(rig.uuid, deadline_s=1, force=True)
    with pytest.raises(SourceError, match="suspended"):
        rig.source.start(rig.uuid)
    assert not rig.source.off_evidence(rig.uuid).proved
    assert any(one.severity is Severity.BLOCKER for one in rig.source.check(rig.vm))


def test_a_file_that_is_still_held_is_no_proof_that_it_is_off(make: Make) -> None:
    rig = make()
    rig.source.shut_down(rig.uuid, deadline_s=10, force=False)
    rig.vsphere.fault("folder", "status", status=500, text="NFC_FILE_LOCKED", skip=1)
    evidence = rig.source.off_evidence(rig.uuid)
    assert (evidence.power, evidence.released) == (PowerState.OFF, False)
    assert "NFC_FILE_LOCKED" in evidence.detail
    assert rig.source.off_evidence(rig.uuid).proved


def test_a_question_that_keeps_a_vm_from_starting_is_shown(make: Make) -> None:
    rig = make(asks="msg.uuid.altered: was it moved or copied?", running=False)
    with pytest.raises(SourceError, match="moved or copied"):
        rig.source.start(rig.uuid)
    assert any("moved or copied" in one.what for one in rig.source.check(rig.vm))


# ---- what is in the way


def whats(rig: Rig, severity: Severity = Severity.BLOCKER) -> str:
    return "\n".join(one.what for one in rig.source.check(rig.vm) if one.severity is severity)


@BOTH
def test_nothing_is_in_the_way_of_a_plain_vm(make: Make, *, vcenter: bool) -> None:
    rig = make(vcenter=vcenter)
    assert rig.source.check(rig.vm) == []


@pytest.mark.parametrize(
    ("disk", "word"),
    [
        (DiskSpec(MiB, mode="independent_persistent"), "independent"),
        (DiskSpec(MiB, rdm="physicalMode"), "mapping (physical)"),
        (DiskSpec(MiB, rdm="virtualMode"), "mapping (virtual)"),
        (DiskSpec(MiB, sharing="sharingMultiWriter"), "several VMs"),
        (DiskSpec(MiB, shared_bus="physicalSharing"), "several VMs"),
    ],
)
def test_disks_that_cannot_be_frozen_are_blockers(make: Make, disk: DiskSpec, word: str) -> None:
    assert word in whats(make(disks=[disk]))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"vtpm": True}, "TPM"),
        ({"encrypted": True}, "encrypted"),
        ({"faultTolerance": "running"}, "fault tolerance"),
        ({"consolidationNeeded": True}, "consolidation"),
        ({"connectionState": "disconnected"}, "unknown"),
    ],
)
def test_states_that_cannot_be_migrated_are_blockers(make: Make, fields: dict[str, object], word: str) -> None:
    assert word in whats(make(fields=fields))


def test_a_disk_that_is_no_file_is_a_blocker_unless_somebody_else_reads_it(make: Make) -> None:
    rig = make(options=HostOptions(datastores=[DatastoreSpec("vsanDatastore", type="vsan")]))
    assert "vsan" in whats(rig)
    other = rig.connect(nbd="nbd+unix:///?socket=/run/x.sock")
    assert [one for one in other.check(rig.vm) if one.severity is Severity.BLOCKER] == []


@pytest.mark.parametrize("denied", ["VirtualMachine.State.CreateSnapshot", "Datastore.FileManagement", "VApp.Export"])
def test_a_privilege_that_is_missing_is_named(make: Make, denied: str) -> None:
    rig = make(api={"denied": [denied]})
    assert denied in whats(rig)
    by_ssh = [one.what for one in rig.connect(ssh=True).check(rig.vm) if denied in one.what]
    assert bool(by_ssh) is denied.startswith("VirtualMachine")


def test_more_snapshots_than_is_wise(make: Make) -> None:
    rig = make()
    for number in range(4):
        rig.host.foreign_snapshot("web", f"nightly {number}")
    assert "more than is wise" in whats(rig, Severity.WARNING)


def test_a_little_room_is_a_warning(make: Make) -> None:
    rig = make(options=HostOptions(datastores=[DatastoreSpec("small", free=1 << 10)]))
    assert "free" in whats(rig, Severity.WARNING)


def test_somebody_elses_claim_is_a_blocker_and_ours_is_none(make: Make) -> None:
    rig = make()
    rig.source.claim(rig.uuid, "me")
    assert whats(rig) == ""
    other = rig.connect()
    assert "claimed by another run: me" in "".join(one.what for one in other.check(rig.vm))
    assert other.check(rig.vm, owner="me") == []
    assert Record.from_text(rig.vsphere.extra_config("web")[record.KEY]) == Record(owner="me")


def test_a_host_that_a_vcenter_manages_is_a_warning(make: Make) -> None:
    rig = make(vcenter=False, options=HostOptions(vcenter="10.0.0.9"))
    assert "10.0.0.9" in whats(rig, Severity.WARNING)


def test_a_claim_over_ssh_is_seen_over_the_api_and_the_other_way_round(make: Make) -> None:
    rig = make(vcenter=False)
    over_ssh = EsxSource(rig._ssh(f"ssh://{rig.host.sshd.netloc}"))
    try:
        assert over_ssh.claim(rig.uuid, "ssh") == "ssh"
        assert "over SSH" in whats(rig)
        over_ssh.release(rig.uuid, "ssh")
        assert whats(rig) == ""
        assert rig.source.claim(rig.uuid, "api") == "api"
        with rig.host.local(f"{rig.host.directory('web')}/web.vmx").open("a") as vmx:  # as a real host keeps extraConfig
            vmx.write(f'{record.KEY} = "{escaped(rig.vsphere.extra_config("web")[record.KEY])}"\n')
        found = [one.what for one in over_ssh.check(over_ssh.inspect(rig.uuid)) if one.severity is Severity.BLOCKER]
        assert len(found) == 1
        assert "API" in found[0]
    finally:
        over_ssh.close()
