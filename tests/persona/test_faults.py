"""Commands that go wrong, over a real connection, and when."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

import pytest

from tokvm.testing.xenserver.host import XenHost

Ssh = Callable[..., "subprocess.CompletedProcess[bytes]"]


def snapshot_line(host: XenHost) -> str:
    return f"xe vm-snapshot uuid={host.uuid('web')} new-name-label=tokvm-1-1"


def test_a_lost_reply_is_an_action_without_an_answer(host: XenHost, ssh: Ssh) -> None:
    host.fault("vm-snapshot", "lost_reply")
    done = ssh(host, snapshot_line(host))
    assert (done.returncode, done.stdout) == (255, b"")
    assert [vm["name"] for vm in host.snapshots("web")] == ["tokvm-1-1"]
    assert ssh(host, snapshot_line(host)).returncode == 0


def test_a_dropped_command_never_happened(host: XenHost, ssh: Ssh) -> None:
    host.fault("vm-snapshot", "drop")
    assert ssh(host, snapshot_line(host)).returncode == 255
    assert host.snapshots("web") == []


def test_a_mute_xe_did_it_and_says_nothing(host: XenHost) -> None:
    host.fault("vm-snapshot", "mute")
    answer = host.run(line=snapshot_line(host))
    assert (answer.code, answer.stdout) == (0, b"")
    assert len(host.snapshots("web")) == 1


def test_a_late_command_is_done_after_its_client_has_gone(host: XenHost, ssh: Ssh) -> None:
    host.fault("vm-snapshot", "late", seconds=0.4)
    assert ssh(host, snapshot_line(host)).returncode == 255
    assert host.snapshots("web") == []
    until = time.monotonic() + 5
    while not host.snapshots("web"):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_refusal_has_xes_text(host: XenHost) -> None:
    host.fault("vm-snapshot", "refuse", text="The SR is full.\nrequested: 1")
    host.fault("power-state", "refuse", code="SR_BACKEND_FAILURE_46")
    answer = host.run(line=snapshot_line(host))
    assert (answer.code, answer.stderr) == (1, b"The SR is full.\nrequested: 1\n")
    read = host.run("xe", "vm-param-get", f"uuid={host.uuid('web')}", "param-name=power-state")
    assert read.stderr.startswith(b"Error code: SR_BACKEND_FAILURE_46\n")


@pytest.mark.slow
def test_a_hanging_command_ends_with_its_client(host: XenHost, ssh: Ssh) -> None:
    host.fault("vm-snapshot", "hang")
    with pytest.raises(subprocess.TimeoutExpired):
        ssh(host, snapshot_line(host), timeout_s=1.0)
    assert host.snapshots("web") == []


def test_faults_count_what_they_skip_and_how_often_they_hit(host: XenHost) -> None:
    host.fault("vm-param-get", "refuse", text="no", skip=1, times=2)
    line = f"xe vm-param-get uuid={host.uuid('web')} param-name=uuid"
    assert [host.run(line=line).code for _ in range(5)] == [0, 1, 1, 0, 0]
    assert host.faults_left() == []
    host.fault("vm-param-get", "refuse", text="no", times=0)
    assert [host.run(line=line).code for _ in range(3)] == [1, 1, 1]
    host.clear_faults()
    assert host.run(line=line).code == 0


def test_an_unknown_fault_is_refused_when_it_is_planned(host: XenHost) -> None:
    with pytest.raises(ValueError, match="no fault kind"):
        host.fault("vm-start", "explode")


def test_everything_is_logged(host: XenHost, ssh: Ssh) -> None:
    line = snapshot_line(host)
    ssh(host, line)
    ssh(host, "xe host-list")
    assert host.commands() == [line, "xe host-list"]
    assert [record["command"] for record in host.violations()] == ["xe host-list"]


def test_a_defect_of_the_persona_itself_is_seen(host: XenHost) -> None:
    with host.edit() as state:
        state["options"]["backend"] = "tokvm.testing.xenserver.backend:NoSuchBackend"
    answer = host.run(line=snapshot_line(host))
    assert answer.code == 1
    assert b"internal error" in answer.stderr
    assert "the persona itself failed" in str(host.violations()[0]["why"])
