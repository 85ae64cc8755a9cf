"""What the scripts in sources/hyperv/scripts do and answer: one function for each. Their contract: docs/hyperv-commands.md.

A function gets the script's data, whose fields were checked, and the state, locked; what it returns is the answer's `value`.
Texts are a German host's, so that nobody can parse them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

from tokvm.testing.hyperv import handles, paths, records
from tokvm.testing.hyperv.contract import Data
from tokvm.testing.hyperv.errors import SHARING_VIOLATION, HostError
from tokvm.testing.hyperv.records import Value
from tokvm.testing.hyperv.state import (
    OFF,
    RECOVERY,
    RUNNING,
    STANDARD,
    State,
    Vm,
    chain,
)
from tokvm.testing.hyperv.vmms import Vmms, find_vm

Act = Callable[[Vmms, State, Data], Value]

POLL_S = 0.05
NOT_FOUND = -2147024894  # 0x80070002
TYPES = ("Disabled", "Production", "ProductionOnly", "Standard")
STARTS = ("Nothing", "StartIfRunning", "Start")


def _checked(value: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise HostError(
            "System.Management.Automation.ParameterBindingException",
            -2146233087,
            "CannotConvertArgumentNoMessage,Microsoft.HyperV.PowerShell.Commands.SetVM",
            f"„{value}“ kann nicht konvertiert werden.",
        )
    return value


def _vm(state: State, data: Data) -> Vm:
    return find_vm(state, cast("str", data["vm"]))


# Reading


def list_(_vmms: Vmms, state: State, _data: Data) -> Value:
    machines = [{"id": vm["id"], "name": vm["name"], "state": vm["state"]} for vm in state["vms"].values()]
    return {"host": state["options"]["node"], "machines": machines}


def ping(_vmms: Vmms, _state: State, _data: Data) -> Value:
    return {}


def inspect(vmms: Vmms, state: State, data: Data) -> Value:
    vm = _vm(state, data)
    fields, second = vm["fields"], vm["fields"]["Generation"] == 2
    boot = next(({"number": one["number"], "location": one["location"]} for one in vm["drives"]), None)
    return {
        "host": state["options"]["node"],
        "id": vm["id"],
        "name": vm["name"],
        "notes": vm["notes"],
        "version": fields["Version"],
        "state": vm["state"],
        **records.status(state, vm),
        "generation": fields["Generation"],
        "processors": fields["ProcessorCount"],
        "memory": {
            "startup": fields["MemoryStartup"],
            "dynamic": fields["DynamicMemoryEnabled"],
            "maximum": fields["MemoryMaximum"],
        },
        **records.settings(vm),
        "replication": {"state": fields["ReplicationState"], "mode": fields["ReplicationMode"]},
        "clustered": vm["role"] is not None,
        "cluster": {**(records.cluster(vm) or {}), "error": None} if vm["role"] else None,
        "firmware": {"secureBoot": fields["SecureBoot"], "bootDrive": boot} if second else None,
        "security": {
            "tpm": fields["TpmEnabled"],
            "shielded": fields["Shielded"],
            "encryptedState": fields["EncryptStateAndVmMigrationTraffic"],
        },
        "disks": [records.inspected(vmms.store, state, drive) for drive in vm["drives"]],
        "nics": records.nics(vm),
        "checkpoints": records.checkpoints(state, vm),
        "services": records.services(vm),
    }


def layers(_vmms: Vmms, state: State, data: Data) -> Value:
    vm = _vm(state, data)
    disks = [
        {**records.place(drive), "path": drive["path"], "layers": [records.layer(vhd) for vhd in chain(state, drive["path"])]}
        for drive in vm["drives"]
        if drive["path"]
    ]
    return {
        "state": vm["state"],
        "operational": records.status(state, vm)["operational"],
        "disks": disks,
        "checkpoints": records.checkpoints(state, vm),
    }


def checkpoints(_vmms: Vmms, state: State, data: Data) -> Value:
    return {"checkpoints": records.checkpoints(state, _vm(state, data))}


def power(_vmms: Vmms, state: State, data: Data) -> Value:
    vm = _vm(state, data)
    uptime = int(time.time() - vm["since"]) if vm["state"] != OFF else 0
    return {
        "state": vm["state"],
        **records.status(state, vm),
        "uptime": uptime,
        "now": int(time.time()),
        "record": records.record_line(vm["notes"])[1],
        **records.settings(vm),
        "clustered": vm["role"] is not None,
        "cluster": records.cluster(vm),
    }


def evidence(vmms: Vmms, state: State, data: Data) -> Value:
    vm = _vm(state, data)
    used = handles.used(vmms.store, state)
    files = [_opened(vmms, drive["path"], used) for drive in vm["drives"] if drive["path"]]
    return {"state": vm["state"], "operational": records.status(state, vm)["operational"], "files": files}


def _opened(vmms: Vmms, path: str, used: set[str]) -> Value:
    if not paths.local(vmms.store.folder, path).exists():
        return {
            "path": path,
            "free": False,
            "hresult": NOT_FOUND,
            "message": f"Die Datei „{path}“ konnte nicht gefunden werden.",
        }
    if paths.key(path) in used:
        return {"path": path, "free": False, "hresult": SHARING_VIOLATION, "message": f"„{path}“ wird verwendet."}
    return {"path": path, "free": True, "hresult": 0, "message": ""}


# Changing


def checkpoint(vmms: Vmms, state: State, data: Data) -> Value:
    """One under each name; another type of checkpoint than was asked for is not made of a VM that is not off."""
    vm = _vm(state, data)
    kind = vm["fields"]["CheckpointType"]
    mine = [
        one for one in state["checkpoints"] if (one["vm"], one["name"]) == (vm["id"], data["mark"]) and one["type"] != RECOVERY
    ]
    suits = kind in cast("list[object]", data["types"]) or (vm["state"] == OFF and kind != "Disabled")
    if not mine and suits:
        mine = [vmms.checkpoint(state, vm, cast("str", data["mark"]), STANDARD)]
    made = [{key: value for key, value in records.checkpoint(vm, one).items() if key != "parent"} for one in mine]
    said = records.settings(vm)
    del said["autoStart"]
    return {**said, "state": vm["state"], "checkpoints": made}


def remove_checkpoint(vmms: Vmms, state: State, data: Data) -> Value:
    vm = _vm(state, data)
    wanted = cast("str", data["id"]).lower()
    found = [one for one in state["checkpoints"] if one["vm"] == vm["id"] and one["id"] == wanted]
    if not found:
        return {"found": False, "name": None, "removed": False}
    removed = found[0]["name"] == data["mark"]
    if removed:
        vmms.remove(state, wanted)
    return {"found": True, "name": found[0]["name"], "removed": removed}


def record(_vmms: Vmms, state: State, data: Data) -> Value:
    """The one line `#tokvm …` in the Notes: set if it is what was expected."""
    vm = _vm(state, data)
    before, line, end, after = records.record_line(vm["notes"])
    swapped = line == data["expect"]
    if swapped:
        written = "" if data["write"] is None else f"#tokvm {data['write']}{end}"
        vm["notes"] = before + written + after
    return {"swapped": swapped, "record": records.record_line(vm["notes"])[1], "now": int(time.time())}


def settings(_vmms: Vmms, state: State, data: Data) -> Value:
    vm = _vm(state, data)
    new: Value = {}
    if data.get("checkpointType") is not None:
        new["CheckpointType"] = _checked(data["checkpointType"], TYPES)
    if data.get("automaticCheckpoints") is not None:
        new["AutomaticCheckpointsEnabled"] = data["automaticCheckpoints"]
    if data.get("autoStart") is not None:
        new["AutomaticStartAction"] = _checked(data["autoStart"], STARTS)
    vm["fields"].update(new)
    role = vm["role"]
    if role is not None and data.get("priority") is not None:
        role["priority"] = cast("int", data["priority"])
    if role is not None and data.get("restartAction") is not None:
        role["restart_action"] = cast("int", data["restartAction"])
    return {**records.settings(vm), "clustered": role is not None, "cluster": records.cluster(vm)}


def shutdown(vmms: Vmms, state: State, data: Data) -> Value:
    """Asks, and says how it is now; `wait_for_off` waits, which must not hold the lock."""
    vm = _vm(state, data)
    answer = vmms.ask_shutdown(vm) if data["ask"] and vm["state"] == RUNNING else None
    vmms.refresh(state)
    return {"answer": answer, "state": vm["state"]}


def wait_for_off(vmms: Vmms, data: Data, value: Value) -> None:
    """The rest of `shutdown`: looks until the VM is off or `wait` seconds have passed, unless the guest refused."""
    until = time.monotonic() + cast("float", data["wait"])
    while value["state"] != OFF and value["answer"] in (None, 0, 4096) and time.monotonic() < until:
        time.sleep(min(POLL_S, max(until - time.monotonic(), 0)))
        with vmms.store.change() as state:
            vmms.refresh(state)
            value["state"] = _vm(state, data)["state"]


def turn_off(vmms: Vmms, state: State, data: Data) -> Value:
    vm = _vm(state, data)
    vmms.turn_off(state, vm, "turn-off")
    return {"state": vm["state"]}


def start(vmms: Vmms, state: State, data: Data) -> Value:
    vm = _vm(state, data)
    if vm["state"] == OFF:
        vmms.start(state, vm, "start")
    return {"state": vm["state"]}


def leftovers(vmms: Vmms, state: State, data: Data) -> Value:
    """Those whose sshd is gone; a session that lives is not listed."""
    found = []
    for holder in handles.holders(vmms.store, state):
        if not handles.is_alive(holder):
            found.append({"pid": holder["pid"], "ended": bool(data["end"])})
            if data["end"]:
                handles.forget(vmms.store, holder["pid"])
    return {"processes": found}


ACTS: dict[str, Act] = {
    "list": list_,
    "ping": ping,
    "inspect": inspect,
    "layers": layers,
    "checkpoints": checkpoints,
    "power": power,
    "evidence": evidence,
    "checkpoint": checkpoint,
    "remove-checkpoint": remove_checkpoint,
    "record": record,
    "settings": settings,
    "shutdown": shutdown,
    "turn-off": turn_off,
    "start": start,
    "leftovers": leftovers,
}
