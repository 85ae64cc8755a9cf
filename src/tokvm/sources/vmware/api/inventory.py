"""Which VMs are there, where each one is, and what it is made of. Nothing is remembered but which object a uuid is."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokvm.core.errors import SourceError, UsageError
from tokvm.core.machine import Disk, Firmware, Nic, PowerState, VirtualMachine
from tokvm.core.text import readable
from tokvm.core.units import MiB
from tokvm.sources.vmware.api import faults, properties
from tokvm.sources.vmware.api.client import Client
from tokvm.sources.vmware.api.machine import VmDisk, VmSnapshot, cards_of, disks_of, networks_of, power_state, snapshots_of
from tokvm.sources.vmware.api.properties import Properties
from tokvm.sources.vmware.api.vmomi import vim
from tokvm.sources.vmware.hardware import plain_slot
from tokvm.sources.vmware.machines import unescaped

HARDWARE = ("name", "config", "runtime", "snapshot", "guest.toolsRunningStatus")
_DEPTH = 64  # of folders in folders


@dataclass(frozen=True, slots=True)
class Row:
    """One VM of the inventory."""

    uuid: str
    name: str
    power: PowerState
    ref: Any


@dataclass(frozen=True, slots=True)
class Facts:
    """One VM as it is now. config, runtime: as the API has them."""

    ref: Any
    name: str
    config: Any
    runtime: Any
    disks: tuple[VmDisk, ...]
    snapshots: tuple[VmSnapshot, ...]
    tools: str = ""

    @property
    def power(self) -> PowerState:
        runtime = self.runtime
        paused = bool(getattr(runtime, "paused", False))
        return power_state(runtime.connectionState, runtime.powerState, paused=paused)

    def disk(self, key: str) -> VmDisk | None:
        return next((disk for disk in self.disks if disk.key == key), None)


class Machines:
    """The VMs of a server, or of one of its datacenters. Thread-safe."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._known: dict[str, Any] = {}
        self._lock = threading.Lock()

    def rows(self) -> list[Row]:
        """Templates, and VMs whose settings cannot be read (orphaned, inaccessible), are left out."""
        client = self._client
        root = None if not client.place.datacenter else datacenter(client, client.place.datacenter)
        paths = ["name", "config.uuid", "config.template", "runtime.powerState", "runtime.connectionState"]
        found = []
        for one in properties.read_all(client, vim.VirtualMachine, paths, under=root):
            uuid = one.values.get("config.uuid")
            if uuid is None or one.values.get("config.template"):
                continue
            power = power_state(one.values.get("runtime.connectionState"), one.values.get("runtime.powerState"))
            found.append(Row(str(uuid).lower(), unescaped(str(one.values.get("name", ""))), power, one.ref))
        return found

    def ref(self, uuid: str) -> Any:
        """The VM's object. UsageError when there is none; SourceError when two have this uuid (one is a copy of the other)."""
        with self._lock:
            known = self._known.get(uuid)
        if known is not None:
            return known
        found = [row for row in self.rows() if row.uuid == uuid]
        if not found:
            raise UsageError(f"there is no VM {uuid}", where=self._client.where, fix=absent(self._client))
        if len(found) > 1:
            names = ", ".join(f"{readable(row.name, limit=60)!r} ({row.ref._GetMoId()})" for row in found)
            raise SourceError(
                f"{len(found)} VMs have the uuid {uuid}: {names}",
                where=self._client.where,
                fix="give the copy a new uuid.bios in its settings while it is off, or name a datacenter: vpx://…/DATACENTER",
            )
        with self._lock:
            self._known[uuid] = found[0].ref
        return found[0].ref

    def read(self, uuid: str, paths: Sequence[str]) -> Properties:
        """Properties of the VM. It is looked for again when its object is gone (it was registered anew) or has another uuid."""
        for left in (True, False):
            ref = self.ref(uuid)
            try:
                found = properties.read_one(self._client, ref, [*paths, "config.uuid"], doing=f"reading VM {uuid}")
                if str(found.get("config.uuid") or "").lower() == uuid:
                    return found
            except faults.VsphereError as failed:
                if failed.fault != "ManagedObjectNotFound" or not left:
                    raise
            with self._lock:
                self._known.pop(uuid, None)
        raise SourceError(f"the VM {uuid} has another uuid now", where=self._client.where, fix="see `tokvm ls`")

    def facts(self, uuid: str) -> Facts:
        found = self.read(uuid, HARDWARE)
        where = f"{self._client.where} VM {uuid}"
        config = found.need("config")
        return Facts(
            ref=found.ref,
            name=unescaped(str(found.need("name"))),
            config=config,
            runtime=found.need("runtime"),
            disks=disks_of(config.hardware, where),
            snapshots=tuple(snapshots_of(found.get("snapshot"), where)),
            tools=str(found.get("guest.toolsRunningStatus") or ""),
        )


