"""A real sshd on loopback with throw-away keys, and hosts that reach it."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tokvm.remote.ssh import SshConfig, SshHost

SFTP_SERVER = "/usr/lib/openssh/sftp-server"
USER = pwd.getpwuid(os.getuid()).pw_name


def keygen(path: Path) -> Path:
    path.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True, stdin=subprocess.DEVNULL)
    return path


def fingerprint_of(public_key: Path) -> str:
    listed = subprocess.run(["ssh-keygen", "-lf", str(public_key)], check=True, capture_output=True, text=True)
    return listed.stdout.split()[1]


def children_of(pid: int) -> list[int]:
    """All descendants, by /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = parents.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def name_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "comm").read_text().strip()
    return ""


@dataclass
class Server:
    """One sshd. `config()` reaches it as we are, with its key known."""

    directory: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    sftp: str = SFTP_SERVER

    @property
    def user_key(self) -> Path:
        return self.directory / "user_key"

    @property
    def host_key(self) -> Path:
        return self.directory / "host_key"

    @property
    def known_hosts(self) -> Path:
        return self.directory / "known_hosts"

    def prepare(self) -> None:
        keygen(self.host_key)
        keygen(self.user_key)
        (self.directory / "authorized_keys").write_bytes((self.directory / "user_key.pub").read_bytes())
        self.learn()

    def learn(self) -> None:
        kind, key = (self.directory / "host_key.pub").read_text().split()[:2]
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")

    def fingerprint(self) -> str:
        return fingerprint_of(self.directory / "host_key.pub")

    def start(self) -> None:
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        config = self.directory / "sshd_config"
        settings = [
            f"Port {self.port}",
            "ListenAddress 127.0.0.1",
            f"HostKey {self.host_key}",
            f"AuthorizedKeysFile {self.directory}/authorized_keys",
            "PidFile none",
            "UsePAM no",
            "UseDNS no",
            "StrictModes no",
            "PermitRootLogin prohibit-password",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "MaxStartups 100",
            "KexAlgorithms curve25519-sha256",  # the post-quantum one costs 60 ms of CPU a connection
            # bash reads ~/.bashrc for ssh's commands too; what is in it is none of the tests' business
            f"SetEnv HOME={self.directory}",
            f"Subsystem sftp {self.sftp}",
        ]
        config.write_text("\n".join(settings) + "\n")
        argv = ["/usr/sbin/sshd", "-D", "-E", str(self.directory / "log"), "-f", str(config)]
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError((self.directory / "log").read_text())
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.02)
        raise RuntimeError("sshd does not answer")

    def stop(self) -> None:
        if self.process is None:
            return
        for pid in [*children_of(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def sessions(self) -> list[int]:
        """Processes below the listener: the sessions and what runs in them."""
        return [] if self.process is None else children_of(self.process.pid)

    def processes(self, name: str) -> list[int]:
        return [pid for pid in self.sessions() if name_of(pid) == name]

    def config(self) -> SshConfig:
        return SshConfig.parse(
            f"{USER}@127.0.0.1:{self.port}",
            identity=str(self.user_key),
            config_file="/dev/null",
            known_hosts=str(self.known_hosts),
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("sshd"), free_port())
    server.prepare()
    server.start()
    yield server
    server.stop()


class FakeSftp:
    """A server whose sftp subsystem is `fake_sftp.py`, and the faults it has from the next session on."""

    def __init__(self, server: Server, faults: Path) -> None:
        self.server = server
        self._faults = faults

    def faults(self, **faults: object) -> None:
        self._faults.write_text(json.dumps(faults))


@pytest.fixture(scope="session")
def shared_fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeSftp]:
    directory = tmp_path_factory.mktemp("fake")
    faults = directory / "faults.json"
    server = Server(directory, free_port())
    server.sftp = shlex.join([sys.executable, "-IS", str(Path(__file__).with_name("fake_sftp.py")), str(faults)])
    server.prepare()
    server.start()
    yield FakeSftp(server, faults)
    server.stop()


@pytest.fixture
def fake(shared_fake: FakeSftp) -> FakeSftp:
    shared_fake.faults()
    return shared_fake


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Servers of one's own, to be stopped, frozen or given another key."""
    made: list[Server] = []

    def make(*, sftp: str = SFTP_SERVER) -> Server:
        directory = tmp_path / f"sshd-{len(made)}"
        directory.mkdir()
        server = Server(directory, free_port(), sftp=sftp)
        server.prepare()
        server.start()
        made.append(server)
        return server

    yield make
    for server in made:
        server.stop()


@pytest.fixture
def open_host() -> Iterator[Callable[..., SshHost]]:
    """`open_host(server, progress_deadline_s=…)`: closed at the end of the test."""
    made: list[SshHost] = []

    def make(server: Server, **changes: object) -> SshHost:
        host = SshHost(replace(server.config(), **changes))  # type: ignore[arg-type]
        made.append(host)
        return host

    yield make
    for host in made:
        host.close()


@pytest.fixture(scope="session")
def host(shared_server: Server) -> Iterator[SshHost]:
    """One for all tests that leave its connection as it is: a login takes a fifth of a second."""
    host = SshHost(shared_server.config())
    yield host
    host.close()


def eventually(true: Callable[[], object], *, within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError("did not come true in time")
        time.sleep(0.02)


@pytest.fixture(name="eventually")
def eventually_fixture() -> Callable[..., None]:
    return eventually
