"""A session that breaks, or says nothing any more."""

from __future__ import annotations

import os
from typing import Any, NoReturn

from tokvm.testing import pids
from tokvm.testing.persona.store import Store


def wait_for_hangup(out: int) -> NoReturn:
    """Do nothing, visibly nothing, until nobody listens to `out` any more (stdin may have ended long before)."""
    import select

    poller = select.poll()
    poller.register(out, 0)  # POLLERR and POLLHUP come unasked
    poller.poll()
    raise BrokenPipeError


def kill_connection(store: Store[Any]) -> None:
    """SIGKILL for the sshd process that serves this session: the client sees its connection break, as when a network fails.

    Only one that our own listener started; a persona run by hand may well have somebody's login as its ancestor.
    """
    listener = pids.noted(store.path("sshd", "run", "sshd.pid"))
    line = pids.ancestors(os.getpid())
    if listener in line:
        pids.kill(line[line.index(listener) - 1])
        pids.kill(line[1])  # with privilege separation the network is held by the nearer one
