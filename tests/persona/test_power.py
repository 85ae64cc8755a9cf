"""On, off, blocked, in hand, and what HA makes of it."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable

import pytest

from tokvm.testing.xenserver.host import Answer, DiskSpec, MachineSpec, XenHost

Build = Callable[..., XenHost]
Ssh = Callable[..., "subprocess.CompletedProcess[bytes]"]


def get(host: XenHost, param: str) -> str:
    return host.run("xe", "vm-param-get", f"uuid={host.uuid('web')}", f"param-name={param}").text


def shut_down(host: XenHost, *words: str) -> Answer:
    return host.run("xe", "vm-shutdown", f"uuid={host.uuid('web')}", *words)


def start(host: XenHost) -> Answer:
    return host.run("xe", "vm-start", f"uuid={host.uuid('web')}")


def block(host: XenHost) -> None:
    for key in ("start", "start_on", "resume"):
        assert host.run("xe", "vm-param-set", f"uuid={host.uuid('web')}", f"blocked-operations:{key}=moved away").code == 0


def wait_for(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def machine(**more: object) -> MachineSpec:
    return MachineSpec("web", disks=[DiskSpec(1 << 20)], **more)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_clean_shutdown_blocks_until_the_guest_is_off(build: Build) -> None:
    host = build(machine(shutdown_s=0.4))
    began = time.monotonic()
    assert shut_down(host).code == 0
    assert time.monotonic() - began >= 0.4
    assert (get(host, "power-state"), get(host, "dom-id")) == ("halted", "-1")
    attached = host.run("xe", "vbd-list", f"vm-uuid={host.uuid('web')}", "type=Disk", "params=currently-attached", "--minimal")
    assert attached.text == "false"


def test_off_twice_and_on_twice_are_refused(host: XenHost) -> None:
    assert b"expected: halted\nactual: running" in start(host).stderr
    assert shut_down(host).code == 0
    assert b"expected: running\nactual: halted" in shut_down(host, "force=true").stderr
    assert start(host).code == 0
    assert host.power_events("web") == [("on", "vm-start"), ("off", "clean_shutdown"), ("on", "vm-start")]


@pytest.mark.slow
def test_a_shutdown_is_in_hand_while_the_guest_takes_its_time(build: Build) -> None:
    host = build(machine(shutdown_s=0.8))
    waiting = threading.Thread(target=shut_down, args=(host,))
    waiting.start()
    wait_for(lambda: "clean_shutdown" in get(host, "current-operations"))
    assert b"in progress" in shut_down(host).stderr
    assert b"in progress" in host.run("xe", "vm-snapshot", f"uuid={host.uuid('web')}", "new-name-label=tokvm-1-1").stderr
    waiting.join()
    assert get(host, "current-operations") == ""


@pytest.mark.slow
def test_a_guest_that_ignores_the_request_stays_on_and_can_be_cut_off(build: Build) -> None:
    host = build(machine(ignores_shutdown=True), clean_timeout_s=0.3)
    answer = shut_down(host)
    assert (answer.code, answer.stderr[:43]) == (1, b"VM didn't acknowledge the need to shutdown.")
    assert get(host, "power-state") == "running"
    assert shut_down(host, "force=true").code == 0
    assert get(host, "power-state") == "halted"


def test_force_ends_a_clean_shutdown_that_hangs(build: Build) -> None:
    host = build(machine(ignores_shutdown=True), clean_timeout_s=20)
    answers: list[Answer] = []
    waiting = threading.Thread(target=lambda: answers.append(shut_down(host)))
    waiting.start()
    wait_for(lambda: get(host, "current-operations") != "")
    assert shut_down(host, "force=true").code == 0
    waiting.join(timeout=5)
    assert answers[0].code == 0
    wait_for(lambda: get(host, "current-operations") == "")


@pytest.mark.slow
def test_a_power_off_lands_after_its_client_has_gone(host: XenHost, ssh: Ssh) -> None:
    host.fault("vm-shutdown", "late", seconds=0.6)
    assert ssh(host, f"xe vm-shutdown uuid={host.uuid('web')}").returncode == 255
    assert get(host, "power-state") == "running"
    assert "clean_shutdown" in get(host, "current-operations")
    wait_for(lambda: get(host, "power-state") == "halted")
    assert get(host, "current-operations") == ""


def test_a_late_power_off_may_be_hidden(host: XenHost) -> None:
    host.fault("vm-shutdown", "late", seconds=0.3, hidden=True)
    assert shut_down(host, "force=true").code == 255
    assert get(host, "current-operations") == ""
    wait_for(lambda: get(host, "power-state") == "halted")


@pytest.mark.slow
def test_a_blocked_start_is_refused_until_it_is_unblocked(host: XenHost) -> None:
    shut_down(host)
    block(host)
    refused = start(host)
    assert refused.code == 1
    assert b"explicitly blocked" in refused.stderr
    assert b"code: moved away" in refused.stderr
    assert get(host, "blocked-operations") == "start: moved away; start_on: moved away; resume: moved away"
    remove = ["xe", "vm-param-remove", f"uuid={host.uuid('web')}", "param-name=blocked-operations"]
    for key in ("start", "start_on", "resume"):
        assert host.run(*remove, f"param-key={key}").code == 0
    assert start(host).code == 0


def test_ha_starts_a_protected_vm_again_whoever_stopped_it(build: Build) -> None:
    host = build(machine(ha_priority="restart"), ha_delay_s=0.2)
    assert shut_down(host).code == 0
    wait_for(lambda: get(host, "power-state") == "running")
    host.guest_stops("web")
    wait_for(lambda: get(host, "power-state") == "running")
    assert [who for event, who in host.power_events("web") if event == "on"] == ["vm-start", "HA", "HA"]


@pytest.mark.parametrize("fence", ["blocked", "priority cleared"])
@pytest.mark.slow
def test_ha_leaves_a_fenced_vm_alone(build: Build, fence: str) -> None:
    host = build(machine(ha_priority="restart"), ha_delay_s=0.0)
    if fence == "blocked":
        block(host)
    else:
        assert host.run("xe", "vm-param-set", f"uuid={host.uuid('web')}", "ha-restart-priority=").code == 0
    shut_down(host)
    time.sleep(0.1)
    assert get(host, "power-state") == "halted"


def test_without_ha_a_stopped_guest_stays_off(build: Build) -> None:
    host = build(machine(ha_priority="restart"))
    host.guest_stops("web")
    assert not host.is_running("web")


def test_auto_poweron_brings_a_vm_back_after_a_power_cut_unless_blocked(build: Build) -> None:
    host = build(machine(other_config={"auto_poweron": "true"}))
    host.restart_host()
    assert host.is_running("web")
    block(host)
    host.restart_host()
    assert not host.is_running("web")


def test_the_domain_may_outlive_the_power_state(build: Build) -> None:
    host = build(machine(), linger_s=0.5)
    shut_down(host)
    assert (get(host, "power-state"), get(host, "dom-id")) == ("halted", "1")
    wait_for(lambda: get(host, "dom-id") == "-1")
