"""A forced command of a played host: one process for what SSH_ORIGINAL_COMMAND asks, which ends with its exit code.

Imports little: every command of a persona is a process that loads this.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

from tokvm.testing.persona.store import Store

DROPPED = 255  # what ssh itself says of a connection that broke
NOBODY = 141  # as a shell says of SIGPIPE


class Drop(Exception):
    """The connection dies here, without an answer."""


def write(file: int, data: bytes) -> None:
    """All of it."""
    while data:
        data = data[os.write(file, data) :]


def run(store: Store[Any], answer: Callable[[str], int], *, told: Callable[[BaseException], str] = repr) -> NoReturn:
    """Give the asked line to `answer`, and end with its exit code.

    A defect of the persona, or of the backend, is no answer of its host: it is recorded as a violation, so that whoever runs
    the test sees it. told: what standard error says of it.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # a write to nobody is an OSError, so that clean-up still happens
    line = os.environb.get(b"SSH_ORIGINAL_COMMAND", b"").decode("utf-8", "surrogateescape")

    def own_fault(_kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        import traceback

        text = "".join(traceback.format_tb(trace))[-2000:]
        store.append("violations", {"command": line, "why": f"the persona itself failed: {error!r}\n{text}"})
        with contextlib.suppress(OSError):
            write(2, f"{told(error)}\n".encode("utf-8", "surrogateescape"))

    sys.excepthook = own_fault
    os._exit(answer(line))
