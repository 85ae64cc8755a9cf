"""A remote command that stays, and answers one request after another.

    request ─► stdin ─► command ─► stdout ─► until the caller has seen a whole answer ─► Reply

A conversation in which an answer did not come, or did not come in time, is over: nobody could tell the late answer from the
next one's. The end of our side is the end of the command's input, by which it knows that it is to end as well.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tokvm.core.errors import ConnectionLost
from tokvm.core.text import readable
from tokvm.remote.errors import SSH_FAILED, connection_error
from tokvm.remote.process import PIPE_SIZE, STDOUT_LIMIT, Child, ProgramError, ProgramTimeout

_END_S = 5.0
"""How long a command whose output has ended may take to end itself."""

IsWhole = Callable[[bytes], bool]
"""Given each piece of output as it comes, in order; True when it was the last of an answer."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came since the request was sent. code: the command ended with it, instead of a whole answer; None: it goes on.

    stderr may belong to an earlier request: it comes by a way of its own.
    """

    stdout: bytes
    stderr: bytes
    code: int | None = None


class Talk(Protocol):
    """A conversation, by whichever way its words travel. One thread at a time."""

    @property
    def is_over(self) -> bool:
        """No further request will be answered. One that is not over may find out at its next request that it is."""
        ...

    def request(self, data: bytes, is_whole: IsWhole, *, timeout_s: float) -> Reply:
        """Send `data` and take what comes, up to a whole answer or the command's end.

        ConnectionLost when no whole answer came in time or the connection broke: the request may have been carried out.
        ProgramError when more came than is allowed.
        """
        ...

    def close(self) -> None:
        """End of input for the command, wherever it is; it is not waited for."""
        ...


class Conversation:
    """A Talk over ssh."""

    def __init__(self, child: Child, *, where: str, command: str) -> None:
        self._child = child
        self._where = where
        self._command = command
        self._over = False
        self._said = bytearray()
        os.set_blocking(child.stdin, False)

    @property
    def pid(self) -> int:
        """The local ssh process."""
        return self._child.pid

    @property
    def is_over(self) -> bool:
        return self._over

    def request(self, data: bytes, is_whole: IsWhole, *, timeout_s: float) -> Reply:
        """See `Talk.request`. At most 16 MiB may come."""
        if self._over:
            raise ConnectionLost("the conversation is over", where=self._where)
        self._over = True  # until it is answered, whatever happens in between
        self._said.clear()
        code = self._talk(memoryview(data), is_whole, timeout_s)
        self._over = code is not None
        return Reply(bytes(self._said), self._child.take_stderr(), code)

    def close(self) -> None:
        self._over = True
        self._child.close()

    def _talk(self, left: memoryview, is_whole: IsWhole, timeout_s: float) -> int | None:
        """None: a whole answer came. A number: the command ended with it."""
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._child.stdout, select.POLLIN)
        poll.register(self._child.stdin, select.POLLOUT)
        while (wait_s := deadline - time.monotonic()) > 0:
            ready = {fd for fd, _ in poll.poll(wait_s * 1000)}
            if self._child.stdin in ready:
                left = self._feed(left)
                if not left:
                    poll.unregister(self._child.stdin)
            if self._child.stdout in ready:
                piece = os.read(self._child.stdout, 65536)
                if not piece:
                    return self._end()
                self._take(piece)
                if is_whole(piece) and not left:
                    return None
        raise self._late(timeout_s)

    def _feed(self, left: memoryview) -> memoryview:
        try:
            return left[os.write(self._child.stdin, left[:PIPE_SIZE]) :]
        except BlockingIOError:
            return left
        except BrokenPipeError:  # it has ended, or is about to: its last words are still to be read
            return left[:0]

    def _take(self, piece: bytes) -> None:
        self._said += piece
        if len(self._said) > STDOUT_LIMIT:
            self._child.kill()
            raise ProgramError(f"said more than {STDOUT_LIMIT} bytes and was killed", where=self._where)

    def _end(self) -> int:
        """The exit code of a command that ended by itself."""
        try:
            code = self._child.wait(_END_S)
        except ProgramTimeout:
            self._child.kill()
            code = SSH_FAILED
        if code < 0 or code == SSH_FAILED:
            raise connection_error(self._child.take_stderr(), where=self._where, doing=f"running `{readable(self._command)}`")
        return code

    def _late(self, timeout_s: float) -> ConnectionLost:
        self._child.kill()
        return ConnectionLost(
            f"`{readable(self._command)}` did not answer within {timeout_s:g} s",
            where=self._where,
            fix="run the same command again; it asks the host first how far it got",
        )
