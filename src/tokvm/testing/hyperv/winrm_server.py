"""A WinRM service on loopback for the played Hyper-V host: HTTP(S), NTLM, message encryption, WS-Management, PSRP.

    client ── POST /wsman ──► login (spnego) ──► [decrypt] ──► WS-Management ──► psrp_shell ──► the host's persona

Strict: basic authentication, messages in clear over HTTP, a login that is bound to another certificate, an unknown action or
bootstrap are refused, and what no honest client would send is recorded in the host's violations. pyspnego checks the login by a
file whose name it takes from NTLM_USER_FILE, so there is one server's set of users in a process.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import socket
import ssl
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import spnego
from pypsrp.encryption import WinRMEncryption
from spnego.channel_bindings import GssChannelBindings

from tokvm.sources.hyperv.psrp import BOOTSTRAP
from tokvm.testing.certificates import server_context
from tokvm.testing.hyperv.host import HyperVHost
from tokvm.testing.hyperv.psrp_shell import Broken, Ending, Shell

USER = "Administrator"
PASSWORD = "pa ß'w\"ord$(x)"
LOST = 255  # of a persona whose connection is to die
_S = "http://www.w3.org/2003/05/soap-envelope"
_A = "http://schemas.xmlsoap.org/ws/2004/08/addressing"
_W = "http://schemas.dmtf.org/wbem/wsman/1/wsman.xsd"
_R = "http://schemas.microsoft.com/wbem/wsman/1/windows/shell"
_T = "http://schemas.xmlsoap.org/ws/2004/09/transfer"
_F = "http://schemas.microsoft.com/wbem/wsman/1/wsmanfault"
_P = "http://schemas.microsoft.com/powershell"
_RESOURCE = f"{_P}/Microsoft.PowerShell"
_ENCRYPTED = 'multipart/encrypted;protocol="application/HTTP-SPNEGO-session-encrypted";boundary="Encrypted Boundary"'
NO_SHELL, NOTHING_YET, DENIED = 2150858843, 2150858793, 5


class Fault(Exception):
    """A SOAP fault."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class WinrmServer:
    """certificate: a PEM file with its key beside it; None: plain HTTP, where every message must be encrypted."""

    def __init__(self, host: HyperVHost, folder: Path, *, certificate: Path | None, port: int = 0) -> None:
        self.host = host
        self.address = "127.0.0.1"
        self.shells: dict[str, Shell] = {}
        self.opened = 0
        self.closed: list[str] = []
        self.denies: int | None = None
        """A fault that everything is answered with."""
        self.slow_to_open_s = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        users = folder / "ntlm-users"
        users.write_text(f":{USER}:{PASSWORD}\n", encoding="utf-8")
        self._before = os.environ.get("NTLM_USER_FILE")
        os.environ["NTLM_USER_FILE"] = str(users)
        self.binding = None if certificate is None else _binding(certificate)
        self._connections: set[socket.socket] = set()
        self._http = _Http((self.address, port), self)
        self._tls = None if certificate is None else server_context(certificate)
        self.port = int(self._http.server_address[1])

    def start(self) -> Self:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, name="winrm", daemon=True).start()
        return self

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self.cut_connections()
        if self._before is None:
            os.environ.pop("NTLM_USER_FILE", None)
        else:
            os.environ["NTLM_USER_FILE"] = self._before

    def cut_connections(self) -> None:
        """Every connection breaks; new ones work, and shells live on."""
        for one in list(self._connections):
            kill(one)

    def forget_shells(self) -> None:
        """As a host does with those that were idle for too long, or when its WinRM service is started anew."""
        self.shells.clear()

    def violation(self, why: str) -> None:
        self.host.store.append("violations", {"command": "winrm", "why": why})

    def wrap(self, plain: socket.socket) -> socket.socket:
        return plain if self._tls is None else self._tls.wrap_socket(plain, server_side=True)

    def connected(self, one: socket.socket) -> None:
        self._connections.add(one)

    def gone(self, one: socket.socket) -> None:
        self._connections.discard(one)

    def run(self, request: bytes) -> bytes | Ending:
        """A request to the persona, as its powershell.exe would have read it."""
        from tokvm.sources.hyperv import powershell

        try:
            done = self.host.run(powershell.COMMAND, request)
        except Exception as exc:  # noqa: BLE001 - a persona that hangs until its test is over
            return Ending.NEVER if "timed out" in str(exc) else Ending.CRASHED
        if done.code == LOST:
            return Ending.CONNECTION_DIES
        framed = re.search(rb"\r\n@@B\r\n(.*)\r\n@@E\r\n", done.stdout, re.DOTALL)
        if framed:
            return framed[1].replace(b"\r\n", b"")
        return Ending.CRASHED if done.code else Ending.SAYS_NOTHING

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], service: WinrmServer) -> None:
        super().__init__(address, _Connection)
        self.service = service

    def finish_request(self, request: Any, client_address: Any) -> None:
        try:
            wrapped = self.service.wrap(request)
        except (OSError, ssl.SSLError):
            return
        self.service.connected(wrapped)
        try:
            _Connection(wrapped, client_address, self)
        except OSError:
            pass
        finally:
            self.service.gone(wrapped)
            kill(wrapped)

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that break are what it is for."""


class _Connection(BaseHTTPRequestHandler):
    """One connection: its login, then its messages."""

    protocol_version = "HTTP/1.1"
    server: _Http

    def setup(self) -> None:
        super().setup()
        self.context: Any = None
        self.logged_in = False

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nowhere."""

    def do_POST(self) -> None:
        service = self.server.service
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path != "/wsman":
            service.violation(f"POST {self.path}")
            self._reply(404, b"")
            return
        if not self.logged_in and not self._log_in(self.headers.get("Authorization", "")):
            return
        if service.binding is None:
            self._sealed(body)
        else:
            self._reply(*self._answer(body))

    def _log_in(self, said: str) -> bool:
        """False: the answer (401) was sent already."""
        service = self.server.service
        word, _, token = said.partition(" ")
        if word not in ("", "Negotiate"):
            service.violation(f"authentication by {word}")
        if word != "Negotiate":
            self._reply(401, b"", login="Negotiate")
            return False
        if self.context is None or self.context.complete:
            bindings = None if service.binding is None else GssChannelBindings(application_data=service.binding)
            options = spnego.NegotiateOptions.use_negotiate
            self.context = spnego.server(channel_bindings=bindings, options=options)
        try:
            out = self.context.step(base64.b64decode(token))
        except Exception:  # noqa: BLE001 - a wrong password, user or binding
            self.context = None
            self._reply(401, b"", login="Negotiate")
            return False
        self.logged_in = self.context.complete
        self.last_token = "Negotiate " + base64.b64encode(out).decode() if out else ""
        if not self.logged_in:
            self._reply(401, b"", login=self.last_token)
        return bool(self.logged_in)

    def _sealed(self, body: bytes) -> None:
        """Over HTTP: an empty message that logs in, then encrypted ones."""
        kind = self.headers.get("Content-Type", "")
        if not body:
            self._reply(200, b"", login=self.last_token)
            return
        if not kind.startswith("multipart/encrypted"):
            self.server.service.violation("a message in clear over HTTP")
            self._reply(400, b"")
            return
        seal = WinRMEncryption(self.context, WinRMEncryption.SPNEGO)
        try:
            plain = seal.unwrap_message(body, "Encrypted Boundary")
        except Exception:  # noqa: BLE001 - of another login
            self._reply(400, b"")
            return
        code, text = self._answer(plain)
        self._reply(code, seal.wrap_message(text)[1], kind=_ENCRYPTED)

    def _answer(self, raw: bytes) -> tuple[int, bytes]:
        service = self.server.service
        asked = ElementTree.fromstring(raw)
        message = asked.findtext(f"{{{_S}}}Header/{{{_A}}}MessageID") or ""
        try:
            action, body = _Message(service, asked).answer()
        except Fault as fault:
            text = f'<f:WSManFault Code="{fault.code}" Machine="HV1"><f:Message>{escape(str(fault))}</f:Message></f:WSManFault>'
            body = (
                "<s:Fault><s:Code><s:Value>s:Receiver</s:Value></s:Code><s:Reason><s:Text xml:lang='de-DE'>"
                f"{escape(str(fault))}</s:Text></s:Reason><s:Detail>{text}</s:Detail></s:Fault>"
            )
            return 500, _envelope("http://schemas.dmtf.org/wbem/wsman/1/wsman/fault", message, body)
        except Broken as broken:
            service.violation(str(broken))
            return 400, b""
        return 200, _envelope(action, message, body)

    def _reply(self, code: int, body: bytes, *, login: str = "", kind: str = "application/soap+xml;charset=UTF-8") -> None:
        self.send_response(code)
        if login:
            self.send_header("WWW-Authenticate", login)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Message:
    """One WS-Management request. `answer`: (action, body) of the response."""

    def __init__(self, service: WinrmServer, asked: ElementTree.Element) -> None:
        self._service = service
        self._header = _child(asked, f"{{{_S}}}Header")
        self._body = _child(asked, f"{{{_S}}}Body")
        self._action = self._header.findtext(f"{{{_A}}}Action") or ""

    def answer(self) -> tuple[str, str]:
        acts = {
            f"{_T}/Create": self._create,
            f"{_T}/Delete": self._delete,
            f"{_T}/Get": self._get,
            f"{_R}/Command": self._command,
            f"{_R}/Receive": self._receive,
            f"{_R}/Send": self._send,
            f"{_R}/Signal": self._signal,
        }
        if self._action not in acts:
            raise Broken(f"the action {self._action}")
        if self._service.denies is not None:
            raise Fault(self._service.denies, "Zugriff verweigert")
        return f"{self._action}Response", acts[self._action]()

    @property
    def _wait_s(self) -> float:
        found = re.fullmatch(r"PT([0-9]+)S", self._header.findtext(f"{{{_W}}}OperationTimeout") or "")
        if found is None:
            raise Broken("no OperationTimeout")
        return float(found[1])

    def _shell(self) -> Shell:
        for selector in self._header.findall(f"{{{_W}}}SelectorSet/{{{_W}}}Selector"):
            if selector.get("Name") == "ShellId" and (selector.text or "") in self._service.shells:
                return self._service.shells[selector.text or ""]
        raise Fault(NO_SHELL, "Die Shell wurde auf dem Server nicht gefunden.")

    def _create(self) -> str:
        if self._header.findtext(f"{{{_W}}}ResourceURI") != _RESOURCE:
            raise Broken("another resource than PowerShell")
        asked = _child(self._body, f"{{{_R}}}Shell")
        creation = _child(asked, f"{{{_P}}}creationXml")
        shell_id = asked.get("ShellId") or str(uuid.uuid4()).upper()
        shell = Shell(shell_id, BOOTSTRAP, self._service.run)
        shell.open(base64.b64decode(creation.text or ""))
        self._service.shells[shell_id] = shell
        self._service.opened += 1
        selectors = f'<w:SelectorSet><w:Selector Name="ShellId">{shell_id}</w:Selector></w:SelectorSet>'
        reference = f"<a:ReferenceParameters><w:ResourceURI>{_RESOURCE}</w:ResourceURI>{selectors}</a:ReferenceParameters>"
        told = f"<r:Shell><r:ShellId>{shell_id}</r:ShellId><r:State>Connected</r:State></r:Shell>"
        return f'<t:ResourceCreated xmlns:t="{_T}"><a:Address>x</a:Address>{reference}</t:ResourceCreated>{told}'

    def _get(self) -> str:
        return f"<r:Shell><r:ShellId>{self._shell().id}</r:ShellId><r:State>Connected</r:State></r:Shell>"

    def _delete(self) -> str:
        shell = self._shell()
        del self._service.shells[shell.id]
        self._service.closed.append(shell.id)
        return ""

    def _command(self) -> str:
        line = _child(self._body, f"{{{_R}}}CommandLine")
        command_id = line.get("CommandId") or ""
        self._shell().begin(command_id, base64.b64decode(line.findtext(f"{{{_R}}}Arguments") or ""))
        return f"<r:CommandResponse><r:CommandId>{command_id}</r:CommandId></r:CommandResponse>"

    def _send(self) -> str:
        stream = _child(self._body, f"{{{_R}}}Send/{{{_R}}}Stream")
        self._shell().pipelines[stream.get("CommandId") or ""].take(base64.b64decode(stream.text or ""))
        return "<r:SendResponse/>"

    def _receive(self) -> str:
        shell = self._shell()
        wanted = _child(self._body, f"{{{_R}}}Receive/{{{_R}}}DesiredStream").get("CommandId")
        if wanted is None:
            time.sleep(min(self._wait_s, self._service.slow_to_open_s))
            if self._service.slow_to_open_s > 0:
                self._service.slow_to_open_s = max(0.0, self._service.slow_to_open_s - self._wait_s)
                raise Fault(NOTHING_YET, "Der Vorgang wurde nicht rechtzeitig abgeschlossen.")
            return _streams(shell.receive())
        if wanted not in shell.pipelines:
            raise Fault(NO_SHELL, "Der Befehl wurde nicht gefunden.")
        found = shell.pipelines[wanted].receive(self._wait_s)
        if found is None:
            raise Fault(NOTHING_YET, "Der Vorgang wurde nicht rechtzeitig abgeschlossen.")
        return _streams(found[0], command=wanted, done=found[1])

    def _signal(self) -> str:
        signal = _child(self._body, f"{{{_R}}}Signal")
        self._shell().pipelines.pop(signal.get("CommandId") or "", None)
        return "<r:SignalResponse/>"


