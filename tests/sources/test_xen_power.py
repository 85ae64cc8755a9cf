"""Stopping, the two witnesses, the fence, and starting again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from tests.sources.conftest import LOST, VM, ScriptedHost, Words, refusal

from tokvm.core.errors import ConnectionLost, NotOff, SourceError, UsageError
from tokvm.core.machine import PowerState
from tokvm.sources.xenserver.source import XenServerSource

CLEAN = ("vm-shutdown", f"uuid={VM}")
FORCED = ("vm-shutdown", f"uuid={VM}", "force=true")
START = ("vm-start", f"uuid={VM}")
VBDS = ("vbd-list", f"vm-uuid={VM}", "type=Disk")
BAD_STATE = "You attempted an operation on a VM that was not in an appropriate power state at the time"


def turning(host: ScriptedHost, state: str, then: Exception | None = None) -> Callable[[Words], str]:
    def work(_: Words) -> str:
        host.set_vm(power_state=state, dom_id="-1" if state == "halted" else "9")
        if then is not None:
            raise then
        return ""

    return work


def test_off_already_is_success(host: ScriptedHost, source: XenServerSource) -> None:
    host.set_vm(power_state="halted")
    source.shut_down(VM, deadline_s=1, force=False)
    assert host.sent("vm-shutdown") == []


def test_a_guest_that_stops(host: ScriptedHost, source: XenServerSource) -> None:
    host.script[CLEAN] = [turning(host, "halted")]
    source.shut_down(VM, deadline_s=5, force=False)
    assert host.sent("vm-shutdown") == [CLEAN]


def test_a_lost_answer_is_looked_after(host: ScriptedHost, source: XenServerSource) -> None:
    host.script[CLEAN] = [turning(host, "halted", LOST)]
    source.shut_down(VM, deadline_s=5, force=False)
    assert host.sent("vm-shutdown") == [CLEAN]


def test_a_request_that_was_lost_is_sent_again_while_time_is_left(host: ScriptedHost, source: XenServerSource) -> None:
    host.script[CLEAN] = [LOST, turning(host, "halted")]
    source.shut_down(VM, deadline_s=5, force=False)
    assert host.sent("vm-shutdown") == [CLEAN, CLEAN]


def test_it_is_not_asked_twice_while_the_host_has_the_first_in_hand(host: ScriptedHost, source: XenServerSource) -> None:
    host.set_vm(current_operations="OpaqueRef:1: clean_shutdown")
    host.script[CLEAN] = [LOST]
    with pytest.raises(NotOff):
        source.shut_down(VM, deadline_s=0.1, force=False)
    assert host.sent("vm-shutdown") == [CLEAN]
    assert source.stop_pending(VM)


def test_a_guest_that_goes_down_by_itself_meanwhile_is_off(host: ScriptedHost, source: XenServerSource) -> None:
    host.script[CLEAN] = [turning(host, "halted", refusal(BAD_STATE))]
    source.shut_down(VM, deadline_s=5, force=False)
    assert source.power(VM) is PowerState.OFF


def test_a_guest_that_does_not_stop_keeps_its_power_unless_forced(host: ScriptedHost, source: XenServerSource) -> None:
    host.script[CLEAN] = [refusal("VM didn't acknowledge the need to shutdown.")]
    with pytest.raises(NotOff, match="did not shut down") as caught:
        source.shut_down(VM, deadline_s=5, force=False)
    assert "--force-off" in caught.value.fix
    assert FORCED not in host.log


def test_force_cuts_the_power_at_the_deadline(host: ScriptedHost, source: XenServerSource) -> None:
    def slow(_: Words) -> str:
        time.sleep(0.15)
        raise LOST

    host.script[CLEAN] = [slow]
    host.script[FORCED] = [turning(host, "halted")]
    source.shut_down(VM, deadline_s=0.1, force=True)
    assert host.sent("vm-shutdown") == [CLEAN, FORCED]


@pytest.mark.parametrize("answer", [LOST, refusal("Error code: INTERNAL_ERROR"), ""])
@pytest.mark.slow
def test_a_cut_that_does_not_take_is_not_called_off(
    host: ScriptedHost, source: XenServerSource, answer: Exception | str
) -> None:
    host.script[CLEAN] = [refusal("VM didn't acknowledge the need to shutdown.")]
    host.script[FORCED] = [answer]
    with pytest.raises(NotOff):
        source.shut_down(VM, deadline_s=5, force=True)


@pytest.mark.parametrize("state", ["paused", "suspended"])
def test_a_frozen_vm_is_not_off(host: ScriptedHost, source: XenServerSource, state: str) -> None:
    host.set_vm(power_state=state)
    with pytest.raises(NotOff, match=state):
        source.shut_down(VM, deadline_s=1, force=True)
    assert host.sent("vm-shutdown") == []


@pytest.mark.parametrize(
    ("power", "domain", "attached", "proved"),
    [
        ("halted", "-1", ["false", "false"], True),
        ("halted", "-1", ["false", "true"], False),
        ("halted", "7", ["false"], False),
        ("halted", "", ["false"], False),
        ("running", "7", ["true"], False),
        ("running", "-1", ["false"], False),
        ("halted", "-1", [], False),
        ("halted", "-1", ["maybe"], False),
        ("halted", "-1", ["False"], False),
        ("HALTED", "-1", ["false"], False),
        ("", "-1", ["false"], False),
        ("suspended", "-1", ["false"], False),
        ("paused", "3", ["true"], False),
    ],
)
def test_two_witnesses(
    host: ScriptedHost, source: XenServerSource, power: str, domain: str, attached: list[str], proved: bool
) -> None:
    host.set_vm(power_state=power, dom_id=domain)
    host.tables[VBDS] = [{"currently-attached": value} for value in attached]
    assert source.off_evidence(VM).proved is proved


@pytest.mark.parametrize(
    ("operations", "pending"),
    [
        ("", False),
        ("hard_shutdown", True),
        ("OpaqueRef:a: clean_shutdown; OpaqueRef:b: snapshot", True),
        ("snapshot", False),
        ("shutdown", True),
    ],
)
def test_stop_pending(host: ScriptedHost, source: XenServerSource, operations: str, pending: bool) -> None:
    host.set_vm(current_operations=operations)
    assert source.stop_pending(VM) is pending


def test_start(host: ScriptedHost, source: XenServerSource) -> None:
    source.start(VM)  # runs
    assert host.sent("vm-start") == []
    host.set_vm(power_state="halted")
    host.script[START] = [turning(host, "running")]
    source.start(VM)
    host.set_vm(power_state="halted")
    host.script[START] = [turning(host, "running", LOST)]
    source.start(VM)
    host.set_vm(power_state="halted")
    host.script[START] = [turning(host, "running", refusal(BAD_STATE))]
    source.start(VM)
    assert len(host.sent("vm-start")) == 3


def test_a_start_that_does_not_take_is_an_error(host: ScriptedHost, source: XenServerSource) -> None:
    host.set_vm(power_state="halted")
    host.script[START] = [""]
    with pytest.raises(SourceError, match="does not run"):
        source.start(VM)
    host.script[START] = [refusal("You attempted an operation that was explicitly blocked (see the blocked_operations field)")]
    with pytest.raises(SourceError, match="blocked"):
        source.start(VM)


def state_of(host: ScriptedHost) -> tuple[dict[str, str], dict[str, str], str]:
    return dict(host.maps["blocked-operations"]), dict(host.maps["other-config"]), host.values[VM, "ha-restart-priority"]


BEFORE: list[tuple[dict[str, str], dict[str, str], str]] = [
    ({}, {}, ""),
    ({}, {"auto_poweron": "true", "folder": "x; y: z"}, "restart"),
    ({"start": "maintenance"}, {"auto_poweron": "false"}, "best-effort"),
    ({"start": "a", "start_on": "b", "resume": "c"}, {}, ""),
]


@pytest.mark.parametrize("before", BEFORE)
def test_a_fence_holds_and_leaves_no_trace(
    host: ScriptedHost, source: XenServerSource, before: tuple[dict[str, str], dict[str, str], str]
) -> None:
    host.maps = {"blocked-operations": dict(before[0]), "other-config": dict(before[1])}
    host.set_vm(ha_restart_priority=before[2])
    assert source.is_fenced(VM) is (before == BEFORE[3])
    source.fence(VM, "tokvm ab12: cutover")
    assert source.is_fenced(VM)
    assert set(host.maps["blocked-operations"]) == {"start", "start_on", "resume"}
    assert before[0].items() <= host.maps["blocked-operations"].items()  # somebody else's reason stays
    source.fence(VM, "tokvm ab12: cutover")
    source.unfence(VM)
    assert state_of(host) == before
    source.unfence(VM)
    assert state_of(host) == before


class Killed(Exception):
    """The tool dies here."""


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.slow
def test_a_fence_cut_off_anywhere_is_finished_and_undone(
    host: ScriptedHost,
    source: XenServerSource,
    before: tuple[dict[str, str], dict[str, str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Die before every command of fence and unfence; whoever comes next ends where an undisturbed run ends."""
    run = host.run
    for first, again in (("fence", "fence"), ("fence", "unfence"), ("unfence", "unfence"), ("unfence", "fence")):
        for death in range(60):
            host.maps = {"blocked-operations": dict(before[0]), "other-config": dict(before[1])}
            host.set_vm(ha_restart_priority=before[2])
            if first == "unfence":
                source.fence(VM, "tokvm")
            left = [death]

            def dying(*args: object, _left: list[int] = left, **options: object) -> object:
                _left[0] -= 1
                if _left[0] < 0:
                    raise Killed
                return run(*args, **options)  # type: ignore[arg-type]

            monkeypatch.setattr(host, "run", dying)
            try:
                source.fence(VM, "tokvm") if first == "fence" else source.unfence(VM)
            except Killed:
                finished = False
            else:
                finished = True
            monkeypatch.setattr(host, "run", run)
            if again == "fence":
                source.fence(VM, "tokvm, again")
                assert source.is_fenced(VM)
            source.unfence(VM)
            assert state_of(host) == before, (first, again, death)
            if finished:
                break
        assert finished


