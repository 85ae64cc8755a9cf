"""HTTPS on loopback: one thread for each connection, connections that can be cut, and an end that leaves nothing behind."""

from __future__ import annotations

import contextlib
import email.message
import http.server
import select
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from tokvm.testing.certificates import server_context
from tokvm.testing.vsphere.soap import MAX_REQUEST

IDLE_S = 60.0
LOOK_S = 0.1  # how often a thread that waits for a client to go looks whether we are to end


class Cut(Exception):
    """The connection is to break here, without (the rest of) an answer."""


class Exchange:
    """One request, and the ways to answer it."""

    def __init__(self, handler: _Handler) -> None:
        self._handler = handler
        self.verb = handler.command
        path, _, self.raw_query = handler.path.partition("?")
        self.raw_path = path
        self.headers: email.message.Message = handler.headers
        self.cookie = ""
        """A Set-Cookie that goes with the answer."""

    @property
    def path(self) -> str:
        """Percent-decoded once, as web servers do."""
        return urllib.parse.unquote(self.raw_path)

    def query(self) -> dict[str, str]:
        """Percent-decoded once."""
        return dict(urllib.parse.parse_qsl(self.raw_query, keep_blank_values=True))

    def body(self) -> bytes:
        """ValueError without a sane Content-Length."""
        length = int(self.headers.get("Content-Length", ""))
        if not 0 <= length <= MAX_REQUEST:
            raise ValueError(f"a request of {length} bytes")
        return self._handler.rfile.read(length)

    def send(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None, *, cut_at: int = -1) -> None:
        """A whole answer. cut_at: break the connection after so many bytes of the body."""
        self.begin(status, {"Content-Length": str(len(body)), **(headers or {})})
        if self.verb != "HEAD":
            self.write(body if cut_at < 0 else body[:cut_at])
        if cut_at >= 0:
            raise Cut

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """The answer's head. Without a Content-Length or chunks the connection's end is the body's."""
        handler = self._handler
        handler.send_response(status)
        if self.cookie:
            handler.send_header("Set-Cookie", self.cookie)
        for name, value in headers.items():
            handler.send_header(name, value)
        if "Content-Length" not in headers and "Transfer-Encoding" not in headers:
            handler.send_header("Connection", "close")
            handler.close_connection = True
        handler.end_headers()

    def write(self, data: bytes) -> None:
        self._handler.wfile.write(data)

    def wait_for_hangup(self) -> NoReturn:
        """Say nothing until the client has gone."""
        poller = select.poll()
        poller.register(self._handler.connection, select.POLLIN | select.POLLRDHUP)
        while not self._handler.listener.ending.is_set() and not poller.poll(LOOK_S * 1000):
            pass
        raise Cut


Answer = Callable[[Exchange], None]


class Listener:
    """An HTTPS server that gives every request to `answer`. Starts at once; port 0: any."""

    def __init__(self, certificate: Path, answer: Answer, *, port: int = 0) -> None:
        self.answer = answer
        self.ending = threading.Event()
        self.context = server_context(certificate)
        self._server = _Server(self, port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(LOOK_S,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def use_certificate(self, certificate: Path) -> None:
        """For connections from now on."""
        self.context = server_context(certificate)

    def cut_connections(self) -> int:
        return self._server.cut_connections()

    def close(self) -> None:
        self.ending.set()
        self._server.shutdown()
        self._server.cut_connections()
        self._server.server_close()
        self._thread.join()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = False  # joined by server_close
    request_queue_size = 64

    def __init__(self, listener: Listener, port: int) -> None:
        self.listener = listener
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        """The handshake is the thread's to do: a client that never finishes it must not keep others waiting."""
        plain, address = self.socket.accept()
        plain.settimeout(IDLE_S)
        secured = self.listener.context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        with self._lock:
            self._open.add(secured)
        return secured, address

    def shutdown_request(self, request: object) -> None:
        if isinstance(request, ssl.SSLSocket):
            with self._lock:
                self._open.discard(request)
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
            request.close()

    def cut_connections(self) -> int:
        with self._lock:
            found = list(self._open)
        for one in found:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(one, socket.SHUT_RDWR)  # below TLS: its owner's thread may be within it
        return len(found)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away, or broke the handshake off, is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "hostd"
    sys_version = ""
    timeout = IDLE_S
    disable_nagle_algorithm = True
    server: _Server

    @property
    def listener(self) -> Listener:
        return self.server.listener

    def setup(self) -> None:
        self.request.do_handshake()
        super().setup()

    def _answer(self) -> None:
        try:
            self.listener.answer(Exchange(self))
        except (Cut, OSError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815  http.server's names

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """What was asked is in calls.log."""
