"""The seam to PowerShell: what goes to its standard input, and what is believed of its standard output."""

from __future__ import annotations

import base64
import json
import secrets
import threading
import time
from collections.abc import Callable
from typing import cast

import pytest

from tokvm.core.errors import ConnectionLost
from tokvm.remote.conversation import Conversation, Reply
from tokvm.remote.process import ProgramError
from tokvm.sources.hyperv import powershell, sessions
from tokvm.sources.hyperv.faults import Failure, Fault, HyperVError, fault_of
from tokvm.sources.hyperv.powershell import PowerShell, request, script_text

HOSTILE = [
    "it's",
    "‘curly’ “quotes”",
    "$(Remove-VM *)",
    "-oProxyCommand=x",
    "a\nb\r\nc",
    "[1]*?",
    "`n$env:X",
    '"&|%PATH%^',
    "Ünï",
    "@@E",
    "\0",
]


TAG = "9f86d081884c7d65"


@pytest.fixture(autouse=True)
def known_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _: TAG)


def framed(answer: object, width: int = 76, tag: object = TAG) -> bytes:
    """As the bootstrap writes it. tag: None leaves it out."""
    if isinstance(answer, dict) and tag is not None:
        answer = {"tag": tag, **answer}
    text = base64.b64encode(json.dumps(answer).encode())
    lines = b"\r\n".join(text[at : at + width] for at in range(0, len(text), width))
    return b"\r\n@@B\r\n" + lines + b"\r\n@@E\r\n"


def value(**found: object) -> bytes:
    return framed({"ok": True, "value": found})


