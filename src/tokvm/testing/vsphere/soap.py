"""SOAP as pyVmomi speaks it, from the server's side: requests in, replies and faults out, by pyVmomi's own type tables.

    POST /sdk   SOAPAction: urn:vim25/8.0.2.0
    <Envelope><Header/>?<Body><METHOD xmlns="urn:vim25"><_this type="T">id</_this> parameters … </METHOD></Body></Envelope>

    200  <METHODResponse><returnval …/>…</METHODResponse>
    500  <Fault><faultcode/><faultstring>text</faultstring><detail><NAMEFault xsi:type="NAME">…</NAMEFault></detail></Fault>

A reply that pyVmomi's tables do not allow (a required field unset, a wrong type) cannot be sent: TypeError here.
"""

from __future__ import annotations

import contextlib
import copy
import re
import xml.parsers.expat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyVmomi import SoapAdapter, VmomiSupport, vmodl
from pyVmomi.VmomiSupport import F_OPTIONAL, ManagedObject, Object

NAMESPACE = "urn:vim25"
THIS = "_this"
FETCH = "Fetch"
BODY_DEPTH, METHOD_DEPTH = 2, 3
MAX_REQUEST = 4 << 20  # bytes; hostd's own limit is of this order, and no client of ours comes near it

_is_child: Any = vars(VmomiSupport)["IsChildVersion"]  # not among the names that its typing exports
_ENVELOPE = (
    '<?xml version="1.0" encoding="UTF-8"?>\n'
    '<soapenv:Envelope xmlns:soapenc="http://schemas.xmlsoap.org/soap/encoding/"'
    ' xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/"'
    ' xmlns:xsd="http://www.w3.org/2001/XMLSchema" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">\n'
    "<soapenv:Body>\n{}\n</soapenv:Body>\n</soapenv:Envelope>"
)


class BadRequest(Exception):
    """What came is not a call that the API knows: its text says why. `method`: as far as it was read."""

    def __init__(self, why: str, method: str = "") -> None:
        super().__init__(why)
        self.method = method


class UnknownMethod(BadRequest):
    """A call of a method that this kind of object does not have."""

    def __init__(self, this: Any, method: str) -> None:
        super().__init__(f"{type(this).__name__} has no method {method}", method)
        self.this = this


@dataclass(frozen=True, slots=True)
class Call:
    """One call. this: a pyVmomi managed object (its type and `_moId`). arguments: by their name on the wire; those left out are
    absent. version: pyVmomi's name of what the client speaks. result: what the reply is declared as (pyVmomi's Object)."""

    this: Any
    method: str
    arguments: dict[str, Any]
    version: str
    result: Any
    privilege: str = ""

    @property
    def moid(self) -> str:
        return str(self.this._moId)

    @property
    def kind(self) -> str:
        """The object's type as on the wire: `VirtualMachine`."""
        return wsdl_name(type(self.this))


def wsdl_name(kind: type) -> str:
    return str(VmomiSupport.GetWsdlName(kind))


def parse_call(body: bytes, action: str, newest: str) -> Call:
    """The call in `body`. action: the SOAPAction header; newest: the version if it says none. BadRequest."""
    version = _version(action, newest)
    reader = _Reader(version)
    try:
        reader.read(body)
        pieces = [(name, deserializer.GetResult()) for name, deserializer in reader.pieces]
    except BadRequest:
        raise
    except Exception as exc:
        raise BadRequest(f"{type(exc).__name__}: {exc}", reader.method) from exc
    if not reader.method or not pieces or pieces[0][0] != THIS:
        raise BadRequest("no method, or no _this before its parameters", reader.method)
    this = pieces[0][1]
    if reader.method == FETCH:
        return Call(this, FETCH, dict(pieces[1:]), version, _declared(object, "vmodl.version.version0", F_OPTIONAL))
    info = reader.info or method_info(this, reader.method)
    arguments = _arguments(info, pieces[1:], reader.method)
    return Call(
        this, reader.method, arguments, version, _declared(info.result, info.version, info.resultFlags), info.privId or ""
    )


def reply(call: Call, value: Any) -> bytes:
    """The answer to `call`; value: of the type that its method returns, None for nothing."""
    body = ""
    if value is not None:
        if isinstance(value, list) and not isinstance(value, VmomiSupport.Array):
            value = call.result.type(value)
        VmomiSupport.CheckField(call.result, value)
        body = SoapAdapter.SerializeToStr(value, call.result, version=call.version, nsMap=_prefixes())
    return _ENVELOPE.format(f'<{call.method}Response xmlns="{NAMESPACE}">{body}</{call.method}Response>').encode()


def fault(error: Any, version: str) -> bytes:
    """A pyVmomi fault as SOAP's."""
    silent = copy.copy(error)
    silent.msg = None
    tag = f"{wsdl_name(type(error))}Fault"
    detail = SoapAdapter.SerializeFaultDetail(silent, _declared(object, "vmodl.version.version0", 0, tag), version, _prefixes())
    detail = detail.replace(f"<{tag}", f'<{tag} xmlns="{NAMESPACE}"', 1)
    text = SoapAdapter.XmlEscape(str(error.msg or f"The operation failed: {type(error).__name__}"))
    said = f"<faultcode>ServerFaultCode</faultcode><faultstring>{text}</faultstring><detail>{detail}</detail>"
    return _ENVELOPE.format(f"<soapenv:Fault>{said}</soapenv:Fault>").encode()