def _streams(pieces: list[bytes], *, command: str = "", done: bool = False) -> str:
    named = f' CommandId="{command}"' if command else ""
    texts = "".join(f'<r:Stream Name="stdout"{named}>{base64.b64encode(piece).decode()}</r:Stream>' for piece in pieces)
    state = f'<r:CommandState{named} State="{_R}/CommandState/{"Done" if done else "Running"}"/>' if command else ""
    return f"<r:ReceiveResponse>{texts}{state}</r:ReceiveResponse>"


def _envelope(action: str, relates_to: str, body: str) -> bytes:
    names = f'xmlns:s="{_S}" xmlns:a="{_A}" xmlns:w="{_W}" xmlns:r="{_R}" xmlns:f="{_F}"'
    header = (
        f"<a:Action>{action}</a:Action><a:MessageID>uuid:{uuid.uuid4()}</a:MessageID><a:RelatesTo>{relates_to}</a:RelatesTo>"
    )
    return f"<s:Envelope {names}><s:Header>{header}</s:Header><s:Body>{body}</s:Body></s:Envelope>".encode()


def _child(parent: ElementTree.Element, path: str) -> ElementTree.Element:
    found = parent.find(path)
    if found is None:
        raise Broken(f"no {path} in {parent.tag}")
    return found


def _binding(certificate: Path) -> bytes:
    """tls-server-end-point (RFC 5929) of a certificate that was signed with SHA-256."""
    der = ssl.PEM_cert_to_DER_cert(certificate.read_text(encoding="ascii"))
    return b"tls-server-end-point:" + hashlib.sha256(der).digest()


def kill(one: socket.socket) -> None:
    try:
        one.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    finally:
        one.close()
