"""What went wrong between us and a WinRM service, in our words.

login refused              SourceError          a person must mend it
certificate                CertificateRefused   nothing was sent
connection, silence        ConnectionLost       what was asked may have been done
a fault (SOAP)             ConnectionLost when the session had worked before (it is gone), else HyperVError with its code
nonsense                   HyperVError
"""

from __future__ import annotations

import binascii
import ssl
import struct
from collections.abc import Iterator
from xml.etree.ElementTree import ParseError

import requests
from pypsrp.exceptions import (
    AuthenticationError,
    FragmentError,
    InvalidPSRPOperation,
    InvalidRunspacePoolStateError,
    SerializationError,
    WinRMError,
    WinRMTransportError,
    WSManFaultError,
)
from spnego.exceptions import SpnegoError
from urllib3.exceptions import HTTPError

from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.core.text import readable
from tokvm.remote.tls import certificate_refused, is_certificate_error
from tokvm.sources.hyperv.faults import Fault, HyperVError

NOTHING_YET = 0x80338029  # ERROR_WSMAN_OPERATION_TIMEDOUT: the host held the question open and has nothing to say so far
_ACCESS_DENIED = 5

BROKEN = (requests.exceptions.RequestException, HTTPError, OSError)
LOGIN = (AuthenticationError, SpnegoError)
REFUSED = (WSManFaultError, WinRMTransportError)
# What pypsrp raises for bytes that are no WS-Management or no PSRP: it parses without looking.
NONSENSE = (
    WinRMError,
    FragmentError,
    SerializationError,
    InvalidPSRPOperation,
    InvalidRunspacePoolStateError,
    ParseError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    struct.error,
    binascii.Error,
    RecursionError,
)
ANY = (*BROKEN, *LOGIN, *REFUSED, *NONSENSE)


def explained(exc: BaseException, *, worked: bool, doing: str, host: str, port: int, where: str) -> SourceError:
    """Any of ANY. worked: the session had answered before, so what fails now is not the host's way of being."""
    shown = next((one for one in _causes(exc) if isinstance(one, ssl.SSLError) and is_certificate_error(one)), None)
    if isinstance(shown, ssl.SSLError):
        return certificate_refused(shown, host=host, port=port, where=where)
    if isinstance(exc, LOGIN):
        return SourceError(
            f"the host refused the login: {_said(exc)}",
            where=where,
            fix="check the user (DOMAIN%5Cname for a domain's) and the password, and that the host's WinRM allows Negotiate",
        )
    if isinstance(exc, REFUSED):
        return _fault(exc, worked=worked, doing=doing, where=where)
    if isinstance(exc, BROKEN) and not isinstance(exc, ValueError):
        return reached_nobody(exc, where=where, doing=doing)
    return HyperVError(
        f"{doing} was answered with something tokvm does not understand: {_said(exc)}",
        where=where,
        fix="is it a WinRM service that listens there? run with -vv, and report this with the Windows version",
    )


def reached_nobody(exc: BaseException, *, where: str, doing: str = "connecting") -> ConnectionLost:
    return ConnectionLost(
        f"the connection failed while {doing}: {_said(exc)}",
        where=where,
        fix="run the same command again once the host answers (WinRM on it: `winrm quickconfig -transport:https`)",
    )


def _fault(exc: WSManFaultError | WinRMTransportError, *, worked: bool, doing: str, where: str) -> SourceError:
    said = _said(exc)
    if isinstance(exc, WSManFaultError) and exc.code == _ACCESS_DENIED:
        return HyperVError(
            f"the user we are logged in as may not use WinRM ({said})",
            where=where,
            fix="log in as a member of the host's Administrators (a local one but Administrator itself needs "
            "LocalAccountTokenFilterPolicy 1)",
            fault=Fault.ACCESS_DENIED,
        )
    if worked:
        return ConnectionLost(
            f"the host broke off while {doing}: {said}",
            where=where,
            fix="run the same command again; it asks the host first how far it got",
        )
    return HyperVError(f"WinRM refused {doing}: {said}", where=where, fix="see the host's event log Windows Remote Management")


def _said(exc: BaseException) -> str:
    if isinstance(exc, WSManFaultError):
        code = f"{exc.code & 0xFFFFFFFF:#x}" if isinstance(exc.code, int) else str(exc.code)
        return f"{readable(' '.join(str(exc.reason or 'a fault').split()), limit=300)} ({code})"
    return readable(" ".join(str(exc).split()) or type(exc).__name__, limit=300)


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    """The exception and all that it was made of: requests and urllib3 wrap what the socket said."""
    seen: list[BaseException] = []
    waiting = [exc]
    while waiting:
        one = waiting.pop()
        if one is None or one in seen or len(seen) > 20:
            continue
        seen.append(one)
        yield one
        inner = [part for part in (*one.args, getattr(one, "reason", None)) if isinstance(part, BaseException)]
        waiting += [one.__cause__, one.__context__, *inner]
