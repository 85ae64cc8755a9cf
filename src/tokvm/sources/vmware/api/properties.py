"""Reading properties: always through the PropertyCollector, all pages, many objects and paths in one question.

An attribute of a managed object would be a `Fetch` of its own (pyVmomi), and the server answers at most some 100 objects at a
time: whoever does not ask for the rest does not see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokvm.core.errors import SourceError
from tokvm.sources.vmware.api import faults
from tokvm.sources.vmware.api.client import Client
from tokvm.sources.vmware.api.vmomi import vim, vmodl

PAGE = 100
MOST_PAGES = 10_000
_PC = vmodl.query.PropertyCollector


class Properties:
    """What was read of one object. An unset property is not there; one that may not be read is in `denied`."""

    def __init__(self, ref: Any, values: dict[str, Any], denied: dict[str, Any], where: str) -> None:
        self.ref = ref
        self.values = values
        self.denied = denied
        self._where = where

    @property
    def moid(self) -> str:
        return str(self.ref._GetMoId())

    def get(self, path: str) -> Any:
        """None when it is unset. A fault when the login may not read it."""
        if path in self.denied:
            raise faults.error_of(self.denied[path], where=self._where, doing=f"reading {path} of {self.moid}")
        return self.values.get(path)

    def need(self, path: str) -> Any:
        found = self.get(path)
        if found is None:
            raise SourceError(
                f"the server does not say {path} of {self.moid}", where=self._where, fix="is it being created or removed?"
            )
        return found


def read(client: Client, refs: Sequence[Any], paths: Sequence[str], *, doing: str = "reading") -> list[Properties]:
    """The paths of objects of one kind, in the order of `refs`; an object that is gone is left out."""
    if not refs:
        return []
    specs = [_PC.ObjectSpec(obj=ref) for ref in refs]
    wanted = _filter(type(refs[0]), specs, paths)
    found = {one.moid: one for one in _named(client, client.ask(lambda: _pages(client, wanted), doing))}
    return [found[moid] for ref in refs if (moid := str(ref._GetMoId())) in found]


def read_one(client: Client, ref: Any, paths: Sequence[str], *, doing: str = "reading") -> Properties:
    """One object's paths. VsphereError ManagedObjectNotFound when it is gone."""
    found = read(client, [ref], paths, doing=doing)
    if not found:
        raise faults.VsphereError(
            f"{doing} failed: {ref._GetMoId()} is gone", where=client.where, fault="ManagedObjectNotFound"
        )
    return found[0]


def read_all(client: Client, kind: Any, paths: Sequence[str], *, under: Any = None) -> list[Properties]:
    """The paths of every object of a kind, in all of the inventory or under a folder or datacenter."""
    walk = _PC.TraversalSpec(name="view", type=vim.view.ContainerView, path="view", skip=False)

    def look() -> list[Any]:
        """All in one, because a view ends with the session that made it."""
        content = client.content
        root = under if under is not None else content.rootFolder
        view = content.viewManager.CreateContainerView(container=root, type=[kind], recursive=True)
        try:
            return _pages(client, _filter(kind, [_PC.ObjectSpec(obj=view, skip=True, selectSet=[walk])], paths))
        finally:
            view.DestroyView()

    return _named(client, client.ask(look, "reading the inventory"))


def _filter(kind: Any, specs: list[Any], paths: Sequence[str]) -> Any:
    wanted = [_PC.PropertySpec(type=kind, all=False, pathSet=list(paths))]
    return _PC.FilterSpec(objectSet=specs, propSet=wanted, reportMissingObjectsInResults=True)


def _named(client: Client, contents: list[Any]) -> list[Properties]:
    found = []
    for content in contents:
        values = {str(one.name): one.val for one in content.propSet or ()}
        denied = {str(one.path): one.fault for one in content.missingSet or ()}
        found.append(Properties(content.obj, values, denied, client.where))
    return found


def _pages(client: Client, wanted: Any) -> list[Any]:
    """Every page. A session that expired is told by a fault in the place of a property: it is raised here."""
    collector = client.content.propertyCollector
    answer = collector.RetrievePropertiesEx(specSet=[wanted], options=_PC.RetrieveOptions(maxObjects=PAGE))
    found: list[Any] = []
    pages = 0
    while answer is not None:
        found += answer.objects or ()
        if not answer.token:
            break
        if (pages := pages + 1) > MOST_PAGES:
            raise SourceError(f"the server's answer has more than {MOST_PAGES} pages", where=client.where)
        answer = collector.ContinueRetrievePropertiesEx(token=answer.token)
    for content in found:
        for missing in content.missingSet or ():
            if faults.is_not_authenticated(missing.fault):
                raise missing.fault
    return found
