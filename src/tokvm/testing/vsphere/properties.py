"""Which properties are played, by type on the wire. Any other is unset, and asking for it is noted."""

from __future__ import annotations

from typing import Any

from pyVmomi import vim

from tokvm.testing.vsphere import lease_calls, machine_properties, places
from tokvm.testing.vsphere.inventory import Inventory, Property
from tokvm.testing.vsphere.places import GREEN


def _name(inventory: Inventory, this: Any) -> str:
    return inventory.node(this).name


def _parent(inventory: Inventory, this: Any) -> Any:
    return inventory.node(this).parent


def _children(inventory: Inventory, this: Any) -> list[Any]:
    return inventory.children(this)


def _green(_inventory: Inventory, _this: Any) -> Any:
    return GREEN


def _none(_inventory: Inventory, _this: Any) -> list[Any]:
    return []


def _folder(name: str) -> Property:
    return lambda inventory, _this: inventory.ref(vim.Folder, name)


def _task_info(inventory: Inventory, this: Any) -> Any:
    return inventory.endpoint.tasks.info(this._moId)


def _view(inventory: Inventory, this: Any) -> list[Any]:
    return inventory.seen(this._moId)


_COMPUTE: dict[str, Property] = {
    "host": places.cluster_hosts,
    "datastore": places.datastore_refs,
    "network": places.network_refs,
    "resourcePool": places.pool,
}

PROPERTIES: dict[str, dict[str, Property]] = {
    "ManagedEntity": {
        "name": _name,
        "parent": _parent,
        "overallStatus": _green,
        "configStatus": _green,
        "recentTask": places.recent_tasks,
        "disabledMethod": _none,
    },
    "Folder": {"childEntity": _children},
    "Datacenter": {
        "vmFolder": _folder("vm"),
        "hostFolder": _folder("hosts"),
        "datastoreFolder": _folder("datastores"),
        "networkFolder": _folder("networks"),
        "datastore": places.datastore_refs,
        "network": places.network_refs,
    },
    "ComputeResource": _COMPUTE,
    "ClusterComputeResource": {"configurationEx": places.cluster_configuration},
    "HostSystem": {
        "config": places.host_config,
        "runtime": places.host_runtime,
        "summary": places.host_summary,
        "configManager": places.host_managers,
        "vm": places.host_machines,
        "datastore": places.datastore_refs,
        "network": places.network_refs,
    },
    "HostAutoStartManager": {"config": places.autostart_config},
    "ResourcePool": {},
    "Datastore": {
        "summary": places.datastore_summary,
        "info": places.datastore_info,
        "vm": places.datastore_machines,
    },
    "Network": {},
    "VirtualMachine": machine_properties.ROWS,
    "VirtualMachineSnapshot": machine_properties.SNAPSHOT_ROWS,
    "ServiceInstance": {"content": lambda inventory, _this: inventory.content()},
    "SessionManager": {"currentSession": places.current_session},
    "LicenseManager": {"licenses": places.licences},
    "TaskManager": {"recentTask": places.recent_tasks},
    "Task": {"info": _task_info},
    "ContainerView": {"view": _view},
    "HttpNfcLease": lease_calls.PROPERTIES,
}
