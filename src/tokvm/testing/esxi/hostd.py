"""hostd: power, snapshots, consolidation. What it has in hand goes on when a client's connection breaks; it lands when its time
has come and somebody looks.

All methods are called with the state locked.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tokvm.testing.esxi import errors, locks, paths
from tokvm.testing.esxi.state import (
    CREATE,
    OFF,
    ON,
    PERSISTENT,
    REMOVE,
    SUSPENDED,
    Done,
    Layer,
    Snapshot,
    State,
    Store,
    Task,
    Vm,
    chain,
    next_number,
    pairs,
    present,
)
from tokvm.testing.esxi.tasks import task_name
from tokvm.testing.hyperv.backend import Backend, load
from tokvm.testing.persona.store import new_uuid

DEEPEST = 32  # snapshots upon each other


class Hostd:
    def __init__(self, store: Store, backend: Backend) -> None:
        self.store = store
        self.backend = backend

    def refresh(self, state: State) -> None:
        """Look at the guests and at the clock: who went off by himself, which task has landed."""
        for vm in state["vms"]:
            if vm["state"] == ON and not self.backend.is_running(vm["guest"]):
                self._note_off(state, vm, "the guest stopped")
        for task in sorted(state["tasks"], key=lambda one: one["due"]):
            self._land(state, task)
        now = time.time()
        state["done"] = [one for one in state["done"] if one["at"] + state["options"]["recent_s"] > now]
        for late in [one for one in state["later"] if one["due"] <= now]:
            from tokvm.testing.esxi.commands import do_late  # it uses us

            state["later"].remove(late)
            do_late(self, state, late["line"])

    def over(self, state: State, vm: Vm, name: str) -> None:
        """A task that took no time."""
        task = f"haTask-{vm['vmid']}-vim.VirtualMachine.{name}-{next_number(state)}"
        state["done"].append(Done(vm=vm["vmid"], name=task, at=time.time(), error=""))

    # Power

    def power_on(self, state: State, vm: Vm, who: str) -> None:
        """Comes back with an open question if there is one to ask."""
        if vm["state"] == ON or vm["question"]:
            raise errors.bad_state(ON, ON)
        readers = locks.read_by_others(self.store, state) | locks.locked(state)
        for layer in (layer for disk in vm["disks"] for layer in chain(state, disk["top"])[:1]):
            if paths.extent_of(layer) in readers:
                raise errors.locked(paths.extent_of(layer))
        if vm["asks"]:
            vm["question"] = vm["asks"]
            vm["world"] = next_number(state) * 7 + 2_098_000
            return
        self.really_on(state, vm, who)

    def really_on(self, state: State, vm: Vm, who: str) -> None:
        self.backend.power_on(vm["guest"])
        vm["state"], vm["since"], vm["question"] = ON, time.time(), ""
        vm["world"] = next_number(state) * 7 + 2_098_000
        self._set_live(state, vm, live=True)
        self.over(state, vm, "powerOn")
        self.store.append("events.log", {"event": "on", "vm": vm["guest"], "who": who})

    def power_off(self, state: State, vm: Vm, who: str) -> None:
        if vm["state"] == OFF and not vm["question"]:
            raise errors.bad_state(OFF, OFF)
        vm["question"] = ""
        if vm["state"] != OFF:
            self.backend.power_off(vm["guest"])
            self._note_off(state, vm, who)
            self.over(state, vm, "powerOff")

    def suspend(self, state: State, vm: Vm) -> None:
        """The guest's memory goes to a file, and its process away."""
        self.power_off(state, vm, "suspended")
        vm["state"] = SUSPENDED

    def shut_down(self, state: State, vm: Vm) -> None:
        """Whether and when the guest obeys is seen later."""
        if vm["state"] != ON:
            raise errors.bad_state(ON, vm["state"])
        if vm["fields"]["tools"] != "guestToolsRunning":
            raise errors.no_tools()
        self.backend.ask_shutdown(vm["guest"])

    def _note_off(self, state: State, vm: Vm, why: str) -> None:
        vm["state"], vm["world"] = OFF, 0
        self._set_live(state, vm, live=False)
        self.store.append("events.log", {"event": "off", "vm": vm["guest"], "who": why})

    def _set_live(self, state: State, vm: Vm, *, live: bool) -> None:
        from tokvm.testing.esxi import vmdks, vmx  # only those who write disks pay for the VMDK code

        for disk in vm["disks"]:
            top = state["layers"][disk["top"]]
            if top["live"] and not live:
                vmdks.new_cid(top)
            top["live"] = live
            vmdks.write(self.store, state, self.backend, top)
        vmx.write(self.store, state, vm)

    # Snapshots

    def create(self, state: State, vm: Vm, name: str, description: str) -> Task | None:
        """The snapshot now, or the task that will make it."""
        if any(task["vm"] == vm["vmid"] for task in state["tasks"]):
            raise errors.busy()
        if vm["question"]:
            raise errors.VimFault("InvalidState", "The operation is not allowed in the current state.")
        if any(disk["shared_bus"] != "noSharing" for disk in vm["disks"]):
            raise errors.VimFault("GenericVmConfigFault", "Cannot take a snapshot of a virtual machine with a shared bus.")
        if len(vm["snapshots"]) >= DEEPEST:
            raise errors.VimFault("TooManySnapshotLevels", "Too many levels of snapshots.")
        task = Task(
            vm=vm["vmid"],
            kind=CREATE,
            number=next_number(state),
            due=time.time() + state["options"]["create_s"],
            name=name,
            description=description,
            freeze="",
        )
        state["tasks"].append(task)
        self._land(state, task)
        return task

    def _freeze(self, state: State, vm: Vm, name: str, description: str) -> Snapshot:
        """Freeze every top but independent ones, and put a new delta over it. Names need not be unique."""
        from tokvm.testing.esxi import vmdks, vmx

        freeze = new_uuid()
        self.backend.freeze(vm["guest"], freeze)
        vm["last_uid"] += 1
        made = Snapshot(
            id=vm["last_uid"],
            name=name,
            description=description,
            parent=vm["current"],
            created=time.time(),
            freeze=freeze,
            state="powered on" if vm["state"] == ON else "powered off",
            paths=[],
        )
        for disk in vm["disks"]:
            if disk["mode"] != PERSISTENT or disk["rdm"] == "physicalMode":
                made["paths"].append("")
                continue
            made["paths"].append(disk["top"])
            frozen = state["layers"][disk["top"]]
            child = vmdks.child_of(self.store, state, frozen, freeze)
            frozen["upto"], frozen["live"] = freeze, False
            state["layers"][child["path"]] = child
            disk["top"] = child["path"]
            child["live"] = vm["state"] == ON
            vmdks.write(self.store, state, self.backend, frozen)
            vmdks.write(self.store, state, self.backend, child)
        vm["snapshots"].append(made)
        vm["current"] = made["id"]
        vmx.write(self.store, state, vm)
        self.store.append("events.log", {"event": "snapshot", "vm": vm["guest"], "name": name, "id": made["id"]})
        return made

    def remove(self, state: State, vm: Vm, number: int) -> None:
        """Forget the snapshot and begin to merge its files; comes back at once."""
        from tokvm.testing.esxi import vmx

        snapshot = next((one for one in vm["snapshots"] if one["id"] == number), None)
        if snapshot is None:
            raise errors.VimFault("NotFound", f"Unable to find a snapshot corresponding to {number}")
        if any(task["vm"] == vm["vmid"] for task in state["tasks"]):
            raise errors.busy()
        vm["snapshots"].remove(snapshot)
        for other in vm["snapshots"]:
            if other["parent"] == number:
                other["parent"] = snapshot["parent"]
        if vm["current"] == number:
            vm["current"] = snapshot["parent"]
        vmx.write(self.store, state, vm)
        self.store.append("events.log", {"event": "remove", "vm": vm["guest"], "name": snapshot["name"], "id": number})
        due = time.time() + state["options"]["merge_s"]
        task = Task(
            vm=vm["vmid"], kind=REMOVE, number=next_number(state), due=due, name="", description="", freeze=snapshot["freeze"]
        )
        state["tasks"].append(task)
        self._land(state, task)

    def _land(self, state: State, task: Task) -> None:
        if time.time() < task["due"]:
            return
        vm = next(one for one in state["vms"] if one["vmid"] == task["vm"])
        state["tasks"].remove(task)
        error = ""
        if task["kind"] == CREATE:
            self._freeze(state, vm, task["name"], task["description"])
        elif not self.consolidate(state, vm, task["freeze"]):
            error = "Unable to access file since it is locked"
        state["done"].append(Done(vm=vm["vmid"], name=task_name(task), at=time.time(), error=error))

    def consolidate(self, state: State, vm: Vm, freeze: str) -> bool:
        """Merge the layers that meet at this freeze. What somebody reads cannot be opened to write: then the files stay, no
        snapshot names them, the VM needs consolidation, and it is False."""
        from tokvm.testing.esxi import vmdks, vmx

        meeting = pairs(state, vm["guest"], freeze)
        readers = locks.read_by_others(self.store, state)
        if any(paths.extent_of(state["layers"][path]) in readers for pair in meeting for path in pair):
            vm["fields"]["consolidationNeeded"] = True
            self.store.append("events.log", {"event": "consolidation needed", "vm": vm["guest"]})
            return False
        for parent, child in meeting:
            vmdks.merge(self.store, state, self.backend, state["layers"][parent], state["layers"][child])
        if not any(layer["upto"] == freeze for layer in state["layers"].values()):  # else another branch hangs on it
            self.backend.drop(vm["guest"], freeze)
        vmx.write(self.store, state, vm)
        merged = [child for _, child in meeting]
        self.store.append("events.log", {"event": "merged", "vm": vm["guest"], "files": merged, "stun": vm["state"] == ON})
        return True

    def consolidate_all(self, state: State, vm: Vm) -> None:
        """As a person does it who reads `consolidation needed`: every layer that no snapshot names goes into its parent."""
        named = {one["freeze"] for one in vm["snapshots"]}
        freezes = {layer["upto"] for layer in self.layers_of(state, vm) if layer["upto"]} - named
        vm["fields"]["consolidationNeeded"] = False
        for freeze in sorted(freezes):
            self.consolidate(state, vm, freeze)

    def revert(self, state: State, vm: Vm, number: int, back: Callable[[str, str], None]) -> None:
        """Off, and what was written since the newest snapshot of this branch is thrown away. Younger snapshots stay, on a
        branch of their own. back: lets the guest's disks (guest, freeze) be as they were."""
        from tokvm.testing.esxi import vmdks, vmx

        snapshot = next(one for one in vm["snapshots"] if one["id"] == number)
        if vm["state"] != OFF:
            self.power_off(state, vm, "reverted to a snapshot")
        back(vm["guest"], snapshot["freeze"])
        for disk, frozen in zip(vm["disks"], snapshot["paths"], strict=True):
            if frozen:
                dropped = state["layers"].pop(disk["top"])
                vmdks.remove(self.store, dropped)
                child = vmdks.child_of(self.store, state, state["layers"][frozen], snapshot["freeze"])
                child["live"] = False
                disk["top"], state["layers"][child["path"]] = child["path"], child
                vmdks.write(self.store, state, self.backend, child)
        vm["current"] = number
        vmx.write(self.store, state, vm)
        self.store.append("events.log", {"event": "revert", "vm": vm["guest"], "name": snapshot["name"], "id": number})

    def layers_of(self, state: State, vm: Vm) -> list[Layer]:
        return [layer for layer in state["layers"].values() if layer["guest"] == vm["guest"]]


def find_vm(state: State, vmid: str) -> Vm:
    found = next((vm for vm in present(state) if str(vm["vmid"]) == vmid), None)
    if found is None:
        raise errors.no_such_vm(vmid)
    return found


def hostd_of(store: Store) -> Hostd:
    return Hostd(store, load(store.read()["options"]["backend"], store.path("backend")))


def with_state(hostd: Hostd, act: Callable[[State], None]) -> None:
    """One change, after a look around, which is kept even if the change is refused."""
    with hostd.store.change() as state:
        hostd.refresh(state)
    with hostd.store.change() as state:
        act(state)
