"""Reading: what xe's list and param-get commands print."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tokvm.testing.xenserver.errors import XeError, no_such
from tokvm.testing.xenserver.state import RUNNING, State, Vbd, Vdi, Vm


def escaped(values: Iterable[str]) -> str:
    """One line of `--minimal`."""
    return ",".join(value.replace("\\", "\\\\").replace(",", "\\,") for value in values)


def as_map(values: dict[str, str]) -> str:
    return "; ".join(f"{key}: {value}" for key, value in values.items())


def find_vm(state: State, uuid: str) -> Vm:
    try:
        return state["vms"][uuid]
    except KeyError:
        raise no_such("VM", uuid) from None


def find_vdi(state: State, uuid: str) -> Vdi:
    try:
        return state["vdis"][uuid]
    except KeyError:
        raise no_such("VDI", uuid) from None


def real_vms(state: State) -> list[Vm]:
    return [vm for vm in state["vms"].values() if not (vm["control"] or vm["template"] or vm["snapshot_of"])]


def snapshots_of(state: State, uuid: str) -> list[Vm]:
    return [vm for vm in state["vms"].values() if vm["snapshot_of"] == uuid]


def vm_list(state: State, param: str) -> str:
    return escaped(vm_field(vm, param) for vm in real_vms(state))


def snapshot_list(state: State, uuid: str, param: str) -> str:
    return escaped(vm_field(vm, param) for vm in snapshots_of(state, uuid))


MAPS = ("HVM-boot-params", "platform", "blocked-operations", "other-config")


def vm_field(vm: Vm, param: str) -> str:
    own: dict[str, Callable[[], str]] = {
        "uuid": lambda: vm["uuid"],
        "name-label": lambda: vm["name"],
        "power-state": lambda: vm["power"],
        "dom-id": lambda: str(vm["domid"]),
        "current-operations": lambda: as_map({operation["ref"]: operation["name"] for operation in vm["operations"]}),
    }
    if param in own:
        return own[param]()
    return as_map(vm["maps"].get(param, {})) if param in MAPS else vm["fields"].get(param, "")


def vm_map_value(vm: Vm, param: str, key: str) -> str:
    try:
        return vm["maps"][param][key]
    except KeyError:
        raise XeError(f"Error: Key {key} not found in map") from None


def vbd_list(state: State, uuid: str, param: str) -> str:
    vm = state["vms"].get(uuid)  # a filter that matches nothing is no error
    disks = [vbd for vbd in vm["vbds"] if vbd["type"] == "Disk"] if vm else []
    return escaped(_vbd_field(vm, vbd, param) for vbd in disks) if vm else ""


def _vbd_field(vm: Vm, vbd: Vbd, param: str) -> str:
    return {
        "uuid": vbd["uuid"],
        "userdevice": vbd["userdevice"],
        "device": vbd["device"] if vm["power"] == RUNNING else "",
        "bootable": _bool(vbd["bootable"]),
        "vdi-uuid": vbd["vdi"] or "<not in database>",
        "mode": vbd["mode"],
        "currently-attached": _bool(vm["domid"] >= 0),
    }[param]


def vdi_field(vdi: Vdi, param: str) -> str:
    return {
        "virtual-size": str(vdi["size"]),
        "sr-uuid": vdi["sr"],
        "name-label": vdi["label"],
        "sharable": _bool(vdi["sharable"]),
        "snapshot-of": vdi["snapshot_of"] or "<not in database>",
        "sm-config": as_map(vdi["sm_config"]),
    }[param]


def sr_field(state: State, uuid: str, param: str) -> str:
    if uuid not in state["srs"]:
        raise no_such("SR", uuid)
    sr = state["srs"][uuid]
    return {
        "type": sr["type"],
        "name-label": sr["label"],
        "physical-size": str(sr["size"]),
        "physical-utilisation": str(sr["used"]),
    }[param]


def vif_list(state: State, uuid: str, param: str) -> str:
    vm = state["vms"].get(uuid)
    names = {"device": "device", "MAC": "mac", "network-name-label": "network"}
    return escaped(str(dict(vif)[names[param]]) for vif in vm["vifs"]) if vm else ""


def vtpm_list(state: State, uuid: str) -> str:
    if not state["options"]["vtpm_known"]:
        raise XeError("Unknown command: vtpm-list")
    vm = state["vms"].get(uuid)
    return escaped(vm["vtpms"]) if vm else ""


def _bool(value: bool) -> str:  # noqa: FBT001
    return "true" if value else "false"
