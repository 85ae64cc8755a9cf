"""WinRM: the WS-Management service of a Windows host, over TLS or with its own message encryption.

    hyperv+winrm://[user@]host[:port]      5986: HTTPS, the default      5985: HTTP, each message encrypted (SPNEGO)

Whatever the port, nobody but 5985 is talked to without TLS, and nobody at all without encryption; `basic` authentication does
not exist here. Over HTTP the host proves itself by knowing the user's key (NTLM's or Kerberos' session key), over TLS by its
certificate as well, and the login is bound to that certificate (channel binding). No proxy is used, no redirection followed.

pypsrp speaks the protocol, requests carries it; what may come back is bounded here, in bytes and in time, and over HTTP must be
encrypted.
Specs: Microsoft, [MS-WSMV] and [MS-PSRP].
"""

from __future__ import annotations

import logging
import re
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote
from xml.etree.ElementTree import Element

import requests
from pypsrp.wsman import WSMan
from requests.adapters import HTTPAdapter

from tokvm.core.errors import UsageError
from tokvm.core.units import MiB
from tokvm.remote.tls import TlsTrust, certificate_refused, is_certificate_error
from tokvm.sources.hyperv.winrm_errors import reached_nobody

HTTPS, HTTP, SMB = 5986, 5985, 445
OPERATION_S = 20  # what the host holds a question open for, before it says "nothing yet"
CONNECT_S = 15.0
MOST_RECEIVED = 48 * MiB  # for one request; the largest answer of a script, in base64 in CLIXML in base64, is a third of it
_SEALED = ("multipart/encrypted;", "multipart/x-multi-encrypted;")  # exactly what pypsrp decrypts
_PLACE = re.compile(
    r"(?:(?P<user>[^@/?]*)@)?(?:\[(?P<v6>[0-9A-Fa-f:.%]+)\]|(?P<host>[A-Za-z0-9_][A-Za-z0-9._-]*))"
    r"(?::(?P<port>[0-9]{1,5}))?/?(?:\?smb=(?P<smb>[0-9]{1,5}))?"
)


