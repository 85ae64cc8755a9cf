"""HTTPS requests beside the API: `/folder` and lease URLs. Connections are kept and shared between threads.

Each is made with the session's trust, so each proves its peer; a host that only vCenter named is proved by the certificate that
vCenter says it has. The session's cookie goes to the server that gave it, and to nobody else.
"""

from __future__ import annotations

import logging
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import unescape
from http.client import HTTPException, HTTPResponse, HTTPSConnection
from typing import Protocol

from tokvm.core.errors import SourceError
from tokvm.core.text import readable
from tokvm.remote import tls
from tokvm.remote.tls import TlsTrust
from tokvm.sources.vmware.api import faults

log = logging.getLogger(__name__)

SILENCE_S = 300.0  # the first byte of a range may wait for a host that is busy; virt-v2v waits for 2000 s
MOST_ERROR = 64 << 10
_UNAUTHORIZED = (401, 403)
BUSY = (429, 502, 503, 504)


class Login(Protocol):
    """What is needed of `client.Client`."""

    def cookie(self) -> str: ...

    def renew(self, cookie: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Peer:
    """A server. login: None for one that gets no cookie of ours."""

    host: str
    port: int
    trust: TlsTrust
    login: Login | None = None

    @property
    def where(self) -> str:
        return f"https://{self.host}" + ("" if self.port == 443 else f":{self.port}")


class Web:
    """Connections to one server. Thread-safe: each request has a connection for itself until its answer was read."""

    def __init__(self, peer: Peer, *, silence_s: float = SILENCE_S) -> None:
        self.peer = peer
        self._silence_s = silence_s
        self._context = peer.trust.context()
        self._idle: list[HTTPSConnection] = []
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def get(self, target: str, headers: dict[str, str] | None = None) -> Iterator[HTTPResponse]:
        """The answer to a GET, whatever its status. Logged in again, once, when the session had expired; asked again, once,
        when the server closed a kept connection under us. ConnectionLost when it breaks, also while the body is read."""
        connection, answer = self._answer(target, headers or {})
        whole = False
        try:
            yield answer
            whole = answer.isclosed()
        except (OSError, HTTPException) as exc:
            raise faults.lost(exc, where=self.peer.where, doing=f"reading {target}") from exc
        finally:
            reusable = whole and not answer.will_close
            if not (reusable and self._keep(connection)):
                _end(connection, answer)

    def _keep(self, connection: HTTPSConnection) -> bool:
        """For the next request, unless there will be none."""
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
            return not self._closed

    def _answer(self, target: str, headers: dict[str, str]) -> tuple[HTTPSConnection, HTTPResponse]:
        cookie = self.peer.login.cookie() if self.peer.login else ""
        connection, answer = self._ask(target, headers, cookie)
        if answer.status in _UNAUTHORIZED and self.peer.login is not None:
            _end(connection, answer)
            self.peer.login.renew(cookie)
            connection, answer = self._ask(target, headers, self.peer.login.cookie())
        return connection, answer

    def _ask(self, target: str, headers: dict[str, str], cookie: str) -> tuple[HTTPSConnection, HTTPResponse]:
        with self._lock:
            kept = self._idle.pop() if self._idle else None
        sent = {**headers, **({"Cookie": cookie} if cookie else {}), "Accept-Encoding": "identity"}
        for connection in (kept, None):
            if connection is None and kept is not None:
                log.debug("%s closed a connection that lay idle", self.peer.where)
            used = connection or HTTPSConnection(self.peer.host, self.peer.port, timeout=self._silence_s, context=self._context)
            try:
                used.request("GET", target, headers=sent)
                return used, used.getresponse()
            except (OSError, HTTPException) as exc:
                used.close()
                if connection is None:
                    raise self._failed(exc, target) from exc
            except BaseException:
                used.close()
                raise
        raise AssertionError("unreachable")

    def _failed(self, exc: Exception, target: str) -> SourceError:
        if isinstance(exc, ssl.SSLError) and tls.is_certificate_error(exc):
            return tls.certificate_refused(exc, host=self.peer.host, port=self.peer.port, where=self.peer.where)
        return faults.lost(exc, where=self.peer.where, doing=f"asking for {target}")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


def _end(connection: HTTPSConnection, answer: HTTPResponse) -> None:
    """Both: a connection that ends with its answer has given its socket away to it."""
    answer.close()
    connection.close()


def reason_of(answer: HTTPResponse) -> str:
    """What the body of an error page says: vSphere answers 500 for many things, and names the reason in HTML only."""
    raw = answer.read(MOST_ERROR).decode("utf-8", "replace")
    text = unescape(re.sub(r"<[^>]*>", " ", re.sub(r"(?is)<(style|script|title)\b.*?</\1>", " ", raw)))
    return readable(" ".join(text.split()), limit=300)
