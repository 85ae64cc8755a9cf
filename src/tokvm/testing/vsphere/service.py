"""Calls about the service itself: what it is, who is logged in, what is seen of its objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyVmomi import vim, vmodl

from tokvm.testing.vsphere.clock import moment
from tokvm.testing.vsphere.sessions import same

if TYPE_CHECKING:
    from tokvm.testing.vsphere.endpoint import Endpoint
    from tokvm.testing.vsphere.sessions import Session
    from tokvm.testing.vsphere.soap import Call


def content(endpoint: Endpoint, _call: Call, _session: Session) -> Any:
    return endpoint.inventory.content()


def current_time(endpoint: Endpoint, _call: Call, _session: Session) -> Any:
    return moment(endpoint.clock.now())


def log_in(endpoint: Endpoint, call: Call, session: Session) -> Any:
    options = endpoint.options
    right = same(call.arguments["userName"], options["user"]) and same(call.arguments["password"], options["password"])
    if session.user or not right:  # "fails if the user is already logged in", says the reference
        text = "Cannot complete login due to an incorrect user name or password."
        raise vim.fault.InvalidLogin(msg=text)
    endpoint.sessions.log_in(session, options["user"])
    return session.described()


def log_out(endpoint: Endpoint, _call: Call, session: Session) -> None:
    endpoint.sessions.end(session)


def is_active(endpoint: Endpoint, call: Call, _session: Session) -> bool:
    if not endpoint.options["vcenter"]:
        raise vmodl.fault.NotImplemented(msg="The requested operation is not implemented by the server.")
    found = endpoint.sessions.by_key(call.arguments["sessionID"])
    return found is not None and found.user == call.arguments["userName"]


# PropertyCollector


def retrieve(endpoint: Endpoint, call: Call, session: Session) -> Any:
    asked = call.arguments["options"].maxObjects or 0
    return endpoint.collector.retrieve(call.arguments["specSet"], session, asked=asked, limit=endpoint.options["page"])


def go_on(endpoint: Endpoint, call: Call, session: Session) -> Any:
    return endpoint.collector.go_on(call.arguments["token"], session, limit=endpoint.options["page"])


def cancel(endpoint: Endpoint, call: Call, session: Session) -> None:
    endpoint.collector.cancel(call.arguments["token"], session)


def retrieve_all(endpoint: Endpoint, call: Call, _session: Session) -> Any:
    return endpoint.collector.all_contents(call.arguments["specSet"])


def fetch(endpoint: Endpoint, call: Call, _session: Session) -> Any:
    """One property, as pyVmomi's attributes ask for it."""
    return endpoint.collector.read(call.this, call.arguments["prop"])


# Views and searches


def container_view(endpoint: Endpoint, call: Call, session: Session) -> Any:
    if not endpoint.inventory.exists(call.arguments["container"]):
        raise vmodl.fault.ManagedObjectNotFound(obj=call.arguments["container"], msg="The container is not there")
    kinds = tuple(call.arguments.get("type", [])) or (vim.ManagedEntity,)
    return endpoint.inventory.add_view(session, call.arguments["container"], kinds, recursive=call.arguments["recursive"])


def destroy_view(endpoint: Endpoint, call: Call, _session: Session) -> None:
    endpoint.inventory.remove_view(call.moid)


def find_by_uuid(endpoint: Endpoint, call: Call, _session: Session) -> Any:
    found = _with_uuid(endpoint, call)
    return found[0] if found else None


def find_all_by_uuid(endpoint: Endpoint, call: Call, _session: Session) -> Any:
    return _with_uuid(endpoint, call)


def _with_uuid(endpoint: Endpoint, call: Call) -> list[Any]:
    wanted = call.arguments["uuid"].lower()
    if not call.arguments["vmSearch"]:
        raise vmodl.fault.NotSupported(msg="only VMs are searched by uuid here")
    name = "instance_uuid" if call.arguments.get("instanceUuid") else "uuid"
    return [vm.ref for vm in endpoint.inventory.machines() if str(getattr(vm, name)).lower() == wanted]


def find_by_path(endpoint: Endpoint, call: Call, _session: Session) -> Any:
    """`Datacenters` itself is not part of the path."""
    at = endpoint.inventory.content().rootFolder
    for name in call.arguments["inventoryPath"].strip("/").split("/"):
        at = next((one for one in endpoint.inventory.children(at) if endpoint.inventory.value(one, "name") == name), None)
        if at is None:
            return None
    return at


def find_by_datastore_path(endpoint: Endpoint, call: Call, _session: Session) -> Any:
    wanted = call.arguments["path"]
    return next((vm.ref for vm in endpoint.inventory.machines() if vm.vmx_path == wanted), None)


ROWS = {
    ("ServiceInstance", "RetrieveServiceContent"): content,
    ("ServiceInstance", "CurrentTime"): current_time,
    ("SessionManager", "Login"): log_in,
    ("SessionManager", "Logout"): log_out,
    ("SessionManager", "SessionIsActive"): is_active,
    ("PropertyCollector", "RetrievePropertiesEx"): retrieve,
    ("PropertyCollector", "ContinueRetrievePropertiesEx"): go_on,
    ("PropertyCollector", "CancelRetrievePropertiesEx"): cancel,
    ("PropertyCollector", "RetrieveProperties"): retrieve_all,
    ("", "Fetch"): fetch,
    ("ViewManager", "CreateContainerView"): container_view,
    ("ContainerView", "DestroyView"): destroy_view,
    ("SearchIndex", "FindByUuid"): find_by_uuid,
    ("SearchIndex", "FindAllByUuid"): find_all_by_uuid,
    ("SearchIndex", "FindByInventoryPath"): find_by_path,
    ("SearchIndex", "FindByDatastorePath"): find_by_datastore_path,
}
