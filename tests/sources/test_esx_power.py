"""On, off, the witnesses that it is off, and what is remembered beside the VM: claim, fence, when the guest was asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.sources.esx_double import DIR, LOST, OTHER, VM, FakeEsx, Words, connect, fault

from tokvm.core.errors import ConnectionLost, NotOff, SourceError, UsageError
from tokvm.core.machine import PowerState
from tokvm.sources.vmware import power
from tokvm.sources.vmware.record import Asked, AutoStart, Fence, Record
from tokvm.sources.vmware.source import EsxSource

ENTRY = {
    "startOrder": "3", "startDelay": "-1", "waitForHeartbeat": '"systemDefault"', "startAction": '"powerOn"', "stopDelay": "-1",
    "stopAction": '"guestShutdown"',
}  # fmt: skip


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeEsx:
    for name, value in (("POLL_S", 0.01), ("LANDING_S", 0.1), ("START_S", 0.2), ("FORCED_S", 0.2)):
        monkeypatch.setattr(power, name, value)
    made = FakeEsx(tmp_path)
    made.write_base([])
    return made


@pytest.fixture
def source(host: FakeEsx) -> EsxSource:
    return connect(host)


def remembered(host: FakeEsx) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(host.texts.get(f"{DIR}/tokvm.json", "{}"))
    return found


# ---- stopping


def test_the_guest_is_asked_and_when_is_noted_first(host: FakeEsx, source: EsxSource) -> None:
    seen: list[object] = []

    def asked(words: Words) -> str:
        seen.append(remembered(host)["asked"])
        return host.do_power_shutdown(words)

    host.script["power.shutdown"] = [asked]
    source.shut_down(VM, deadline_s=5, force=False)
    assert seen == [{"at": host.now, "boot": host.boot}]
    assert host.sent("power.off") == []


def test_off_is_success(host: FakeEsx, source: EsxSource) -> None:
    host.state = "poweredOff"
    source.shut_down(VM, deadline_s=5, force=False)
    assert host.sent("power.shutdown") == []
    assert host.texts == {}


def test_a_suspended_vm_is_not_off(host: FakeEsx, source: EsxSource) -> None:
    host.state = "suspended"
    with pytest.raises(NotOff, match="suspended"):
        source.shut_down(VM, deadline_s=5, force=True)
    assert source.power(VM) is PowerState.SUSPENDED
    with pytest.raises(SourceError, match="suspended"):
        source.start(VM)


def test_a_guest_without_tools_is_not_cut_unless_forced(host: FakeEsx, source: EsxSource) -> None:
    host.tools = "guestToolsNotRunning"
    with pytest.raises(NotOff, match="VMware Tools"):
        source.shut_down(VM, deadline_s=60, force=False)
    assert host.state == "poweredOn"
    source.shut_down(VM, deadline_s=60, force=True)
    assert host.sent("power.off") == [("vim-cmd", "vmsvc/power.off", "12")]
    assert host.state == "poweredOff"


def test_a_guest_that_ignores_us_is_cut_at_the_deadline_only_if_forced(host: FakeEsx, source: EsxSource) -> None:
    host.obeys = False
    with pytest.raises(NotOff, match=r"within 0\.2 s"):
        source.shut_down(VM, deadline_s=0.2, force=False)
    assert len(host.sent("power.shutdown")) == 1
    source.shut_down(VM, deadline_s=0.2, force=True)
    assert host.state == "poweredOff"


def test_lost_replies_are_bridged(host: FakeEsx, source: EsxSource) -> None:
    host.after("power.shutdown", LOST)
    source.shut_down(VM, deadline_s=5, force=False)
    assert host.state == "poweredOff"
    host.after("power.on", LOST)
    source.start(VM)
    assert host.state == "poweredOn"
    host.script["power.shutdown"] = [LOST]
    source.shut_down(VM, deadline_s=5, force=False)
    assert len(host.sent("power.shutdown")) == 3


def test_a_vm_that_went_off_by_itself_meanwhile_is_off(host: FakeEsx, source: EsxSource) -> None:
    def too_late(_: Words) -> str:
        host.state = "poweredOff"
        return fault("InvalidPowerState", "in the current state (Powered off).")

    host.script["power.shutdown"] = [too_late]
    source.shut_down(VM, deadline_s=5, force=False)


def test_a_power_cut_that_does_nothing_is_not_off(host: FakeEsx, source: EsxSource) -> None:
    host.tools = "guestToolsNotRunning"
    host.script["power.off"] = [(0, fault("NoPermission", "Permission denied.", title="Powering off VM:"), "")]
    with pytest.raises(NotOff, match="Permission denied"):
        source.shut_down(VM, deadline_s=1, force=True)


# ---- who asked, and until when


def test_a_guest_that_was_asked_may_stop_for_minutes(host: FakeEsx, source: EsxSource) -> None:
    assert source.stop_pending(VM) is False
    host.obeys = False
    with pytest.raises(NotOff):
        source.shut_down(VM, deadline_s=0.05, force=False)
    assert connect(host).stop_pending(VM) is True
    host.now += power.LANDS_S - 1
    assert source.stop_pending(VM) is True
    host.now += 1
    assert source.stop_pending(VM) is False


def test_a_guest_that_booted_since_has_forgotten_it(host: FakeEsx, source: EsxSource) -> None:
    host.obeys = False
    with pytest.raises(NotOff):
        source.shut_down(VM, deadline_s=0.05, force=False)
    host.boot = "2026-10-06T00:00:00.000000Z"
    assert source.stop_pending(VM) is False
    host.boot, host.state = "2026-10-04T19:00:52.000000Z", "poweredOff"
    assert source.stop_pending(VM) is False


# ---- witnesses


def test_off_is_proved_by_both_witnesses_alone(host: FakeEsx, source: EsxSource) -> None:
    assert source.off_evidence(VM).proved is False
    host.state = "poweredOff"
    found = source.off_evidence(VM)
    assert (found.power, found.released, found.proved) == (PowerState.OFF, True, True)
    assert host.sftp_server.handles == []


def test_a_process_that_is_still_there_is_a_witness_against(host: FakeEsx, source: EsxSource) -> None:
    host.state, host.processes = "poweredOff", True
    assert source.off_evidence(VM).proved is False
    assert host.sftp_server.opened == []


@pytest.mark.parametrize("field", ["UUID", "ConfigFile"])
def test_a_process_is_known_by_its_uuid_or_its_file(host: FakeEsx, source: EsxSource, field: str) -> None:
    host.state, host.processes = "poweredOff", True
    text = host.do_vm(()).replace(f'<field name="{field}">', '<field name="Other">')
    host.script["vm"] = [text]
    assert source.off_evidence(VM).proved is False


def test_a_file_that_is_still_locked_is_a_witness_against(host: FakeEsx, source: EsxSource) -> None:
    host.state = "poweredOff"
    host.sftp_server.locked.add(f"{DIR}/web-flat.vmdk")
    found = source.off_evidence(VM)
    assert found.proved is False
    assert "busy" in found.detail


def test_the_file_that_is_looked_at_is_what_the_vm_writes(host: FakeEsx, source: EsxSource) -> None:
    host.state = "poweredOff"
    host.freeze("tokvm-x-1")
    host.write_delta("web-000001.vmdk", "web.vmdk", [])
    host.sftp_server.locked.add(f"{DIR}/web-flat.vmdk")
    assert source.off_evidence(VM).proved is True
    host.sftp_server.locked.add(f"{DIR}/web-000001-sesparse.vmdk")
    assert source.off_evidence(VM).proved is False


def test_witnesses_that_contradict_each_other_prove_nothing(host: FakeEsx, source: EsxSource) -> None:
    host.state = "poweredOff"
    host.script["power.getstate"] = ["Retrieved runtime info\nPowered on\n"]
    found = source.off_evidence(VM)
    assert (found.power, found.proved) == (PowerState.UNKNOWN, False)


def test_a_witness_that_is_not_understood_is_none(host: FakeEsx, source: EsxSource) -> None:
    host.state = "poweredOff"
    host.script["vm"] = ["hostd is busy\n"]
    with pytest.raises(SourceError, match="no XML"):
        source.off_evidence(VM)


# ---- starting


def test_a_question_is_told_instead_of_waited_for(host: FakeEsx, source: EsxSource) -> None:
    host.state = "poweredOff"
    host.question = "This virtual machine might have been moved or copied."
    with pytest.raises(SourceError, match="moved or copied") as caught:
        source.start(VM)
    assert "I moved it" in caught.value.fix
    assert not [line for line in host.lines if "vmsvc/message 12 " in line and "echo" not in line]


def test_a_start_that_is_refused_says_why(host: FakeEsx, source: EsxSource) -> None:
    host.state = "poweredOff"
    host.script["power.on"] = [(1, "Powering on VM:\n" + fault("InsufficientResourcesFault", "Not enough memory."), "")]
    with pytest.raises(SourceError, match="Not enough memory"):
        source.start(VM)
    host.script["power.on"] = ["Powering on VM:\n"]
    with pytest.raises(SourceError, match="does not run"):
        source.start(VM)


def test_running_already_is_success(host: FakeEsx, source: EsxSource) -> None:
    source.start(VM)
    assert host.sent("power.on") == []


# ---- claim


def test_the_first_claim_wins_also_in_a_race(host: FakeEsx, source: EsxSource) -> None:
    def other_first(_: Words) -> tuple[int, str, str]:
        host.texts[f"{DIR}/tokvm-owner"] = json.dumps({"v": 1, "owner": "two@host 2"})
        return 1, "", "-sh: can't create: File exists\n"

    host.script["claim"] = [other_first]
    assert source.claim(VM, "one@host 1") == "two@host 2"
    source.release(VM, "one@host 1")
    assert source.claim(VM, "one@host 1") == "two@host 2"


def test_a_claim_whose_reply_was_lost_is_found(host: FakeEsx, source: EsxSource) -> None:
    host.script["claim"] = [LOST]
    with pytest.raises(ConnectionLost):
        source.claim(VM, "one@host 1")
    assert source.claim(VM, "one@host 1") == "one@host 1"


def test_a_claim_that_cannot_be_written_is_none(host: FakeEsx, source: EsxSource) -> None:
    host.script["claim"] = [(1, "", "-sh: can't create: No space left on device\n")]
    with pytest.raises(SourceError, match="could not be written"):
        source.claim(VM, "one@host 1")


@pytest.mark.parametrize("name", ["$(reboot) 'x' \"y\" ; rm -rf /", "ü\u2028z", "a\\nb|c"])
def test_any_owner_is_held_as_it_is(host: FakeEsx, source: EsxSource, name: str) -> None:
    assert source.claim(VM, name) == name
    assert connect(host).claim(VM, "other") == name
    source.release(VM, name)
    assert f"{DIR}/tokvm-owner" not in host.texts


@pytest.mark.parametrize("name", ["", " x", "x\0y"])
def test_some_names_own_nothing(source: EsxSource, name: str) -> None:
    with pytest.raises(UsageError):
        source.claim(VM, name)


def test_a_file_that_cannot_be_read_is_no_free_vm(host: FakeEsx, source: EsxSource) -> None:
    wrong = (1, "", "cat: read error: Input/output error\n")
    real = host.do_cat

    def broken(words: Words) -> Any:
        return wrong if words[1].endswith("tokvm-owner") else real(words)

    host.do_cat = broken  # type: ignore[method-assign]
    with pytest.raises(SourceError, match="Input/output error"):
        source.claim(VM, "one@host 1")
    assert not [line for line in host.lines if line.startswith("set -C")]


def test_a_release_takes_what_was_asked_along_and_leaves_the_fence(host: FakeEsx, source: EsxSource) -> None:
    source.claim(VM, "one@host 1")
    source.fence(VM, "a cutover")
    source.shut_down(VM, deadline_s=5, force=False)
    assert remembered(host).keys() == {"v", "fence", "asked"}
    source.release(VM, "two@host 2")
    assert remembered(host).keys() == {"v", "fence", "asked"}
    source.release(VM, "one@host 1")
    assert remembered(host).keys() == {"v", "fence"}


# ---- fence


def test_a_fence_takes_the_vm_out_of_autostart_and_puts_it_back(host: FakeEsx, source: EsxSource) -> None:
    host.autostart = dict(ENTRY)
    source.fence(VM, "a cutover, by 'me'; $(id)")
    assert host.autostart == {**ENTRY, "startAction": '"none"'}
    assert source.is_fenced(VM) is True
    source.fence(VM, "again")
    assert remembered(host)["fence"]["reason"] == "a cutover, by 'me'; $(id)"
    source.shut_down(VM, deadline_s=5, force=False)
    with pytest.raises(SourceError, match="blocked"):
        source.start(VM)
    source.unfence(VM)
    assert host.autostart == ENTRY
    assert source.is_fenced(VM) is False
    assert host.sent("update_autostartentry")[0][2:] == ("--", "12", "none", "-1", "3", "guestShutdown", "-1", "systemDefault")


def test_a_vm_that_the_host_does_not_start_needs_no_entry(host: FakeEsx, source: EsxSource) -> None:
    source.fence(VM, "a cutover")
    assert source.is_fenced(VM) is True
    source.unfence(VM)
    assert host.autostart is None
    assert f"{DIR}/tokvm.json" not in host.texts
    assert host.sent("update_autostartentry") == []


def test_what_was_before_is_written_first(host: FakeEsx, source: EsxSource) -> None:
    """A crash behind it leaves a fence that is not shut, and what to put back."""
    host.autostart = dict(ENTRY)
    host.script["update_autostartentry"] = [LOST]
    with pytest.raises(ConnectionLost):
        source.fence(VM, "a cutover")
    assert remembered(host)["fence"]["before"]["action"] == "powerOn"
    assert source.is_fenced(VM) is False
    source.fence(VM, "a cutover")
    assert source.is_fenced(VM) is True
    source.unfence(VM)
    assert host.autostart == ENTRY


def test_a_fence_that_does_not_hold_is_an_error(host: FakeEsx, source: EsxSource) -> None:
    host.autostart = dict(ENTRY)
    host.script["update_autostartentry"] = ["Updated AutoStart entry.\n"]
    with pytest.raises(SourceError, match="could not be fenced"):
        source.fence(VM, "a cutover")


def test_somebody_who_turns_autostart_on_again_is_seen(host: FakeEsx, source: EsxSource) -> None:
    host.autostart = dict(ENTRY)
    source.fence(VM, "a cutover")
    host.autostart = dict(ENTRY)
    assert source.is_fenced(VM) is False


def test_entries_that_leave_things_out_are_read(host: FakeEsx, source: EsxSource) -> None:
    host.autostart = {"startOrder": "2", "startAction": '"powerOn"', "stopAction": '"systemDefault"'}
    source.fence(VM, "a cutover")
    assert source.is_fenced(VM)


def test_a_record_that_cannot_be_written_is_an_error(host: FakeEsx, source: EsxSource) -> None:
    host.script["write"] = [(1, "", "sh: write error: No space left on device\n")]
    with pytest.raises(SourceError, match="could not be written"):
        source.fence(VM, "a cutover")
    assert source.is_fenced(VM) is False


@pytest.mark.parametrize("reason", ["", "a\0b"])
def test_a_fence_has_a_reason(source: EsxSource, reason: str) -> None:
    with pytest.raises(UsageError):
        source.fence(VM, reason)


def test_a_record_comes_through_as_it_went_out() -> None:
    entry = AutoStart("powerOn", -1, 3, "guestShutdown", -1, "systemDefault")
    for record in (Record(), Record(Fence("x 'ü'", entry)), Record(Fence("x", None), Asked(5, "now"))):
        line = record.to_line()
        assert line is None or Record.from_line(line) == record


@pytest.mark.parametrize(
    "fence",
    [
        {"reason": "x"},
        {"reason": 1, "before": None},
        {"reason": "x", "before": {"action": "none"}},
        {"reason": "x", "before": {**ENTRY, "more": 1}},
        {"reason": "x", "before": None, "more": 1},
        {
            "reason": "x",
            "before": {"action": "a", "delay": True, "order": 1, "stop_action": "", "stop_delay": 1, "heartbeat": ""},
        },
        [],
    ],
)
def test_a_record_with_other_fields_is_not_believed(fence: object) -> None:
    with pytest.raises(ValueError, match=r"other fields|another type"):
        Record.from_line(json.dumps({"v": 1, "fence": fence}))


def test_changes_go_to_the_vm_that_bears_the_uuid_now(host: FakeEsx, source: EsxSource) -> None:
    source.power(VM)
    host.vmid, host.others = 31, [(12, OTHER, "db")]
    source.shut_down(VM, deadline_s=1, force=True)
    source.start(VM)
    assert {words[2] for words in host.log if words[0] == "vim-cmd" and "power." in words[1]} == {"31"}
