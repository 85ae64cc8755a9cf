"""Whose host is it? Strict by default, and a changed key never passes."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.errors import HostKeyError
from tokvm.remote.ssh import SshHost

OpenHost = Callable[..., SshHost]
Attempt = Callable[[SshHost], object]

ATTEMPTS = {
    "command": lambda host: host.run(["touch", "/tmp/tokvm-was-here"]),
    "stream": lambda host: host.stream("touch /tmp/tokvm-was-here").finish(),
    "sftp": lambda host: host.sftp(),
}


@pytest.fixture(params=sorted(ATTEMPTS))
def attempt(request: pytest.FixtureRequest) -> Attempt:
    return ATTEMPTS[request.param]


def new_host_key(server: Any) -> None:
    server.stop()
    server.host_key.unlink()
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(server.host_key)], check=True)
    server.start()


@pytest.mark.slow
def test_an_unknown_key_is_refused_with_its_fingerprint(
    shared_server: Any, open_host: OpenHost, tmp_path: Path, attempt: Attempt
) -> None:
    empty = tmp_path / "known hosts"
    with pytest.raises(HostKeyError, match="unknown") as caught:
        attempt(open_host(shared_server, known_hosts=str(empty)))
    assert shared_server.fingerprint() in caught.value.what
    assert "--accept-new-host-key" in caught.value.fix
    assert not empty.exists()
    assert not Path("/tmp/tokvm-was-here").exists()


def test_the_command_by_which_a_person_teaches_the_key_does_so(shared_server: Any, open_host: OpenHost, tmp_path: Path) -> None:
    """cutover, rollback and finish have no --accept-new-host-key."""
    known = str(tmp_path / "known hosts")
    with pytest.raises(HostKeyError) as caught:
        open_host(shared_server, known_hosts=known).run(["true"])
    by_hand = caught.value.fix.split("`")[1]
    yes = ["-oStrictHostKeyChecking=accept-new", "-oBatchMode=yes"]
    subprocess.run(["ssh", *yes, *shlex.split(by_hand)[1:], "true"], check=False, stdin=subprocess.DEVNULL, timeout=30)
    open_host(shared_server, known_hosts=known).run(["true"])


@pytest.mark.parametrize("accept", [False, True])
@pytest.mark.slow
def test_a_changed_key_is_refused_whatever_was_said(
    make_server: Callable[..., Any], open_host: OpenHost, attempt: Attempt, accept: bool
) -> None:
    server = make_server()
    believed = server.known_hosts.read_bytes()
    new_host_key(server)
    with pytest.raises(HostKeyError, match="CHANGED") as caught:
        attempt(open_host(server, accept_new_host_key=accept))
    assert server.fingerprint() in caught.value.what
    assert f"ssh-keygen -R '[127.0.0.1]:{server.port}'" in caught.value.fix
    assert str(server.known_hosts) in caught.value.fix
    assert server.known_hosts.read_bytes() == believed
    assert not Path("/tmp/tokvm-was-here").exists()


def test_the_advice_for_a_changed_key_works(make_server: Callable[..., Any], open_host: OpenHost) -> None:
    server = make_server()
    new_host_key(server)
    with pytest.raises(HostKeyError) as caught:
        open_host(server).run(["true"])
    advice = caught.value.fix[caught.value.fix.index("ssh-keygen -R") :]
    subprocess.run(shlex.split(advice), check=True, capture_output=True)
    host = open_host(server, accept_new_host_key=True)
    assert host.run(["echo", "new"]).stdout == b"new\n"


def test_a_new_key_is_learned_when_told_and_strict_from_then_on(
    shared_server: Any, open_host: OpenHost, tmp_path: Path
) -> None:
    known = tmp_path / "known hosts"
    host = open_host(shared_server, known_hosts=str(known), accept_new_host_key=True)
    assert host.fingerprint() == f"{shared_server.fingerprint()} (ED25519)"
    assert host.run(["echo", "hello"]).stdout == b"hello\n"
    strict = open_host(shared_server, known_hosts=str(known))
    assert strict.run(["echo", "again"]).stdout == b"again\n"
    assert strict.fingerprint() == host.fingerprint()


def test_a_new_key_that_cannot_be_stored_is_not_accepted(shared_server: Any, open_host: OpenHost, tmp_path: Path) -> None:
    host = open_host(shared_server, known_hosts=str(tmp_path / "no" / "such" / "directory"), accept_new_host_key=True)
    with pytest.raises(HostKeyError, match="could not be stored"):
        host.run(["true"])


def test_a_hashed_known_hosts_file_is_understood(shared_server: Any, open_host: OpenHost, tmp_path: Path) -> None:
    hashed = tmp_path / "hashed"
    hashed.write_bytes(shared_server.known_hosts.read_bytes())
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(hashed)], check=True, capture_output=True)
    assert b"127.0.0.1" not in hashed.read_bytes()
    host = open_host(shared_server, known_hosts=str(hashed))
    assert host.fingerprint() == f"{shared_server.fingerprint()} (ED25519)"
