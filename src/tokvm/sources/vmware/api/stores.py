"""The datastores a VM lies on: what kind they are, whether a disk is files there, and where a host mounts them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokvm.sources.vmware.api import properties
from tokvm.sources.vmware.api.client import Client
from tokvm.sources.vmware.places import WITH_FILES


@dataclass(frozen=True, slots=True)
class Store:
    """type: `VMFS`, `NFS`, `NFS41`, `vsan`, `VVOL`, … free: bytes; url: `ds:///vmfs/volumes/<uuid>/`."""

    name: str
    type: str
    free: int
    url: str
    accessible: bool

    @property
    def has_files(self) -> bool:
        return self.type.upper().startswith(WITH_FILES)

    @property
    def locks(self) -> bool:
        """Does a running VM's lock keep others from reading its files?"""
        return self.type.upper().startswith("VMFS")


def of_vm(client: Client, vm: Any) -> dict[str, Store]:
    """By name: those that the VM's disks, snapshots and settings lie on."""
    refs = properties.read_one(client, vm, ["datastore"]).get("datastore") or ()
    found = properties.read(client, list(refs), ["summary"], doing="reading the VM's datastores")
    stores = [_store(one.need("summary")) for one in found]
    return {store.name: store for store in stores}


def _store(summary: Any) -> Store:
    return Store(
        name=str(summary.name),
        type=str(summary.type or ""),
        free=int(summary.freeSpace or 0),
        url=str(summary.url or ""),
        accessible=bool(summary.accessible),
    )
