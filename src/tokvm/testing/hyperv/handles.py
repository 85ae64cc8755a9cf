"""Who holds which file: VMs their chains, merges their files, sftp-servers what they opened (persona.holders)."""

from __future__ import annotations

from tokvm.testing.hyperv.paths import key
from tokvm.testing.hyperv.state import OFF, State, Store, chain
from tokvm.testing.persona import holders as everybody
from tokvm.testing.persona.holders import Holder, forget, is_alive, note

__all__ = ["Holder", "forget", "held", "holders", "is_alive", "locked", "note", "pairs", "used"]


def holders(store: Store, state: State) -> list[Holder]:
    """Every sftp-server there is: the living, and the orphans (Win32-OpenSSH's issue 1605) that hold something."""
    return everybody.holders(store, orphans=state["options"]["orphans"])


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
