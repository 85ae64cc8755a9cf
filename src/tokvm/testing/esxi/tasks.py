"""Tasks of hostd as vim-cmd prints them: what is under way, and for a while what is over."""

from __future__ import annotations

import time

from tokvm.testing.esxi.dump import UNSET, Null, Object, Ref, Value, dump, zulu
from tokvm.testing.esxi.errors import VimFault
from tokvm.testing.esxi.state import CREATE, State, Task, Vm


def task_name(task: Task) -> str:
    method = "VirtualMachine.createSnapshot" if task["kind"] == CREATE else "vm.Snapshot.remove"
    return f"haTask-{task['vm']}-vim.{method}-{task['number']}"


def task_list(state: State, vm: Vm) -> str:
    """What is under way and what was lately; all look the same."""
    names = [one["name"] for one in state["done"] if one["vm"] == vm["vmid"]]
    names += [task_name(task) for task in state["tasks"] if task["vm"] == vm["vmid"]]
    if not names:
        return "(ManagedObjectReference) []\n"
    return "(ManagedObjectReference) [\n" + ",\n".join(f"  'vim.Task:{name}'" for name in names) + "\n]\n"


def task_info(state: State, name: str) -> str:
    running = next((task for task in state["tasks"] if task_name(task) == name), None)
    over = next((one for one in state["done"] if one["name"] == name), None)
    if running is not None:
        now, vmid, error = "running", running["vm"], ""
    elif over is not None:
        now, vmid, error = "error" if over["error"] else "success", over["vm"], over["error"]
    else:
        text = f"The object 'vim.Task:{name}' has already been deleted or has not been completely created"
        raise VimFault("vmodl.fault.ManagedObjectNotFound", text, ("obj", Ref(f"vim.Task:{name}")))
    fault: Value = Null("vmodl.MethodFault")
    if error:
        fault = Object(
            "vim.fault.FileLocked", [("faultCause", Null("vmodl.MethodFault")), ("faultMessage", UNSET), ("file", error)]
        )
    method = name.split("-")[2]
    whole = Object(
        "vim.TaskInfo",
        [
            ("key", name),
            ("task", Ref(f"vim.Task:{name}")),
            ("description", Null("vmodl.LocalizableMessage")),
            ("name", method),
            ("descriptionId", method.removeprefix("vim.")),
            ("entity", Ref(f"vim.VirtualMachine:{vmid}")),
            ("entityName", next((vm["name"] for vm in state["vms"] if vm["vmid"] == vmid), "")),
            ("state", now),
            ("cancelled", False),
            ("cancelable", False),
            ("error", fault),
            ("result", UNSET),
            ("progress", 27 if running else UNSET),
            ("reason", Object("vim.TaskReasonUser", [("userName", "root")])),
            ("queueTime", zulu(time.time())),
            ("eventChainId", 1234),
        ],
    )
    return dump(whole, style=state["options"]["dumps"])
