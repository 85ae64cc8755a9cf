"""What a fault of vim-cmd means.

    Powering off VM:
    (vim.fault.InvalidPowerState) {
       faultCause = (vmodl.MethodFault) null,
       msg = "The attempted operation cannot be performed in the current state (Powered off)."
    }

It is on standard output, with any exit code. An answer to a question holds texts of other people, so there only one that
begins with a fault is one; what a change prints is the host's alone.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import ClassVar

from tokvm.core.errors import SourceError
from tokvm.core.text import readable


class Fault(StrEnum):
    """The kinds of refusal that somebody here acts upon, or that have a better advice than the host's words."""

    NO_SUCH_VM = "no such VM"
    BAD_STATE = "bad state"
    NO_TOOLS = "no VMware Tools"
    BUSY = "busy"
    CHANGING = "changing"
    LOCKED = "locked"
    NO_ROOM = "no room"
    LICENCE = "licence"
    ACCESS_DENIED = "access denied"
    UNKNOWN = "unknown"


class EsxError(SourceError):
    """A command that was refused; `fault` says why."""

    meaning: ClassVar[str] = "ESXi refused a command or answered something tokvm does not understand"

    def __init__(self, what: str, *, where: str = "", fix: str = "", fault: Fault = Fault.UNKNOWN) -> None:
        super().__init__(what, where=where, fix=fix)
        self.fault = fault


_FAULT = re.compile(r"^\((?:(?:vim|vmodl)\.fault\.([A-Za-z0-9]{1,80})|vmodl\.(RuntimeFault|MethodFault))\) \{", re.MULTILINE)
_MESSAGE = re.compile(r'^[ \t]*msg = "(.*)"', re.MULTILINE)
_CLI_FAILED = re.compile(r"^[A-Z][A-Za-z ]{1,60} failed\b", re.MULTILINE)
_AWAY = re.compile(
    r"^(?:Connect(?:ion)? to .{0,200} failed|Failed to (?:connect|login)|"
    r".{0,200}(?:Connection (?:refused|failure)|503 Service))",
    re.MULTILINE | re.IGNORECASE,
)

_BY_NAME = {
    "NotFound": Fault.NO_SUCH_VM,
    "ManagedObjectNotFound": Fault.NO_SUCH_VM,
    "InvalidPowerState": Fault.BAD_STATE,
    "InvalidState": Fault.BAD_STATE,
    "QuestionPending": Fault.BAD_STATE,
    "ToolsUnavailable": Fault.NO_TOOLS,
    "TaskInProgress": Fault.BUSY,
    "ConcurrentAccess": Fault.BUSY,
    "ResourceInUse": Fault.BUSY,
    "FileLocked": Fault.LOCKED,
    "NoDiskSpace": Fault.NO_ROOM,
    "InsufficientResourcesFault": Fault.NO_ROOM,
    "RestrictedVersion": Fault.LICENCE,
    "NotEnoughLicenses": Fault.LICENCE,
    "NoPermission": Fault.ACCESS_DENIED,
    "NotAuthenticated": Fault.ACCESS_DENIED,
}
_WORDS: dict[Fault, tuple[str, str]] = {
    Fault.NO_SUCH_VM: (
        "this host has no such VM (any more)",
        "look with `tokvm ls`; vMotion may have moved it: name the host that runs it in the source's URL, and keep it there",
    ),
    Fault.BAD_STATE: ("the VM is not in a state that allows this", "look at its state in the host's client, then again"),
    Fault.NO_TOOLS: (
        "VMware Tools do not run in the guest, so it cannot be asked",
        "shut it down from inside the guest, or allow cutting its power with --force-off",
    ),
    Fault.BUSY: ("another task has the VM in hand", "wait until it is over (a backup?), then run the same command again"),
    Fault.CHANGING: ("its disks are being changed", "wait a minute, then run the same command again"),
    Fault.LOCKED: ("a file is locked", "see who has it open: a backup, another host, a copy"),
    Fault.NO_ROOM: ("there is no room left", "free space on the VM's datastore"),
    Fault.LICENCE: ("the host's licence does not cover this", "see the host's licence"),
    Fault.ACCESS_DENIED: (
        "the user we are logged in as may not do this",
        "log in as root, or as an administrator with shell access",
    ),
    Fault.UNKNOWN: ("it failed", "try the command by hand on the host; /var/log/hostd.log says more"),
}


def fault_name(text: str, *, anywhere: bool = False) -> str | None:
    """`NotFound`, or None. anywhere: the text holds nobody's words but the host's."""
    found = _FAULT.search(text) if anywhere else _FAULT.match(text.lstrip())
    return (found[1] or found[2]) if found else None


def fault_of(name: str) -> Fault:
    return _BY_NAME.get(name, Fault.UNKNOWN)


def is_away(text: str) -> bool:
    """True for what vim-cmd says while hostd restarts (about a minute)."""
    return _AWAY.search(text[:4000]) is not None


def is_failure(text: str) -> bool:
    """True when a change says of itself that it failed, in whichever way."""
    return fault_name(text, anywhere=True) is not None or _CLI_FAILED.search(text) is not None


def explain(text: str, *, command: str, where: str) -> EsxError:
    """The same failure in our words, with the host's own."""
    name = fault_name(text, anywhere=True)
    fault = Fault.UNKNOWN if name is None else fault_of(name)
    what, fix = _WORDS[fault]
    message = _MESSAGE.search(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = readable(message[1] if message else " / ".join(lines[:4]))
    origin = ": ".join(filter(None, (name, said)))
    return EsxError(
        f"`{readable(command, limit=160)}`: {what}" + (f" ({origin})" if origin else ""), where=where, fix=fix, fault=fault
    )
