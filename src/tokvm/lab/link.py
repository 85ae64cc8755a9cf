"""A worse network on loopback: a TCP proxy that delays and limits.

    client ─► listener ─► [ line: each piece leaves rtt/2 after it came, all pieces of a direction share `rate` ] ─► server

Both directions of all connections have `rate` bytes per second each, as a full-duplex link has. What is under way is
bounded (WINDOW, like OpenSSH's own 2 MiB per channel), so a slow reader slows its writer and memory stays small.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from tokvm.lab.errors import LabError

log = logging.getLogger(__name__)

PIECE = 64 << 10
WINDOW = 4 << 20  # bytes under way per direction of a connection


@dataclass(slots=True)
class _Lane:
    """One direction of the link, shared by all connections: when the line is free again."""

    rate: float | None
    free_at: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    carried: int = 0

    def book(self, count: int) -> float:
        """The moment the last of `count` bytes is through."""
        with self.lock:
            self.carried += count
            if self.rate is None:
                return 0.0
            self.free_at = max(self.free_at, time.monotonic()) + count / self.rate
            return self.free_at


class Link:
    """Listens on loopback and passes everything on to `host:port`. rate: bytes/s or None; rtt_s: added to each round trip."""

    def __init__(
        self, port: int, *, host: str = "127.0.0.1", rate: float | None = None, rtt_s: float = 0.0, listen_port: int = 0
    ) -> None:
        if (rate is not None and rate <= 0) or rtt_s < 0:
            raise LabError(f"a link of {rate} bytes/s and {rtt_s} s", fix="give a rate above 0 and a delay of 0 or more")
        self._to = (host, port)
        self._delay_s = rtt_s / 2
        self._lanes = (_Lane(rate), _Lane(rate))
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", listen_port), backlog=64)
        self.port: int = self._listener.getsockname()[1]

    @property
    def carried(self) -> tuple[int, int]:
        """Bytes sent towards the server and back so far."""
        return self._lanes[0].carried, self._lanes[1].carried

    def start(self) -> Link:
        threading.Thread(target=self._accept, name="link", daemon=True).start()
        return self

    def stop(self) -> None:
        """Break every connection and listen no more."""
        self._stopping.set()
        # close() alone does not wake a thread that waits in accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for one in self._sockets:
                _break(one)

    def __enter__(self) -> Link:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._to, timeout=10)
            except OSError as exc:
                log.warning("the link's far end does not answer: %s", exc)
                near.close()
                continue
            far.settimeout(None)
            self._join(near, far)

    def _join(self, near: socket.socket, far: socket.socket) -> None:
        with self._lock:
            self._sockets |= {near, far}
        for one in (near, far):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        done = _Both(near, far, self._forget)
        for source, sink, lane in ((near, far, self._lanes[0]), (far, near, self._lanes[1])):
            line: queue.Queue[tuple[float, bytes]] = queue.Queue(maxsize=WINDOW // PIECE)
            threading.Thread(target=self._read, args=(source, line, lane), daemon=True).start()
            threading.Thread(target=self._write, args=(sink, line, done), daemon=True).start()

    def _read(self, source: socket.socket, line: queue.Queue[tuple[float, bytes]], lane: _Lane) -> None:
        data = b"."
        while data:
            try:
                data = source.recv(PIECE)
            except OSError:
                data = b""
            through = lane.book(len(data))
            line.put((max(through, time.monotonic()) + self._delay_s, data))

    def _write(self, sink: socket.socket, line: queue.Queue[tuple[float, bytes]], done: _Both) -> None:
        broken = False
        while True:
            due, data = line.get()
            if not data:
                break
            if broken:
                continue  # the reader must not be left waiting for room
            wait = due - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            try:
                sink.sendall(data)
            except OSError:
                broken = True
                done.broken()
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
        done.one_ended()

    def _forget(self, near: socket.socket, far: socket.socket) -> None:
        with self._lock:
            self._sockets -= {near, far}
        near.close()
        far.close()


class _Both:
    """Closes a connection's two sockets once both directions have ended."""

    def __init__(self, near: socket.socket, far: socket.socket, forget: Callable[[socket.socket, socket.socket], None]) -> None:
        self._near, self._far, self._forget = near, far, forget
        self._left = 2
        self._lock = threading.Lock()

    def broken(self) -> None:
        _break(self._near)
        _break(self._far)

    def one_ended(self) -> None:
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._forget(self._near, self._far)


def _break(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
