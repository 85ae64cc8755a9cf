"""What ssh's end means.

ssh exits with the remote command's code, or 255 for its own failures; a remote command that was killed by a signal is 255
too. So 255 never counts as an answer. ssh's text is used only to say more precisely what failed, never to call anything a
success: stderr is the remote program's as well, and newer versions put warnings there.
"""

from __future__ import annotations

import re
from typing import ClassVar

from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.core.text import readable
from tokvm.remote.process import Completed

SSH_FAILED = 255
_CHANGED = b"REMOTE HOST IDENTIFICATION HAS CHANGED"
_REVOKED = b"REVOKED HOST KEY DETECTED"
_UNVERIFIED = b"Host key verification failed."
_REFUSED = re.compile(rb"Permission denied \(|Too many authentication failures|no mutual signature algorithm")


class RemoteCommandError(SourceError):
    """The remote command ran and ended with something else than 0."""

    meaning: ClassVar[str] = "a command on the source ended with an error; its own message is shown"

    def __init__(self, command: str, completed: Completed, *, where: str) -> None:
        said = last_line(completed.stderr)
        super().__init__(
            f"`{readable(command)}` ended with exit code {completed.code}" + (f": {said}" if said else ""), where=where
        )
        self.command = command
        self.code = completed.code
        self.stdout = completed.stdout
        self.stderr = completed.stderr


class LoginRefused(SourceError):
    """ssh reached the host, which took none of our keys."""

    meaning: ClassVar[str] = "the source refused the SSH login; a person must mend that"


def is_host_key_refusal(stderr: bytes) -> bool:
    return any(sign in stderr for sign in (_CHANGED, _REVOKED, _UNVERIFIED))


def is_changed_key(stderr: bytes) -> bool:
    return _CHANGED in stderr or _REVOKED in stderr


def connection_error(stderr: bytes, *, where: str, doing: str) -> SourceError:
    """Why ssh itself failed: login refused (which a person must mend) or the connection (which may come back)."""
    said = last_line(stderr)
    if _REFUSED.search(stderr):
        return LoginRefused(
            f"the host refused the login: {said}",
            where=where,
            fix="try `ssh` to it by hand: key in authorized_keys, agent running, user right? (--identity names a key file)",
        )
    return ConnectionLost(
        f"the connection failed while {doing}" + (f": {said}" if said else ""),
        where=where,
        fix="run the same command again once the host answers",
    )


def last_line(text: bytes) -> str:
    lines = [line for line in text.decode("utf-8", "replace").splitlines() if line.strip()]
    return readable(lines[-1].strip()) if lines else ""
