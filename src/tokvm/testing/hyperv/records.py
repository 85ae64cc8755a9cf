"""Pieces of answers: what the host says of a VM, in the forms that several scripts share."""

from __future__ import annotations

from tokvm.testing.hyperv import paths
from tokvm.testing.hyperv.state import DIFFERENCING, FIXED, RUNNING, Checkpoint, Drive, State, Store, Vhd, Vm, chain, is_merging

Value = dict[str, object]

COMPONENTS = {
    "ShutdownEnabled": "9F8233AC-BE49-4C79-8EE3-E7E1985B2077",
    "VssEnabled": "5CED1297-4598-4915-A5FC-AD21BB4D02A4",
    "": "2497F4DE-E9FA-4204-80E4-4B75C46419C0",
}
HOST_VOLUME = "\\\\?\\Volume{5d2c1fd0-0000-0000-0000-300300000000}\\"


def status(state: State, vm: Vm) -> Value:
    if is_merging(state, vm["id"]):
        return {"operational": [11, 32772], "status": "Datenträger werden zusammengeführt (42%)"}
    return {"operational": [2], "status": "Normaler Betrieb"}


def settings(vm: Vm) -> Value:
    fields = vm["fields"]
    return {
        "checkpointType": fields["CheckpointType"],
        "automaticCheckpoints": fields["AutomaticCheckpointsEnabled"],
        "autoStart": fields["AutomaticStartAction"],
    }


def cluster(vm: Vm) -> Value | None:
    role = vm["role"]
    if role is None:
        return None
    return {
        "group": role["group"],
        "owner": role["owner"],
        "priority": role["priority"],
        "restartAction": role["restart_action"],
    }


def place(drive: Drive) -> Value:
    return {"controller": ("IDE", "SCSI")[drive["controller"]], "number": drive["number"], "location": drive["location"]}


def layer(vhd: Vhd) -> Value:
    return {
        "path": vhd["path"],
        "parent": vhd["parent"],
        "format": vhd["format"],
        "size": vhd["size"],
        "diskId": vhd["identifier"].upper(),
    }


def inspected(store: Store, state: State, drive: Drive) -> Value:
    number = drive["pass_through"] if drive["pass_through"] >= 0 else None
    known = drive["path"] and not drive["path"].startswith("\\\\")
    return {
        **place(drive),
        "path": drive["path"] or f"Disk {number} 25.00 GB Bus 0 Lun 0 Target 0",
        "passThrough": number,
        "shared": drive["shared"],
        "layers": [_inspected_layer(store, vhd) for vhd in chain(state, drive["path"])],
        "volume": {"id": HOST_VOLUME, "fileSystem": "NTFS", "size": 1 << 40, "free": 1 << 39} if known else None,
    }


def _inspected_layer(store: Store, vhd: Vhd) -> Value:
    type_ = {DIFFERENCING: "Differencing", FIXED: "Fixed"}.get(vhd["type"], "Dynamic")
    sizes = {"fileSize": paths.local(store.folder, vhd["path"]).stat().st_size, "type": type_}
    sectors = {"logicalSector": vhd["logical"], "physicalSector": vhd["physical"]}
    return {**layer(vhd), **sizes, **sectors, "error": None}


def nics(vm: Vm) -> list[Value]:
    return [
        {
            "id": f"Microsoft:{vm['id'].upper()}\\{number:08X}-0000-4000-8000-000000000000",
            "name": nic["name"],
            "mac": nic["mac"],
            "dynamic": nic["dynamic_mac"],
            "switch": nic["switch"],
            "vlan": {"mode": "Access" if nic["vlan"] else "Untagged", "access": nic["vlan"], "native": 0},
        }
        for number, nic in enumerate(vm["nics"])
    ]


def services(vm: Vm) -> list[Value]:
    contact = bool(vm["fields"]["ShutdownContact"]) and vm["state"] == RUNNING
    return [
        {"component": guid, "enabled": bool(vm["fields"].get(field, True)), "status": 2 if contact else 12}
        for field, guid in COMPONENTS.items()
    ]


def checkpoints(state: State, vm: Vm) -> list[Value]:
    """In no order that anybody may count on."""
    return [checkpoint(vm, one) for one in reversed(state["checkpoints"]) if one["vm"] == vm["id"]]


def checkpoint(vm: Vm, one: Checkpoint) -> Value:
    disks = [{**place(drive), "path": path} for drive, path in zip(vm["drives"], one["paths"], strict=True)]
    return {"id": one["id"], "name": one["name"], "type": one["type"], "parent": one["parent"] or None, "disks": disks}


def record_line(notes: str) -> tuple[str, str | None, str, str]:
    """(text before our line, the line or None, its newline, text behind)."""
    import re  # most commands live without

    match = re.search(r"(^|\n)#tokvm ([^\r\n]*)(\r?\n|\Z)", notes)
    if match is None:
        return "", None, "\n", notes
    return notes[: match.end(1)], match[2], match[3], notes[match.end() :]
