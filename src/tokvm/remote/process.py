"""The one module that starts local programs.

    run(argv)    ─► waits, collects bounded output ─► Completed(code, stdout, stderr)
    start(argv)  ─► Child: pipes to read and write, the tail of stderr kept by a thread

A list of arguments, never a shell. Each child leads its own process group, so a Ctrl-C on the terminal is ours to act on, and
what the child started goes with it when it is killed. Each child gets SIGKILL when we die, however we die (`kill -9`
included): PR_SET_PDEATHSIG, set by util-linux' `setpriv`, which then becomes the program (same pid). That keeps
subprocess on vfork, where `preexec_fn` would run Python between fork and exec of a program with threads.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import queue
import selectors
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from tokvm.core.errors import TokvmError
from tokvm.core.units import MiB

log = logging.getLogger(__name__)

STDOUT_LIMIT = 16 * MiB
STDERR_KEPT = 1 * MiB
AGAIN_S = 0.05
# The kernel's default pipe is 64 KiB: a context switch for each two of ssh's 32 KiB packets.
PIPE_SIZE = 1 * MiB

Argument = str | bytes


class ProgramError(TokvmError):
    """A local program is missing or could not be started, or its output makes no sense."""

    meaning: ClassVar[str] = "a program on this machine is missing, could not be started, or misbehaved"


class ProgramTimeout(ProgramError):
    """The program did not end in time and was killed, with everything in its process group."""

    meaning: ClassVar[str] = "a program on this machine did not end in time and was killed"

    def __init__(self, what: str, *, where: str = "", fix: str = "", stdout: bytes = b"", stderr: bytes = b"") -> None:
        super().__init__(what, where=where, fix=fix)
        self.stdout = stdout
        self.stderr = stderr


@dataclass(frozen=True, slots=True)
class Completed:
    """How a program ended. `code` is negative for a signal (-9: SIGKILL); `stderr` may be only its last MiB."""

    code: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """stdout as text; bytes that are no UTF-8 survive as surrogates."""
        return self.stdout.decode("utf-8", "surrogateescape")


class Stdin(Enum):
    """What the child reads from."""

    NULL = "null"
    PIPE = "pipe"


def which(name: str, *, fix: str = "") -> str:
    """The program's full path, or ProgramError. The sbin directories count too: blkid and dmsetup live there."""
    found = shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")))
    if found is None:
        raise ProgramError("program not found", where=name, fix=fix or f"install the package that has {name}")
    return found


