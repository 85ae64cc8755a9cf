"""How xe's answers are read: escapes, tables, refusals, nonsense."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sources.conftest import LOST, SNAPSHOT, SR, UUID_INVALID, VM, ScriptedHost, refusal

from tokvm.core.errors import ConnectionLost, SourceError, UsageError
from tokvm.remote.process import Completed, ProgramError
from tokvm.sources.xenserver.faults import Fault, XenServerError, explain
from tokvm.sources.xenserver.source import XenServerSource
from tokvm.sources.xenserver.xe import split_minimal

MACHINES = ("vm-list", "is-control-domain=false", "is-a-template=false", "is-a-snapshot=false")
NAMES = (*MACHINES, "params=name-label", "--minimal")
UUIDS = (*MACHINES, "params=uuid", "--minimal")
POWER = ("vm-param-get", f"uuid={VM}", "param-name=power-state")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", [""]),
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        (r"a\,b,c", ["a,b", "c"]),
        (r"a\\,b", ["a\\", "b"]),
        (r"a\\\,b", ["a\\,b"]),
        (",,", ["", "", ""]),
        ("a\nb,c\n", ["a\nb", "c\n"]),
    ],
)
def test_minimal_is_taken_apart(text: str, values: list[str]) -> None:
    assert split_minimal(text) == values


@given(st.lists(st.text(), min_size=1))
def test_minimal_brings_every_text_back(values: list[str]) -> None:
    line = ",".join(value.replace("\\", "\\\\").replace(",", "\\,") for value in values)
    assert split_minimal(line) == values


@pytest.mark.parametrize("text", ["a\\", "a\\n", "\\ "])
def test_an_escape_that_xe_does_not_use_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="escape"):
        split_minimal(text)


@pytest.mark.parametrize(
    "name", ["a,b", "a\\b", "a\nb\n", "-oProxyCommand=x", "$(id)", "'\"`", "\udcff\udc80 no utf-8", "", "名前: x; y", "\\,"]
)
def test_any_name_comes_through_and_finds_its_vm(host: ScriptedHost, source: XenServerSource, name: str) -> None:
    host.tables[MACHINES] = [
        {"uuid": VM, "name-label": name, "power-state": "running"},
        {"uuid": SR, "name-label": "other", "power-state": "halted"},
    ]
    assert [machine.name for machine in source.list_machines()] == [name, "other"]
    assert source.find(name) == VM
    assert all(name not in word for words in host.log for word in words if len(name) > 2)  # a name never goes out


def test_one_vm_with_an_empty_name_is_one_vm_and_no_vm_is_none(host: ScriptedHost, source: XenServerSource) -> None:
    host.tables[MACHINES] = [{"uuid": VM, "name-label": "", "power-state": "halted"}]
    assert [machine.uuid for machine in source.list_machines()] == [VM]
    host.tables[MACHINES] = []
    assert source.list_machines() == []


def test_columns_of_different_lengths_are_read_again(host: ScriptedHost, source: XenServerSource) -> None:
    host.script[NAMES] = ["web,late"]
    assert [machine.name for machine in source.list_machines()] == ["web"]


def test_rows_that_change_while_they_are_read_are_read_again(host: ScriptedHost, source: XenServerSource) -> None:
    """Same length, other rows: the names would belong to other VMs."""
    host.script[UUIDS] = [SR, VM]
    host.script[NAMES] = ["other"]
    assert [(machine.uuid, machine.name) for machine in source.list_machines()] == [(VM, "web")]


def test_columns_that_never_fit_are_an_error_with_command_and_host(host: ScriptedHost, source: XenServerSource) -> None:
    host.script[NAMES] = ["web,late"] * 10
    with pytest.raises(SourceError, match="do not belong together") as caught:
        source.list_machines()
    assert "vm-list" in caught.value.what
    assert caught.value.where == "ssh://root@xen"


@pytest.mark.parametrize("answer", ["garbage", "../../etc", VM.upper() + "x", VM[:-1], f"{VM}\n{VM}", " " + VM])
def test_a_uuid_that_is_none_is_refused(host: ScriptedHost, source: XenServerSource, answer: str) -> None:
    host.script[UUIDS] = [answer] * 20
    with pytest.raises(SourceError, match="is not a uuid"):
        source.list_machines()


@pytest.mark.parametrize("answer", ["", "two", "0", "-3", "9" * 30, "1e3", "٣"])
def test_a_number_that_is_none_is_refused(host: ScriptedHost, source: XenServerSource, answer: str) -> None:
    host.set_vm(VCPUs_max=answer)
    with pytest.raises(SourceError, match="is not a number") as caught:
        source.inspect(VM)
    assert "VCPUs-max" in caught.value.what


def test_more_output_than_any_host_has_to_say_is_an_error_with_the_command(host: ScriptedHost, source: XenServerSource) -> None:
    host.script[POWER] = [ProgramError("said more than 16777216 bytes and was killed", where="x")]
    with pytest.raises(SourceError, match=r"vm-param-get.*16777216"):
        source.power(VM)


def test_a_read_is_asked_again_once_when_the_connection_breaks(host: ScriptedHost, source: XenServerSource) -> None:
    host.script[POWER] = [LOST]
    assert source.power(VM) == "running"
    host.script[POWER] = [LOST, LOST]
    with pytest.raises(ConnectionLost):
        source.power(VM)


@pytest.mark.parametrize("uuid", ["", "-oProxyCommand=x", "web", VM + " force=true", SR.upper()])
def test_what_is_no_uuid_never_becomes_part_of_a_command(host: ScriptedHost, source: XenServerSource, uuid: str) -> None:
    with pytest.raises(UsageError, match="uuid"):
        source.power(uuid)
    assert host.log == []


@pytest.mark.parametrize(
    ("stderr", "fault", "fix"),
    [
        (UUID_INVALID, Fault.NO_SUCH_OBJECT, "tokvm ls"),
        ("Error code: HANDLE_INVALID\nError parameters: VM, OpaqueRef:x", Fault.NO_SUCH_OBJECT, "tokvm ls"),
        ("Error: Key tokvm-owner not found in map", Fault.NO_SUCH_KEY, ""),
        ("… a VM that was not in an appropriate power state at the time; …\nvm: x", Fault.BAD_POWER_STATE, "power state"),
        ("You attempted an operation that was explicitly blocked (see …", Fault.OPERATION_BLOCKED, "blocked-operations"),
        ("Error code: SR_BACKEND_FAILURE_44\nError parameters: , There is insufficient space", Fault.STORAGE, "free space"),
        ("The SR is full. Requested new size exceeds the maximum size", Fault.STORAGE, "free space"),
        ("You cannot make regular API calls directly on a slave.", Fault.NOT_MASTER, "master"),
        ("You cannot make regular API calls directly on a pool member.", Fault.NOT_MASTER, "master"),
        ("Error code: LICENCE_RESTRICTION\nError parameters: CBT", Fault.LICENCE, "licence"),
        ("This operation is not allowed because your license lacks a needed feature.", Fault.LICENCE, "licence"),
        ("VM didn't acknowledge the need to shutdown.\nvm: x", Fault.NO_SHUTDOWN_SUPPORT, "--force-off"),
        ("Another operation involving the object is currently in progress", Fault.BUSY, "again"),
        ("Unknown command: vtpm-list", Fault.UNKNOWN_COMMAND, ""),
        ("Lost connection to the server.", Fault.XAPI_AWAY, "xapi"),
        ("something else entirely", Fault.OTHER, "xensource.log"),
        ("", Fault.OTHER, "xensource.log"),
    ],
)  # fmt: skip
def test_refusals_say_what_where_and_fix(stderr: str, fault: Fault, fix: str) -> None:
    error = explain(refusal(stderr), where="ssh://root@xen")
    assert error.fault is fault
    assert error.where == "ssh://root@xen"
    assert fix in error.fix
    assert (stderr.splitlines() or ["no message"])[0][:30] in error.what


def test_a_refusal_with_terminal_controls_is_shown_harmless(host: ScriptedHost, source: XenServerSource) -> None:
    host.script[POWER] = [refusal("\x1b[2Jgone\x07" + "x" * 100_000)]
    with pytest.raises(XenServerError) as caught:
        source.power(VM)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_names_that_are_not_unique_list_their_uuids(host: ScriptedHost, source: XenServerSource) -> None:
    host.tables[MACHINES] += [{"uuid": SNAPSHOT, "name-label": "web", "power-state": "halted"}]
    with pytest.raises(UsageError, match=rf"(?s){VM}.*{SNAPSHOT}"):
        source.find("web")
    assert source.find(SNAPSHOT.upper()) == SNAPSHOT
    with pytest.raises(UsageError, match="no VM 'nobody'"):
        source.find("nobody")


@pytest.mark.parametrize(
    "output",
    [b"", b"running\n\x000\x00", b"a\x00b\n\x000\x00" * 3, "a\0²\0".encode() * 3, b"a\x000\x00" * 4, b"a\x000\x00" * 3 + b"x"],
)
def test_a_batch_whose_answers_do_not_match_its_questions_is_refused(
    host: ScriptedHost, source: XenServerSource, monkeypatch: pytest.MonkeyPatch, output: bytes
) -> None:
    monkeypatch.setattr(host, "run_line", lambda *_args, **_options: Completed(0, output, b""))
    with pytest.raises(SourceError, match="answers to 3 questions"):
        source.off_evidence(VM)
