"""Freezing a VM and taking the frozen disks away again."""

from __future__ import annotations

import time

from tokvm.testing import pids
from tokvm.testing.persona.store import new_uuid
from tokvm.testing.xenserver.errors import NotInContract, api_error, no_such
from tokvm.testing.xenserver.power import Power
from tokvm.testing.xenserver.records import find_vdi, find_vm
from tokvm.testing.xenserver.state import HALTED, State, Store, Vbd, Vdi, Vm

DETACH_POLL_S = 0.05


def take_snapshot(store: Store, power: Power, vm_uuid: str, label: str) -> str:
    """A new snapshot VM with new VBDs and VDIs. Names are labels: two snapshots may have the same."""
    with store.change() as state:
        power.refresh(state)
        vm = find_vm(state, vm_uuid)
        if vm["operations"]:
            raise api_error("OTHER_OPERATION_IN_PROGRESS", "VM", f"{vm_uuid} ({vm['name']})")
        name = new_uuid()
        power.backend.freeze(vm_uuid, name)
        state["vms"][name] = _frozen_vm(state, vm, name, label)
        store.append("events.log", {"event": "snapshot", "vm": vm_uuid, "snapshot": name, "label": label})
        return name


def _frozen_vm(state: State, vm: Vm, name: str, label: str) -> Vm:
    vbds = [_frozen_vbd(state, vbd, name) for vbd in vm["vbds"]]
    return Vm(
        uuid=name,
        name=label,
        power=HALTED,
        domid=-1,
        snapshot_of=vm["uuid"],
        template=True,  # xapi marks snapshots as templates too
        control=False,
        fields=dict(vm["fields"]),
        maps={**{key: dict(value) for key, value in vm["maps"].items()}, "blocked-operations": {}},
        operations=[],
        vbds=vbds,
        vifs=list(vm["vifs"]),
        vtpms=[],
        off_since=0.0,
        linger_until=0.0,
    )


def _frozen_vbd(state: State, vbd: Vbd, name: str) -> Vbd:
    copy = vbd.copy()
    copy["uuid"] = new_uuid()
    live = state["vdis"].get(vbd["vdi"])
    if live is not None and vbd["type"] == "Disk":
        vdi = live.copy()
        vdi["uuid"], vdi["snapshot_of"], vdi["frozen"] = new_uuid(), live["uuid"], name
        vdi["readers"], vdi["busy_until"] = [], 0.0
        state["vdis"][vdi["uuid"]] = vdi
        copy["vdi"] = vdi["uuid"]
    return copy


def readers(vdi: Vdi) -> list[tuple[int, int]]:
    """Exports of the VDI that are still running."""
    return [(pid, tick) for pid, tick in vdi["readers"] if pids.start_tick(pid) == tick]


def in_use(vdi: Vdi) -> bool:
    return bool(readers(vdi)) or time.time() < vdi["busy_until"]


def uninstall(store: Store, power: Power, snapshot: str) -> None:
    """First the VM record goes, then each disk that can be destroyed; one attached to dom0 stays behind without its
    snapshot, and xe says so (xen-api, cli_operations.ml, vm_uninstall_common)."""
    stuck = None
    with store.change() as state:
        vm = state["vms"].get(snapshot)
        if vm is None or not vm["snapshot_of"]:
            raise no_such("snapshot", snapshot)
        del state["vms"][snapshot]
        for vbd in vm["vbds"]:
            vdi = state["vdis"].get(vbd["vdi"])
            if vdi is not None and in_use(vdi):
                stuck = stuck or vdi
            elif vdi is not None:
                _destroy(store, state, power, vdi)
        store.append("events.log", {"event": "uninstall", "snapshot": snapshot, "label": vm["name"]})
    if stuck is not None:
        raise api_error("VDI_IN_USE", f"{stuck['uuid']} ({stuck['label']})", "destroy")


def destroy_orphan(store: Store, power: Power, uuid_: str) -> None:
    """A frozen disk whose snapshot is gone already. Any other disk must never be destroyed: that is a violation."""
    with store.change() as state:
        vdi = find_vdi(state, uuid_)
        if not vdi["frozen"] or vdi["frozen"] in state["vms"]:
            raise NotInContract("vdi-destroy is only for a frozen disk that outlived its snapshot")
        if in_use(vdi):
            raise api_error("VDI_IN_USE", f"{uuid_} ({vdi['label']})", "destroy")
        _destroy(store, state, power, vdi)


def _destroy(store: Store, state: State, power: Power, vdi: Vdi) -> None:
    del state["vdis"][vdi["uuid"]]
    for file in store.path("exports").glob(f"*{vdi['uuid']}*"):
        file.unlink(missing_ok=True)
    if not any((other["vm"], other["frozen"]) == (vdi["vm"], vdi["frozen"]) for other in state["vdis"].values()):
        power.backend.drop(vdi["vm"], vdi["frozen"])
