"""What a failed script means: by exception type, HRESULT and error id, never by text, which is in the host's language.

    type      the innermost exception's .NET name          Microsoft.HyperV.PowerShell.VirtualizationException
    hresult   its HRESULT, a signed 32-bit number          -2147024864 is 0x80070020, ERROR_SHARING_VIOLATION
    id        FullyQualifiedErrorId                        ObjectNotFound,Microsoft.HyperV.PowerShell.Commands.GetVM

The first word of an id of the Hyper-V module is its own kind of error; what our scripts throw themselves begins with Tokvm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from tokvm.core.errors import SourceError
from tokvm.core.text import readable

_LONGEST = 4000


class Fault(StrEnum):
    """The kinds of refusal that somebody here acts upon, or that have a better advice than the host's words."""

    NO_SUCH_VM = "no such VM"
    BAD_STATE = "bad state"
    IN_USE = "in use"
    MERGING = "merging"
    ACCESS_DENIED = "access denied"
    NO_MODULE = "no Hyper-V module"
    NO_SUCH_FILE = "no such file"
    NO_ROOM = "no room"
    TIMEOUT = "timeout"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Failure:
    """What the bootstrap says of an exception."""

    type: str
    message: str
    hresult: int
    id: str

    @classmethod
    def parse(cls, answer: Mapping[str, object]) -> Failure:
        """ValueError when a field is missing or of another type."""
        texts = [answer.get(key) for key in ("type", "message", "id")]
        hresult = answer.get("hresult")
        if not isinstance(hresult, int) or isinstance(hresult, bool):
            raise ValueError("a failure without a numeric hresult")  # noqa: TRY004 - it is about the text
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a failure without type, message and id")
        kind, message, error_id = (str(text)[:_LONGEST] for text in texts)
        return cls(kind, message, hresult, error_id)


class HyperVError(SourceError):
    """A script that ended with an error; `fault` says of which kind."""

    meaning: ClassVar[str] = "Hyper-V refused a command or answered something tokvm does not understand"

    def __init__(self, what: str, *, where: str = "", fix: str = "", fault: Fault = Fault.UNKNOWN) -> None:
        super().__init__(what, where=where, fix=fix)
        self.fault = fault


_BY_HRESULT = {
    0x80070020: Fault.IN_USE,  # ERROR_SHARING_VIOLATION
    0x80070021: Fault.IN_USE,  # ERROR_LOCK_VIOLATION
    0x80070005: Fault.ACCESS_DENIED,
    0x80070002: Fault.NO_SUCH_FILE,
    0x80070003: Fault.NO_SUCH_FILE,
    0x80070070: Fault.NO_ROOM,  # ERROR_DISK_FULL
    0x800705B4: Fault.TIMEOUT,  # ERROR_TIMEOUT
    0x80131505: Fault.TIMEOUT,  # System.TimeoutException
}
_BY_ID = {
    "ObjectNotFound": Fault.NO_SUCH_VM,
    "InvalidState": Fault.BAD_STATE,
    "ObjectInUse": Fault.IN_USE,
    "AccessDenied": Fault.ACCESS_DENIED,
    "UnauthorizedAccess": Fault.ACCESS_DENIED,
    "OutOfMemory": Fault.NO_ROOM,
    "FileNotFound": Fault.NO_SUCH_FILE,
    "OperationTimeout": Fault.TIMEOUT,
    "TokvmBusy": Fault.TIMEOUT,
    "CommandNotFoundException": Fault.NO_MODULE,
    "CouldNotAutoLoadModule": Fault.NO_MODULE,
}
_BY_TYPE = {
    "System.UnauthorizedAccessException": Fault.ACCESS_DENIED,
    "System.Management.Automation.CommandNotFoundException": Fault.NO_MODULE,
    "System.TimeoutException": Fault.TIMEOUT,
    "System.IO.FileNotFoundException": Fault.NO_SUCH_FILE,
    "System.IO.DirectoryNotFoundException": Fault.NO_SUCH_FILE,
}
_WORDS: dict[Fault, tuple[str, str]] = {
    Fault.NO_SUCH_VM: (
        "this host has no such VM (any more)",
        "look with `tokvm ls`; in a cluster it may have moved: move it back to this node, on which its migration was begun "
        "(Move-ClusterVirtualMachineRole), then run the same command again",
    ),
    Fault.BAD_STATE: (
        "the VM is not in a state that allows this",
        "look at its state and status in Hyper-V Manager, then run the same command again",
    ),
    Fault.IN_USE: ("a disk file is held open by another program", "see which: a backup, a merge, another copy; then again"),
    Fault.MERGING: ("a merge of checkpoints is in progress", "wait until Hyper-V Manager shows no merge, then again"),
    Fault.ACCESS_DENIED: (
        "the user we are logged in as may not do this",
        "log in as a member of the host's Administrators (Hyper-V Administrators cannot read every disk file), then again",
    ),
    Fault.NO_MODULE: (
        "a command is missing: Hyper-V's (or the cluster's) PowerShell module is not there",
        "Install-WindowsFeature Hyper-V-PowerShell (a cluster's node: RSAT-Clustering-PowerShell too)",
    ),
    Fault.NO_SUCH_FILE: ("a file is not there", "a merge may have moved the disks; run the same command again"),
    Fault.NO_ROOM: ("there is no room left", "free space on the volume of the VM's disks, or memory on the host, then again"),
    Fault.TIMEOUT: ("the host did not finish in its own time", "see whether its management service (vmms) is busy; then again"),
    Fault.UNKNOWN: ("it failed", "the event log Hyper-V-VMMS on the host says more; mend it there, then again"),
}


def fault_of(failure: Failure) -> Fault:
    """The most precise of the three decides: the file system's code, the module's own word, the exception's class."""
    code = failure.hresult & 0xFFFFFFFF
    word = failure.id.partition(",")[0].strip()
    if word == "InvalidParameter" and failure.id.endswith(".GetVM"):
        return Fault.NO_SUCH_VM
    return _BY_HRESULT.get(code) or _BY_ID.get(word) or _BY_TYPE.get(failure.type) or Fault.UNKNOWN


def explain(failure: Failure, *, script: str, where: str) -> HyperVError:
    """The same failure in our words, with the host's own."""
    fault = fault_of(failure)
    what, fix = _WORDS[fault]
    said = readable(" ".join(failure.message.split()))
    code = f"{failure.hresult & 0xFFFFFFFF:#010x}"
    return HyperVError(f"{script}: {what} ({said or failure.type}; {code})", where=where, fix=fix, fault=fault)