def test_what_was_before_is_saved_first(host: ScriptedHost, source: XenServerSource) -> None:
    host.set_vm(ha_restart_priority="restart")
    source.fence(VM, "tokvm")
    changes = [words for words in host.log if words[0].startswith("vm-param-") and words[0] != "vm-param-get"]
    assert changes[0][2].startswith("other-config:tokvm-fence=")
    assert json.loads(changes[0][2].partition("=")[2])["ha_priority"] == "restart"
    assert len([words for words in changes if "tokvm-fence" in words[2]]) == 1


def test_a_fence_that_does_not_hold_is_an_error(host: ScriptedHost, source: XenServerSource) -> None:
    host.script["vm-param-set", f"uuid={VM}", "blocked-operations:start_on=tokvm"] = [""]  # says yes, does nothing
    with pytest.raises(SourceError, match="could not be fenced"):
        source.fence(VM, "tokvm")


@pytest.mark.parametrize(
    "text",
    ["x", "[]", "{}", '{"version": 2}', '{"version": 1, "reason": 3}', "[" * 100_000,
     '{"version": 1, "reason": "r", "blocked": ["destroy"], "ha_priority": "", "auto_poweron": false}'],
)  # fmt: skip
def test_a_record_that_is_not_ours_changes_nothing(host: ScriptedHost, source: XenServerSource, text: str) -> None:
    host.maps["other-config"]["tokvm-fence"] = text
    before = state_of(host)
    for method in (source.unfence, lambda uuid: source.fence(uuid, "tokvm")):
        with pytest.raises(SourceError, match="not what tokvm wrote"):
            method(VM)
    assert state_of(host) == before


