"""Requests and replies over one sftp connection: many in flight, from several threads, payloads copied by the kernel only.

    thread A ── requests ─►┐              ┌─► payload straight into the memory its request named
    thread B ── requests ─►┴─ ssh … sftp ─┴─► other replies: kept as bytes for whoever waits

There is no receiving thread. Of the threads that wait, one receives for all until its own replies are there, then another
takes over: one connection, no copy, no hand-over in the common case of one caller.

One readv takes the rest of a payload *and* the head of the next reply (13 bytes), so a reply costs no read of its own.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.remote import hostkeys
from tokvm.remote.errors import SSH_FAILED, connection_error, is_host_key_refusal, last_line
from tokvm.remote.process import Child, ProgramTimeout
from tokvm.remote.sftp_wire import HEAD, LARGEST_PACKET, VERSION_3, Body, Kind, WireError, packet, u32
from tokvm.remote.ssh_config import SshConfig

_VERSION_HEAD = 9  # length, type, version: the one reply without an id


P = TypeVar("P", bound="Pending")


@dataclass(slots=True)
class Pending:
    """A request that waits for its reply; it is put into its owner's `ready` when that came.

    `into` is where a DATA payload goes, its `length` bytes long; nobody else may touch that memory until then.
    """

    ready: deque[Any]
    into: memoryview | None = None
    kind: int = 0
    body: bytes = b""
    length: int = 0


class SftpPipe:
    """One connection. All methods are thread-safe. A connection that failed once fails always, with the same reason."""

    def __init__(self, child: Child, config: SshConfig, *, deadline_s: float) -> None:
        self._child = child
        self._config = config
        self._where = config.where
        self._deadline_ms = deadline_s * 1000
        self._turn = threading.Condition()
        self._sending = threading.Lock()
        self._receiving = False
        self._pending: dict[int, Pending] = {}
        self._number = 0
        self._broken: Callable[[], SourceError] | None = None
        self._head = memoryview(bytearray(HEAD.size))
        self._have = 0
        self._received = 0
        self._readable = select.poll()
        self._readable.register(child.stdout, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(child.stdin, select.POLLOUT)
        os.set_blocking(child.stdin, False)

    def greet(self) -> dict[bytes, bytes]:
        """INIT and VERSION: the server's extensions. Before anything else, once."""
        try:
            self._write(packet(Kind.INIT, u32(VERSION_3)))
            self._fill_head(_VERSION_HEAD)
            length, kind, version = HEAD.unpack(self._head)[:3]
            if kind != Kind.VERSION or not 5 <= length <= LARGEST_PACKET:
                # A login script that prints something: its text is where the packet should be.
                raise WireError(f"the answer to the greeting begins with {bytes(self._head[:_VERSION_HEAD])!r}")
            if version < VERSION_3:
                raise WireError(f"the server speaks version {version} only")
            self._have = 0
            body = Body(bytes(self._read_exactly(length - 5)))
            extensions = {}
            while body.left:
                name = body.string()
                extensions[name] = body.string()
            return extensions
        except WireError as exc:
            raise self._fail_wire(exc) from exc

    def send(self, requests: Iterable[tuple[Pending, Callable[[int], bytes]]]) -> None:
        """Send requests, each made with the number it gets. Wait for all of them, whatever happens."""
        batch = bytearray()
        with self._turn:
            self._check()
            for pending, make in requests:
                self._number = (self._number + 1) & 0xFFFFFFFF
                self._pending[self._number] = pending
                batch += make(self._number)
        try:
            with self._sending:
                self._write(batch)
        except SourceError:
            self._wake()
            raise

    def wait(self, ready: deque[P]) -> P:
        """The next reply of the caller's own. Receives for all meanwhile if nobody else does."""
        with self._turn:
            while not ready:
                if self._receiving:  # on a failure too: until it has left it may still write into our memory
                    self._turn.wait()
                    continue
                self._check()
                self._receiving = True
                self._turn.release()
                try:
                    self._receive()
                except SourceError:
                    raise
                except BaseException:  # Ctrl-C in the middle of a reply: nobody knows any more where the next one begins
                    self._fail(lambda: ConnectionLost("the sftp connection was interrupted", where=self._where))
                    raise
                finally:
                    self._turn.acquire()
                    self._receiving = False
                    self._turn.notify_all()
            return ready.popleft()

    def ask(self, make: Callable[[int], bytes]) -> Pending:
        """One request and its reply."""
        ready: deque[Pending] = deque()
        self.send([(Pending(ready), make)])
        return self.wait(ready)

    def close(self) -> None:
        """End the connection. Whoever still waits gets ConnectionLost."""
        with self._turn:
            if self._broken is None:
                self._broken = lambda: ConnectionLost("the sftp connection was closed", where=self._where)
        self._child.kill()  # a thread that still receives sees the end of the pipe, and leaves
        with self._turn:
            self._turn.notify_all()
            while self._receiving:
                self._turn.wait()
        with self._sending:
            self._child.close()

    def _check(self) -> None:
        if self._broken is not None:
            raise self._broken()

    def _wake(self) -> None:
        with self._turn:
            self._turn.notify_all()

    def _receive(self) -> None:
        """One reply, into the hands of whoever waits for it."""
        try:
            self._fill_head(HEAD.size)
            self._have = 0
            length, kind, number, first = HEAD.unpack(self._head)
            if not HEAD.size - 4 <= length <= LARGEST_PACKET:
                raise WireError(f"a reply of {length} bytes; at most {LARGEST_PACKET} are allowed")
            pending = self._pending.pop(number, None)
            if pending is None:
                raise WireError(f"a reply to request {number}, which was not made or is answered already")
            rest = length - (HEAD.size - 4)
            if kind == Kind.DATA:
                self._payload(pending, first, rest)
            else:
                pending.body = u32(first) + bytes(self._read_exactly(rest))
            pending.kind = kind
            pending.ready.append(pending)
        except WireError as exc:
            raise self._fail_wire(exc) from exc

    def _payload(self, pending: Pending, length: int, rest: int) -> None:
        if length != rest:
            raise WireError(f"DATA of {length} bytes in a packet with room for {rest}")
        if pending.into is None or not 0 < length <= len(pending.into):
            asked = 0 if pending.into is None else len(pending.into)
            raise WireError(f"DATA of {length} bytes where {asked} were asked for")
        self._read_into(pending.into[:length])
        pending.length = length

    def _read_exactly(self, count: int) -> memoryview:
        data = memoryview(bytearray(count))
        self._read_into(data)
        return data

    def _read_into(self, data: memoryview) -> None:
        """Fill `data`, and as much of the next head as is there anyway."""
        at = 0
        while at < len(data):
            count = self._readv([data[at:], self._head])
            at += count
        self._have = at - len(data)

    def _fill_head(self, count: int) -> None:
        while self._have < count:
            self._have += self._readv([self._head[self._have : count]])

    def _readv(self, buffers: list[memoryview]) -> int:
        if not self._readable.poll(self._deadline_ms):
            raise self._fail(
                lambda: ConnectionLost(
                    f"no byte came over sftp for {self._deadline_ms / 1000:g} s; the connection was given up",
                    where=self._where,
                    fix="run the same command again; if this repeats, look whether the host's storage hangs",
                )
            )
        count = os.readv(self._child.stdout, buffers)
        if count == 0:
            raise self._fail(self._reason_of_end())
        self._received += count
        return count

    def _write(self, data: bytes | bytearray) -> None:
        left = memoryview(data)
        while left:
            if not self._writable.poll(self._deadline_ms):
                raise self._fail(lambda: ConnectionLost("the host takes no more requests", where=self._where))
            try:
                left = left[os.write(self._child.stdin, left) :]
            except BlockingIOError:
                continue
            except OSError:  # EPIPE: ssh has ended
                raise self._fail(self._reason_of_end()) from None

    def _fail_wire(self, exc: WireError) -> SourceError:
        text = str(exc)
        return self._fail(lambda: SourceError(f"this is not the SFTP protocol: {text}", where=self._where))

    def _fail(self, reason: Callable[[], SourceError]) -> SourceError:
        with self._turn:
            if self._broken is None:
                self._broken = reason
            reason = self._broken
        self._child.kill()
        return reason()

    def _reason_of_end(self) -> Callable[[], SourceError]:
        """Why the pipe ended: ssh's exit code and words."""
        try:
            code = self._child.wait(timeout_s=5.0)
        except ProgramTimeout:
            self._child.kill()
            code = SSH_FAILED
        said = self._child.stderr_tail()
        if self._received:
            doing = f"reading over sftp (ssh ended with {code})"
            return lambda: connection_error(last_line(said).encode(), where=self._where, doing=doing)
        if is_host_key_refusal(said):
            refusal = hostkeys.host_key_error(self._config, said)
            return lambda: refusal
        if b"subsystem request failed" in said:
            fix = "add `Subsystem sftp internal-sftp` to its sshd_config"
            return lambda: SourceError("the host has no sftp subsystem", where=self._where, fix=fix)
        return lambda: connection_error(said, where=self._where, doing="opening sftp")
