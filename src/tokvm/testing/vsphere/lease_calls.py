"""Calls about export leases, and their properties."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyVmomi import vim

from tokvm.testing.esxi.state import OFF, Snapshot
from tokvm.testing.vsphere import leases
from tokvm.testing.vsphere.hardware import CONTROLLERS
from tokvm.testing.vsphere.leases import DONE, ERROR, READY, Item, Lease
from tokvm.testing.vsphere.machine import Machine, frozen_tops

if TYPE_CHECKING:
    from tokvm.testing.vsphere.endpoint import Endpoint
    from tokvm.testing.vsphere.inventory import Inventory, Property
    from tokvm.testing.vsphere.sessions import Session
    from tokvm.testing.vsphere.soap import Call

NVRAM = "nvram"


def export_snapshot(endpoint: Endpoint, call: Call, _session: Session) -> Any:
    machine = endpoint.inventory.machine(call.this)
    return _export(endpoint, machine, machine.snapshot_of(call.moid), call.moid)


def export_machine(endpoint: Endpoint, call: Call, _session: Session) -> Any:
    """Only of a VM that is off."""
    machine = endpoint.inventory.machine(call.this)
    if machine.vm["state"] != OFF:
        text = "The attempted operation cannot be performed in the current state (Powered on)."
        raise vim.fault.InvalidPowerState(requestedState="poweredOff", existingState=machine.vm["state"], msg=text)
    return _export(endpoint, machine, None, "")


def _export(endpoint: Endpoint, machine: Machine, snapshot: Snapshot | None, moid: str) -> Any:
    if machine.field("encrypted"):
        raise vim.fault.InvalidState(msg="The operation is not allowed in the current state.")
    items = [
        Item(f"disk-{number}.vmdk", disk, machine.layers(top)[0], snapshot["freeze"] if snapshot else "")
        for number, (disk, top) in enumerate(zip(machine.vm["disks"], frozen_tops(machine, snapshot), strict=True))
        if top and disk["rdm"] != "physicalMode"
    ]
    lease = endpoint.leases.open(machine.ref, moid, items)
    return vim.HttpNfcLease(lease.moid, None)


def progress(endpoint: Endpoint, call: Call, _session: Session) -> None:
    endpoint.leases.report(_live(endpoint, call), call.arguments["percent"])


def complete(endpoint: Endpoint, call: Call, _session: Session) -> None:
    endpoint.leases.end(_live(endpoint, call), DONE)


def abort(endpoint: Endpoint, call: Call, _session: Session) -> None:
    fault = call.arguments.get("fault") or vim.fault.Timedout(msg="The lease was aborted by the user.")
    endpoint.leases.end(_live(endpoint, call), ERROR, fault)


def _live(endpoint: Endpoint, call: Call) -> Lease:
    lease = endpoint.leases.find(call.moid)
    if lease is None or lease.state not in (READY, leases.INITIALIZING):
        if lease is not None and isinstance(lease.error, vim.fault.Timedout):
            raise vim.fault.Timedout(msg="Operation timed out.")
        raise vim.fault.InvalidState(msg="The operation is not allowed in the current state.")
    return lease


def _lease(inventory: Inventory, this: Any) -> Lease:
    lease = inventory.endpoint.leases.find(this._moId)
    if lease is None:
        raise KeyError(this._moId)
    return lease


def _state(inventory: Inventory, this: Any) -> Any:
    return vim.HttpNfcLease.State(_lease(inventory, this).state)


def _error(inventory: Inventory, this: Any) -> Any:
    return _lease(inventory, this).error


def _info(inventory: Inventory, this: Any) -> Any:
    """Unset until it is ready."""
    lease = _lease(inventory, this)
    if lease.state == leases.INITIALIZING:
        return None
    urls = [_url(inventory, lease, item.name, item) for item in lease.items]
    return vim.HttpNfcLease.Info(
        lease=this,
        entity=lease.entity,
        deviceUrl=[*urls, _url(inventory, lease, f"disk-{len(urls)}.nvram", None)],
        totalDiskCapacityInKB=sum(item.layer["size"] for item in lease.items) // 1024,
        leaseTimeout=int(inventory.endpoint.options["lease_s"]),
    )


def _url(inventory: Inventory, lease: Lease, name: str, item: Item | None) -> Any:
    """[C] fileSize is often 0, and the nvram is listed like a disk. A key: `/vm-7/ParaVirtualSCSIController0:1`."""
    key = NVRAM if item is None else f"{_controller(item.disk)}{item.disk['bus_number']}:{item.disk['unit']}"
    return vim.HttpNfcLease.DeviceUrl(
        key=f"/{lease.entity._moId}/{key}",
        importKey=f"/{lease.entity._moId}/{key}",
        url=f"https://{inventory.endpoint.lease_address()}/nfc/{lease.ticket}/{name}",
        sslThumbprint=inventory.endpoint.thumbprint,
        disk=item is not None,
        targetId=name,
        datastoreKey="",
        fileSize=0,
    )


def _controller(disk: Any) -> str:
    return str(CONTROLLERS[disk["controller"]].__name__).rpartition(".")[2]


def _percent(inventory: Inventory, this: Any) -> int:
    return _lease(inventory, this).percent


def _initialized(inventory: Inventory, this: Any) -> int:
    return 0 if _lease(inventory, this).state == leases.INITIALIZING else 100


ROWS = {
    ("VirtualMachineSnapshot", "ExportSnapshot"): export_snapshot,
    ("VirtualMachine", "ExportVm"): export_machine,
    ("HttpNfcLease", "HttpNfcLeaseProgress"): progress,
    ("HttpNfcLease", "HttpNfcLeaseComplete"): complete,
    ("HttpNfcLease", "HttpNfcLeaseAbort"): abort,
}
PROPERTIES: dict[str, Property] = {
    "state": _state,
    "error": _error,
    "info": _info,
    "initializeProgress": _initialized,
    "transferProgress": _percent,
    "mode": lambda _inventory, _this: "pushOrGet",
}
