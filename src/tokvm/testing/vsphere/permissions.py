"""What a user, and a licence, may do. Which privilege a method needs is in pyVmomi's own tables, of most of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyVmomi import vim

if TYPE_CHECKING:
    from tokvm.testing.vsphere.endpoint import Endpoint
    from tokvm.testing.vsphere.sessions import Session
    from tokvm.testing.vsphere.soap import Call

ALWAYS = frozenset({"", "System.Anonymous", "System.View", "System.Read"})

# All that a migration may need (virt-v2v's list, and snapshots, power, tracking, leases, cluster settings).
KNOWN = (
    "System.Anonymous",
    "System.View",
    "System.Read",
    "Sessions.ValidateSession",
    "Datastore.Browse",
    "Datastore.FileManagement",
    "Host.Config.AutoStart",
    "Host.Inventory.EditCluster",
    "VApp.Export",
    "VirtualMachine.Config.AdvancedConfig",
    "VirtualMachine.Config.Annotation",
    "VirtualMachine.Config.ChangeTracking",
    "VirtualMachine.Config.EditDevice",
    "VirtualMachine.Config.Settings",
    "VirtualMachine.Interact.AnswerQuestion",
    "VirtualMachine.Interact.PowerOff",
    "VirtualMachine.Interact.PowerOn",
    "VirtualMachine.Provisioning.DiskRandomRead",
    "VirtualMachine.Provisioning.GetVmFiles",
    "VirtualMachine.State.CreateSnapshot",
    "VirtualMachine.State.RemoveSnapshot",
    "Cryptographer.Access",
)

CONFIG_PRIVILEGES = {
    "changeTrackingEnabled": "VirtualMachine.Config.ChangeTracking",
    "annotation": "VirtualMachine.Config.Annotation",
    "extraConfig": "VirtualMachine.Config.AdvancedConfig",
}
METHOD_PRIVILEGES = {
    "ReconfigureComputeResource_Task": "Host.Inventory.EditCluster",
    "ReconfigureAutostart": "Host.Config.AutoStart",
    "ConsolidateVMDisks_Task": "VirtualMachine.State.RemoveSnapshot",
    "ExportSnapshot": "VApp.Export",
    "CreateSnapshotEx_Task": "VirtualMachine.State.CreateSnapshot",
}
# What a free licence lets the API read only. [K]: to be compared with a real free host.
WRITES = frozenset({"ShutdownGuest", "AnswerVM", "ExportSnapshot", "ExportVm", "ReconfigureAutostart"})


def check_allowed(endpoint: Endpoint, call: Call) -> None:
    """RestrictedVersion or NoPermission, if so."""
    options = endpoint.options
    if options["free_licence"] and (call.method.endswith("_Task") or call.method in WRITES):
        text = "Current license or ESXi version prohibits execution of the requested operation."
        raise vim.fault.RestrictedVersion(msg=text)
    for privilege in needed(call):
        if privilege in options["denied"]:
            raise no_permission(call.this, privilege)


def needed(call: Call) -> list[str]:
    """The privileges that a call takes."""
    if call.method == "ReconfigVM_Task":
        spec = call.arguments["spec"]
        return [privilege for name, privilege in CONFIG_PRIVILEGES.items() if getattr(spec, name) not in (None, [])]
    privilege = METHOD_PRIVILEGES.get(call.method, call.privilege)
    return [] if privilege in ALWAYS else [privilege]


def no_permission(this: Any, privilege: str) -> Any:
    text = "Permission to perform this operation was denied."
    return vim.fault.NoPermission(object=this, privilegeId=privilege, msg=text)


def granted(endpoint: Endpoint, privilege: str) -> bool:
    return privilege not in endpoint.options["denied"]


def has_on_entities(endpoint: Endpoint, call: Call, _session: Session) -> list[Any]:
    """HasPrivilegeOnEntities, HasUserPrivilegeOnEntities."""
    entities = call.arguments.get("entity") or call.arguments.get("entities") or []
    return [
        vim.AuthorizationManager.EntityPrivilege(
            entity=one,
            privAvailability=[
                vim.AuthorizationManager.PrivilegeAvailability(privId=privilege, isGranted=granted(endpoint, privilege))
                for privilege in call.arguments.get("privId", [])
            ],
        )
        for one in entities
    ]


def has_on_entity(endpoint: Endpoint, call: Call, _session: Session) -> list[bool]:
    return [granted(endpoint, privilege) for privilege in call.arguments.get("privId", [])]


def fetch_on_entities(endpoint: Endpoint, call: Call, _session: Session) -> list[Any]:
    """FetchUserPrivilegeOnEntities."""
    held = [privilege for privilege in KNOWN if granted(endpoint, privilege)]
    return [vim.AuthorizationManager.UserPrivilegeResult(entity=one, privileges=held) for one in call.arguments["entities"]]


ROWS = {
    ("AuthorizationManager", "HasPrivilegeOnEntities"): has_on_entities,
    ("AuthorizationManager", "HasUserPrivilegeOnEntities"): has_on_entities,
    ("AuthorizationManager", "HasPrivilegeOnEntity"): has_on_entity,
    ("AuthorizationManager", "FetchUserPrivilegeOnEntities"): fetch_on_entities,
}
