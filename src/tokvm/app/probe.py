"""A sign of life that the operator names: `tcp:HOST:PORT` answers."""

from __future__ import annotations

import socket
from collections.abc import Callable

from tokvm.core.errors import UsageError

TIMEOUT_S = 2.0


def proof_of(text: str | None) -> Callable[[], bool] | None:
    """The question behind `--probe`; None without one. UsageError when nobody understands it."""
    if text is None:
        return None
    kind, _, rest = text.partition(":")
    host, _, port = rest.rpartition(":")
    if kind != "tcp" or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"--probe {text!r} is not understood", fix="write --probe tcp:HOST:PORT")
    address = (host.strip("[]"), int(port))

    def answers() -> bool:
        try:
            with socket.create_connection(address, timeout=TIMEOUT_S):
                return True
        except OSError:
            return False

    return answers
