"""Who has which file of a disk open: VMs their chains, merges their files, sftp-servers what they read.

What VMFS refuses to a reader (sources: field reports of 6.7 to 8.0; no host of our own has been asked yet):

| file                  | VM off | VM on, no snapshot | VM on, snapshot on top                    |
|-----------------------|--------|--------------------|-------------------------------------------|
| -flat.vmdk            | read   | busy               | read; busy with `base_stays_locked`       |
| frozen -00000N-…      | read   |                    | read                                      |
| -00000N-… on top      | read   |                    | busy                                      |
| the files of a merge  | busy   |                    | busy                                      |
| descriptors           | read   | read               | read                                      |
"""

from __future__ import annotations

from tokvm.testing.esxi import paths
from tokvm.testing.esxi.state import FLAT, ON, REMOVE, State, Store, Vm, chain, pairs
from tokvm.testing.persona.holders import holders


def locked(state: State) -> set[str]:
    """Paths of the extents that nobody else may open, not even to read."""
    options = state["options"]
    if not options["locks"]:
        return set()
    found = {paths.extent_of(state["layers"][path]) for path in merging(state)}
    for vm in (one for one in state["vms"] if _runs(one)):
        for disk in vm["disks"]:
            layers = chain(state, disk["top"])
            found.add(paths.extent_of(layers[0]))
            if options["base_stays_locked"] and layers[-1]["kind"] == FLAT:
                found.add(paths.extent_of(layers[-1]))
    return found


def _runs(vm: Vm) -> bool:
    """Here or elsewhere, its files are open."""
    return vm["state"] == ON or vm["question"] != ""


def merging(state: State) -> set[str]:
    """Descriptors of what is being merged."""
    tasks = [task for task in state["tasks"] if task["kind"] == REMOVE]
    guests = {vm["vmid"]: vm["guest"] for vm in state["vms"]}
    return {path for task in tasks for pair in pairs(state, guests[task["vm"]], task["freeze"]) for path in pair}


def read_by_others(store: Store, state: State) -> set[str]:
    """Paths that some sftp-server has open, and so nobody can open to write."""
    if not state["options"]["readers_lock"]:
        return set()
    return {path for holder in holders(store, orphans=False) for path in holder["paths"].values()}


def may_be_read(state: State) -> set[str]:
    """Paths of descriptors and extents that the configurations and snapshots list: what sftp is for."""
    files = set()
    for vm in state["vms"]:
        tops = [disk["top"] for disk in vm["disks"]] + [path for one in vm["snapshots"] for path in one["paths"] if path]
        for layer in (layer for top in tops for layer in chain(state, top)):
            files |= {layer["path"], paths.extent_of(layer)}
    return files