# They log whole messages, with login tokens, when DEBUG is on for everybody, and failures that are ours to tell.
for _name in ("pypsrp", "spnego", "urllib3"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class WinrmConfig:
    """One host. `user` may be `DOMAIN\\name` or `name@domain`. silence_s: how long it may say nothing at all."""

    host: str
    user: str
    password: str = field(repr=False)
    port: int = HTTPS
    trust: TlsTrust = field(default_factory=TlsTrust)
    silence_s: float = 30.0
    tls: bool = True
    where: str = ""
    """For messages, and as the source's URL."""


@dataclass(frozen=True, slots=True)
class WinrmPlace:
    """What a URL says."""

    user: str
    host: str
    port: int
    smb_port: int

    @classmethod
    def parse(cls, text: str, *, user: str) -> WinrmPlace:
        """`[user@]host[:port][?smb=port]`; `user` when it names nobody. UsageError for anything else."""
        match = _PLACE.fullmatch(text)
        if match is None:
            raise UsageError(
                f"{text!r} is no place to reach over WinRM", fix="write hyperv+winrm://[user@]host[:port], port 5986 or 5985"
            )
        found = unquote(match["user"] or user)
        if ":" in found:
            raise UsageError("a URL is no place for a password", fix="give it by --password-file, TOKVM_PASSWORD or the prompt")
        if not found.isprintable():
            raise UsageError(f"{found!r} is no user's name")
        return cls(found, match["v6"] or match["host"], _port(match["port"] or HTTPS), _port(match["smb"] or SMB))

    @property
    def where(self) -> str:
        """For messages, and as the source's URL."""
        shown = f"[{self.host}]" if ":" in self.host else self.host
        smb = f"?smb={self.smb_port}" if self.smb_port != SMB else ""
        return f"hyperv+winrm://{quote(self.user, safe='')}@{shown}:{self.port}{smb}"

    def config(self, password: str, trust: TlsTrust, *, silence_s: float) -> WinrmConfig:
        """UsageError when somebody is to be trusted who is not asked."""
        if self.port == HTTP and trust != TlsTrust():
            raise UsageError(
                f"--tls-ca and --tls-fingerprint have no meaning for port {HTTP}, which has no TLS",
                fix=f"leave them out, or use port {HTTPS}",
            )
        return WinrmConfig(self.host, self.user, password, self.port, trust, silence_s, tls=self.port != HTTP, where=self.where)


def _port(text: str | int) -> int:
    if not 0 < int(text) < 1 << 16:
        raise UsageError(f"{text} is not a port", fix="1 to 65535")
    return int(text)


def certificate(config: WinrmConfig) -> bytes:
    """The certificate (DER) that the host proved to hold the key of. CertificateRefused, ConnectionLost."""
    try:
        with (
            socket.create_connection((config.host, config.port), timeout=CONNECT_S) as plain,
            config.trust.context().wrap_socket(plain, server_hostname=config.host) as wrapped,
        ):
            return wrapped.getpeercert(binary_form=True) or b""
    except OSError as exc:
        if isinstance(exc, ssl.SSLError) and is_certificate_error(exc):
            raise certificate_refused(exc, host=config.host, port=config.port, where=config.where) from exc
        raise reached_nobody(exc, where=config.where) from exc


class TooLate(requests.exceptions.Timeout):
    """The deadline of what is being done has passed."""


class Wsman(WSMan):
    """A WSMan whose requests all end before `deadline` (time.monotonic), and are never repeated behind our back."""

    def __init__(self, config: WinrmConfig) -> None:
        super().__init__(
            config.host,
            port=config.port,
            username=config.user,
            password=config.password,
            ssl=config.tls,
            auth="negotiate",
            encryption="auto" if config.tls else "always",
            cert_validation=not config.trust.pins,
            connection_timeout=round(CONNECT_S),
            operation_timeout=OPERATION_S,
            reconnection_retries=0,
            no_proxy=True,
        )
        self.deadline = 0.0
        self._silence_s = config.silence_s
        self._adapter = _Adapter(config)
        self.transport.session = self._session()

    def give(self, seconds: float) -> None:
        """The time for what comes now, and the bytes that it may bring."""
        self.deadline = self._adapter.deadline = time.monotonic() + seconds
        self._adapter.left = MOST_RECEIVED

    def invoke(
        self,
        action: str,
        resource_uri: str,
        resource: Element | None,
        option_set: Any = None,
        selector_set: Any = None,
        timeout: int | None = None,
        **_retries: int,
    ) -> Element:
        left_s = self.deadline - time.monotonic()
        if left_s <= 0:
            raise TooLate
        held_s = max(1, int(min(timeout or OPERATION_S, left_s, max(1.0, self._silence_s - 2))))
        return super().invoke(action, resource_uri, resource, option_set, selector_set, held_s)

    def _session(self) -> requests.Session:
        session = self.transport._build_session()
        session.trust_env = False  # no .netrc, no proxies of the environment
        session.max_redirects = 0
        for scheme in ("http://", "https://"):
            session.mount(scheme, self._adapter)
        return session


class _Adapter(HTTPAdapter):
    """Connections that trust whom the configuration trusts, and answers that end."""

    def __init__(self, config: WinrmConfig) -> None:
        self._config = config
        self.deadline = 0.0
        self.left = 0
        self._raw: list[Any] = []
        super().__init__(max_retries=0)

    def close(self) -> None:
        """Those as well whose answer nobody read to its end, because what came before it was nonsense."""
        for raw in self._raw:
            raw.close()
        self._raw.clear()
        super().close()

    def init_poolmanager(self, *args: Any, **named: Any) -> None:
        if self._config.tls:
            named["ssl_context"] = self._config.trust.context()
            named["assert_fingerprint"] = next(iter(self._config.trust.pins), None)  # says to urllib3 that somebody looks
        super().init_poolmanager(*args, **named)

    def cert_verify(self, conn: Any, url: str, verify: object, cert: object) -> None:
        """Not the CAs that come with requests: those of our context alone."""
        conn.cert_reqs = "CERT_NONE" if self._config.trust.pins else "CERT_REQUIRED"

    def build_response(self, req: Any, resp: Any) -> Any:
        response = super().build_response(req, resp)
        self._raw = [*(raw for raw in self._raw if not raw.closed), resp]
        self._refuse_clear(req, response)
        whole = response.iter_content
        response.iter_content = lambda *args, **named: self._bounded(whole(*args, **named))  # type: ignore[method-assign]
        return response

    def _refuse_clear(self, req: Any, response: Any) -> None:
        """Over HTTP pypsrp believes an answer that is not encrypted as well, and anybody on the way could have given that one.
        The login's own requests have no body; 401 begins another login."""
        sealed = str(response.headers.get("content-type", "")).startswith(_SEALED)
        if self._config.tls or not req.body or response.status_code == requests.codes.unauthorized or sealed:
            return
        if response.status_code >= requests.codes.bad_request:  # Windows' HTTP.sys says these without asking WinRM
            raise requests.exceptions.ConnectionError(f"the host answered {response.status_code}, in clear")
        raise ValueError("an answer in clear, where all are encrypted: somebody may sit between us and the host")

    def _bounded(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            self.left -= len(piece)
            if self.left < 0:
                raise ValueError(f"more than {MOST_RECEIVED} bytes came")
            if time.monotonic() > self.deadline:
                raise TooLate
            yield piece
