"""Claiming, stopping, the two witnesses, the fence, and starting again: decisions, and what is left in the Notes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
from tests.sources.hyperv_double import IN_USE, LOST, VM, FakeShell, connect, failure

from tokvm.core.errors import ConnectionLost, NotOff, SourceError, UsageError
from tokvm.core.machine import PowerState
from tokvm.sources.hyperv import power
from tokvm.sources.hyperv.powershell import Value
from tokvm.sources.hyperv.record import Fence, Record, Settings
from tokvm.sources.hyperv.source import HyperVSource


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> FakeShell:
    for name, value in (("POLL_S", 0.01), ("FORCED_S", 0.2), ("START_S", 0.2), ("LANDING_S", 0.2), ("WATCH_S", 0.05)):
        monkeypatch.setattr(power, name, value)
    return FakeShell()


@pytest.fixture
def source(shell: FakeShell) -> HyperVSource:
    return connect(shell)


def line(shell: FakeShell) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(shell.vm.line or "{}"))


def then(shell: FakeShell, script: str, error: Exception) -> Callable[[Value], Value]:
    """The script does what it does, but the answer is lost."""

    def work(data: Value) -> Value:
        getattr(shell.vm, script)(data)
        raise error

    return work


def automatic_start(shell: FakeShell) -> object:
    return shell.vm.switches["autoStart"]


def test_the_record_is_one_line_of_ascii_whatever_is_in_it() -> None:
    fence = Fence("a\nb 'x’ $(id)", "Start", 2000, 1)
    made = Record("Ünï\r\n#tokvm x", Settings("Standard", None), fence, 1_790_000_000)
    written = made.to_line()
    assert written is not None
    assert written.isascii()
    assert written.isprintable()
    assert Record.from_line(written) == made
    assert Record().to_line() is None
    assert Record.from_line(None) == Record()


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "x",
            "[]",
            "{}",
            '{"v":2}',
            '{"v":1,"more":1}',
            '{"v":1,"owner":1}',
            '{"v":1,"asked":"1"}',
            '{"v":1,"asked":true}',
        ),
        *('{"v":1,"fence":{}}', '{"v":1,"fence":[]}', '{"v":1,"settings":{"checkpoint_type":1,"automatic_checkpoints":null}}'),
        '{"v":1,"fence":{"auto_start":1,"priority":null,"reason":"x","restart_action":null}}',
        "[" * 100_000,
    ],
)
def test_a_line_that_somebody_else_wrote_is_refused_with_what_to_do(shell: FakeShell, source: HyperVSource, text: str) -> None:
    shell.vm.line = text
    with pytest.raises(SourceError, match="Notes") as caught:
        source.claim(VM, "me")
    assert "by hand" in caught.value.fix
    assert shell.vm.line == text


def test_the_first_claim_wins_and_the_race_is_decided_on_the_host(shell: FakeShell, source: HyperVSource) -> None:
    def another_was_first(data: Value) -> Value:
        shell.vm.line = '{"owner":"two","v":1}'
        return shell.vm.record(data)

    shell.script["record"] = [another_was_first]
    assert source.claim(VM, "one") == "two"
    source.release(VM, "one")
    assert line(shell)["owner"] == "two"
    source.release(VM, "two")
    assert shell.vm.line is None


def test_a_claim_is_read_back(shell: FakeShell, source: HyperVSource) -> None:
    shell.script["record"] = [{"swapped": True, "record": None, "now": 1}]
    with pytest.raises(SourceError, match="could not be saved"):
        source.claim(VM, "one")


@pytest.mark.parametrize("owner", ["", " x", "a\0b"])
def test_an_owner_that_is_no_name(source: HyperVSource, owner: str) -> None:
    with pytest.raises(UsageError):
        source.claim(VM, owner)


def test_off_already_is_success(shell: FakeShell, source: HyperVSource) -> None:
    shell.vm.state = 3
    source.shut_down(VM, deadline_s=1, force=True)
    assert [script for script, _ in shell.log] == ["power"]


def test_the_guest_is_asked_once_and_when_is_written_down_before(shell: FakeShell, source: HyperVSource) -> None:
    source.shut_down(VM, deadline_s=1, force=False)
    assert [script for script, _ in shell.log] == ["power", "record", "shutdown", "power"]
    assert line(shell)["asked"] == shell.vm.now
    assert source.off_evidence(VM).proved
    assert not source.stop_pending(VM)


@pytest.mark.parametrize("state", [9, 6])
def test_a_paused_or_saved_vm_is_not_off(shell: FakeShell, source: HyperVSource, state: int) -> None:
    shell.vm.state = state
    with pytest.raises(NotOff, match="memory"):
        source.shut_down(VM, deadline_s=1, force=True)
    assert shell.sent("turn-off") == []


@pytest.mark.slow
def test_a_guest_that_ignores_us_loses_its_power_only_when_forced(shell: FakeShell, source: HyperVSource) -> None:
    shell.vm.obeys = False
    with pytest.raises(NotOff, match=r"within 0\.2 s"):
        source.shut_down(VM, deadline_s=0.2, force=False)
    assert shell.vm.state == 2
    assert [data["ask"] for data in shell.sent("shutdown")].count(True) == 1
    source.shut_down(VM, deadline_s=0.1, force=True)
    assert shell.vm.state == 3


def test_a_guest_without_the_service_is_not_waited_for(shell: FakeShell, source: HyperVSource) -> None:
    shell.script["shutdown"] = [{"answer": -1, "state": 2}] * 2
    with pytest.raises(NotOff, match="integration services"):
        source.shut_down(VM, deadline_s=600, force=False)
    source.shut_down(VM, deadline_s=600, force=True)
    assert shell.vm.state == 3


def test_a_guest_that_cannot_be_asked_yet_is_asked_again(shell: FakeShell, source: HyperVSource) -> None:
    shell.script["shutdown"] = [{"answer": 32775, "state": 2}, LOST, failure("InvalidState,x")]
    source.shut_down(VM, deadline_s=10, force=False)
    assert [data["ask"] for data in shell.sent("shutdown")] == [True] * 4
    assert shell.vm.state == 3


SILENT: Value = {"answer": 32768, "state": 2}


def test_a_guest_that_does_not_answer_yet_is_asked_until_the_deadline_and_that_is_said(
    shell: FakeShell, source: HyperVSource, caplog: pytest.LogCaptureFixture
) -> None:
    shell.script["shutdown"] = [dict(SILENT) for _ in range(1000)]
    with pytest.raises(NotOff, match=r"does not answer \(32768\): it is still booting"):
        source.shut_down(VM, deadline_s=0.2, force=False)
    assert len(shell.sent("shutdown")) > 2
    assert all(data["ask"] for data in shell.sent("shutdown"))
    (told,) = [one.getMessage() for one in caplog.records if "cannot be shut down yet" in one.getMessage()]
    assert "still booting" in told
    shell.script["shutdown"] = [dict(SILENT), {"answer": 32780, "state": 2}, {"answer": 32782, "state": 2}]
    shell.script["shutdown"].append(lambda _: {"answer": None, **shell.vm.turn_off({})})
    source.shut_down(VM, deadline_s=60, force=False)
    assert [data["ask"] for data in shell.sent("shutdown")][-4:] == [True, True, True, False]


def test_force_does_not_cut_the_power_of_a_silent_guest_before_its_time(shell: FakeShell, source: HyperVSource) -> None:
    """It may be in the middle of installing updates."""
    shell.script["shutdown"] = [dict(SILENT) for _ in range(1000)]
    begun = time.monotonic()
    source.shut_down(VM, deadline_s=0.3, force=True)
    assert time.monotonic() - begun >= 0.3
    assert [script for script, _ in shell.log][-2:] == ["turn-off", "power"]


def test_who_comes_after_us_counts_from_when_the_guest_was_last_asked(
    shell: FakeShell, source: HyperVSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(power, "NOTED_S", 0.0)
    shell.vm.obeys = False

    def later(_: Value) -> Value:
        shell.vm.now += 100
        return dict(SILENT)

    shell.script["shutdown"] = [later, later, later, later]
    with pytest.raises(NotOff):
        source.shut_down(VM, deadline_s=0.3, force=False)
    assert line(shell)["asked"] == shell.vm.now
    assert source.stop_pending(VM)


def test_a_refusal_that_will_not_change_is_told(shell: FakeShell, source: HyperVSource) -> None:
    shell.script["shutdown"] = [failure("AccessDenied,x")]
    with pytest.raises(NotOff, match="may not"):
        source.shut_down(VM, deadline_s=600, force=False)


def test_a_stop_may_land_for_as_long_as_windows_lets_programs_close(shell: FakeShell, source: HyperVSource) -> None:
    assert not source.stop_pending(VM)
    shell.vm.line = Record(asked=shell.vm.now - 299).to_line()
    assert source.stop_pending(VM)
    shell.vm.uptime = 298  # it booted since
    assert not source.stop_pending(VM)
    shell.vm.uptime, shell.vm.now = 86400, shell.vm.now + 1
    assert not source.stop_pending(VM)
    for state in (4, 32781):
        shell.vm.state = state
        assert source.stop_pending(VM)


@pytest.mark.parametrize(
    ("state", "operational", "held", "released"),
    [
        (3, [2], False, True),
        (3, [2], True, False),
        (3, [2, 32772], False, False),
        (3, [2, 32770], False, False),
        (2, [2], False, False),
        (32786, [2], False, False),
    ],
)
def test_two_witnesses(
    shell: FakeShell, source: HyperVSource, state: int, operational: list[int], held: bool, released: bool
) -> None:
    shell.vm.state, shell.vm.operational = state, operational
    shell.vm.held = [shell.vm.chain[-1]] if held else []
    found = source.off_evidence(VM)
    assert (found.released, found.proved) == (released, state == 3 and released)
    assert ("0x80070020" in found.detail) is (held or state != 3)


def test_start_is_idempotent_and_bridges_a_lost_answer(shell: FakeShell, source: HyperVSource) -> None:
    source.start(VM)
    assert shell.sent("start") == []
    shell.vm.state = 3
    shell.script["start"] = [then(shell, "start", LOST)]
    source.start(VM)
    shell.vm.state = 3
    shell.script["start"] = [LOST]
    with pytest.raises(ConnectionLost):
        source.start(VM)
    shell.vm.state = 6
    with pytest.raises(SourceError, match="resume"):
        source.start(VM)


def test_a_fence_says_first_what_it_changes_and_puts_it_back(shell: FakeShell, source: HyperVSource) -> None:
    shell.vm.cluster = {"group": "web", "owner": "HV1", "priority": 2000, "restartAction": 2}
    source.claim(VM, "me")
    source.fence(VM, "tokvm: 'x’ $(id)\n")
    scripts = [script for script, _ in shell.log]
    assert scripts.index("settings") > scripts.index("record")
    assert automatic_start(shell) == "Nothing"
    assert (shell.vm.cluster["priority"], shell.vm.cluster["restartAction"]) == (0, 0)
    assert connect(shell).is_fenced(VM)
    source.fence(VM, "again")
    assert line(shell)["fence"]["auto_start"] == "StartIfRunning"
    shell.vm.state = 3
    with pytest.raises(SourceError, match="blocked"):
        source.start(VM)
    source.unfence(VM)
    source.unfence(VM)
    assert not source.is_fenced(VM)
    assert automatic_start(shell) == "StartIfRunning"
    assert (shell.vm.cluster["priority"], shell.vm.cluster["restartAction"]) == (2000, 2)
    assert line(shell) == {"owner": "me", "v": 1}
    source.start(VM)
    assert source.power(VM) is PowerState.RUNNING


@pytest.mark.parametrize("script", ["record", "settings"])
def test_a_fence_is_whole_after_any_crash(shell: FakeShell, source: HyperVSource, script: str) -> None:
    before = dict(shell.vm.switches)
    shell.script[script] = [then(shell, script, LOST)]
    with pytest.raises(ConnectionLost):
        source.fence(VM, "x")
    source.fence(VM, "x")
    assert source.is_fenced(VM)
    shell.script[script] = [then(shell, script, LOST)]
    with pytest.raises(ConnectionLost):
        source.unfence(VM)
    source.unfence(VM)
    assert shell.vm.switches == before
    assert shell.vm.line is None


def test_a_fence_that_does_not_hold_is_an_error(shell: FakeShell, source: HyperVSource) -> None:
    shell.script["settings"] = [shell.vm.settings({})]
    with pytest.raises(SourceError, match="could not be fenced"):
        source.fence(VM, "x")
    assert not source.is_fenced(VM)
    source.fence(VM, "x")
    shell.vm.switches["autoStart"] = "Start"  # by a person
    assert not source.is_fenced(VM)


def test_a_vm_that_nothing_starts_is_fenced_by_the_record_alone(shell: FakeShell, source: HyperVSource) -> None:
    shell.vm.switches["autoStart"] = "Nothing"
    assert not source.is_fenced(VM)
    source.fence(VM, "x")
    assert source.is_fenced(VM)
    assert shell.sent("settings") == []
    source.unfence(VM)
    assert shell.vm.switches["autoStart"] == "Nothing"


def test_a_fence_without_a_reason_is_none(source: HyperVSource) -> None:
    with pytest.raises(UsageError):
        source.fence(VM, "")


def test_a_refused_start_passes_through(shell: FakeShell, source: HyperVSource) -> None:
    shell.vm.state = 3
    shell.script["start"] = [IN_USE]
    with pytest.raises(SourceError, match="held open"):
        source.start(VM)
