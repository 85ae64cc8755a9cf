"""The control connection: one login, then every command over it without another.

    ssh -N -o ControlMaster=yes -o ControlPath=DIR/c   our child, in the foreground, so it dies with us
    ssh    -o ControlMaster=no  -o ControlPath=DIR/c   one per command

DIR is a `RunDirectory`: mode 0700, a random name. It outlives `kill -9`; whoever comes next and finds its lock free removes it.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from tokvm.core.errors import ConnectionLost, HostKeyError
from tokvm.remote import hostkeys, process
from tokvm.remote.errors import connection_error, is_host_key_refusal
from tokvm.remote.rundir import RunDirectory
from tokvm.remote.ssh_config import SshConfig

log = logging.getLogger(__name__)

_PREFIX = "tokvm-ssh-"
# From the TCP connection to the end of the login: key exchange and an agent that asks a token.
_LOGIN_S = 30.0
ENVIRONMENT = {"LC_ALL": "C"}


class ControlConnection:
    """Keeps the connection up. Thread-safe."""

    def __init__(self, config: SshConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._directory: RunDirectory | None = None
        self._master: process.Child | None = None
        self._closed = False

    def path(self) -> str:
        """The control socket, of a connection that is up: made anew when it died. HostKeyError, ConnectionLost, SourceError."""
        with self._lock:
            if self._closed:
                raise ConnectionLost("the connection was closed", where=self._config.where)
            if self._directory is None:
                self._directory = RunDirectory(_PREFIX)
            socket = self._directory.path / "c"
            if self._master is None or self._master.poll() is not None or not socket.exists():
                self._drop_master()
                socket.unlink(missing_ok=True)
                self._master = self._connect(socket)
            return str(socket)

    @property
    def pid(self) -> int | None:
        """The process that holds the connection, for those who want to look at it."""
        return None if self._master is None else self._master.pid

    def close(self) -> None:
        """Hang up and remove the socket and its directory. Once closed it stays closed."""
        with self._lock:
            self._closed = True
            self._drop_master()
            if self._directory is not None:
                self._directory.remove()
                self._directory = None

    def _drop_master(self) -> None:
        if self._master is not None:
            self._master.terminate(timeout_s=2.0)
            self._master.close()
            self._master = None

    def _connect(self, socket: Path) -> process.Child:
        argv = [
            *("ssh", "-N", "-T", "-o", "ControlMaster=yes", "-o", f"ControlPath={socket}"),
            *self._config.arguments(),
            *("--", self._config.host),
        ]
        master = process.start(argv, where=self._config.where, env=ENVIRONMENT)
        try:
            self._await_socket(master, socket)
            if self._config.accept_new_host_key:
                self._check_learned()
        except BaseException:
            master.close()
            raise
        log.info("connected to %s", self._config.where)
        return master

    def _await_socket(self, master: process.Child, socket: Path) -> None:
        """ssh links the socket into place once it is logged in and listens."""
        deadline = time.monotonic() + self._config.connect_timeout_s + _LOGIN_S
        while not socket.exists():
            if master.poll() is not None:
                master.wait(timeout_s=1.0)
                said = master.stderr_tail()
                if is_host_key_refusal(said):
                    raise hostkeys.host_key_error(self._config, said)
                raise connection_error(said, where=self._config.where, doing="logging in")
            if time.monotonic() > deadline:
                raise ConnectionLost("the host accepted the connection but not the login in time", where=self._config.where)
            time.sleep(0.005)

    def _check_learned(self) -> None:
        """ssh only warns when it cannot write down a new key; then the next connection would believe any key."""
        known = hostkeys.believed_fingerprints(self._config)
        if not known:
            raise HostKeyError(
                "the host's key was accepted but could not be stored",
                where=self._config.where,
                fix="make the known_hosts file writable, or name another one",
            )
        log.info("host key of %s: %s", self._config.where, ", ".join(known))