class Talk:
    """A `remote.conversation.Conversation`, and the powershell.exe at its other end."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.is_over = False
        self.is_closed = False

    def request(self, data: bytes, is_whole: Callable[[bytes], bool], *, timeout_s: float) -> Reply:
        assert timeout_s > 0
        assert not self.is_over
        name = script_named(data)
        self.host.asked.append((self.host.started.index(self), name, data))
        answer = value() if name == "ping" and not self.host.pings_too else self.host.answers.pop(0)
        self.is_over = True
        if isinstance(answer, Exception):
            raise answer
        said = answer(data) if callable(answer) else answer
        pieces = [said[at : at + 7] for at in range(0, len(said), 7)]
        self.is_over = not any(is_whole(piece) for piece in pieces)
        return Reply(said, self.host.stderr, self.host.code if self.is_over else None)

    def close(self) -> None:
        self.is_over = self.is_closed = True


class Host:
    """`asked`: which of the `started` powershell.exe, which script, and all that was sent."""

    where = "ssh://Administrator@hv1"

    def __init__(
        self,
        *answers: bytes | Exception | Callable[[bytes], bytes],
        stderr: bytes = b"",
        code: int = 0,
        pings_too: bool = False,
    ) -> None:
        self.answers = list(answers)
        self.stderr = stderr
        self.code = code
        self.pings_too = pings_too
        self.asked: list[tuple[int, str, bytes]] = []
        self.started: list[Talk] = []

    def converse(self, command: str) -> Conversation:
        assert command == powershell.COMMAND
        self.started.append(Talk(self))
        return cast("Conversation", self.started[-1])

    @property
    def log(self) -> list[tuple[int, str]]:
        return [(session, name) for session, name, _ in self.asked]


def script_named(data: bytes) -> str:
    text = base64.b64decode(data.split(b"\n")[1]).decode()
    return next(name for name in ("ping", "list", "record", "start") if script_text(name) == text)


def ask(*answers: bytes | Exception, stderr: bytes = b"", code: int = 0) -> object:
    return PowerShell(Host(*answers, stderr=stderr, code=code)).ask("list", {})


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_go_there_and_back_unharmed(text: str) -> None:
    def echo(sent: bytes) -> bytes:
        tag, script, data, whole, end = sent.split(b"\n")
        assert tag == TAG.encode()
        assert base64.b64decode(script).decode() == script_text("record")
        assert (whole, end) == (b"@@X", b"")
        return framed({"ok": True, "value": json.loads(base64.b64decode(data))})

    host = Host(echo)
    assert PowerShell(host).act("record", {"vm": text}) == {"vm": text}
    assert host.log == [(0, "ping"), (0, "record")]
    assert host.asked[1][2].isascii()
    assert host.asked[1][2].count(b"\n") == 4


@pytest.mark.parametrize("width", [1, 76, 120, 10_000])
def test_banners_code_pages_and_wrapping_do_not_matter(width: int) -> None:
    noise = "Grüße von Müller\r\n@@B ist nichts\r\n".encode("cp850")
    answer = noise + framed({"ok": True, "value": {"name": "Ünïcode ‘x’"}}, width) + b"tsch\x81ss\r\n"
    assert ask(answer, stderr=b"#< CLIXML\r\n<Objs \xff>") == {"name": "Ünïcode ‘x’"}


def test_an_answer_to_another_request_is_none() -> None:
    """What a profile prints that an earlier run left, or an answer that comes too late."""
    other = framed({"ok": True, "value": {"n": 1}}, tag="0" * 16)
    assert ask(other + value(n=2)) == {"n": 2}
    with pytest.raises(HyperVError, match="did not run"):
        ask(other)


@pytest.mark.parametrize(
    "stdout",
    [
        b"@@B\r\n!!!!\r\n@@E\r\n",
        b"@@B\r\nYQ\r\n@@E\r\n",
        framed([1]),
        framed({"ok": True}),
        framed({"ok": True, "value": {}}, tag=None),
        framed({"ok": True, "value": {}}, tag=1),
        framed({"ok": True, "value": [1]}),
        framed({"ok": 1, "value": {}}),
        framed({"ok": False}),
        framed({"ok": False, "type": "x", "message": "y", "hresult": True, "id": "z"}),
        framed({"ok": False, "type": 1, "message": "y", "hresult": 1, "id": "z"}),
        b"@@B\r\n" + base64.b64encode(b"\xff\xfe") + b"\r\n@@E\r\n",
        b"@@B\r\n" + base64.b64encode(b"[" * 100_000) + b"\r\n@@E\r\n",
    ],
)
def test_an_answer_that_makes_no_sense_is_refused(stdout: bytes) -> None:
    with pytest.raises(HyperVError, match="does not understand"):
        ask(stdout)


def test_an_answer_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(powershell, "MOST_ANSWER", 100)
    with pytest.raises(HyperVError, match="at most 100"):
        ask(framed({"ok": True, "value": {"x": "y" * 200}}))


@pytest.mark.parametrize(
    "stdout",
    [b"", b"@@B\r\neyJ9\r\n", b"'powershell.exe' is not recognized as an internal or external command\r\n", b"@@E\r\n"],
)
def test_no_answer_at_all_says_what_to_try(stdout: bytes) -> None:
    with pytest.raises(HyperVError, match="exit code 1") as caught:
        ask(stdout, code=1)
    assert "Get-VM" in caught.value.fix


LOST = ConnectionLost("gone")


def test_a_question_is_asked_once_more_and_an_order_never() -> None:
    host = Host(LOST, value())
    assert PowerShell(host).ask("list", {}) == {}
    assert host.log == [(0, "list"), (1, "list")]
    host = Host(LOST, value())
    with pytest.raises(ConnectionLost):
        PowerShell(host).act("start", {})
    assert host.log == [(0, "ping"), (0, "start")]


def test_questions_share_a_powershell_and_an_order_needs_one_that_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(*[value()] * 5)
    shell = PowerShell(host)
    shell.ask("list", {})
    shell.act("start", {})  # right after an answer
    monkeypatch.setattr(sessions, "PROVED_S", 0.0)
    shell.ask("list", {})
    shell.act("start", {})
    assert host.log == [(0, "list"), (0, "start"), (0, "list"), (0, "ping"), (0, "start")]


@pytest.mark.parametrize("gone", [LOST, b"", HyperVError("confused")])
def test_an_order_is_given_to_a_new_powershell_when_the_old_one_is_gone(
    gone: bytes | Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "PROVED_S", 0.0)
    host = Host(value(), gone, value(), value(n=1), pings_too=True)
    shell = PowerShell(host)
    shell.ask("list", {})
    assert shell.act("start", {}) == {"n": 1}
    assert host.log == [(0, "list"), (0, "ping"), (1, "ping"), (1, "start")]
    assert host.started[0].is_closed


def test_an_order_is_not_given_when_nobody_is_there_to_take_it() -> None:
    host = Host(b"'powershell.exe' is not recognized", code=1, pings_too=True)
    with pytest.raises(HyperVError, match=r"did not run ping.*is not recognized"):
        PowerShell(host).act("start", {})
    assert host.log == [(0, "ping")]


def test_a_powershell_that_ends_over_an_order_may_have_carried_it_out() -> None:
    host = Host(b"", code=1)
    with pytest.raises(ConnectionLost, match=r"exit code 1.*did not run start"):
        PowerShell(host).act("start", {})
    assert host.log == [(0, "ping"), (0, "start")]


def test_a_powershell_that_has_ended_meanwhile_is_replaced_for_a_question() -> None:
    host = Host(value(), b"", value(n=1))
    shell = PowerShell(host)
    shell.ask("list", {})
    assert shell.ask("list", {}) == {"n": 1}
    assert host.log == [(0, "list"), (0, "list"), (1, "list")]


def test_a_failure_of_a_script_is_no_failure_of_its_powershell() -> None:
    host = Host(framed({"ok": False, "type": "x", "message": "", "hresult": 1, "id": "y"}), value())
    shell = PowerShell(host)
    with pytest.raises(HyperVError):
        shell.ask("list", {})
    shell.ask("list", {})
    assert host.log == [(0, "list"), (0, "list")]


def test_a_powershell_that_makes_no_sense_is_not_asked_again() -> None:
    host = Host(framed([1]), value())
    shell = PowerShell(host)
    with pytest.raises(HyperVError):
        shell.ask("list", {})
    shell.ask("list", {})
    assert host.log == [(0, "list"), (1, "list")]


class Crowd:
    """Questions asked at the same time, each answered only when `go` says so."""

    def __init__(self, count: int) -> None:
        self.go, self.inside = threading.Event(), threading.Semaphore(0)
        self.host = Host(*[self._answer] * count)
        self.shell = PowerShell(self.host)
        self.threads = [threading.Thread(target=self.shell.ask, args=("list", {})) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def _answer(self, _: bytes) -> bytes:
        self.inside.release()
        assert self.go.wait(10)
        return value()

    @property
    def ended(self) -> int:
        return sum(talk.is_closed for talk in self.host.started)

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self.inside.acquire(timeout=10)

    def finish(self) -> None:
        self.go.set()
        for thread in self.threads:
            thread.join()


def test_at_most_four_powershells_are_there_however_many_ask() -> None:
    crowd = Crowd(9)
    crowd.wait_for(sessions.MOST)
    with pytest.raises(ConnectionLost, match="under way"):
        crowd.shell.ask("list", {}, timeout_s=0.05)
    assert len(crowd.host.started) == sessions.MOST
    crowd.finish()
    assert len(crowd.host.asked) == 9
    assert len(crowd.host.started) == sessions.MOST


def test_the_idle_are_ended_and_the_next_question_starts_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "IDLE_S", 0.1)
    host = Host(value(), value())
    shell = PowerShell(host)
    shell.ask("list", {})
    deadline = time.monotonic() + 10
    while not host.started[0].is_closed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    shell.ask("list", {})
    assert host.log == [(0, "list"), (1, "list")]
    shell.close()


def test_close_ends_the_idle_at_once_and_the_others_when_they_come_back() -> None:
    crowd = Crowd(1)
    crowd.wait_for(1)
    crowd.shell.close()
    assert crowd.ended == 0
    crowd.finish()
    assert crowd.ended == 1
    with pytest.raises(ConnectionLost, match="closed"):
        crowd.shell.ask("list", {})
    host = Host(value())
    shell = PowerShell(host)
    shell.ask("list", {})
    shell.close()
    assert host.started[0].is_closed


def test_too_much_output_is_the_hosts_fault() -> None:
    with pytest.raises(HyperVError, match="said more"):
        ask(ProgramError("said more than 16777216 bytes and was killed"))


def test_a_failure_is_told_in_our_words_with_the_hosts_own_and_its_code() -> None:
    failed = {
        "ok": False,
        "type": "System.IO.IOException",
        "message": "Der Prozess\nkann nicht",
        "hresult": -2147024864,
        "id": "x",
    }
    with pytest.raises(HyperVError, match=r"Der Prozess kann nicht; 0x80070020") as caught:
        ask(framed(failed))
    assert caught.value.fault is Fault.IN_USE


VIRTUALIZATION = "Microsoft.HyperV.PowerShell.VirtualizationException"
COMMANDS = "Microsoft.HyperV.PowerShell.Commands"


@pytest.mark.parametrize(
    ("failed", "fault"),
    [
        (Failure(VIRTUALIZATION, "", -2146233088, f"InvalidParameter,{COMMANDS}.GetVM"), Fault.NO_SUCH_VM),
        (Failure(VIRTUALIZATION, "", -2146233088, f"InvalidParameter,{COMMANDS}.SetVM"), Fault.UNKNOWN),
        (Failure(VIRTUALIZATION, "", -2146233088, f"ObjectNotFound,{COMMANDS}.GetVM"), Fault.NO_SUCH_VM),
        (Failure(VIRTUALIZATION, "", -2146233088, f"InvalidState,{COMMANDS}.CheckpointVM"), Fault.BAD_STATE),
        (Failure(VIRTUALIZATION, "", -2147024864, f"OperationFailed,{COMMANDS}.CheckpointVM"), Fault.IN_USE),
        (Failure(VIRTUALIZATION, "", -2146233088, f"AccessDenied,{COMMANDS}.GetVM"), Fault.ACCESS_DENIED),
        (Failure("System.UnauthorizedAccessException", "", -2147024891, "x"), Fault.ACCESS_DENIED),
        (Failure("System.Management.Automation.CommandNotFoundException", "", 1, "CommandNotFoundException"), Fault.NO_MODULE),
        (Failure("System.IO.FileNotFoundException", "", -2147024894, "x"), Fault.NO_SUCH_FILE),
        (Failure("System.Exception", "0x80070020 sharing violation, ObjectNotFound", 0, "x"), Fault.UNKNOWN),
        (Failure("System.Management.Automation.RuntimeException", "", -2146233087, "TokvmBusy"), Fault.TIMEOUT),
    ],
)
def test_faults_are_told_by_code_id_and_type_never_by_text(failed: Failure, fault: Fault) -> None:
    assert fault_of(failed) is fault


def test_a_request_is_ascii_lines_with_an_end() -> None:
    lines = [TAG.encode(), b"YQ==", base64.b64encode(b'{"n": "\\u00fc"}'), b"@@X", b""]
    assert request("a", {"n": "ü"}, TAG).split(b"\n") == lines
