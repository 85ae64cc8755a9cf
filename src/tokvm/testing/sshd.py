"""A real sshd on loopback with throw-away keys.

    folder/  host_key user_key (+ .pub)   known_hosts   sshd_config   ssh_config   authorized_keys   sshd.log   run/sshd.pid

With a forced command every session runs that program, which finds what was asked for in SSH_ORIGINAL_COMMAND; without one it is
an ordinary sshd (shell, SFTP). Works as root and as any user (who can then log in only as himself).
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from types import TracebackType

from tokvm.testing import pids

START_TIMEOUT_S = 10.0
ATTEMPTS = 5


class Lifetime(Enum):
    """Whether the sshd dies with the process that started it (tests) or lives on until `stop` (the lab)."""

    WITH_US = "with us"
    OUTLIVES_US = "outlives us"


@dataclass(frozen=True, slots=True)
class SshdLimits:
    """What this sshd allows. key_type: of the host's key and the user's, as ssh-keygen names it. more: lines of sshd_config."""

    key_type: str = "ed25519"
    key_exchange: str = "curve25519-sha256"  # a login in half the time of the post-quantum one
    max_startups: str = "300"
    max_sessions: int = 100
    more: tuple[str, ...] = ()

    def with_banner(self, file: Path) -> SshdLimits:
        return replace(self, more=(*self.more, f"Banner {_quoted(file)}"))


GENEROUS = SshdLimits()
# sshd_config of ESXi 8.0.2: FIPS mode, so that ed25519 and chacha20 do not exist; MaxSessions is not set, and so is 10.
ESXI_LIMITS = SshdLimits(
    key_type="ecdsa",
    key_exchange="ecdh-sha2-nistp256,ecdh-sha2-nistp384,ecdh-sha2-nistp521,diffie-hellman-group14-sha256",
    max_startups="10:30:100",
    max_sessions=10,
    more=(
        "Ciphers aes256-gcm@openssh.com,aes128-gcm@openssh.com,aes256-ctr,aes192-ctr,aes128-ctr",
        "MACs hmac-sha2-256,hmac-sha2-512",
        "HostKeyAlgorithms ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,rsa-sha2-256,rsa-sha2-512",
        "PubkeyAcceptedAlgorithms ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,ecdsa-sha2-nistp521,rsa-sha2-256,rsa-sha2-512",
        "Compression no",
        "ClientAliveInterval 200",
        "ClientAliveCountMax 3",
        "RekeyLimit 1G 1H",
        "AllowTcpForwarding no",
    ),
)


class SshdError(RuntimeError):
    """sshd is missing or did not start; the text holds the end of its log."""


class Sshd:
    """One sshd, its keys and the client configuration to reach it. The folder holds everything, so a second process can
    make the same object and go on with it (`running`, `port`, `stop`)."""

    def __init__(
        self,
        folder: Path,
        *,
        forced_command: Sequence[str] | None = None,
        sftp: str = "",
        host: str = "127.0.0.1",
        limits: SshdLimits = GENEROUS,
    ) -> None:
        """sftp: what a forced command finds in SSH_ORIGINAL_COMMAND when the sftp subsystem is asked for; "": there is none."""
        self.folder = folder.absolute()
        self.host = host
        self.user = getpass.getuser()
        self._forced = list(forced_command) if forced_command is not None else None
        self._sftp = sftp
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def config_file(self) -> Path:
        """An ssh_config for `ssh -F`: identity, known_hosts, strict checking, no agent."""
        return self.folder / "ssh_config"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    @property
    def identity(self) -> Path:
        """The user's private key."""
        return self.folder / "user_key"

    @property
    def host_public_key(self) -> str:
        """`ssh-ed25519 AAAA…`"""
        return " ".join((self.folder / "host_key.pub").read_text().split()[:2])

    @property
    def log_file(self) -> Path:
        return self.folder / "sshd.log"

    @property
    def port(self) -> int:
        return int((self.folder / "port").read_text())

    @property
    def netloc(self) -> str:
        """`user@host:port`, as a URL has it."""
        return f"{self.user}@{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The listening process, while it lives."""
        return pids.noted(self.folder / "run" / "sshd.pid")

    def start(self, lifetime: Lifetime = Lifetime.WITH_US) -> Sshd:
        """Make keys if there are none, start, wait until it answers. Again when running: nothing happens."""
        if self.pid is not None:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self._make_keys()
        for _ in range(ATTEMPTS):  # the free port may be taken between finding and using it
            if self._start_on(self._wanted_port(), lifetime):
                return self
            (self.folder / "port").unlink(missing_ok=True)
        raise SshdError(f"sshd did not start: {self._log_tail()}")

    def stop(self) -> None:
        """Kill the listener and every session; what was sent by them is lost, as when a host dies."""
        pid = self.pid
        if pid is not None:
            pids.kill_tree(pid)
            if self._process is None:
                pids.wait_gone(pid)
        if self._process is not None:
            self._process.wait()
            self._process = None
        (self.folder / "run" / "sshd.pid").unlink(missing_ok=True)

    def cut_connections(self) -> int:
        """Kill every session but not the listener: all connections break, new ones work. Returns how many processes."""
        return self._signal_sessions(signal.SIGKILL)

    def freeze_connections(self) -> int:
        """Stop every session where it is: sockets stay open, nothing moves (a hung host, a pulled cable)."""
        return self._signal_sessions(signal.SIGSTOP)

    def thaw_connections(self) -> int:
        return self._signal_sessions(signal.SIGCONT)

    def _signal_sessions(self, number: signal.Signals) -> int:
        pid = self.pid
        family = pids.descendants(pid) if pid is not None else []
        for member in family:
            pids.kill(member, number)
        return len(family)

    def also_at(self, port: int) -> None:
        """Let clients find the same host behind another port (a proxy's)."""
        name = f"[{self.host}]:{port} "
        if name not in self.known_hosts.read_text():
            with self.known_hosts.open("a") as file:
                file.write(f"{name}{self.host_public_key}\n")

    def new_host_key(self) -> None:
        """The host was installed anew (or is another one): same address, other key; known_hosts keeps the old one."""
        self.stop()
        for name in ("host_key", "host_key.pub"):
            (self.folder / name).unlink()
        _make_key(self.folder / "host_key", self._limits.key_type)
        self.start()

    def __enter__(self) -> Sshd:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _wanted_port(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            return self.port  # the one it had before: URLs and known_hosts stay right over a restart
        with socket.socket() as probe:
            probe.bind((self.host, 0))
            return int(probe.getsockname()[1])

    def _make_keys(self) -> None:
        for name in ("host_key", "user_key"):
            if not (self.folder / name).exists():
                _make_key(self.folder / name, self._limits.key_type)
        public = (self.folder / "user_key.pub").read_text()
        (self.folder / "authorized_keys").write_text(public)

    def _start_on(self, port: int, lifetime: Lifetime) -> bool:
        self._write_config(port)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # its own chroot, which only the service's start makes
        argv = [_sshd_path(), "-D", "-f", str(self.folder / "sshd_config"), "-E", str(self.log_file)]
        if lifetime is Lifetime.WITH_US and shutil.which("setpriv"):
            argv = ["setpriv", "--pdeathsig", "KILL", *argv]
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._process = process
        until = time.monotonic() + START_TIMEOUT_S
        while process.poll() is None and time.monotonic() < until:
            if _answers(self.host, port):
                pids.note(self.folder / "run", "sshd", process.pid)
                if lifetime is Lifetime.OUTLIVES_US:
                    pids.disown(process)
                    self._process = None
                return True
            time.sleep(0.01)
        process.kill()
        process.wait()
        self._process = None
        return False

    def _write_config(self, port: int) -> None:
        root = os.geteuid() == 0
        lines = [
            f"Port {port}",
            f"ListenAddress {self.host}",
            f"HostKey {_quoted(self.folder / 'host_key')}",
            f"AuthorizedKeysFile {_quoted(self.folder / 'authorized_keys')}",
            "PidFile none",
            # An account's shell reads its ~/.bashrc before every command, forced ones too; here it costs what it likes.
            f'SetEnv "HOME={self.folder}"',
            f"KexAlgorithms {self._limits.key_exchange}",
            "StrictModes no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            f"UsePAM {'yes' if root and _account_locked(self.user) else 'no'}",
            "PermitRootLogin prohibit-password",
            "PrintMotd no",
            "UseDNS no",
            f"MaxStartups {self._limits.max_startups}",
            f"MaxSessions {self._limits.max_sessions}",
            "LogLevel VERBOSE",
            *self._limits.more,
        ]
        if self._forced is None:
            lines.append("Subsystem sftp internal-sftp")
        else:
            lines += [f"ForceCommand {shlex.join(self._forced)}", "PermitTTY no", "DisableForwarding yes"]
            lines += [f"Subsystem sftp {self._sftp}"] if self._sftp else []
        (self.folder / "sshd_config").write_text("\n".join(lines) + "\n")
        (self.folder / "port").write_text(f"{port}\n")
        name = f"[{self.host}]:{port} "
        if not self.known_hosts.exists() or name not in self.known_hosts.read_text():
            self.known_hosts.write_text(f"{name}{self.host_public_key}\n")
        self.config_file.write_text(
            "Host *\n"
            f"  IdentityFile {_quoted(self.identity)}\n"
            "  IdentitiesOnly yes\n"
            "  IdentityAgent none\n"
            f"  UserKnownHostsFile {_quoted(self.known_hosts)}\n"
            "  GlobalKnownHostsFile /dev/null\n"
            "  StrictHostKeyChecking yes\n"
            "  BatchMode yes\n"
            "  ConnectTimeout 10\n"
        )

    def _log_tail(self) -> str:
        try:
            return self.log_file.read_text(errors="replace")[-2000:]
        except OSError:
            return "no log"


def _make_key(path: Path, key_type: str) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", key_type, "-N", "", "-C", "throw-away", "-f", str(path)], check=True)


def _sshd_path() -> str:
    found = shutil.which("sshd", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")))
    if found is None:
        raise SshdError("sshd is not there; install the package openssh-server")
    return found


def _quoted(path: Path) -> str:
    return f'"{path}"'


def _answers(host: str, port: int) -> bool:
    """True once it says its version: the socket alone may be somebody else's."""
    try:
        with socket.create_connection((host, port), timeout=1.0) as probe:
            return probe.recv(4) == b"SSH-"
    except OSError:
        return False


def _account_locked(user: str) -> bool:
    """Without PAM, sshd refuses accounts whose password field begins with `!` (auth.c), keys or not."""
    try:
        lines = Path("/etc/shadow").read_text().splitlines()
    except OSError:
        return False
    return any(line.split(":", 2)[:1] == [user] and line.split(":", 2)[1].startswith("!") for line in lines)
