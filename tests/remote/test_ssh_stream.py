"""A command's output as a stream: all of it and well ended, or an error."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.core.units import MiB
from tokvm.remote.ssh import RemoteCommandError, RemoteStream, SshHost, quote

OpenHost = Callable[..., SshHost]


@contextlib.contextmanager
def opened(host: SshHost, command: str, **options: float) -> Iterator[RemoteStream]:
    stream = host.stream(command, **options)
    try:
        yield stream
    finally:
        stream.close()


def drain(stream: RemoteStream, *, least: int = 1 << 62) -> bytes:
    """Everything, or until at least so many bytes have come."""
    found = bytearray()
    buffer = bytearray(MiB)
    while len(found) < least and (count := stream.read_into(memoryview(buffer))):
        found += buffer[:count]
    return bytes(found)


def test_a_stream_is_what_the_command_wrote(host: SshHost, tmp_path: Path) -> None:
    content = os.urandom(5 * MiB + 17)
    (tmp_path / "a 'file'").write_bytes(content)
    with opened(host, quote(["cat", str(tmp_path / "a 'file'")])) as stream:
        assert drain(stream) == content
        stream.finish()
        assert stream.received == len(content)


def test_an_empty_stream_ends_well(host: SshHost) -> None:
    with opened(host, "true") as stream:
        assert stream.read_into(memoryview(bytearray(10))) == 0
        stream.finish()
        assert stream.received == 0


@pytest.mark.slow
def test_only_the_first_byte_may_take_longer(host: SshHost) -> None:
    with opened(host, "sleep 1.5; echo x; sleep 30", deadline_s=0.5, first_byte_s=20) as stream:
        assert drain(stream, least=2) == b"x\n"
        with pytest.raises(ConnectionLost, match=r"no byte came for 0\.5 s"):
            drain(stream)


def test_a_plausible_stream_from_a_failing_command_is_an_error(host: SshHost) -> None:
    with opened(host, "head -c 1000000 /dev/zero; echo 'SR_BACKEND_FAILURE' >&2; exit 1") as stream:
        assert len(drain(stream)) == 1000000
        with pytest.raises(RemoteCommandError, match="SR_BACKEND_FAILURE") as caught:
            stream.finish()
        assert caught.value.code == 1


def test_a_pipe_that_fails_inside_is_an_error(host: SshHost) -> None:
    with opened(host, "set -o pipefail; (head -c 1000 /dev/zero; exit 3) | tail -c +100") as stream:
        assert len(drain(stream)) == 901
        with pytest.raises(RemoteCommandError):
            stream.finish()


def test_a_stream_that_goes_on_where_it_should_end_is_an_error(host: SshHost) -> None:
    with opened(host, "echo more") as stream:
        stream.read_into(memoryview(bytearray(2)))
        with pytest.raises(SourceError, match="goes on behind byte 2"):
            stream.finish()


def test_a_killed_remote_reader_is_a_lost_connection(make_server: Callable[..., Any], open_host: OpenHost) -> None:
    server = make_server()
    with opened(open_host(server), "exec cat /dev/zero") as stream:
        drain(stream, least=MiB)
        for pid in server.processes("cat"):
            os.kill(pid, signal.SIGKILL)
        drain(stream)
        assert stream.received >= MiB
        with pytest.raises(ConnectionLost, match="after"):
            stream.finish()


def test_a_killed_session_is_a_lost_connection(make_server: Callable[..., Any], open_host: OpenHost) -> None:
    server = make_server()
    with opened(open_host(server), "exec cat /dev/zero") as stream:
        drain(stream, least=MiB)
        for pid in server.sessions():
            os.kill(pid, signal.SIGKILL)
        drain(stream)
        with pytest.raises(ConnectionLost):
            stream.finish()


@pytest.mark.slow
def test_a_stopped_remote_reader_is_a_lost_connection_though_sshd_answers(
    make_server: Callable[..., Any], open_host: OpenHost
) -> None:
    server = make_server()
    host = open_host(server, progress_deadline_s=0.7)
    with opened(host, "exec cat /dev/zero") as stream:
        drain(stream, least=MiB)
        (reader,) = server.processes("cat")
        os.kill(reader, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(ConnectionLost, match=r"no byte came for 0\.7 s"):
            drain(stream)
        assert time.monotonic() - began < 5
        assert host.run(["echo", "alive"]).stdout == b"alive\n"


@pytest.mark.slow
def test_a_black_hole_is_found_by_the_keepalive(make_server: Callable[..., Any], open_host: OpenHost) -> None:
    """The peer's kernel takes our packets, and nobody answers: the deadline is far off, ssh itself gives up."""
    server = make_server()
    host = open_host(server, keepalive_s=1, keepalive_count=1, progress_deadline_s=60.0)
    with opened(host, "echo begun; exec sleep 1000") as stream:
        assert stream.read_into(memoryview(bytearray(100))) == 6
        for pid in server.sessions():
            os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        drain(stream)
        with pytest.raises(ConnectionLost):
            stream.finish()
        assert time.monotonic() - began < 10


def test_a_command_that_closes_its_output_and_goes_on_is_given_up(host: SshHost) -> None:
    with opened(host, "exec sleep 1000 >&-", deadline_s=0.5) as stream, pytest.raises(ConnectionLost):
        stream.finish()


def test_closing_in_the_middle_ends_the_remote_command(
    make_server: Callable[..., Any], open_host: OpenHost, eventually: Callable[..., None]
) -> None:
    server = make_server()
    host = open_host(server)
    with opened(host, "exec cat /dev/zero") as stream:
        drain(stream, least=MiB)
        assert server.processes("cat")
    eventually(lambda: not server.processes("cat"))


@pytest.mark.slow
def test_data_has_its_own_connection(make_server: Callable[..., Any], open_host: OpenHost) -> None:
    server = make_server()
    host = open_host(server)
    host.run(["true"])
    with opened(host, "head -c 50000000 /dev/zero") as stream:
        drain(stream, least=MiB)
        assert host._control.pid is not None
        os.kill(host._control.pid, signal.SIGKILL)
        drain(stream)
        stream.finish()
        assert stream.received == 50_000_000
    assert (server.directory / "log").read_text().count("Accepted publickey") == 2


def test_a_hostile_stream_command_is_only_a_command(host: SshHost) -> None:
    with opened(host, quote(["-oProxyCommand=touch /tmp/pwned"])) as stream:
        drain(stream)
        with pytest.raises(RemoteCommandError):
            stream.finish()
    assert not Path("/tmp/pwned").exists()
