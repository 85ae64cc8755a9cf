"""The virtual machine management service: power, checkpoints, merges. What it has in hand goes on when a client's connection
breaks; it lands when its time has come and somebody looks.

All methods are called with the state locked.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tokvm.testing.hyperv import backend as backends
from tokvm.testing.hyperv import handles, paths
from tokvm.testing.hyperv.errors import OPERATION_FAILED, VIRTUALIZATION, HostError, bad_state, in_use, no_such_vm
from tokvm.testing.hyperv.state import (
    OFF,
    PAUSED,
    RUNNING,
    SAVED,
    STANDARD,
    Checkpoint,
    Job,
    Late,
    State,
    Store,
    Vm,
    guid,
    is_merging,
)

NO_CONTACT = 32768
DISABLED = "Disabled"
COMMANDS = "Microsoft.HyperV.PowerShell.Commands"


class Vmms:
    def __init__(self, store: Store, backend: backends.Backend) -> None:
        self.store = store
        self.backend = backend

    def refresh(self, state: State) -> None:
        """Look at the guests and at the clock: who went off by himself, which merge has landed."""
        for vm in state["vms"].values():
            if vm["state"] == RUNNING and not self.backend.is_running(vm["id"]):
                self._note_off(state, vm, "the guest stopped")
        for job in sorted(state["jobs"], key=lambda one: one["due"]):
            self._land(state, job)
        for late in [one for one in state["later"] if one["due"] <= time.time()]:
            state["later"].remove(late)
            self._land_late(state, late)

    def _land_late(self, state: State, late: Late) -> None:
        from tokvm.testing.hyperv import scripts  # it uses us

        try:
            scripts.ACTS[late["script"]](self, state, late["data"])
        except HostError as error:
            self.store.append("events.log", {"event": "late refusal", "script": late["script"], "why": error.message})

    # Power

    def start(self, state: State, vm: Vm, who: str) -> None:
        if vm["state"] not in (OFF, SAVED):
            raise bad_state("StartVM", vm["name"])
        self.backend.power_on(vm["id"])
        vm["state"], vm["since"] = RUNNING, time.time()
        for nic in vm["nics"]:
            if nic["dynamic_mac"] and nic["mac"] == "000000000000":
                nic["mac"] = f"00155D{int(vm['id'][:6], 16):06X}"
        self._set_live(state, vm, live=True)
        self.store.append("events.log", {"event": "on", "vm": vm["id"], "who": who})
        if vm["fields"]["AutomaticCheckpointsEnabled"]:
            self.checkpoint(state, vm, f"Automatischer Prüfpunkt - {vm['name']}", STANDARD)

    def turn_off(self, state: State, vm: Vm, who: str) -> None:
        """Turning off what is off is no error, only a warning."""
        if vm["state"] != OFF:
            self.backend.power_off(vm["id"])
            self._note_off(state, vm, who)

    def ask_shutdown(self, vm: Vm) -> int:
        """What Msvm_ShutdownComponent.InitiateShutdown returns; -1: the guest has no such component. Whether and when the guest
        obeys is seen later."""
        if not vm["fields"]["ShutdownEnabled"]:
            return -1
        if not vm["fields"]["ShutdownContact"]:
            return NO_CONTACT
        self.backend.ask_shutdown(vm["id"])
        return 0

    def _note_off(self, state: State, vm: Vm, why: str) -> None:
        vm["state"] = OFF
        self._set_live(state, vm, live=False)
        self.store.append("events.log", {"event": "off", "vm": vm["id"], "who": why})

    def _set_live(self, state: State, vm: Vm, *, live: bool) -> None:
        from tokvm.testing.hyperv import vhds  # only those who write disks pay for the VHDX code

        for drive in vm["drives"]:
            if drive["path"]:
                top = state["vhds"][drive["path"]]
                top["live"] = live
                vhds.write(self.store, state, self.backend, top)

    # Checkpoints

    def checkpoint(self, state: State, vm: Vm, name: str, type_: str) -> Checkpoint:
        """Freeze every top and put a new AVHDX over it. Names need not be unique."""
        from tokvm.testing.hyperv import vhds

        if vm["fields"]["CheckpointType"] == DISABLED and type_ == STANDARD:
            text = f"Fehler beim Prüfpunktvorgang für „{vm['name']}“: Prüfpunkte sind deaktiviert."
            raise HostError(VIRTUALIZATION, OPERATION_FAILED, f"OperationFailed,{COMMANDS}.CheckpointVM", text)
        if vm["state"] not in (RUNNING, OFF, PAUSED, SAVED) or is_merging(state, vm["id"]):
            raise bad_state("CheckpointVM", vm["name"])
        freeze = guid()
        self.backend.freeze(vm["id"], freeze)
        made = Checkpoint(
            id=freeze.lower(), name=name, vm=vm["id"], type=type_, parent="", created=time.time(), freeze=freeze, paths=[]
        )
        older = [one["id"] for one in state["checkpoints"] if one["vm"] == vm["id"]]
        made["parent"] = older[-1] if older else ""
        for drive in vm["drives"]:
            made["paths"].append(drive["path"])
            if drive["path"]:
                frozen = state["vhds"][drive["path"]]
                child = vhds.child_of(frozen, freeze)
                frozen["upto"], frozen["live"] = freeze, False
                vhds.write(self.store, state, self.backend, frozen)
                drive["path"] = child["path"]
                state["vhds"][child["path"]] = child
                child["live"] = vm["state"] != OFF
                vhds.write(self.store, state, self.backend, child)
        state["checkpoints"].append(made)
        self.store.append("events.log", {"event": "checkpoint", "vm": vm["id"], "name": name, "id": made["id"]})
        return made

    def apply(self, state: State, vm: Vm, id_: str, revert: Callable[[str, str], None]) -> None:
        """Back to a checkpoint of no memory: off, and what was written since the newest checkpoint is thrown away. Checkpoints
        younger than it stay, on a branch of their own. revert: lets the guests' disks (VM, freeze) be as they were."""
        from tokvm.testing.hyperv import vhds

        applied = next(one for one in state["checkpoints"] if (one["id"], one["vm"]) == (id_, vm["id"]))
        self.turn_off(state, vm, "a checkpoint was applied")
        for drive, path in zip(vm["drives"], applied["paths"], strict=True):
            if path:
                dropped, frozen = state["vhds"].pop(drive["path"]), state["vhds"][path]
                paths.local(self.store.folder, dropped["path"]).unlink()
                child = vhds.child_of(frozen, applied["freeze"])
                child["upto"], child["live"] = "", False
                drive["path"], state["vhds"][child["path"]] = child["path"], child
        revert(vm["id"], applied["freeze"])
        for drive in vm["drives"]:
            if drive["path"]:
                vhds.write(self.store, state, self.backend, state["vhds"][drive["path"]])
        self.store.append("events.log", {"event": "apply", "vm": vm["id"], "name": applied["name"], "id": id_})

    def remove(self, state: State, id_: str, *, wait_for_readers: bool = False) -> None:
        """Forget the checkpoint and begin to merge its files; comes back at once. wait_for_readers: the merge waits until
        nobody has its files open; else that is refused."""
        checkpoint = next((one for one in state["checkpoints"] if one["id"] == id_.lower()), None)
        if checkpoint is None:
            text = "Der Prüfpunkt wurde nicht gefunden."
            raise HostError(VIRTUALIZATION, OPERATION_FAILED, f"ObjectNotFound,{COMMANDS}.RemoveVMSnapshot", text)
        readers = handles.held(self.store, state)
        for path in (path for pair in handles.pairs(state, checkpoint["vm"], checkpoint["freeze"]) for path in pair):
            if paths.key(path) in readers and not wait_for_readers:
                raise in_use(path)
        state["checkpoints"].remove(checkpoint)
        for other in state["checkpoints"]:
            if other["parent"] == checkpoint["id"]:
                other["parent"] = checkpoint["parent"]
        job = Job(vm=checkpoint["vm"], freeze=checkpoint["freeze"], due=time.time() + state["options"]["merge_s"])
        state["jobs"].append(job)
        self.store.append("events.log", {"event": "remove", "vm": checkpoint["vm"], "name": checkpoint["name"], "id": id_})
        self._land(state, job)

    def _land(self, state: State, job: Job) -> None:
        if time.time() < job["due"]:
            return
        from tokvm.testing.hyperv import vhds

        pairs = handles.pairs(state, job["vm"], job["freeze"])
        readers = handles.held(self.store, state)
        if any(paths.key(path) in readers for pair in pairs for path in pair):
            return
        for parent, child in pairs:
            vhds.merge(self.store, state, self.backend, state["vhds"][parent], state["vhds"][child])
        state["jobs"].remove(job)
        self.backend.drop(job["vm"], job["freeze"])
        self.store.append("events.log", {"event": "merged", "vm": job["vm"], "files": [child for _, child in pairs]})


def find_vm(state: State, id_: str) -> Vm:
    try:
        return state["vms"][id_.lower()]
    except KeyError:
        raise no_such_vm(id_) from None


def with_state(vmms: Vmms, act: Callable[[State], None]) -> None:
    """One change, after a look around, which is kept even if the change is refused."""
    with vmms.store.change() as state:
        vmms.refresh(state)
    with vmms.store.change() as state:
        act(state)
