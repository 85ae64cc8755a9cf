"""Calls to VMs and their snapshots. What hostd does for them is the ESXi host's own doing (Ground.do)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyVmomi import vim, vmodl

from tokvm.testing.esxi import vmx
from tokvm.testing.esxi.hostd import Hostd
from tokvm.testing.esxi.state import OFF, ON, Snapshot, State, Vm
from tokvm.testing.vsphere.ground import vm_of
from tokvm.testing.vsphere.machine import Machine
from tokvm.testing.vsphere.machine_properties import QUESTION_ID, change_version

if TYPE_CHECKING:
    from tokvm.testing.vsphere.endpoint import Endpoint
    from tokvm.testing.vsphere.options import State as OwnState
    from tokvm.testing.vsphere.sessions import Session
    from tokvm.testing.vsphere.soap import Call

WHO = "the API"
LOOK_S = 0.02
MAX_NAME = 80
# What ReconfigVM_Task may set here; anything else in a spec is not played.
RECONFIGURABLE = frozenset({"changeVersion", "changeTrackingEnabled", "extraConfig", "annotation"})


def _task(
    endpoint: Endpoint, call: Call, session: Session, name: str, act: Callable[[Machine], Any], *, entity: Any = None
) -> Any:
    """entity: whose task it is, of a snapshot's calls its VM."""
    machine = endpoint.inventory.machine(call.this)
    return endpoint.begin_task(
        call, session, lambda: act(machine), name=name, entity=entity or machine.ref, entity_name=machine.name
    )


def _on_vm(endpoint: Endpoint, machine: Machine, act: Callable[[Hostd, State, Vm], Any]) -> Any:
    return endpoint.ground.do(lambda hostd, state: act(hostd, state, vm_of(state, machine.vm["vmid"])))


# Power


def power_on(endpoint: Endpoint, call: Call, session: Session) -> Any:
    def act(machine: Machine) -> None:
        _on_vm(endpoint, machine, lambda hostd, state, vm: hostd.power_on(state, vm, WHO))
        _wait_for_answer(endpoint, machine)

    return _task(endpoint, call, session, "VirtualMachine.powerOn", act)


def _wait_for_answer(endpoint: Endpoint, machine: Machine) -> None:
    """The task of a power-on goes on for as long as its question is open."""
    vmid = machine.vm["vmid"]
    while vm_of(endpoint.ground.state(), vmid)["question"]:
        if endpoint.ending.wait(LOOK_S):
            return
    if vm_of(endpoint.ground.state(), vmid)["state"] != ON:
        text = "The operation was cancelled by the user."
        raise vmodl.fault.RequestCanceled(msg=text)


def power_off(endpoint: Endpoint, call: Call, session: Session) -> Any:
    def act(machine: Machine) -> None:
        _on_vm(endpoint, machine, lambda hostd, state, vm: hostd.power_off(state, vm, WHO))

    return _task(endpoint, call, session, "VirtualMachine.powerOff", act)


def shut_down(endpoint: Endpoint, call: Call, _session: Session) -> None:
    machine = endpoint.inventory.machine(call.this)
    _on_vm(endpoint, machine, lambda hostd, state, vm: hostd.shut_down(state, vm))


def answer(endpoint: Endpoint, call: Call, _session: Session) -> None:
    machine = endpoint.inventory.machine(call.this)
    if not machine.vm["question"] or call.arguments["questionId"] != QUESTION_ID:
        raise _wrong("questionId")
    choice = call.arguments["answerChoice"]
    if choice not in ("0", "1", "2"):
        raise _wrong("answerChoice")

    def act(hostd: Hostd, state: State, vm: Vm) -> None:
        if choice == "0":
            hostd.power_off(state, vm, WHO)
        else:
            hostd.really_on(state, vm, WHO)

    _on_vm(endpoint, machine, act)


# Snapshots


def create_snapshot(endpoint: Endpoint, call: Call, session: Session) -> Any:
    name, description = call.arguments["name"], call.arguments.get("description") or ""
    if len(name) > MAX_NAME:
        raise vim.fault.InvalidName(name=name, msg=f"The name '{name}' is invalid.")

    def act(machine: Machine) -> Any:
        quiesces = call.arguments.get("quiesce") or call.arguments.get("quiesceSpec") is not None
        if quiesces and machine.vm["state"] == ON and machine.field("tools") != "guestToolsRunning":
            raise vim.fault.ApplicationQuiesceFault(msg="An error occurred while quiescing the virtual machine.")
        before = {one["freeze"] for one in machine.vm["snapshots"]}
        _on_vm(endpoint, machine, lambda hostd, state, vm: hostd.create(state, vm, name, description))
        made = _wait_for(
            endpoint, machine, lambda vm: next((one for one in vm["snapshots"] if one["freeze"] not in before), None)
        )
        return machine.snapshot_ref(made) if made is not None else None

    return _task(endpoint, call, session, "VirtualMachine.createSnapshot", act)


def _wait_for(endpoint: Endpoint, machine: Machine, found: Callable[[Vm], Snapshot | None]) -> Snapshot | None:
    """hostd makes it when its time has come."""
    while (one := found(vm_of(endpoint.ground.state(), machine.vm["vmid"]))) is None:
        if endpoint.ending.wait(LOOK_S):
            return None
    return one


