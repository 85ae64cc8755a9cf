"""Freezing a VM and taking the frozen disks away again."""

from __future__ import annotations

import time
import uuid

from tokvm.testing import pids
from tokvm.testing.xenserver.errors import api_error, no_such
from tokvm.testing.xenserver.power import Power
from tokvm.testing.xenserver.records import find_vm
from tokvm.testing.xenserver.state import HALTED, State, Store, Vbd, Vdi, Vm

DETACH_POLL_S = 0.05


def take_snapshot(store: Store, power: Power, vm_uuid: str, label: str) -> str:
    """A new snapshot VM with new VBDs and VDIs. Names are labels: two snapshots may have the same."""
    with store.change() as state:
        power.refresh(state)
        vm = find_vm(state, vm_uuid)
        if vm["operations"]:
            raise api_error("OTHER_OPERATION_IN_PROGRESS", "VM", f"{vm_uuid} ({vm['name']})")
        name = str(uuid.uuid4())
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
    copy["uuid"] = str(uuid.uuid4())
    live = state["vdis"].get(vbd["vdi"])
    if live is not None and vbd["type"] == "Disk":
        vdi = live.copy()
        vdi["uuid"], vdi["snapshot_of"], vdi["frozen"] = str(uuid.uuid4()), live["uuid"], name
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
    """The snapshot with its disks, as long as none of them is attached to dom0 for an export."""
    with store.change() as state:
        vm = state["vms"].get(snapshot)
        if vm is None or not vm["snapshot_of"]:
            raise no_such("snapshot", snapshot)
        disks = [state["vdis"][vbd["vdi"]] for vbd in vm["vbds"] if vbd["type"] == "Disk"]
        for vdi in disks:
            if in_use(vdi):
                raise api_error("VDI_IN_USE", f"{vdi['uuid']} ({vdi['label']})", "destroy")
        power.backend.drop(vm["snapshot_of"], snapshot)
        for vdi in disks:
            del state["vdis"][vdi["uuid"]]
            _forget_exports(store, vdi["uuid"])
        del state["vms"][snapshot]
        store.append("events.log", {"event": "uninstall", "snapshot": snapshot, "label": vm["name"]})


def _forget_exports(store: Store, vdi: str) -> None:
    for file in store.path("exports").glob(f"*{vdi}*"):
        file.unlink(missing_ok=True)
