"""A few powershell.exe that stay: starting one and its Hyper-V module takes a real host 1 to 5 s, a question to one that is
there takes a round trip.

    caller ── lend ──► an idle session, or a new one ──► back among the idle ──► closed after a minute without a question

Each session serves one caller at a time. On the host it ends when its input does: at our `close`, and when we die. A long copy
asks nothing, so a thread looks after the idle ones.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from tokvm.core.errors import ConnectionLost
from tokvm.remote.conversation import IsWhole, Reply, Talk

MOST = 4
IDLE_S = 60.0
PROVED_S = 5.0
"""A session that answered so lately is taken to be alive."""


class Session:
    """One powershell.exe, started when it is first asked. One thread at a time."""

    def __init__(self, start: Callable[[], Talk]) -> None:
        self._start = start
        self._talk: Talk | None = None
        self._answered: float | None = None

    @property
    def has_answered(self) -> bool:
        """It did work once."""
        return self._answered is not None

    @property
    def is_proved(self) -> bool:
        """It answered just now."""
        return self._answered is not None and time.monotonic() - self._answered < PROVED_S

    @property
    def is_open(self) -> bool:
        return self._talk is not None and not self._talk.is_over

    def request(self, data: bytes, is_whole: IsWhole, *, timeout_s: float) -> Reply:
        """See `Talk.request`."""
        if self._talk is None:
            self._talk = self._start()
        reply = self._talk.request(data, is_whole, timeout_s=timeout_s)
        if reply.code is None:
            self._answered = time.monotonic()
        return reply

    def renew(self) -> None:
        """The next request goes to a new powershell.exe."""
        if self._talk is not None:
            self._talk.close()
        self._talk = self._answered = None

    close = renew


class Sessions:
    """The sessions of one host. Thread-safe."""

    def __init__(self, start: Callable[[], Talk], *, where: str) -> None:
        self._start = start
        self._where = where
        lock = threading.Lock()
        self._returned = threading.Condition(lock)
        self._closing = threading.Condition(lock)
        self._idle: list[tuple[float, Session]] = []  # since when (monotonic), the longest first
        self._lent = 0
        self._closed = False
        self._keeper: threading.Thread | None = None

    @contextlib.contextmanager
    def lend(self, *, timeout_s: float) -> Iterator[Session]:
        """A session for the caller alone. ConnectionLost when none is free in time; nothing was sent then."""
        session = self._take(timeout_s)
        try:
            yield session
        finally:
            self._give_back(session)

    def close(self) -> None:
        """End those that are idle, and the others when they come back."""
        with self._closing:
            self._closed = True
            idle, self._idle = self._idle, []
            self._closing.notify_all()
            self._returned.notify_all()
        for _, session in idle:
            session.close()

    def _take(self, timeout_s: float) -> Session:
        with self._returned:
            if not self._returned.wait_for(lambda: self._closed or self._lent < MOST, timeout_s):
                raise ConnectionLost(f"{MOST} questions are under way; none ended within {timeout_s:g} s", where=self._where)
            if self._closed:
                raise ConnectionLost("the connection was closed", where=self._where)
            self._lent += 1
            return self._idle.pop()[1] if self._idle else Session(self._start)

    def _give_back(self, session: Session) -> None:
        with self._returned:
            self._lent -= 1
            self._returned.notify()
            kept = session.is_open and not self._closed
            if kept:
                self._idle.append((time.monotonic(), session))
                self._ensure_keeper()
        if not kept:
            session.close()

    def _ensure_keeper(self) -> None:
        if self._keeper is None or not self._keeper.is_alive():  # a fork inherits the object but not the thread
            self._keeper = threading.Thread(target=self._keep, name="idle PowerShell", daemon=True)
            self._keeper.start()

    def _keep(self) -> None:
        """Close what was idle for too long, until there is nothing to look after."""
        while True:
            with self._closing:
                if self._closed or not (self._idle or self._lent):
                    self._keeper = None
                    return
                left_s = self._idle[0][0] + IDLE_S - time.monotonic() if self._idle else IDLE_S
                if left_s > 0:
                    self._closing.wait(left_s)
                    continue
                _, session = self._idle.pop(0)
            session.close()
