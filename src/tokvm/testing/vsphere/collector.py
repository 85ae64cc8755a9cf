"""PropertyCollector: which objects a filter selects, which of their properties it asks for, in pages.

    PropertyFilterSpec ─┬─ objectSet: start objects, and TraversalSpecs: follow property `path` of objects of `type` to others
                        └─ propSet:   of each type, paths such as `runtime.powerState`, `config.hardware.device[2000]`; or all

Unset properties are left out, wrong ones are InvalidProperty. A page holds at most what the client and the host allow.
vSphere Web Services SDK Programming Guide, "Retrieve Properties" (8.0).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from pyVmomi import VmomiSupport, vmodl
from pyVmomi.VmomiSupport import DataObject, Enum

from tokvm.testing.persona.store import new_uuid
from tokvm.testing.vsphere.sessions import Session

_STEP = re.compile(r"(\w+)(?:\[\"?([^\]\"]+)\"?\])?")


class Objects(Protocol):
    """What there is. Managed objects are pyVmomi's: a type and an id."""

    def exists(self, this: Any) -> bool: ...

    def names(self, kind: type) -> Iterable[str]:
        """The properties of that type that are played."""
        ...

    def value(self, this: Any, name: str) -> Any:
        """A property; None when unset. One that is not played is unset, and noted."""
        ...


@dataclass(slots=True)
class _Rest:
    """What a token stands for. page: the size that the client asked for, 0 for none."""

    session: str
    asked: int
    contents: list[Any]


class Collector:
    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._lock = threading.Lock()
        self._rests: dict[str, _Rest] = {}

    def retrieve(self, filters: Iterable[Any], session: Session, *, asked: int, limit: int) -> Any:
        """A RetrieveResult with the first objects, and a token if there are more; None if there is none. asked, limit: how many
        at most, by the client's wish and the host's (0: all)."""
        contents = [content for one in filters for content in self._contents(one)]
        return self._page(contents, session, asked, limit)

    def go_on(self, token: str, session: Session, *, limit: int) -> Any:
        """The next page; a token is good once."""
        with self._lock:
            rest = self._rests.get(token)
            if rest is None or rest.session != session.key:
                raise vmodl.fault.InvalidArgument(invalidProperty="token", msg="A specified parameter was not correct: token")
            del self._rests[token]
        return self._page(rest.contents, session, rest.asked, limit)

    def cancel(self, token: str, session: Session) -> None:
        with self._lock:
            rest = self._rests.get(token)
            if rest is not None and rest.session == session.key:
                del self._rests[token]

    def all_contents(self, filters: Iterable[Any]) -> list[Any]:
        """Unpaged, as RetrieveProperties answers."""
        return [content for one in filters for content in self._contents(one)]

    def read(self, this: Any, path: str) -> Any:
        """One property of one object, typed; None when unset."""
        return _Properties(self._objects, this).read(path)

    def _page(self, contents: list[Any], session: Session, asked: int, limit: int) -> Any:
        if not contents:
            return None
        page = min([size for size in (asked, limit) if size > 0], default=len(contents))
        here, rest = contents[:page], contents[page:]
        token = None
        if rest:
            token = new_uuid()
            with self._lock:
                self._rests[token] = _Rest(session.key, asked, rest)
        return vmodl.query.PropertyCollector.RetrieveResult(token=token, objects=here)

    def _contents(self, one: Any) -> Iterator[Any]:
        seen: set[tuple[str, str]] = set()
        for start in one.objectSet:
            if not self._objects.exists(start.obj):
                if one.reportMissingObjectsInResults:
                    continue
                raise gone(start.obj)
            for this in _Selection(self._objects, start).objects():
                known = (type(this).__name__, this._moId)
                wanted = [spec for spec in one.propSet if issubclass(type(this), spec.type)]
                if known not in seen and wanted:
                    seen.add(known)
                    yield self._content(this, wanted)

    def _content(self, this: Any, wanted: list[Any]) -> Any:
        properties = _Properties(self._objects, this)
        paths: list[str] = []
        for spec in wanted:
            paths += [str(path) for path in (self._objects.names(type(this)) if spec.all else spec.pathSet)]
        content = vmodl.query.PropertyCollector.ObjectContent(obj=this)
        for path in dict.fromkeys(paths):
            value = properties.read(path)
            if value is not None:
                content.propSet.append(vmodl.DynamicProperty(name=path, val=value))
        return content