def absent(client: Client) -> str:
    """What to do about a VM that is not there."""
    return "see `tokvm ls`" + ("" if client.is_vcenter else "; in a cluster, name the host that runs it, or its vCenter")


def inspect(client: Client, machines: Machines, uuid: str) -> VirtualMachine:
    facts = machines.facts(uuid)
    config, hardware = facts.config, facts.config.hardware
    boot = getattr(config, "bootOptions", None)
    return VirtualMachine(
        uuid=uuid,
        name=facts.name,
        vcpus=int(hardware.numCPU),
        memory=int(hardware.memoryMB) * MiB,
        disks=tuple(_disk(index, disk) for index, disk in enumerate(facts.disks)),
        nics=tuple(_nics(client, hardware)),
        firmware=Firmware.UEFI if str(config.firmware or "bios") == "efi" else Firmware.BIOS,
        secure_boot=bool(getattr(boot, "efiSecureBootEnabled", False)),
        tpm=has_tpm(hardware),
        hypervisor="vmware",
        power=facts.power,
        description=str(config.annotation or ""),
        extra={"guest": str(config.guestId or ""), "version": str(config.version or "")},
    )


def has_tpm(hardware: Any) -> bool:
    return any(type(one).__name__.endswith(".VirtualTPM") for one in hardware.device or ())


def _disk(index: int, disk: VmDisk) -> Disk:
    storage = disk.layers[-1][1:].rpartition("] ")[0] if disk.layers else ""
    return Disk(index, disk.key, disk.size, device=str(disk.node), bootable=index == 0, storage=storage)


def _nics(client: Client, hardware: Any) -> Iterator[Nic]:
    slots = {int(card.key): getattr(card.slotInfo, "pciSlotNumber", None) for card in cards_of(hardware)}
    for index, (key, mac, backing) in enumerate(networks_of(hardware)):
        yield Nic(index, mac.lower(), _network(client, backing), plain_slot(slots[key]))


def _network(client: Client, backing: Any) -> str:
    """The name people know it by; a distributed port group is named by its id in the VM, so its name is asked for."""
    port = getattr(backing, "port", None)
    key = getattr(port, "portgroupKey", None)
    if key is None:
        return str(getattr(backing, "deviceName", None) or getattr(backing, "opaqueNetworkId", None) or "")
    ref = client.ref(vim.dvs.DistributedVirtualPortgroup, str(key))
    found = properties.read(client, [ref], ["name"], doing="reading a port group")
    return str(found[0].values.get("name") or key) if found else str(key)


# ---- where things are in the inventory


def ancestors(client: Client, ref: Any) -> list[Properties]:
    """`name` and `parent` of an object and of everything above it, the object first."""
    found: list[Properties] = []
    while ref is not None and len(found) < _DEPTH:
        found.append(properties.read_one(client, ref, ["name", "parent"], doing="reading the inventory"))
        ref = found[-1].get("parent")
    return found


def datacenter_path(client: Client, ref: Any) -> str:
    """The inventory path of the datacenter an object is in, as `/folder` wants it: `Folder/DC`; `ha-datacenter` on ESXi."""
    above = ancestors(client, ref)
    place = next((index for index, one in enumerate(above) if isinstance(one.ref, vim.Datacenter)), None)
    if place is None:
        raise SourceError(
            f"{ref._GetMoId()} is in no datacenter that may be seen",
            where=client.where,
            fix="give the user's role read access from the datacenter down (System.View)",
        )
    return "/".join(str(one.need("name")) for one in reversed(above[place:-1]))


def datacenter(client: Client, path: str) -> Any:
    """The datacenter with this inventory path, or with this name when only one has it. UsageError when there is none."""
    named = []
    for one in properties.read_all(client, vim.Datacenter, ["name"]):
        full = datacenter_path(client, one.ref)
        if full == path:
            return one.ref
        if str(one.values.get("name")) == path:
            named.append(one.ref)
    if len(named) != 1:
        raise UsageError(
            f"there is no datacenter {path!r}", where=client.where, fix="write vpx://…/FOLDER/DATACENTER, or nothing"
        )
    return named[0]
