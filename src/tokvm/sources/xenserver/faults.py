"""What a failed `xe` command means.

xe prints an API error as a sentence with its parameters on the lines below ("The uuid you supplied was invalid." / "type: VM" /
"uuid: …"), or, where it has no sentence, as "Error code: SR_BACKEND_FAILURE_44" / "Error parameters: …". Exit code 1 for all
of them. Both forms are known here (xen-api `datamodel_errors.ml`, `cli_util.ml`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from tokvm.core.errors import SourceError
from tokvm.core.text import readable
from tokvm.remote.ssh import RemoteCommandError

_LOOKED_AT = 64 * 1024  # bytes of a message


class Fault(StrEnum):
    """The kinds of refusal that somebody here acts upon; everything else is OTHER."""

    NO_SUCH_OBJECT = "no such object"
    NO_SUCH_KEY = "no such key"
    DUPLICATE_KEY = "duplicate key"
    BAD_POWER_STATE = "bad power state"
    OPERATION_BLOCKED = "operation blocked"
    IN_USE = "in use"
    BUSY = "busy"
    NO_SHUTDOWN_SUPPORT = "no shutdown support"
    STORAGE = "storage"
    NOT_MASTER = "not the pool master"
    LICENCE = "licence"
    UNKNOWN_COMMAND = "unknown command"
    HIGH_AVAILABILITY = "high availability"
    XAPI_AWAY = "xapi is away"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class _Meaning:
    fault: Fault
    pattern: re.Pattern[str]
    what: str
    fix: str


def _meaning(fault: Fault, pattern: str, what: str, fix: str) -> _Meaning:
    return _Meaning(fault, re.compile(pattern, re.IGNORECASE), what, fix)


_MEANINGS = (
    _meaning(
        Fault.NO_SUCH_OBJECT,
        r"uuid you supplied was invalid|UUID_INVALID|HANDLE_INVALID|invalid object reference|no matching VMs? found",
        "the host does not know this object (any more)",
        "look with `tokvm ls` whether the VM is still there; it may have been removed or moved to another pool",
    ),
    _meaning(Fault.NO_SUCH_KEY, r"\bkey\b.{0,300}\bnot found in map", "the map has no such key", ""),
    _meaning(
        Fault.DUPLICATE_KEY,
        r"MAP_DUPLICATE_KEY|add a key-value pair to a map, but that key is already",
        "the key is there already",
        "",
    ),
    _meaning(
        Fault.OPERATION_BLOCKED,
        r"OPERATION_BLOCKED|explicitly blocked|blocked_operations",
        "the operation is blocked on this VM",
        "see who blocks it (xe vm-param-get param-name=blocked-operations uuid=…); tokvm's goes with `tokvm rollback`",
    ),
    _meaning(
        Fault.BAD_POWER_STATE,
        r"VM_BAD_POWER_STATE|not in an appropriate power state|VM_IS_SNAPSHOT",
        "the VM is not in a power state that allows this",
        "look at its power state in XenCenter or with `tokvm ls`, then run the same command again",
    ),
    _meaning(
        Fault.IN_USE,
        r"VDI_IN_USE|VDI is in use|VDI_NOT_AVAILABLE|still attached|DEVICE_ALREADY_ATTACHED",
        "a disk image is in use by another operation",
        "wait for the export or backup that uses it, then run the same command again",
    ),
    _meaning(
        Fault.BUSY,
        r"OTHER_OPERATION_IN_PROGRESS|another operation involving the object|TOO_MANY_PENDING_TASKS",
        "another operation on this VM is in progress",
        "wait until it is over (xe task-list shows it), then run the same command again",
    ),
    _meaning(
        Fault.NO_SHUTDOWN_SUPPORT,
        r"VM_LACKS_FEATURE|VM_MISSING_PV_DRIVERS|needs the cooperative shutdown|requires PV drivers|VM_SHUTDOWN_TIMEOUT|"
        r"failed to shut ?down before the timeout|VM_FAILED_SHUTDOWN|acknowledge the need to shut ?down",
        "the guest did not shut down when asked",
        "shut it down from inside the guest, or allow cutting its power with --force-off",
    ),
    _meaning(
        Fault.LICENCE,
        r"LICEN[CS]E_RESTRICTION|FEATURE_RESTRICTED|license lacks|licence",
        "the host's licence does not cover this",
        "see the licence of the pool (xe host-license-view)",
    ),
    _meaning(
        Fault.NOT_MASTER,
        r"HOST_IS_SLAVE|directly on a (?:slave|pool member)|host is not (?:the )?master",
        "this host is not the master of its pool",
        "name the pool's master in the source's URL: xe pool-list params=master shows which it is",
    ),
    _meaning(
        Fault.STORAGE,
        r"SR_BACKEND_FAILURE|SR_FULL|SR is full|insufficient space|backend (?:error|failure)",
        "the storage repository failed",
        "look at its free space and health (xe sr-list params=name-label,physical-size,physical-utilisation; /var/log/SMlog)",
    ),
    _meaning(
        Fault.HIGH_AVAILABILITY,
        r"HA_OPERATION_WOULD_BREAK|HA_IS_ENABLED|operation would (?:cause|break).*HA",
        "high availability forbids it",
        "take the VM out of the pool's HA plan, or free memory on its hosts",
    ),
    _meaning(Fault.UNKNOWN_COMMAND, r"unknown command|xe: (?:command )?not found", "the host does not know this command", ""),
    _meaning(
        Fault.XAPI_AWAY,
        r"lost connection to the server|connection refused|HOST_STILL_BOOTING|still booting",
        "xapi, the host's management service, does not answer",
        "wait until it is back (systemctl status xapi on the host), then run the same command again",
    ),
)


class XenServerError(SourceError):
    """An `xe` command that ended with an error; `fault` says of which kind."""

    meaning: ClassVar[str] = "XenServer refused a command or answered something tokvm does not understand"

    def __init__(self, what: str, *, where: str = "", fix: str = "", fault: Fault = Fault.OTHER) -> None:
        super().__init__(what, where=where, fix=fix)
        self.fault = fault


def explain(failed: RemoteCommandError, *, where: str) -> XenServerError:
    """The same failure in our words, with the host's own first line."""
    text = (failed.stderr[:_LOOKED_AT] + b"\n" + failed.stdout[:_LOOKED_AT]).decode("utf-8", "replace")
    said = readable(" / ".join(line.strip() for line in text.splitlines() if line.strip()))
    command = f"`{readable(failed.command, limit=160)}`"
    for meaning in _MEANINGS:
        if meaning.pattern.search(text):
            return XenServerError(f"{command}: {meaning.what} ({said})", where=where, fix=meaning.fix, fault=meaning.fault)
    return XenServerError(
        f"{command} ended with exit code {failed.code}" + (f": {said}" if said else " and no message"),
        where=where,
        fix="try the command by hand on the host; /var/log/xensource.log says more",
    )
