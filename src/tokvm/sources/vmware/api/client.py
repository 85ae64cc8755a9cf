"""One login to vCenter or ESXi, kept for as long as it is used.

    ask(question)   may be asked twice: after a broken connection, and after the session expired (30 minutes idle)
    act(change)     sent once: a broken connection is ConnectionLost, and the caller looks what is so.
                    A session that had expired refused it before it did anything, so it is sent again after a new login

Which version of the API both sides speak is asked first (`/sdk/vimServiceVersions.xml`). Every socket proves the peer, as
`remote.tls` says.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from http.client import HTTPException, HTTPSConnection
from typing import Any, TypeVar

from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.remote.tls import TlsTrust
from tokvm.sources.vmware.api import faults
from tokvm.sources.vmware.api.place import Place
from tokvm.sources.vmware.api.vmomi import SoapStubAdapter, versions, vim, vmodl

log = logging.getLogger(__name__)

CALL_S = 180.0  # one SOAP call; long work is a task that is looked at
_IDLE_S = 30.0  # a pooled connection that lay idle longer is opened anew: the server closes them without a word
_MOST_VERSIONS = 256 << 10
T = TypeVar("T")


class Client:
    """Thread-safe. password: asked for once, at the first login."""

    def __init__(self, place: Place, password: Callable[[], str], trust: TlsTrust) -> None:
        self.place = place
        self.trust = trust
        self._password = password
        self._secret: str | None = None
        self._lock = threading.RLock()
        self._stub: Any = None
        self._content: Any = None
        self._logins = 0
        self._in = False
        self.session_key = ""

    @property
    def where(self) -> str:
        return self.place.url

    @property
    def content(self) -> Any:
        """The service's content: its managers. Logs in when nobody did."""
        self._session()
        return self._content

    @property
    def is_vcenter(self) -> bool:
        return str(self.content.about.apiType) == "VirtualCenter"

    def ref(self, kind: Any, moid: str) -> Any:
        """A managed object by its id. Its attributes must not be read: each would be a request; see `properties`."""
        self._session()
        return kind(moid, self._stub)

    def ask(self, question: Callable[[], T], doing: str) -> T:
        """The answer to what changes nothing."""
        return self._send(question, doing, again=True)

    def act(self, change: Callable[[], T], doing: str) -> T:
        """Sent once. ConnectionLost: it may have been done."""
        return self._send(change, doing, again=False)

    def cookie(self) -> str:
        """The session's cookie for requests beside the API."""
        self._session()
        found = re.search(r'vmware_soap_session="?([^";]+)"?', str(self._stub.cookie)) if self._stub else None
        if found is None:
            raise SourceError("the server gave no session cookie", where=self.where)
        return f'vmware_soap_session="{found[1]}"'

    def renew(self, cookie: str) -> None:
        """Log in again, unless somebody did since `cookie` was read."""
        with self._lock:
            if self._in and self.cookie() != cookie:
                return
            seen = self._logins
        self._log_in_again(seen)

    def close(self) -> None:
        with self._lock:
            stub, self._stub = self._stub, None
            if stub is None:
                return
            try:
                if self._in:
                    self._content.sessionManager.Logout()
            except (vmodl.MethodFault, OSError, HTTPException) as exc:
                log.debug("%s: logout: %s", self.where, exc)
            stub.poolSize = 0  # a call of another thread that is still under way closes its connection itself
            stub.DropConnections()

    # ---- inside

    def _send(self, call: Callable[[], T], doing: str, *, again: bool) -> T:
        """The session's expiry is met by a new login, once; a broken connection by a second try, where `again` allows it."""
        logins, tries = 1, 1 if again else 0
        while True:
            self._session()
            seen = self._logins
            try:
                return call()
            except vmodl.MethodFault as fault:
                if not (logins and faults.is_not_authenticated(fault)):
                    raise faults.error_of(fault, where=self.where, doing=doing) from fault
                logins -= 1
                self._log_in_again(seen)
            except Exception as exc:
                error = self._translated(exc, doing)
                if error is None:
                    raise
                if not (tries and isinstance(error, ConnectionLost)):
                    raise error from exc
                tries -= 1
                log.info("%s: %s; asking again", self.where, error.what)

    def _translated(self, exc: BaseException, doing: str) -> SourceError | None:
        return faults.translated(exc, host=self.place.host, port=self.place.port, where=self.where, doing=doing)

    def _session(self) -> None:
        with self._lock:
            if self._in:
                return
            try:
                self._connect()
            except Exception as exc:
                error = self._translated(exc, "logging in")
                if error is None:
                    raise
                raise error from exc

    def _connect(self) -> None:
        if self._stub is None:
            context = self.trust.context()
            self._stub = SoapStubAdapter(
                host=self.place.host,
                port=self.place.port,
                version=self._version(context),
                sslContext=context,
                httpConnectionTimeout=CALL_S,
                connectionPoolTimeout=_IDLE_S,
            )
            self._content = vim.ServiceInstance("ServiceInstance", self._stub).RetrieveContent()
        self._login()

    def _login(self) -> None:
        if self._secret is None:
            self._secret = self._password()
        found = self._content.sessionManager.Login(userName=self.place.user, password=self._secret)
        self.session_key = str(found.key)
        self._in = True
        self._logins += 1

    def _log_in_again(self, seen: int) -> None:
        with self._lock:
            if self._logins != seen or self._stub is None:
                return
            log.info("%s: the session expired; logging in again", self.where)
            self._in = False
            self._stub.SetSessionId(None)
            self._session()

    def _version(self, context: Any) -> str:
        """The newest version of the API that both sides know."""
        connection = HTTPSConnection(self.place.host, self.place.port, timeout=CALL_S, context=context)
        try:
            connection.request("GET", "/sdk/vimServiceVersions.xml")
            answer = connection.getresponse()
            text = answer.read(_MOST_VERSIONS).decode("utf-8", "replace")
        finally:
            connection.close()
        theirs = set(re.findall(r"<version>\s*([0-9.]{1,20})\s*</version>", text)) if answer.status == 200 else set()
        found = next((ours for ours, name in versions() if name in theirs), None)
        if found is None:
            raise SourceError(
                "it speaks no version of the vSphere API that is known here",
                where=self.where,
                fix="is this a vCenter or an ESXi host, and the right port?",
            )
        return found
