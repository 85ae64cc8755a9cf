"""The ESXi host below: its state as it is now, and what hostd does for the API. SSH and the API see one host."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pyVmomi import vim

from tokvm.testing.esxi.errors import VimFault
from tokvm.testing.esxi.hostd import Hostd, hostd_of
from tokvm.testing.esxi.state import State, Store, Vm
from tokvm.testing.hyperv.backend import Backend, load

T = TypeVar("T")


class Ground:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store: Store = Store(folder)

    def state(self) -> State:
        """As it is now: what was due has landed."""
        hostd = hostd_of(self.store)
        with self.store.change() as state:
            hostd.refresh(state)
        return state

    def do(self, act: Callable[[Hostd, State], T]) -> T:
        """One change by hostd. Its faults are raised as the API's."""
        hostd = hostd_of(self.store)
        with self.store.change() as state:
            hostd.refresh(state)
        try:
            with self.store.change() as state:
                return act(hostd, state)
        except VimFault as fault:
            raise translated(fault) from fault

    def backend(self) -> Backend:
        return load(self.store.read()["options"]["backend"], self.store.path("backend"))

    def reverts(self, guest: str) -> int:
        """How often a VM was reverted to a snapshot."""
        try:
            lines = self.store.path("events.log").read_text(encoding="ascii").splitlines()
        except FileNotFoundError:
            return 0
        rows = [json.loads(line) for line in lines if '"revert"' in line]
        return sum(1 for row in rows if (row["event"], row["vm"]) == ("revert", guest))


def vm_of(state: State, vmid: int) -> Vm:
    return next(one for one in state["vms"] if one["vmid"] == vmid)


def translated(fault: VimFault) -> Any:
    """hostd's fault as pyVmomi's."""
    made = getattr(vim.fault, fault.type)(msg=fault.message)
    for name, value in fault.fields:
        setattr(made, name, value)
    if fault.type == "GenericVmConfigFault":
        made.reason = fault.message
    return made
