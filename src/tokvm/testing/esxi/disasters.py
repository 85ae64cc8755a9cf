"""What other people, the guests and the host itself do to a played ESXi host, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tokvm.testing.esxi import paths
from tokvm.testing.esxi.hostd import Hostd, with_state
from tokvm.testing.esxi.state import OFF, ON, REMOVE, Layer, Snapshot, State, Store, Vm, datastore_of, next_number, present
from tokvm.testing.hyperv.backend import FileBackend


class Disasters:
    """A part of EsxHost."""

    store: Store
    folder: Path
    change: Callable[[str, Callable[[Hostd, State, Vm], object]], None]
    state: Callable[[], State]
    vm: Callable[[str], Vm]

    @property
    def guests(self) -> FileBackend:
        raise NotImplementedError

    @property
    def _hostd(self) -> Hostd:
        raise NotImplementedError

    # Power

    def guest_stops(self, name: str) -> None:
        """The guest goes off by itself: shut down from inside, or crashed."""
        self._hostd.backend.power_off(self.vm(name)["guest"])
        self.state()

    def suspend(self, name: str) -> None:
        self.change(name, lambda hostd, state, vm: hostd.suspend(state, vm))

    def answer(self, name: str, choice: int) -> None:
        """Somebody answers the open question: 0 cancels the power-on."""

        def act(hostd: Hostd, state: State, vm: Vm) -> None:
            if choice == 0:
                vm["question"], vm["world"] = "", 0
            else:
                hostd.really_on(state, vm, "an answer")

        self.change(name, act)

    def host_restarts(self) -> None:
        """Everything stops, merges too; what the host starts by itself comes back. Vmids stay."""
        hostd = self._hostd

        def act(state: State) -> None:
            for task in state["tasks"]:
                if task["kind"] == REMOVE:
                    _by_id(state, task["vm"])["fields"]["consolidationNeeded"] = True
            state["tasks"], state["done"] = [], []
            for vm in present(state):
                if vm["state"] == ON or vm["question"]:
                    hostd.power_off(state, vm, "host restart")
            state["done"] = []
            entries = [vm for vm in present(state) if vm["autostart"] is not None and vm["state"] == OFF]
            for vm in sorted(entries, key=lambda one: one["autostart"]["startOrder"] if one["autostart"] else 0):
                if vm["autostart"] and vm["autostart"]["startAction"] != "none" and state["options"]["autostart"]:
                    hostd.power_on(state, vm, "autostart")

        with_state(hostd, act)

    def ha_restarts(self, name: str) -> bool:
        """vSphere HA finds the VM off and starts it, if nothing has its disks open. True if it did."""
        started = []

        def act(hostd: Hostd, state: State, vm: Vm) -> None:
            if vm["state"] == OFF:
                hostd.power_on(state, vm, "vSphere HA")
                started.append(vm)

        self.change(name, act)
        return bool(started)

    # Snapshots

    def foreign_snapshot(self, name: str, label: str = "nightly", *, description: str = "") -> Snapshot:
        """Somebody else's; there at once."""

        def act(hostd: Hostd, state: State, vm: Vm) -> None:
            late, state["options"]["create_s"] = state["options"]["create_s"], 0.0
            hostd.create(state, vm, label, description)
            state["options"]["create_s"] = late

        self.change(name, act)
        return self.vm(name)["snapshots"][-1]

    def delete_snapshot(self, name: str, number: int) -> None:
        """Somebody deletes it, whosever it is: its merge begins."""
        self.change(name, lambda hostd, state, vm: hostd.remove(state, vm, number))

    def revert(self, name: str, number: int) -> None:
        """File backend. Somebody goes back to it: the VM is off, and its disks are as they were then."""
        self.change(name, lambda hostd, state, vm: hostd.revert(state, vm, number, self.guests.revert))

    def consolidate(self, name: str) -> None:
        """Somebody does what `consolidation needed` asks for."""
        self.change(name, lambda hostd, state, vm: hostd.consolidate_all(state, vm))

    def finish_tasks(self) -> None:
        """Whatever is under way is done now."""
        with self.store.change() as state:
            for task in state["tasks"]:
                task["due"] = 0.0
        self.state()

    # Moving

    def vmotion_away(self, name: str) -> None:
        """Another host has it from now on, in the same files, which stay locked."""

        def act(_hostd: Hostd, _state: State, vm: Vm) -> None:
            vm["away"], vm["world"] = True, 0

        self.change(name, act)

    def vmotion_back(self, name: str) -> None:
        """It comes back, under another Vmid."""

        def act(_hostd: Hostd, state: State, vm: Vm) -> None:
            vm["vmid"], vm["away"] = next_number(state), False
            vm["world"] = next_number(state) * 7 + 2_098_000 if vm["state"] == ON else 0

        self.change(name, act)

    def storage_vmotion(self, name: str, datastore: str, folder: str = "") -> None:
        """All its files go to a directory on another datastore; the VM runs on. Deltas get the format that is usual there."""

        def act(hostd: Hostd, state: State, vm: Vm) -> None:
            from tokvm.testing.esxi import vmdks, vmx

            old = paths.directory(state, vm)
            vm["datastore"] = next(one["uuid"] for one in state["datastores"] if one["name"] == datastore)
            vm["folder"] = folder or vm["folder"]
            layers = hostd.layers_of(state, vm)
            for layer in layers:
                vmdks.remove(self.store, layer)
            moved = {layer["path"]: _moved(state, vm, layer) for layer in layers}
            _rename(state, vm, moved)
            for layer in layers:
                vmdks.write(self.store, state, hostd.backend, layer)
            vmx.write(self.store, state, vm)
            _remove_folder(paths.local(self.folder, old))

        self.change(name, act)


def _moved(state: State, vm: Vm, layer: Layer) -> str:
    return f"{paths.directory(state, vm)}/{paths.name_of(layer['path'])}"


def _rename(state: State, vm: Vm, moved: dict[str, str]) -> None:
    for old, new in moved.items():
        layer = state["layers"].pop(old)
        layer["path"], layer["parent"] = new, moved.get(layer["parent"], layer["parent"])
        if layer["parent"]:
            small = datastore_of(state, vm["datastore"])["type"] != "VMFS-6" and layer["size"] < 2 << 40
            layer["kind"] = "delta" if small else "sesparse"
        state["layers"][new] = layer
    for disk in vm["disks"]:
        disk["top"] = moved.get(disk["top"], disk["top"])
    for snapshot in vm["snapshots"]:
        snapshot["paths"] = [moved.get(path, path) for path in snapshot["paths"]]


def _remove_folder(folder: Path) -> None:
    """What hostd knows goes along; what somebody else had put there stays behind, and the directory with it."""
    for name in ("*.vmx", "*.vmsd", "*.nvram", "*.log", "*.lck", "*.vswp", "*.vmsn"):
        for path in folder.glob(name):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _by_id(state: State, vmid: int) -> Vm:
    return next(vm for vm in state["vms"] if vm["vmid"] == vmid)
