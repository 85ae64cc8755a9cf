"""smbprotocol's connection, less trusting: bounded messages, bounded waiting, no links, nothing in clear."""

from __future__ import annotations

import logging
from typing import Any

from smbprotocol import exceptions
from smbprotocol.connection import Connection
from smbprotocol.header import Commands

from tokvm.core.units import KiB, MiB

_LONGEST = MiB + 64 * KiB  # a message; nothing that we ask for is answered with more

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
        """Called for every message that came in clear."""
        session = self.session_table.get(session_id)
        if (
            session is not None
            and session.encrypt_data
            and not force
            and header["command"].get_value() != Commands.SMB2_SESSION_SETUP
        ):
            raise exceptions.SMBException("a message in clear came on an encrypted session")
        super().verify_signature(header, session_id, force=force)
