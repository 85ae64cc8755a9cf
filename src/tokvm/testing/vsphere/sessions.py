"""Sessions: a cookie from the first answer on, logged in by Login, gone after half an hour of silence.

    Set-Cookie: vmware_soap_session="<40 hex digits>"; Path=/; HttpOnly; Secure;

They live as long as the process: after vpxd restarts everybody is asked to log in again.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import re
import secrets
import threading
from dataclasses import dataclass, field

from pyVmomi import vim

from tokvm.testing.persona.store import new_uuid
from tokvm.testing.vsphere.clock import Clock, moment

COOKIE = "vmware_soap_session"
IDLE_S = 1800.0  # vpxd's and hostd's default


@dataclass(slots=True)
class Session:
    """`user` is empty until somebody logs in. Views and page tokens belong to a session and go with it."""

    cookie: str
    key: str = field(default_factory=new_uuid)
    user: str = ""
    since: float = 0.0
    seen: float = 0.0

    @property
    def set_cookie(self) -> str:
        return f'{COOKIE}="{self.cookie}"; Path=/; HttpOnly; Secure;'

    def described(self) -> vim.UserSession:
        return vim.UserSession(
            key=self.key,
            userName=self.user,
            fullName=self.user,
            loginTime=moment(self.since),
            lastActiveTime=moment(self.seen),
            locale="en",
            messageLocale="en",
            extensionSession=False,
            ipAddress="127.0.0.1",
            userAgent="",
            callCount=0,
        )


class Sessions:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}

    def of(self, cookie_header: str) -> Session | None:
        """The session that a Cookie header names, if there is (still) one; it is seen now."""
        named = re.search(rf'{COOKIE}="?([^";\s]+)"?', cookie_header)
        with self._lock:
            self._forget_idle()
            found = self._sessions.get(named[1]) if named else None
            if found is not None:
                found.seen = self._clock.now()
            return found

    def begin(self) -> Session:
        session = Session(secrets.token_hex(20), seen=self._clock.now())
        with self._lock:
            self._sessions[session.cookie] = session
        return session

    def log_in(self, session: Session, user: str) -> None:
        session.user, session.since = user, self._clock.now()

    def end(self, session: Session) -> None:
        with self._lock:
            self._sessions.pop(session.cookie, None)

    def end_all(self) -> None:
        """As when vpxd restarts."""
        with self._lock:
            self._sessions.clear()

    def by_key(self, key: str) -> Session | None:
        with self._lock:
            self._forget_idle()
            return next((one for one in self._sessions.values() if one.key == key), None)

    def _forget_idle(self) -> None:
        limit = self._clock.now() - IDLE_S
        for cookie in [cookie for cookie, one in self._sessions.items() if one.seen < limit]:
            del self._sessions[cookie]


def basic_credentials(header: str) -> tuple[str, str] | None:
    """(user, password) of an Authorization header; None if it is no such."""
    scheme, _, coded = header.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        user, colon, password = base64.b64decode(coded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return (user, password) if colon else None


def same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())
