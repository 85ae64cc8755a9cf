"""The API's faults in our words. A fault's name is its type's (`InvalidPowerState`), its text the server's, in any language."""

from __future__ import annotations

import ssl
from http.client import HTTPException
from xml.parsers.expat import ExpatError

from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.core.text import readable
from tokvm.remote import tls
from tokvm.sources.vmware.api.vmomi import vim, vmodl

_FIX = {
    "InvalidLogin": "check user and password; a user of a domain is written user@domain",
    "NoPermission": "give the user's role that privilege on the VM, its host and datastores; see docs/vsphere-calls.md",
    "RestrictedVersion": "this host's free licence lets nothing be changed through the API; over SSH it can be: esx://root@HOST",
    "ToolsUnavailable": "VMware Tools do not run in the guest; shut it down from inside, or cut its power with --force-off",
    "TaskInProgress": "wait until the other task on this VM is over, then run the same command again",
    "FileLocked": "see who holds the file (another host, a backup job), then run the same command again",
    "NoDiskSpace": "make room on the datastore, then run the same command again",
    "ManagedObjectNotFound": "it was removed or moved: see `tokvm ls`; in a cluster, name the host that runs it or its vCenter",
    "MethodNotFound": "this server is too old, or no vCenter or ESXi",
    "HostNotConnected": "connect the host to vCenter again",
    "InvalidState": "the VM is in a state that does not allow this now; look at its recent tasks",
}
_BREAKS = (OSError, HTTPException, EOFError, ExpatError)
"""What pyVmomi lets through when a connection breaks: socket and TLS errors, http.client's own, and half an XML document."""
_CONFUSED = (TypeError, AttributeError, LookupError, ValueError)
"""What pyVmomi raises over an answer that is not what its tables say (an old or odd server)."""


class VsphereError(SourceError):
    """The server answered with a fault. `fault`: its name; `fault_text`: what it says."""

    def __init__(self, what: str, *, where: str, fault: str, fault_text: str = "", fix: str = "") -> None:
        super().__init__(what, where=where, fix=fix)
        self.fault = fault
        self.fault_text = fault_text


def name_of(fault: object) -> str:
    """`InvalidPowerState` of a `vim.fault.InvalidPowerState`."""
    return type(fault).__name__.rpartition(".")[2]


def is_a(fault: object, name: str) -> bool:
    """Is it this fault, or one derived from it?"""
    return any(one.__name__.rpartition(".")[2] == name for one in type(fault).__mro__)


def text_of(fault: object) -> str:
    found = getattr(fault, "msg", None) or getattr(fault, "localizedMessage", None) or ""
    reasons = [text for one in getattr(fault, "faultMessage", None) or () if (text := getattr(one, "message", None))]
    return readable(" ".join([str(found), *map(str, reasons)]).strip(), limit=400)


def error_of(fault: object, *, where: str, doing: str) -> VsphereError:
    name, text = name_of(fault), text_of(fault)
    privilege = getattr(fault, "privilegeId", None)
    told = ": ".join(part for part in (name, text) if part) + (f" (privilege {readable(str(privilege))})" if privilege else "")
    return VsphereError(f"{doing} failed: {told}", where=where, fault=name, fault_text=text, fix=_fix(fault))


def _fix(fault: object) -> str:
    names = [one.__name__.rpartition(".")[2] for one in type(fault).__mro__]
    return next((_FIX[name] for name in names if name in _FIX), "see the VM's recent tasks in the vSphere client")


def translated(exc: BaseException, *, host: str, port: int, where: str, doing: str) -> SourceError | None:
    """The error for whatever pyVmomi or its connection raised; None for what is no such thing."""
    if isinstance(exc, vmodl.MethodFault):
        return error_of(exc, where=where, doing=doing)
    if isinstance(exc, ssl.SSLError) and tls.is_certificate_error(exc):
        return tls.certificate_refused(exc, host=host, port=port, where=where)
    if isinstance(exc, _BREAKS):
        return lost(exc, where=where, doing=doing)
    if isinstance(exc, _CONFUSED):
        said = readable(f"{type(exc).__name__}: {exc}", limit=200)
        return SourceError(f"{doing}: the server's answer is not understood ({said})", where=where)
    return None


def lost(exc: BaseException, *, where: str, doing: str) -> ConnectionLost:
    return ConnectionLost(
        f"the connection failed while {doing}: {readable(str(exc) or type(exc).__name__, limit=200)}",
        where=where,
        fix="run the same command again once the server answers",
    )


def is_not_authenticated(fault: object) -> bool:
    return isinstance(fault, vim.fault.NotAuthenticated)
