"""What there is: the tree of managed entities, the managers, views, tasks and leases, and where their properties come from.

vCenter   group-d1 ─ (folder) group-d2 ─ datacenter-3 ─┬─ group-v4 ─ vm-1001 …
                                                      ├─ group-h5 ─ domain-c8 (cluster) ─ host-10, host-20, resgroup-9
                                                      ├─ group-s6 ─ datastore-11 …
                                                      └─ group-n7 ─ network-100 …
ESXi      ha-folder-root ─ ha-datacenter ─ ha-folder-vm ─ 1 … ; ha-folder-host ─ ha-compute-res ─ ha-host ; …
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyVmomi import vim, vmodl

from tokvm.testing.esxi.state import State as EsxState
from tokvm.testing.persona.store import new_uuid
from tokvm.testing.vsphere.machine import Machine, escaped, machines_of
from tokvm.testing.vsphere.options import State as OwnState

if TYPE_CHECKING:
    from tokvm.testing.vsphere.endpoint import Endpoint
    from tokvm.testing.vsphere.sessions import Session

Property = Callable[["Inventory", Any], Any]
HOST, OTHER_HOST = "host", "other host"

# What is where: (vCenter's id, ESXi's). A host's other one is where a VM is that went away.
IDS = {
    "root": ("group-d1", "ha-folder-root"),
    "region": ("group-d2", ""),
    "datacenter": ("datacenter-3", "ha-datacenter"),
    "vm": ("group-v4", "ha-folder-vm"),
    "hosts": ("group-h5", "ha-folder-host"),
    "datastores": ("group-s6", "ha-folder-datastore"),
    "networks": ("group-n7", "ha-folder-network"),
    "cluster": ("domain-c8", "ha-compute-res"),
    "pool": ("resgroup-9", "ha-root-pool"),
    HOST: ("host-10", "ha-host"),
    OTHER_HOST: ("host-20", ""),
    "autostart": ("autoStartManager-10", "ha-autostart-mgr"),
    "other autostart": ("autoStartManager-20", ""),
    "collector": ("propertyCollector", "ha-property-collector"),
    "views": ("ViewManager", "ViewManager"),
    "sessions": ("SessionManager", "ha-sessionmgr"),
    "authorization": ("AuthorizationManager", "ha-authmgr"),
    "search": ("SearchIndex", "ha-searchindex"),
    "tasks": ("TaskManager", "ha-taskmgr"),
    "licences": ("LicenseManager", "ha-license-manager"),
}


@dataclass(slots=True)
class Node:
    """An entity of the tree."""

    ref: Any
    name: str
    parent: Any
    children: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class World:
    """Everything at the moment of one call."""

    state: EsxState
    own: OwnState
    machines: list[Machine]
    nodes: dict[tuple[str, str], Node]


@dataclass(frozen=True, slots=True)
class View:
    session: str
    container: Any
    kinds: tuple[Any, ...]
    recursive: bool


class Inventory:
    """collector.Objects"""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._local = threading.local()
        self._views: dict[str, View] = {}

    @contextlib.contextmanager
    def look(self) -> Iterator[None]:
        """One moment for all that is asked within."""
        state = self.endpoint.ground.state()
        vcenter = self.endpoint.options["vcenter"]
        machines = machines_of(state, vcenter=vcenter)
        self.endpoint.tracker.look(machines)
        own = self.endpoint.store.read()
        self._local.world = World(state, own, machines, {})
        self._local.world.nodes = _tree(self, self._local.world)
        try:
            yield
        finally:
            self._local.world = None

    @property
    def world(self) -> World:
        found: World = self._local.world
        return found

    @property
    def vcenter(self) -> bool:
        return self.world.own["options"]["vcenter"]

    def ref(self, kind: Any, name: str) -> Any:
        return kind(IDS[name][0 if self.vcenter else 1], None)

    def machines(self) -> list[Machine]:
        return self.world.machines

    def machine(self, this: Any) -> Machine:
        """Of a VM, or of one of its snapshots. KeyError."""
        for one in self.machines():
            if this._moId == one.moid or (isinstance(this, vim.vm.Snapshot) and one.snapshot_of(this._moId)):
                return one
        raise KeyError(this._moId)

    def children(self, this: Any) -> list[Any]:
        node = self.world.nodes.get(_key(this))
        return [] if node is None else node.children

    def node(self, this: Any) -> Node:
        return self.world.nodes[_key(this)]

    def below(self, this: Any) -> Iterator[Any]:
        for one in self.children(this):
            yield one
            yield from self.below(one)

    # Implements Objects

    def exists(self, this: Any) -> bool:  # noqa: PLR0911  one for each kind
        match this:
            case vim.Task():
                return this._moId in self.endpoint.tasks.keys_of()
            case vim.HttpNfcLease():
                return self.endpoint.leases.find(this._moId) is not None
            case vim.view.ContainerView():
                return this._moId in self._views
            case vim.vm.Snapshot():
                return any(one.snapshot_of(this._moId) for one in self.machines())
            case vim.ServiceInstance():
                return bool(this._moId == "ServiceInstance")
            case vim.ManagedEntity():
                return _key(this) in self.world.nodes
            case _:
                return any(this._moId == ids[0 if self.vcenter else 1] for ids in IDS.values())

    def names(self, kind: type) -> Iterable[str]:
        found: dict[str, None] = {}
        for rows in _rows(kind):
            found.update(dict.fromkeys(rows))
        return found

    def value(self, this: Any, name: str) -> Any:
        for rows in _rows(type(this)):
            if name in rows:
                return rows[name](self, this)
        self.endpoint.violation(f"{type(this).__name__}.{name}", "the endpoint does not play this property")
        return None

    # Views

    def add_view(self, session: Session, container: Any, kinds: tuple[Any, ...], *, recursive: bool) -> Any:
        moid = f"session[{session.key}]{new_uuid()}"
        self._views[moid] = View(session.key, container, kinds, recursive)
        return vim.view.ContainerView(moid, None)

    def remove_view(self, moid: str) -> None:
        del self._views[moid]

    def seen(self, moid: str) -> list[Any]:
        view = self._views[moid]
        inside = self.below(view.container) if view.recursive else self.children(view.container)
        return [one for one in inside if issubclass(type(one), view.kinds)]

    def content(self) -> Any:
        """ServiceContent."""
        from tokvm.testing.vsphere.places import about

        return vim.ServiceInstanceContent(
            rootFolder=self.ref(vim.Folder, "root"),
            propertyCollector=self.ref(vmodl.query.PropertyCollector, "collector"),
            viewManager=self.ref(vim.view.ViewManager, "views"),
            about=about(self),
            sessionManager=self.ref(vim.SessionManager, "sessions"),
            authorizationManager=self.ref(vim.AuthorizationManager, "authorization"),
            searchIndex=self.ref(vim.SearchIndex, "search"),
            taskManager=self.ref(vim.TaskManager, "tasks"),
            licenseManager=self.ref(vim.LicenseManager, "licences"),
        )


def _rows(kind: Any) -> Iterator[dict[str, Property]]:
    """Of the type itself first, then of what it is based on."""
    from tokvm.testing.vsphere.properties import PROPERTIES

    for base in kind.__mro__:
        rows = PROPERTIES.get(getattr(base, "_wsdlName", ""))
        if rows is not None and "_wsdlName" in vars(base):
            yield rows


def _key(this: Any) -> tuple[str, str]:
    return type(this).__name__, str(this._moId)


def _tree(inventory: Inventory, world: World) -> dict[tuple[str, str], Node]:
    nodes: dict[tuple[str, str], Node] = {}
    options = world.own["options"]

    def add(ref: Any, name: str, parent: Any) -> Any:
        nodes[_key(ref)] = Node(ref, name, parent)
        if parent is not None:
            nodes[_key(parent)].children.append(ref)
        return ref

    root = add(inventory.ref(vim.Folder, "root"), "Datacenters" if options["vcenter"] else "ha-folder-root", None)
    if options["datacenter_folder"]:
        root = add(inventory.ref(vim.Folder, "region"), escaped(options["datacenter_folder"]), root)
    datacenter = add(inventory.ref(vim.Datacenter, "datacenter"), escaped(options["datacenter"]), root)
    folders = {
        name: add(inventory.ref(vim.Folder, name), label, datacenter)
        for name, label in (("vm", "vm"), ("hosts", "host"), ("datastores", "datastore"), ("networks", "network"))
    }
    for machine in world.machines:
        add(machine.ref, escaped(machine.name), folders["vm"])
    _add_hosts(inventory, world, add, folders["hosts"])
    for number, store in enumerate(world.state["datastores"]):
        moid = f"datastore-{11 + number}" if options["vcenter"] else store["uuid"]
        add(vim.Datastore(moid, None), escaped(store["name"]), folders["datastores"])
    for number, name in enumerate(networks(world)):
        moid = f"network-{100 + number}" if options["vcenter"] else f"HaNetwork-{name}"
        add(vim.Network(moid, None), escaped(name), folders["networks"])
    return nodes


def _add_hosts(inventory: Inventory, world: World, add: Callable[[Any, str, Any], Any], folder: Any) -> None:
    name = world.state["options"]["name"]
    if inventory.vcenter:
        cluster = add(inventory.ref(vim.ClusterComputeResource, "cluster"), world.own["options"]["cluster"], folder)
        add(inventory.ref(vim.HostSystem, HOST), f"{name}.lab.test", cluster)
        add(inventory.ref(vim.HostSystem, OTHER_HOST), f"{name}-other.lab.test", cluster)
    else:
        cluster = add(inventory.ref(vim.ComputeResource, "cluster"), "localhost.localdomain", folder)
        add(inventory.ref(vim.HostSystem, HOST), "localhost.localdomain", cluster)
    add(inventory.ref(vim.ResourcePool, "pool"), "Resources", cluster)


def networks(world: World) -> list[str]:
    return list(dict.fromkeys(nic["network"] for one in world.machines for nic in one.vm["nics"]))
