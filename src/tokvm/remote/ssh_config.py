"""How a host is reached: what the operator said, checked, and turned into ssh's arguments.

Everything that is not said here comes from the user's own ssh_config (jump hosts, agent, old key exchanges). What would change
the meaning of our sessions is overridden on the command line: multiplexing, forwardings, a RemoteCommand, a tty, and above
all the host-key policy.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from tokvm.core.errors import UsageError

# Whatever begins with a dash is an option to ssh, and `-oProxyCommand=…` runs a command here.
_USER = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,254}")
_HOST = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,254}|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]+")
_NETLOC = re.compile(r"(?:(?P<user>[^@]*)@)?(?:\[(?P<v6>[^\[\]]*)\]|(?P<host>[^:\[\]]*))(?::(?P<port>[^:]*))?", re.DOTALL)
_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9]*=[^\n\0]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class SshConfig:
    """One host. If you hold one, host and user are fit for ssh's command line.

    user, port, identity: None leaves them to ssh_config. config_file: instead of the user's own (`ssh -F`).
    known_hosts: the one file that is believed, instead of the user's and the system's. accept_new_host_key: learn the key of
    a host never seen before; a changed key is refused all the same. options: more `-o` settings, `Key=value`; as in ssh, the
    first value for a key wins, so these cannot weaken ours.

    progress_deadline_s: a data connection on which no byte comes for so long is dead, whatever its keepalive says.
    keepalive_s x keepalive_count: how long a peer that answers nothing at all is believed.
    """

    host: str
    user: str | None = None
    port: int | None = None
    identity: str | None = None
    config_file: str | None = None
    known_hosts: str | None = None
    accept_new_host_key: bool = False
    options: tuple[str, ...] = ()
    progress_deadline_s: float = 30.0
    connect_timeout_s: float = 15.0
    keepalive_s: int = 5
    keepalive_count: int = 3

    def __post_init__(self) -> None:
        if not _HOST.fullmatch(self.host):
            raise UsageError(f"{self.host!r} is not a host name", fix="letters, digits, dots, dashes; IPv6 in brackets")
        if self.user is not None and not _USER.fullmatch(self.user):
            raise UsageError(f"{self.user!r} is not a user name", fix="letters, digits, dots, dashes, underscores")
        if self.port is not None and not 0 < self.port < 65536:
            raise UsageError(f"{self.port} is not a port", fix="1 to 65535")
        for option in self.options:
            if not _OPTION.fullmatch(option):
                raise UsageError(f"{option!r} is not an ssh option", fix="write Key=value, as for ssh -o")

    @classmethod
    def parse(
        cls,
        netloc: str,
        *,
        identity: str | None = None,
        config_file: str | None = None,
        known_hosts: str | None = None,
        accept_new_host_key: bool = False,
        options: tuple[str, ...] = (),
        progress_deadline_s: float = 30.0,
        connect_timeout_s: float = 15.0,
    ) -> SshConfig:
        """`[user@]host[:port]`, with IPv6 addresses in brackets. UsageError for anything else."""
        match = _NETLOC.fullmatch(netloc)
        if match is None:
            raise UsageError(f"{netloc!r} is no place to reach over ssh", fix="write [user@]host[:port]")
        port = match["port"]
        if port is not None and not re.fullmatch(r"[0-9]{1,5}", port):
            raise UsageError(f"{port!r} is not a port", fix="1 to 65535")
        return cls(
            host=match["host"] if match["v6"] is None else match["v6"],
            user=match["user"],
            port=None if port is None else int(port),
            identity=identity,
            config_file=config_file,
            known_hosts=known_hosts,
            accept_new_host_key=accept_new_host_key,
            options=options,
            progress_deadline_s=progress_deadline_s,
            connect_timeout_s=connect_timeout_s,
        )

    @property
    def where(self) -> str:
        """For messages: `ssh://root@host:22`, with only what was said."""
        user = f"{self.user}@" if self.user else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ssh://{user}{host}" + (f":{self.port}" if self.port else "")

    def arguments(self, *, believe: HostKeys | None = None) -> list[str]:
        """ssh's options that every connection to this host has, up to but without `-- host`."""
        believe = believe or HostKeys(self.known_hosts, "accept-new" if self.accept_new_host_key else "yes")
        options = [
            "BatchMode=yes",
            f"StrictHostKeyChecking={believe.policy}",
            *believe.files(),
            f"ConnectTimeout={max(1, round(self.connect_timeout_s))}",
            "ConnectionAttempts=1",
            f"ServerAliveInterval={self.keepalive_s}",
            f"ServerAliveCountMax={self.keepalive_count}",
            "LogLevel=ERROR",
            "ControlPersist=no",
            "RequestTTY=no",
            "RemoteCommand=none",
            "PermitLocalCommand=no",
            "ClearAllForwardings=yes",
            "ForwardAgent=no",
            "ForwardX11=no",
        ]
        if self.user is not None:
            options.append(f"User={self.user}")
        if self.port is not None:
            options.append(f"Port={self.port}")
        if self.identity is not None:
            options += [f"IdentityFile={option_value(self.identity)}", "IdentitiesOnly=yes"]
        options += self.options
        config = [] if self.config_file is None else ["-F", self.config_file]
        return [*config, *(part for option in options for part in ("-o", option))]


@dataclass(frozen=True, slots=True)
class HostKeys:
    """Which host keys are believed. `file` None: those of the user's and the system's files."""

    file: str | None
    policy: str

    def files(self) -> list[str]:
        if self.file is None:
            return []
        return [f"UserKnownHostsFile={option_value(self.file)}", "GlobalKnownHostsFile=/dev/null"]


def option_value(path: str) -> str:
    """A path as the value of an ssh option: quoted, with nothing in it expanded."""
    if "${" in path or "\n" in path or "\0" in path:
        raise UsageError(f"ssh cannot be given the path {path!r}", fix="use a path without ${ and newlines")
    escaped = path.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def quote(args: Sequence[str]) -> str:
    """A command line that a POSIX shell takes apart into exactly `args`, byte for byte."""
    if any("\0" in arg for arg in args):
        raise UsageError("a command's argument cannot hold a NUL byte", where=repr(args[0]) if args else "")
    line = shlex.join(args)
    # To a shell an unquoted `a=b` in front is an assignment, not a command.
    return f"'{args[0]}'{line[len(args[0]) :]}" if args and "=" in args[0] and line.startswith(args[0]) else line


def command_bytes(line: str) -> bytes:
    """The bytes of a command line. Surrogates are bytes that were no UTF-8 when they were read, and go back as such."""
    return line.encode("utf-8", "surrogateescape")
