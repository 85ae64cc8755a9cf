"""The QEMU guest agent: a guest that answers through it has come all the way up.

Protocol: QEMU, docs/interop/qemu-ga-ref (guest-ping, guest-get-osinfo). Everything in an answer is the guest's word.
"""

from __future__ import annotations

import json
import logging
import xml.etree.ElementTree as ET
from typing import Any

from tokvm.core.text import readable
from tokvm.domain.connection import Connection

log = logging.getLogger(__name__)

TIMEOUT_S = 2
CHANNEL = "devices/channel/target[@name='org.qemu.guest_agent.0']"


def agent_answers(connection: Connection, domain: Any) -> bool:
    """True when the agent of this virDomain answers within TIMEOUT_S."""
    return _ask(connection, domain, "guest-ping") is not None


def agent_is_there(domain_xml: str) -> bool:
    """Does a running domain's XML say that the guest has opened the agent's channel? Costs no time in vain, unlike a ping."""
    target = ET.fromstring(domain_xml).find(CHANNEL)
    return target is not None and target.get("state") == "connected"


def system_name(connection: Connection, domain: Any) -> str:
    """What the guest calls itself (`Debian GNU/Linux 12 (bookworm)`); "" when its agent does not say."""
    answer = _ask(connection, domain, "guest-get-osinfo")
    name = answer.get("pretty-name", "") if isinstance(answer, dict) else ""
    return readable(name, limit=100) if isinstance(name, str) else ""


def _ask(connection: Connection, domain: Any, command: str) -> Any | None:
    """The `return` of an answer; None when there is none."""
    import libvirt_qemu  # type: ignore[import-untyped]

    try:
        text = libvirt_qemu.qemuAgentCommand(domain, json.dumps({"execute": command}), TIMEOUT_S, 0)
        return json.loads(text)["return"]
    except connection.libvirt.libvirtError as failed:
        log.debug("%s: no answer to %s: %s", connection.uri, command, failed)
    except (ValueError, KeyError, TypeError) as failed:
        log.debug("%s: a strange answer to %s: %s", connection.uri, command, failed)
    return None
