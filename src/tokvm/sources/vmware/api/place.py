"""vpx://[user@]host[:port][/datacenter], as typed and as shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from tokvm.core.errors import UsageError

DEFAULT_USER = "administrator@vsphere.local"
DEFAULT_PORT = 443
_HOST = re.compile(r"\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_][A-Za-z0-9._-]{0,252}")
_MOST = 1000


@dataclass(frozen=True, slots=True)
class Place:
    """host: a name or an address, without brackets. datacenter: its inventory path, without slashes around it; "" for all."""

    host: str
    user: str = DEFAULT_USER
    port: int = DEFAULT_PORT
    datacenter: str = ""

    @classmethod
    def parse(cls, text: str) -> Place:
        """From what follows `vpx:`. A user may hold an `@` (user@domain): the last one divides. UsageError otherwise."""
        authority, _, path = text.removeprefix("//").partition("/")
        user, sign, rest = authority.rpartition("@")
        host, colon, port = rest.rpartition(":") if not rest.endswith("]") else (rest, "", "")
        host = host if colon else rest
        if not _HOST.fullmatch(host) or (sign and not user) or (colon and not _is_port(port)) or len(text) > _MOST:
            raise UsageError(
                f"{text!r} names no vCenter or ESXi host", fix="write vpx://[USER@]HOST[:PORT][/DATACENTER], without a password"
            )
        user = unquote(user) or DEFAULT_USER
        if ":" in user:
            raise UsageError("a password has no place in a URL", fix="use --password-file, or TOKVM_PASSWORD")
        return cls(host.strip("[]"), user, int(port) if colon else DEFAULT_PORT, unquote(path).strip("/"))

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORT else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"vpx://{self.user}@{self.netloc}" + (f"/{self.datacenter}" if self.datacenter else "")


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and 0 < int(text[:6]) < 1 << 16
