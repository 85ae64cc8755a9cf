"""pyVmomi's real client, as the tests of the played vSphere drive it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from pyVim.connect import Disconnect, SmartConnect
from pyVmomi import vim, vmodl

from tokvm.testing.vsphere.host import VSphere

DONE = ("success", "error")


@contextmanager
def connected(vsphere: VSphere) -> Iterator[Any]:
    """The ServiceInstance of a logged-in client that verifies the certificate."""
    instance = SmartConnect(
        host="127.0.0.1",
        port=vsphere.port,
        user=vsphere.user,
        pwd=vsphere.password,
        sslContext=vsphere.client_context(),
    )
    try:
        yield instance
    finally:
        with suppress(vmodl.MethodFault, OSError):
            Disconnect(instance)
        instance._stub.DropConnections()


def machine(instance: Any, vsphere: VSphere, name: str = "web") -> Any:
    return vim.VirtualMachine(vsphere.moid(name), instance._stub)


def wait(task: Any, *, timeout_s: float = 20.0) -> Any:
    """TaskInfo of a task that is over."""
    until = time.monotonic() + timeout_s
    while (info := task.info).state not in DONE:
        assert time.monotonic() < until, info
        time.sleep(0.005)
    return info


def result(task: Any) -> Any:
    info = wait(task)
    assert info.state == "success", info.error
    return info.result


def snapshot(vm: Any, name: str = "tokvm-x-1") -> Any:
    return result(vm.CreateSnapshot_Task(name, "", memory=False, quiesce=False))


def disks(config: Any) -> list[Any]:
    return [one for one in config.hardware.device if isinstance(one, vim.vm.device.VirtualDisk)]


def all_of(instance: Any, kind: Any, *, page: int | None = None, paths: list[str] | None = None) -> list[Any]:
    """ObjectContents of all objects of a kind by a view and a paged PropertyCollector; paths None: all properties."""
    content = instance.content
    view = content.viewManager.CreateContainerView(content.rootFolder, [kind], True)
    spec = vmodl.query.PropertyCollector
    traversal = spec.TraversalSpec(name="view", type=vim.view.ContainerView, path="view", skip=False)
    start = spec.ObjectSpec(obj=view, skip=True, selectSet=[traversal])
    wanted = spec.PropertySpec(type=kind, all=paths is None, pathSet=paths or [])
    answer = content.propertyCollector.RetrievePropertiesEx(
        [spec.FilterSpec(objectSet=[start], propSet=[wanted])], spec.RetrieveOptions(maxObjects=page)
    )
    found: list[Any] = []
    while answer is not None:
        found += answer.objects
        answer = content.propertyCollector.ContinueRetrievePropertiesEx(answer.token) if answer.token else None
    view.DestroyView()
    return found


def read(vm: Any, *paths: str) -> dict[str, Any]:
    """Properties of one object in one call; those that are unset are absent."""
    spec = vmodl.query.PropertyCollector
    wanted = spec.FilterSpec(
        objectSet=[spec.ObjectSpec(obj=vm)], propSet=[spec.PropertySpec(type=type(vm), all=False, pathSet=list(paths))]
    )
    collector: Any = vim.ServiceInstance("ServiceInstance", vm._stub).RetrieveContent().propertyCollector
    answer = collector.RetrievePropertiesEx([wanted], spec.RetrieveOptions())
    return {one.name: one.val for one in answer.objects[0].propSet}
