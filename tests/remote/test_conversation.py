"""A remote command that answers one request after another, over the control connection of a real sshd."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.errors import ConnectionLost, HostKeyError, UsageError
from tokvm.core.units import MiB
from tokvm.remote import conversation
from tokvm.remote.conversation import Conversation
from tokvm.remote.process import ProgramError
from tokvm.remote.recorded import RecordedHost
from tokvm.remote.recording import Recorder
from tokvm.remote.ssh import SshHost
from tokvm.testing.transcripts import read_transcript

ECHO = "while read -r line; do echo $$ got $line; done; echo bye >&2; exit 7"


class Line:
    """A whole answer is a line."""

    def __init__(self) -> None:
        self.text = b""

    def __call__(self, piece: bytes) -> bool:
        self.text += piece
        return self.text.endswith(b"\n")


def ask(talk: Conversation, data: bytes, timeout_s: float = 20.0) -> list[bytes]:
    reply = talk.request(data, Line(), timeout_s=timeout_s)
    assert reply.code is None
    return reply.stdout.split()


def test_one_process_answers_many_requests(host: SshHost) -> None:
    talk = host.converse(ECHO)
    answers = [ask(talk, b"%d\n" % number) for number in range(20)]
    assert [answer[1:] for answer in answers] == [[b"got", b"%d" % number] for number in range(20)]
    assert len({answer[0] for answer in answers}) == 1
    assert not talk.is_over
    talk.close()
    with pytest.raises(ConnectionLost, match="over"):
        ask(talk, b"x\n")


def test_a_command_that_ends_says_its_code_and_last_words(host: SshHost) -> None:
    talk = host.converse("read -r line; echo half; printf '%s' $line; echo oops >&2; exit 3")
    reply = talk.request(b"answer\n", lambda _: False, timeout_s=20)
    assert (reply.stdout, reply.stderr, reply.code) == (b"half\nanswer", b"oops\n", 3)
    assert talk.is_over
    talk.close()


def test_one_that_ended_between_two_requests_shows_at_the_next(host: SshHost, eventually: Callable[..., None]) -> None:
    talk = host.converse("read -r line; echo $line; exit 4")
    ask(talk, b"x\n")
    eventually(lambda: not (Path("/proc") / str(talk.pid) / "exe").exists())
    assert not talk.is_over
    reply = talk.request(b"y\n" * MiB, Line(), timeout_s=20)
    assert (reply.stdout, reply.code) == (b"", 4)
    talk.close()


def test_requests_and_answers_larger_than_any_pipe_pass_each_other(host: SshHost) -> None:
    """Neither side waits for the other to be done: `cat` answers while it is still being asked."""
    talk = host.converse("cat")
    data = os.urandom(6 * MiB)
    count = 0

    def whole(piece: bytes) -> bool:
        nonlocal count
        count += len(piece)
        return count == len(data)

    assert talk.request(data, whole, timeout_s=60).stdout == data
    talk.close()


@pytest.mark.slow
def test_what_comes_before_the_request_is_out_is_no_answer_to_it(host: SshHost) -> None:
    talk = host.converse("echo early; sleep 0.5; cat >/dev/null")
    with pytest.raises(ConnectionLost, match="did not answer"):
        talk.request(bytes(8 * MiB), lambda _: True, timeout_s=1.5)
    talk.close()


@pytest.mark.slow
def test_an_answer_that_does_not_come_ends_the_conversation(host: SshHost) -> None:
    talk = host.converse("read -r line; echo half; sleep 60")
    with pytest.raises(ConnectionLost, match=r"did not answer within 0\.5 s"):
        talk.request(b"x\n", lambda _: False, timeout_s=0.5)
    assert talk.is_over
    talk.close()
    assert host.run(["echo", "again"]).stdout == b"again\n"


def test_a_command_that_never_stops_talking_is_stopped(host: SshHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "STDOUT_LIMIT", MiB)
    talk = host.converse("cat /dev/zero")
    with pytest.raises(ProgramError, match="said more"):
        talk.request(b"x\n", lambda _: False, timeout_s=20)
    assert talk.is_over
    talk.close()


@pytest.mark.slow
def test_a_connection_that_breaks_in_between_is_a_lost_connection(
    make_server: Callable[..., Any], open_host: Callable[..., SshHost]
) -> None:
    server = make_server()
    host = open_host(server)
    talk = host.converse("read -r line; echo $line; sleep 60")
    ask(talk, b"x\n")

    def kill() -> None:
        for pid in server.sessions():
            os.kill(pid, signal.SIGKILL)

    killer = threading.Timer(0.3, kill)
    killer.start()
    with pytest.raises(ConnectionLost):
        talk.request(b"y\n", Line(), timeout_s=30)
    killer.join()
    talk.close()
    again = host.converse(ECHO)
    assert ask(again, b"x\n")[1:] == [b"got", b"x"]
    again.close()


def test_interrupted_in_between_it_is_over(host: SshHost) -> None:
    def interrupted(_: bytes) -> bool:
        raise KeyboardInterrupt

    talk = host.converse(ECHO)
    with pytest.raises(KeyboardInterrupt):
        talk.request(b"x\n", interrupted, timeout_s=20)
    assert talk.is_over
    talk.close()


def test_its_stderr_is_told_once(host: SshHost, eventually: Callable[..., None]) -> None:
    talk = host.converse("while read -r line; do echo $line >&2; sleep 0.1; echo done; done")
    said = [talk.request(b"%d\n" % number, Line(), timeout_s=20).stderr for number in range(3)]
    assert b"".join(said) == b"0\n1\n2\n"
    talk.close()


def test_at_our_end_it_sees_the_end_of_its_input(
    make_server: Callable[..., Any], open_host: Callable[..., SshHost], tmp_path: Path, eventually: Callable[..., None]
) -> None:
    host = open_host(make_server())
    talk = host.converse(f"while read -r line; do echo $line; done; touch '{tmp_path}/ended'")
    ask(talk, b"x\n")
    talk.close()
    eventually((tmp_path / "ended").exists)


def test_at_our_death_it_ends(make_server: Callable[..., Any], tmp_path: Path, eventually: Callable[..., None]) -> None:
    server = make_server()
    script = f"""
        import time
        from tokvm.remote.ssh import SshConfig, SshHost
        host = SshHost(SshConfig.parse({server.config().where.removeprefix("ssh://")!r}, identity={str(server.user_key)!r},
                                       known_hosts={str(server.known_hosts)!r}, config_file="/dev/null"))
        talk = host.converse("while read -r line; do echo $line; done; touch '{tmp_path}/ended'")
        talk.request(b"x\\n", lambda piece: True, timeout_s=20)
        print(talk.pid, flush=True)
        time.sleep(1000)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
    eventually((tmp_path / "ended").exists)
    eventually(lambda: not (Path("/proc") / str(pid) / "exe").exists())
    eventually(lambda: server.sessions() == [])