def remove_snapshot(endpoint: Endpoint, call: Call, session: Session) -> Any:
    if call.arguments["removeChildren"] or call.arguments.get("consolidate") is False:
        raise vmodl.fault.NotSupported(msg="only single snapshots, and with consolidation, are removed here")
    machine = endpoint.inventory.machine(call.this)
    snapshot = machine.snapshot_of(call.moid)
    number = snapshot["id"] if snapshot else 0

    def act(machine: Machine) -> None:
        if endpoint.leases.reads(call.moid):
            raise vim.fault.FileLocked(file=machine.vmx_path, msg="Unable to access a file since it is locked")
        _on_vm(endpoint, machine, lambda hostd, state, vm: hostd.remove(state, vm, number))
        _wait_for_merge(endpoint, machine)

    return _task(endpoint, call, session, "vm.Snapshot.remove", act)


def _wait_for_merge(endpoint: Endpoint, machine: Machine) -> None:
    vmid = machine.vm["vmid"]
    while any(one["vm"] == vmid for one in endpoint.ground.state()["tasks"]):
        if endpoint.ending.wait(LOOK_S):
            return
    if vm_of(endpoint.ground.state(), vmid)["fields"]["consolidationNeeded"]:
        text = "Unable to access file since it is locked"
        raise vim.fault.FileLocked(file=machine.vmx_path, msg=text)


def consolidate(endpoint: Endpoint, call: Call, session: Session) -> Any:
    def act(machine: Machine) -> None:
        _on_vm(endpoint, machine, lambda hostd, state, vm: hostd.consolidate_all(state, vm))
        _wait_for_merge(endpoint, machine)

    return _task(endpoint, call, session, "VirtualMachine.consolidateDisks", act)


# Configuration


def reconfigure(endpoint: Endpoint, call: Call, session: Session) -> Any:
    spec = call.arguments["spec"]
    given = {one.name for one in spec._GetPropertyList() if getattr(spec, one.name) not in (None, [])}
    if not given <= RECONFIGURABLE:
        endpoint.violation("ReconfigVM_Task", f"the endpoint does not play {sorted(given - RECONFIGURABLE)}")
        raise vmodl.fault.NotSupported(msg=f"not supported here: {sorted(given - RECONFIGURABLE)}")

    def act(machine: Machine) -> None:
        with endpoint.inventory.look():
            fresh = endpoint.inventory.machine(machine.ref)
            if spec.changeVersion not in (None, "", change_version(endpoint.inventory, fresh)):
                text = "Cannot complete operation due to concurrent modification by another operation."
                raise vim.fault.ConcurrentAccess(msg=text)
            _refuse_tracking(endpoint, fresh, spec.changeTrackingEnabled)
        if spec.annotation is not None:
            _on_vm(endpoint, machine, lambda hostd, state, vm: _annotate(hostd, state, vm, spec.annotation))
        with endpoint.store.change() as own:
            _apply(endpoint, own, fresh, spec)

    return _task(endpoint, call, session, "VirtualMachine.reconfigure", act)


def _annotate(hostd: Hostd, state: State, vm: Vm, text: str) -> None:
    vm["fields"]["annotation"] = text
    vmx.write(hostd.store, state, vm)


def _refuse_tracking(endpoint: Endpoint, machine: Machine, wanted: bool | None) -> None:  # noqa: FBT001
    """[C] Azure Migrate's error 31453: tracking is not switched on over a snapshot; hardware before version 7 has none."""
    if not wanted or endpoint.tracker.is_enabled(machine):
        return
    if machine.vm["snapshots"]:
        text = "Change tracking cannot be enabled on a virtual machine with snapshots."
        raise vim.fault.InvalidState(msg=text)
    if int(str(machine.field("version")).removeprefix("vmx-")) < 7:
        raise vmodl.fault.NotSupported(msg="The operation is not supported on the object.")


def _apply(endpoint: Endpoint, own: OwnState, machine: Machine, spec: Any) -> None:
    guest = machine.vm["guest"]
    if spec.changeTrackingEnabled is not None:
        endpoint.tracker.enable(own, machine, enabled=spec.changeTrackingEnabled, now=time.time())
    extra = own["extra"].setdefault(guest, {})
    for option in spec.extraConfig:
        if str(option.value or "") == "":  # an empty value takes the key away
            extra.pop(option.key, None)
        else:
            extra[option.key] = str(option.value)
    own["versions"][guest] = own["versions"].get(guest, 0) + 1


def changed_areas(endpoint: Endpoint, call: Call, _session: Session) -> Any:
    machine = endpoint.inventory.machine(call.this)
    wanted = call.arguments.get("snapshot")
    snapshot = machine.snapshot_of(wanted._moId) if wanted is not None else None
    disk = machine.disk_of(call.arguments["deviceKey"])
    if disk is None:
        raise _wrong("deviceKey")
    if (wanted is not None and snapshot is None) or (wanted is None and machine.vm["state"] != OFF):
        raise _wrong("snapshot")
    start, change_id = call.arguments["startOffset"], call.arguments["changeId"]
    return endpoint.tracker.query(machine, snapshot, disk, change_id, start, endpoint.options)


def _wrong(name: str) -> Any:
    return vmodl.fault.InvalidArgument(invalidProperty=name, msg=f"A specified parameter was not correct: {name}")


ROWS = {
    ("VirtualMachine", "PowerOnVM_Task"): power_on,
    ("VirtualMachine", "PowerOffVM_Task"): power_off,
    ("VirtualMachine", "ShutdownGuest"): shut_down,
    ("VirtualMachine", "AnswerVM"): answer,
    ("VirtualMachine", "CreateSnapshot_Task"): create_snapshot,
    ("VirtualMachine", "CreateSnapshotEx_Task"): create_snapshot,
    ("VirtualMachineSnapshot", "RemoveSnapshot_Task"): remove_snapshot,
    ("VirtualMachine", "ConsolidateVMDisks_Task"): consolidate,
    ("VirtualMachine", "ReconfigVM_Task"): reconfigure,
    ("VirtualMachine", "QueryChangedDiskAreas"): changed_areas,
}
