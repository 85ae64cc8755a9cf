"""smbprotocol's connection, less trusting: bounded messages, bounded waiting, no links, nothing in clear."""

from __future__ import annotations

import logging
from typing import Any

from smbprotocol import exceptions
from smbprotocol.connection import Connection
from smbprotocol.header import Commands

from tokvm.core.units import KiB, MiB

_LONGEST = MiB + 64 * KiB  # a message; nothing that we ask for is answered with more

_IN_CLEAR = (Commands.SMB2_NEGOTIATE, Commands.SMB2_SESSION_SETUP)  # there is no key yet

logging.getLogger("smbprotocol").setLevel(logging.CRITICAL)  # it logs whole messages, and failures that are ours to tell


class StrictConnection(Connection):  # type: ignore[misc]
    """A connection that waits no longer than it is told, follows no links, and takes nothing in clear that should be sealed."""

    silence_s = 30.0

    @property
    def transport(self) -> Any:
        return self._bounded

    @transport.setter
    def transport(self, made: Any) -> None:
        """Whoever is at the other end has not said who it is yet, and may name any length."""
        self._bounded = made
        if made is not None:
            take = made._recv

            def take_bounded(length: int, timeout: float) -> Any:
                if length > _LONGEST:
                    raise exceptions.SMBException(f"a message of {length} bytes")
                return take(length, timeout)

            made._recv = take_bounded

    def receive(self, request: Any, wait: bool = True, timeout: float | None = None, resolve_symlinks: bool = True) -> Any:  # noqa: FBT001
        return super().receive(request, wait=wait, timeout=timeout or self.silence_s, resolve_symlinks=False)

    def verify_signature(self, header: Any, session_id: int, force: bool = False) -> None:  # noqa: FBT001
        """Called for every message that came in clear; with `force` once more for the one that ends the login.

        What was asked decides, not what the answer says that it answers: somebody in between could call anything a login."""
        request = self.outstanding_requests.get(header["message_id"].get_value())
        asked = None if request is None else request.message["command"].get_value()
        if not force and (asked not in _IN_CLEAR or header["command"].get_value() != asked):
            raise exceptions.SMBException("a message in clear came on an encrypted session")
        super().verify_signature(header, session_id, force=force)