def test_a_block_that_a_person_put_in_place_of_ours_stays(host: ScriptedHost, source: XenServerSource) -> None:
    source.fence(VM, "tokvm")
    host.maps["blocked-operations"]["start"] = "do not touch"
    source.unfence(VM)
    assert host.maps["blocked-operations"] == {"start": "do not touch"}
    assert host.maps["other-config"] == {}


def test_the_first_claim_wins_and_only_its_owner_releases(host: ScriptedHost, source: XenServerSource) -> None:
    assert source.claim(VM, "a@host 1") == "a@host 1"
    assert source.claim(VM, "b@host 2") == "a@host 1"
    source.release(VM, "b@host 2")
    assert host.maps["other-config"] == {"tokvm-owner": "a@host 1"}
    source.release(VM, "a@host 1")
    source.release(VM, "a@host 1")
    assert host.maps["other-config"] == {}


def test_a_claim_lost_in_the_race_names_the_winner(host: ScriptedHost, source: XenServerSource) -> None:
    def somebody_else(_: Words) -> str:
        host.maps["other-config"]["tokvm-owner"] = "winner"
        raise refusal("You tried to add a key-value pair to a map, but that key is already there.")

    host.script["vm-param-add", f"uuid={VM}", "param-name=other-config", "tokvm-owner=me"] = [somebody_else]
    assert source.claim(VM, "me") == "winner"


def test_a_claim_that_is_not_there_when_read_back_is_an_error(host: ScriptedHost, source: XenServerSource) -> None:
    host.script["vm-param-add", f"uuid={VM}", "param-name=other-config", "tokvm-owner=me"] = [""]
    with pytest.raises(SourceError, match="not there when read back"):
        source.claim(VM, "me")
    with pytest.raises(UsageError, match="own"):
        source.claim(VM, "")


def test_a_priority_that_ha_refuses_does_not_keep_the_vm_off(
    host: ScriptedHost, source: XenServerSource, caplog: pytest.LogCaptureFixture
) -> None:
    host.maps["other-config"]["auto_poweron"] = "true"
    host.set_vm(power_state="halted", dom_id="-1", ha_restart_priority="restart")
    before = state_of(host)
    source.fence(VM, "tokvm")
    restore = ("vm-param-set", f"uuid={VM}", "ha-restart-priority=restart")
    host.script[restore] = [refusal("This operation cannot be performed because it would invalidate VM failover planning")]
    host.log.clear()
    source.unfence(VM)
    assert "failover planning" in caplog.text
    assert not source.is_fenced(VM)
    assert host.maps["blocked-operations"] == {}
    assert host.maps["other-config"]["auto_poweron"] == "true"
    assert [words for words in host.log if words[0] in ("vm-param-set", "vm-param-remove")][-1] == restore
    host.script[START] = [turning(host, "running")]
    source.start(VM)
    assert "tokvm-fence" in host.maps["other-config"]  # kept for the next try
    source.unfence(VM)
    assert state_of(host) == before


def test_a_connection_lost_at_the_priority_is_no_refusal(host: ScriptedHost, source: XenServerSource) -> None:
    host.set_vm(ha_restart_priority="restart")
    source.fence(VM, "tokvm")
    host.script["vm-param-set", f"uuid={VM}", "ha-restart-priority=restart"] = [LOST]
    with pytest.raises(ConnectionLost):
        source.unfence(VM)
    source.unfence(VM)
    assert host.values[VM, "ha-restart-priority"] == "restart"
