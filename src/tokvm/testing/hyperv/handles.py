"""Who holds which file: VMs their chains, merges their files, sftp-servers what they opened.

handles/<pid>.json   {"pid", "tick", "started", "paths": {handle: Windows path}} of one sftp-server

A process that is gone holds nothing, unless orphans are on: then what it held when its connection broke stays held by its
record, as by the sftp-server.exe that Win32-OpenSSH sometimes leaves behind (its issue 1605), until the record is killed.
"""

from __future__ import annotations

import contextlib
import json
from typing import TypedDict

from tokvm.testing import pids
from tokvm.testing.hyperv.paths import key
from tokvm.testing.hyperv.state import OFF, State, Store, chain
from tokvm.testing.persona.store import replace


class Holder(TypedDict):
    pid: int
    tick: int
    started: float
    paths: dict[str, str]


def note(store: Store, holder: Holder) -> None:
    replace(store.path("handles", f"{holder['pid']}.json"), json.dumps(holder))


def forget(store: Store, pid: int) -> None:
    store.path("handles", f"{pid}.json").unlink(missing_ok=True)


def is_alive(holder: Holder) -> bool:
    """A real process of ours; else it is only remembered."""
    return pids.start_tick(holder["pid"]) == holder["tick"]


def holders(store: Store, state: State) -> list[Holder]:
    """Every sftp-server there is: the living, and the orphans that hold something."""
    found = []
    for path in sorted(store.path("handles").glob("*.json")):
        with contextlib.suppress(FileNotFoundError):
            holder: Holder = json.loads(path.read_text(encoding="ascii"))
            if is_alive(holder) or (state["options"]["orphans"] and holder["paths"]):
                found.append(holder)
            else:
                path.unlink(missing_ok=True)
    return found


def held(store: Store, state: State) -> set[str]:
    """Keys of the paths that some sftp-server has open."""
    return {key(path) for holder in holders(store, state) for path in holder["paths"].values()}


def locked(state: State) -> set[str]:
    """Keys of the paths that nobody else may open, not even to read: tops of VMs that are not off, files of a merge."""
    tops = {key(drive["path"]) for vm in state["vms"].values() if vm["state"] != OFF for drive in vm["drives"] if drive["path"]}
    merging = {key(path) for job in state["jobs"] for pair in pairs(state, job["vm"], job["freeze"]) for path in pair}
    return tops | merging


def used(store: Store, state: State) -> set[str]:
    """Keys of the paths that cannot be opened exclusively: a running VM has all of its chain open."""
    running = [vm for vm in state["vms"].values() if vm["state"] != OFF]
    chains = {
        key(vhd["path"]) for vm in running for drive in vm["drives"] if drive["path"] for vhd in chain(state, drive["path"])
    }
    return chains | locked(state) | held(store, state)


def pairs(state: State, vm: str, freeze: str) -> list[tuple[str, str]]:
    """(parent, child) of each drive whose layers meet at this freeze."""
    mine = [vhd for vhd in state["vhds"].values() if vhd["vm"] == vm]
    children = {vhd["disk"]: vhd["path"] for vhd in mine if vhd["since"] == freeze}
    return [(vhd["path"], children[vhd["disk"]]) for vhd in mine if vhd["upto"] == freeze and vhd["disk"] in children]
