"""The seam to PowerShell: what goes to its standard input, and what is believed of its standard output."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

import pytest

from tokvm.core.errors import ConnectionLost
from tokvm.remote.process import Completed, ProgramError
from tokvm.sources.hyperv import powershell
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


def framed(answer: object, width: int = 76) -> bytes:
    text = base64.b64encode(json.dumps(answer).encode())
    lines = b"\r\n".join(text[at : at + width] for at in range(0, len(text), width))
    return b"\r\n@@B\r\n" + lines + b"\r\n@@E\r\n"


class Host:
    where = "ssh://Administrator@hv1"

    def __init__(self, *answers: bytes | Exception | Callable[[bytes], bytes], stderr: bytes = b"", code: int = 0) -> None:
        self.answers = list(answers)
        self.stderr = stderr
        self.code = code
        self.asked: list[bytes] = []

    def run_line(
        self,
        command: str,
        *,
        timeout_s: float = 60.0,
        check: bool = True,
        input: bytes | None = None,  # noqa: A002
    ) -> Completed:
        assert command == powershell.COMMAND
        assert not check
        assert timeout_s > 0
        assert input is not None
        self.asked.append(input)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return Completed(self.code, answer(input) if callable(answer) else answer, self.stderr)


def ask(*answers: bytes | Exception, stderr: bytes = b"", code: int = 0) -> object:
    return PowerShell(Host(*answers, stderr=stderr, code=code)).ask("list", {})


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_go_there_and_back_unharmed(text: str) -> None:
    def echo(sent: bytes) -> bytes:
        script, data, whole, end = sent.split(b"\n")
        assert base64.b64decode(script).decode() == script_text("record")
        assert (whole, end) == (b"@@X", b"")
        return framed({"ok": True, "value": json.loads(base64.b64decode(data))})

    host = Host(echo)
    assert PowerShell(host).act("record", {"vm": text}) == {"vm": text}
    assert host.asked[0].isascii()
    assert host.asked[0].count(b"\n") == 3


@pytest.mark.parametrize("width", [1, 76, 120, 10_000])
def test_banners_code_pages_and_wrapping_do_not_matter(width: int) -> None:
    noise = "Grüße von Müller\r\n@@B ist nichts\r\n".encode("cp850")
    answer = noise + framed({"ok": True, "value": {"name": "Ünïcode ‘x’"}}, width) + b"tsch\x81ss\r\n"
    assert ask(answer, stderr=b"#< CLIXML\r\n<Objs \xff>") == {"name": "Ünïcode ‘x’"}


def test_of_two_answers_the_last_counts() -> None:
    """A profile may print what an earlier run left."""
    assert ask(framed({"ok": True, "value": {"n": 1}}) + framed({"ok": True, "value": {"n": 2}})) == {"n": 2}


@pytest.mark.parametrize(
    "stdout",
    [
        b"@@B\r\n!!!!\r\n@@E\r\n",
        b"@@B\r\nYQ\r\n@@E\r\n",
        framed([1]),
        framed({"ok": True}),
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


def test_a_question_is_asked_once_more_and_an_order_never() -> None:
    lost = ConnectionLost("gone")
    host = Host(lost, framed({"ok": True, "value": {}}))
    assert PowerShell(host).ask("list", {}) == {}
    host = Host(lost, framed({"ok": True, "value": {}}))
    with pytest.raises(ConnectionLost):
        PowerShell(host).act("start", {})
    assert len(host.asked) == 1


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
    assert request("a", {"n": "ü"}).split(b"\n") == [b"YQ==", base64.b64encode(b'{"n": "\\u00fc"}'), b"@@X", b""]