@pytest.mark.parametrize("line", ["", " ", "echo a\0b"])
def test_a_line_that_is_no_command_is_refused(host: SshHost, line: str) -> None:
    with pytest.raises(UsageError):
        host.converse(line)


@pytest.mark.slow
def test_each_request_is_recorded_with_its_answer(shared_server: Any, tmp_path: Path) -> None:
    recorder = Recorder.open(tmp_path / "transcripts", verb="check")
    host = RecordedHost(shared_server.config(), recorder)
    talk = host.converse("while read -r line; do [ $line = hang ] && sleep 60; echo $line; echo oops >&2; done")
    for data in (b"one\n", b"two password=canary\n"):
        ask(talk, data)
    with pytest.raises(ConnectionLost):
        talk.request(b"hang\n", Line(), timeout_s=0.5)
    talk.close()
    host.close()
    with pytest.raises(ConnectionLost):
        host.converse("true")
    recorder.close()
    found = read_transcript(recorder.path).exchanges
    assert {(one.kind, one.host) for one in found} == {("request", host.where)}
    assert [one.stdin for one in found] == ["one\n", "two password=REMOVED-password-1\n", "hang\n", None]
    assert [one.stdout for one in found] == ["one\n", "two password=REMOVED-password-1\n", "", ""]
    assert [one.code for one in found] == [None] * 4
    assert [one.error and one.error["class"] for one in found] == [None, None, "ConnectionLost", "ConnectionLost"]


def test_a_host_that_is_not_the_one_we_know_is_told_nothing(shared_server: Any, open_host: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(HostKeyError):
        open_host(shared_server, known_hosts=str(tmp_path / "empty")).converse("true")