class _Selection:
    """The objects that an ObjectSpec leads to."""

    def __init__(self, objects: Objects, start: Any) -> None:
        self._objects = objects
        self._start = start
        self._named: dict[str, Any] = {}
        self._visited: set[tuple[str, str, int]] = set()
        self._collect_names(start.selectSet)

    def objects(self) -> Iterator[Any]:
        if not self._start.skip:
            yield self._start.obj
        yield from self._follow(self._start.obj, self._start.selectSet)

    def _follow(self, this: Any, selections: Iterable[Any]) -> Iterator[Any]:
        for spec in map(self._traversal, selections):
            visit = (type(this).__name__, this._moId, id(spec))
            if visit in self._visited or not issubclass(type(this), spec.type):
                continue
            self._visited.add(visit)
            for other in self._reached(this, str(spec.path)):
                if not spec.skip:
                    yield other
                yield from self._follow(other, spec.selectSet)

    def _reached(self, this: Any, path: str) -> list[Any]:
        value = _Properties(self._objects, this).read(path)
        found = value if isinstance(value, list) else [value]
        return [one for one in found if one is not None and self._objects.exists(one)]

    def _traversal(self, selection: Any) -> Any:
        if isinstance(selection, vmodl.query.PropertyCollector.TraversalSpec):
            return selection
        try:
            return self._named[selection.name]
        except KeyError:
            text = "A specified parameter was not correct: specSet"
            raise vmodl.fault.InvalidArgument(invalidProperty="specSet", msg=text) from None

    def _collect_names(self, selections: Iterable[Any]) -> None:
        for one in selections:
            if isinstance(one, vmodl.query.PropertyCollector.TraversalSpec):
                if one.name:
                    self._named[one.name] = one
                self._collect_names(one.selectSet)


class _Properties:
    """The properties of one object; each root is worked out once."""

    def __init__(self, objects: Objects, this: Any) -> None:
        self._objects = objects
        self._this = this
        self._roots: dict[str, Any] = {}

    def read(self, path: str) -> Any:
        """The typed value at `path`, None if anything on the way is unset. InvalidProperty."""
        steps = path.split(".")
        kind: Any = type(self._this)
        value: Any = self._this
        for number, step in enumerate(steps):
            found = _STEP.fullmatch(step)
            info = _property_info(kind if value is None else type(value), found[1] if found else "")
            if found is None or info is None:
                raise vmodl.query.InvalidProperty(name=path, msg=f"The property path is not valid: {path}")
            kind = info.type
            value = self._root(found[1], info) if number == 0 else getattr(value, found[1], None)
            value = typed(kind, value)
            if found[2]:
                value = _element(value, found[2])
                kind = kind.Item if issubclass(kind, list) else kind
        return None if isinstance(value, list) and not value and len(steps) > 1 else value

    def _root(self, name: str, info: Any) -> Any:
        if name not in self._roots:
            self._roots[name] = typed(info.type, self._objects.value(self._this, name))
        return self._roots[name]


def _property_info(kind: Any, name: str) -> Any:
    if not name or not issubclass(kind, DataObject | VmomiSupport.ManagedObject):
        return None
    try:
        return kind._GetPropertyInfo(name)
    except AttributeError:
        return None


def typed(kind: Any, value: Any) -> Any:
    """The value as pyVmomi's type for it, so that an answer of any type says which."""
    if value is None or isinstance(value, kind):
        return value
    if issubclass(kind, list):
        return kind([typed(kind.Item, one) for one in value])
    if issubclass(kind, Enum) or kind in (VmomiSupport.long, int, VmomiSupport.short, VmomiSupport.byte):
        return kind(value)
    return value


def _element(value: Any, key: str) -> Any:
    return next((one for one in value or [] if str(getattr(one, "key", None)) == key), None)


def gone(this: Any) -> Any:
    name = f"{VmomiSupport.GetVmodlName(type(this))}:{this._moId}"
    text = f"The object '{name}' has already been deleted or has not been completely created"
    return vmodl.fault.ManagedObjectNotFound(obj=this, msg=text)