def not_found(this: Any, method: str) -> Any:
    """MethodNotFound."""
    return vmodl.fault.MethodNotFound(
        receiver=this, method=method, msg=f"The method is not supported on the current object: {method}"
    )


def service_versions(newest: str) -> bytes:
    """/sdk/vimServiceVersions.xml: what clients negotiate by."""
    versions = [one for one in VmomiSupport.GetServiceVersions("vim25") if _is_child(newest, one)]
    ids = [VmomiSupport.versionIdMap[one] for one in versions if one.startswith("vim.")]
    prior = "".join(f"<version>{one}</version>" for one in ids[1:])
    text = f"<namespace><name>{NAMESPACE}</name><version>{ids[0]}</version><priorVersions>{prior}</priorVersions></namespace>"
    return f'<?xml version="1.0" encoding="UTF-8" ?><namespaces version="1.0">{text}</namespaces>'.encode()


def _declared(kind: Any, version: str, flags: int, name: str = "returnval") -> Any:
    return Object(name=name, index=-1, type=kind, version=version, flags=flags)


def _prefixes() -> dict[str, str]:
    return {**SoapAdapter.SOAP_NSMAP, NAMESPACE: ""}


def _version(action: str, newest: str) -> str:
    wanted = re.fullmatch(r'"?urn:vim25/([^"]+)"?', action.strip())
    if wanted is None:
        return newest
    version = str(VmomiSupport.GetVersionFromVersionUri(f"{NAMESPACE}/{wanted[1]}"))
    # As a real server: a client that speaks what is newer than we are gets what we have.
    return version if version and _is_child(newest, version) else newest


def _arguments(info: Any, pieces: list[tuple[str, Any]], method: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pieces:
        parameter = next((one for one in info.params if one.name == name), None)
        if parameter is None:
            raise BadRequest(f"{method} has no parameter {name}", method)
        if issubclass(parameter.type, list):
            found.setdefault(name, parameter.type()).append(value)
        else:
            found[name] = value
    for parameter in info.params:
        if parameter.name not in found and not parameter.flags & F_OPTIONAL:
            raise BadRequest(f"{method} lacks its parameter {parameter.name}", method)
    return found


class _Reader(SoapAdapter.ExpatDeserializerNSHandlers):
    """Walks the envelope; hands each parameter to a deserializer of its own."""

    def __init__(self, version: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.version = version
        self.method = ""
        self.info: Any = None
        self.pieces: list[tuple[str, Any]] = []
        self._depth = 0
        self._in_body = False
        self._parser = xml.parsers.expat.ParserCreate(namespace_separator=SoapAdapter.NS_SEP)

    def read(self, body: bytes) -> None:
        self._parser.buffer_text = True
        SoapAdapter.SetHandlers(self._parser, SoapAdapter.GetHandlers(self))
        with contextlib.suppress(StopIteration):
            self._parser.Parse(body, True)

    def StartElementHandler(self, tag: str, attributes: dict[str, str]) -> None:  # noqa: N802  pyVmomi's and expat's names
        name = tag.rpartition(SoapAdapter.NS_SEP)[2]
        self._depth += 1
        if self._depth == BODY_DEPTH:
            self._in_body = name == "Body"
        elif self._in_body and self._depth == METHOD_DEPTH:
            self.method = name
        elif self._in_body and self._depth > METHOD_DEPTH:
            self._depth -= 1  # its end will not be told to us
            self._begin(name, tag, attributes)

    def EndElementHandler(self, tag: str) -> None:  # noqa: N802
        self._depth -= 1

    def CharacterDataHandler(self, data: str) -> None:  # noqa: N802
        """Blanks between elements."""

    def _begin(self, name: str, tag: str, attributes: dict[str, str]) -> None:
        kind = ManagedObject if name == THIS else self._type_of(name)
        deserializer = SoapAdapter.SoapDeserializer(version=self.version)
        self.pieces.append((name, deserializer))
        deserializer.Deserialize(self._parser, kind, False, self.nsMap)
        deserializer.StartElementHandler(tag, attributes)

    def _type_of(self, name: str) -> Any:
        if self.method == FETCH:
            return str
        if self.info is None:
            this = self.pieces[0][1].GetResult() if self.pieces else None
            self.info = method_info(this, self.method)
        parameter = next((one for one in self.info.params if one.name == name), None)
        if parameter is None:
            raise BadRequest(f"{self.method} has no parameter {name}", self.method)
        return parameter.type.Item if issubclass(parameter.type, list) else parameter.type


def method_info(this: Any, method: str) -> Any:
    """pyVmomi's description of a method of that object, by its name on the wire. UnknownMethod."""
    for one in methods_of(type(this)):
        if one.info.wsdlName == method:
            return one.info
    raise UnknownMethod(this, method)


def methods_of(kind: Any) -> Iterator[Any]:
    for base in kind.__mro__:
        yield from (one for one in vars(base).values() if isinstance(one, VmomiSupport.ManagedMethod))
