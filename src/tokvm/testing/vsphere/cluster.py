"""Calls that keep the others from starting or moving a VM: its overrides in the cluster, the host's autostart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from pyVmomi import vim, vmodl

from tokvm.testing.esxi.hostd import Hostd
from tokvm.testing.esxi.state import Autostart, State
from tokvm.testing.vsphere.ground import vm_of
from tokvm.testing.vsphere.inventory import IDS
from tokvm.testing.vsphere.options import Override

if TYPE_CHECKING:
    from tokvm.testing.vsphere.endpoint import Endpoint
    from tokvm.testing.vsphere.sessions import Session
    from tokvm.testing.vsphere.soap import Call

CLUSTER_SPECS = frozenset({"dasVmConfigSpec", "drsVmConfigSpec"})
PRIORITIES = frozenset({"disabled", "lowest", "low", "medium", "high", "highest", "clusterRestartPriority"})


def reconfigure(endpoint: Endpoint, call: Call, session: Session) -> Any:
    """Overrides of single VMs only. modify=False would replace the cluster's whole configuration: never right for us."""
    spec = call.arguments["spec"]
    given = {one.name for one in spec._GetPropertyList() if getattr(spec, one.name) not in (None, [])}
    if not call.arguments["modify"] or not isinstance(spec, vim.cluster.ConfigSpecEx) or not given <= CLUSTER_SPECS:
        endpoint.violation("ReconfigureComputeResource_Task", f"modify={call.arguments['modify']}, {sorted(given)}")
        raise vmodl.fault.NotSupported(msg="The operation is not supported on the object.")
    guests = {one.moid: one.vm["guest"] for one in endpoint.inventory.machines()}

    def act() -> None:
        with endpoint.store.change() as own:
            for one in spec.dasVmConfigSpec:
                override = own["overrides"].setdefault(guests[_key(one)], Override(restart_priority="", drs=""))
                override["restart_priority"] = _changed(one, override["restart_priority"], _priority)
            for other in spec.drsVmConfigSpec:
                override = own["overrides"].setdefault(guests[_key(other)], Override(restart_priority="", drs=""))
                override["drs"] = _changed(other, override["drs"], _behaviour)

    name = endpoint.inventory.node(call.this).name
    return endpoint.begin_task(call, session, act, name="ComputeResource.reconfigureEx", entity=call.this, entity_name=name)


def _key(spec: Any) -> str:
    return str(spec.info.key._moId if spec.info is not None else spec.removeKey._moId)


def _changed(spec: Any, now: str, value: Any) -> str:
    """`add` of what is there, and `edit` or `remove` of what is not, are refused."""
    adds = spec.operation == "add"
    if adds == bool(now):
        text = "A specified parameter was not correct: spec"
        raise vmodl.fault.InvalidArgument(invalidProperty="spec", msg=text)
    return "" if spec.operation == "remove" else str(value(spec.info))


def _priority(info: Any) -> str:
    found = str(info.dasSettings.restartPriority if info.dasSettings else info.restartPriority or "")
    if found not in PRIORITIES:
        raise vmodl.fault.InvalidArgument(invalidProperty="restartPriority", msg="A specified parameter was not correct")
    return found


def _behaviour(info: Any) -> str:
    return "disabled" if info.enabled is False else str(info.behavior)


def reconfigure_autostart(endpoint: Endpoint, call: Call, _session: Session) -> None:
    """Entries are changed one by one; the host's own defaults are not ours to change. startAction `none` keeps the entry."""
    spec = call.arguments["spec"]
    if spec.defaults is not None or call.moid not in IDS["autostart"]:
        endpoint.violation("ReconfigureAutostart", "defaults, or another host")
        raise vmodl.fault.NotSupported(msg="The operation is not supported on the object.")
    vmids = {one.moid: one.vm["vmid"] for one in endpoint.inventory.machines()}

    def act(_hostd: Hostd, state: State) -> None:
        for info in spec.powerInfo:
            entry = {name: _plain(getattr(info, name)) for name in Autostart.__annotations__}
            vm_of(state, vmids[info.key._moId])["autostart"] = cast("Autostart", entry)

    endpoint.ground.do(act)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, str) else int(value)


ROWS = {
    ("ClusterComputeResource", "ReconfigureComputeResource_Task"): reconfigure,
    ("HostAutoStartManager", "ReconfigureAutostart"): reconfigure_autostart,
}
