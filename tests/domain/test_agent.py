"""What a guest's agent says is its own word, and may be nonsense."""

from __future__ import annotations

import pytest

from tokvm.domain.agent import agent_answers, agent_is_there, system_name
from tokvm.domain.connection import Connection

libvirt = pytest.importorskip("libvirt")
libvirt_qemu = pytest.importorskip("libvirt_qemu")

CHANNEL = "<domain><devices><channel type='unix'><target type='virtio' name='{name}' {state}/></channel></devices></domain>"


@pytest.mark.parametrize(
    ("name", "state", "there"),
    [
        ("org.qemu.guest_agent.0", "state='connected'", True),
        ("org.qemu.guest_agent.0", "state='disconnected'", False),
        ("org.qemu.guest_agent.0", "", False),
        ("com.redhat.spice.0", "state='connected'", False),
    ],
)
def test_the_channel_says_whether_the_guest_has_opened_it(name: str, state: str, there: bool) -> None:
    assert agent_is_there(CHANNEL.format(name=name, state=state)) is there


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ('{"return": {"pretty-name": "Debian GNU/Linux 12 (bookworm)"}}', "Debian GNU/Linux 12 (bookworm)"),
        ('{"return": {"pretty-name": "a\\u001b[31m"}}', "a\\x1b[31m"),
        ('{"return": {"pretty-name": 7}}', ""),
        ('{"return": {}}', ""),
        ('{"return": []}', ""),
        ('{"error": {}}', ""),
        ("[]", ""),
        ("{", ""),
    ],
)
def test_a_systems_name(monkeypatch: pytest.MonkeyPatch, answer: str, name: str) -> None:
    monkeypatch.setattr(libvirt_qemu, "qemuAgentCommand", lambda *_arguments: answer)
    assert system_name(Connection("test:///default"), None) == name


def test_no_answer_is_no_life(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> str:
        raise libvirt.libvirtError("not connected")

    monkeypatch.setattr(libvirt_qemu, "qemuAgentCommand", refuse)
    assert not agent_answers(Connection("test:///default"), None)
    assert system_name(Connection("test:///default"), None) == ""