class _Spawner:
    """The thread that starts every child.

    PR_SET_PDEATHSIG means the death of the *thread* that forked, not of the process (prctl(2)). A child started from a pool
    thread would die with that thread, in the middle of its work; this one lives as long as the process does.
    """

    def __init__(self) -> None:
        self._wanted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._owner = 0

    def __call__(self, make: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        self._ensure_thread()
        answer: Future[subprocess.Popen[bytes]] = Future()

        def work() -> None:
            try:
                answer.set_result(make())
            except BaseException as exc:  # noqa: BLE001 - the caller raises it; without an answer it would wait for ever
                answer.set_exception(exc)

        self._wanted.put(work)
        return answer.result()

    def _ensure_thread(self) -> None:
        with self._lock:
            if self._owner == os.getpid():
                return
            self._owner = os.getpid()  # a fork inherits the object but not the thread
            self._wanted = queue.SimpleQueue()
            threading.Thread(target=self._serve, args=(self._wanted,), name="spawner", daemon=True).start()

    @staticmethod
    def _serve(wanted: queue.SimpleQueue[Callable[[], None]]) -> None:
        while True:
            wanted.get()()


_spawn = _Spawner()


class Child:
    """A running program. `stdin` and `stdout` are our ends of its pipes (file descriptors; `stdin` is -1 when there is none).

    Not for two threads at once, except `kill`, `poll`, `stderr_tail` and `take_stderr`.
    """

    def __init__(self, popen: subprocess.Popen[bytes], *, where: str, stdin: int, stdout: int, stderr: int) -> None:
        self._popen = popen
        self.where = where
        self.pid = popen.pid
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self._tail = bytearray()
        self._drain: threading.Thread | None = None

    def poll(self) -> int | None:
        """The exit code if it has ended (negative: a signal), else None."""
        return self._popen.poll()

    def wait(self, timeout_s: float) -> int:
        """The exit code, or ProgramTimeout. Does not kill."""
        try:
            code = self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired as exc:
            raise ProgramTimeout(f"still running after {timeout_s:g} s", where=self.where) from exc
        if self._drain is not None:
            self._drain.join(timeout=1.0)  # a grandchild may hold stderr open for ever
        return code

    def kill(self) -> None:
        """SIGKILL to its whole process group, and reap it. Already ended is fine."""
        if self._popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()

    def terminate(self, timeout_s: float) -> None:
        """SIGTERM, so that it can tidy up, and SIGKILL when that takes longer than `timeout_s`.

        Again and again, for some look at the handler's flag and only then wait in poll(2), which a signal in between does not
        end (OpenSSH 9.2 that is just closing a channel: measured, 2 of 8).
        """
        deadline = time.monotonic() + timeout_s
        while self.poll() is None and time.monotonic() < deadline:
            self._popen.terminate()
            with contextlib.suppress(ProgramTimeout):
                self.wait(min(AGAIN_S, timeout_s))
        self.kill()

    def stderr_tail(self) -> bytes:
        """The last of what it said on stderr so far, at most 1 MiB."""
        return bytes(self._tail[-STDERR_KEPT:])

    def take_stderr(self) -> bytes:
        """What it said on stderr since it was last taken, at most the last MiB."""
        said = bytes(self._tail)
        del self._tail[: len(said)]
        return said[-STDERR_KEPT:]

    def close_stdin(self) -> None:
        """End of input for the child."""
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1

    def close(self) -> None:
        """Kill it if it still runs, and close our ends."""
        self.close_stdin()
        self.kill()
        if self.stdout >= 0:
            os.close(self.stdout)
            self.stdout = -1
        if self._drain is not None:
            self._drain.join(timeout=1.0)
        elif self.stderr >= 0:
            os.close(self.stderr)
            self.stderr = -1

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def keep_stderr(self) -> None:
        """From now on a thread reads stderr, keeps its tail, and owns the descriptor."""
        self._drain = threading.Thread(target=self._drain_stderr, name=f"stderr of {self.pid}", daemon=True)
        self._drain.start()

    def _drain_stderr(self) -> None:
        while piece := os.read(self.stderr, 65536):
            self._tail += piece
            if len(self._tail) > 2 * STDERR_KEPT:
                del self._tail[:-STDERR_KEPT]
        os.close(self.stderr)


@functools.cache
def _setpriv() -> str:
    return which("setpriv", fix="install util-linux")


def _launch(argv: Sequence[Argument], *, where: str, stdin: Stdin, env: Mapping[str, str] | None) -> Child:
    program = os.fsdecode(argv[0])
    full = program if "/" in program else which(program)
    command: list[Argument] = [_setpriv(), "--pdeathsig", "KILL", "--", full, *argv[1:]]
    with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:

        def pipe(*, child_reads: bool) -> tuple[int, int]:
            reader, writer = os.pipe()
            with contextlib.suppress(OSError):  # the user's share of pipe memory may be used up: only slower
                fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
            child, our = (reader, writer) if child_reads else (writer, reader)
            theirs.callback(os.close, child)
            ours.callback(os.close, our)
            return child, our

        child_in, our_in = pipe(child_reads=True) if stdin is Stdin.PIPE else (subprocess.DEVNULL, -1)
        child_out, our_out = pipe(child_reads=False)
        child_err, our_err = pipe(child_reads=False)
        try:
            popen = _spawn(
                lambda: subprocess.Popen(
                    command,
                    stdin=child_in,
                    stdout=child_out,
                    stderr=child_err,
                    env={**os.environ, **env} if env is not None else None,
                    process_group=0,
                )
            )
        except (OSError, ValueError) as exc:
            raise ProgramError(f"{Path(program).name} could not be started: {exc}", where=where) from exc
        ours.pop_all()
    log.debug("pid %d: %s", popen.pid, argv)
    return Child(popen, where=where, stdin=our_in, stdout=our_out, stderr=our_err)


def start(argv: Sequence[Argument], *, where: str, stdin: Stdin = Stdin.NULL, env: Mapping[str, str] | None = None) -> Child:
    """Start a program and leave it running. `env` adds to our environment. ProgramError when it cannot be started."""
    child = _launch(argv, where=where, stdin=stdin, env=env)
    child.keep_stderr()
    return child


def run(
    argv: Sequence[Argument],
    *,
    input: bytes | None = None,  # noqa: A002 - the word subprocess.run uses
    timeout_s: float,
    where: str,
    env: Mapping[str, str] | None = None,
) -> Completed:
    """Run a program to its end. Any exit code is an answer; ProgramTimeout at the deadline, with what it said so far.

    ProgramError when it says more than 16 MiB on stdout: half an answer is none.
    """
    with _launch(argv, where=where, stdin=Stdin.NULL if input is None else Stdin.PIPE, env=env) as child:
        talk = _Talk(child, input or b"")
        if not talk.until_end(time.monotonic() + timeout_s):
            raise ProgramTimeout(
                f"did not end within {timeout_s:g} s and was killed",
                where=where,
                stdout=bytes(talk.stdout),
                stderr=bytes(talk.stderr),
            )
        child.kill()  # it has ended; this reaps it
        return Completed(child.poll() or 0, bytes(talk.stdout), bytes(talk.stderr[-STDERR_KEPT:]))


class _Talk:
    """Feeds a child and takes what it says, until it ends.

    The end is the process' own end, not the end of its pipes: a daemon that it left behind may hold those open for ever.
    """

    def __init__(self, child: Child, data: bytes) -> None:
        self._child = child
        self._left = memoryview(data)
        self.stdout = bytearray()
        self.stderr = bytearray()

    def until_end(self, deadline: float) -> bool:
        """False when the deadline (time.monotonic) came first."""
        pidfd = os.pidfd_open(self._child.pid)
        try:
            with selectors.DefaultSelector() as selector:
                self._watch(selector, pidfd)
                while (wait := deadline - time.monotonic()) > 0:
                    ready = {key.fd for key, _ in selector.select(wait)}
                    for fd in ready - {pidfd}:
                        self._serve(selector, fd)
                    if pidfd in ready:
                        self._take(self._child.stdout)
                        self._take(self._child.stderr)
                        return True
                return False
        finally:
            os.close(pidfd)

    def _watch(self, selector: selectors.BaseSelector, pidfd: int) -> None:
        selector.register(pidfd, selectors.EVENT_READ)
        for fd in (self._child.stdout, self._child.stderr):
            os.set_blocking(fd, False)
            selector.register(fd, selectors.EVENT_READ)
        if self._child.stdin >= 0:
            os.set_blocking(self._child.stdin, False)
            selector.register(self._child.stdin, selectors.EVENT_WRITE)

    def _serve(self, selector: selectors.BaseSelector, fd: int) -> None:
        more = self._feed() if fd == self._child.stdin else self._take(fd)
        if not more:
            selector.unregister(fd)
            if fd == self._child.stdin:
                self._child.close_stdin()

    def _feed(self) -> bool:
        try:
            self._left = self._left[os.write(self._child.stdin, self._left[:PIPE_SIZE]) :]
        except BlockingIOError:
            return True
        except BrokenPipeError:  # it does not want the rest; its exit code says whether that is all right
            return False
        return bool(self._left)

    def _take(self, fd: int) -> bool:
        """Read what is there; False at the end of the pipe."""
        kept = self.stdout if fd == self._child.stdout else self.stderr
        while True:
            try:
                piece = os.read(fd, 65536)
            except BlockingIOError:
                return True
            if not piece:
                return False
            kept += piece
            if kept is self.stderr and len(kept) > 2 * STDERR_KEPT:
                del kept[:-STDERR_KEPT]
            if kept is self.stdout and len(kept) > STDOUT_LIMIT:
                raise ProgramError(f"said more than {STDOUT_LIMIT} bytes and was killed", where=self._child.where)
