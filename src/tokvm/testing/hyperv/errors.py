"""What a cmdlet throws: exception type, HRESULT and error id tell what it was; the text is in the host's language."""

from __future__ import annotations


class HostError(Exception):
    """A terminating error inside a script; the scripts report it as data."""

    def __init__(self, type_: str, hresult: int, id_: str, message: str) -> None:
        super().__init__(message)
        self.type = type_
        self.hresult = hresult
        self.id = id_
        self.message = message


class NotInContract(Exception):
    """Something that no row of the contract allows: recorded as a violation."""


VIRTUALIZATION = "Microsoft.HyperV.PowerShell.VirtualizationException"
SHARING_VIOLATION = -2147024864  # 0x80070020
E_FAIL = -2147467259
OPERATION_FAILED = -2146233088  # COR_E_EXCEPTION, which all exceptions of the Hyper-V module bear


def no_such_vm(vm: str) -> HostError:
    """Get-VM -Id with an id that nobody has."""
    text = f"Hyper-V konnte keinen virtuellen Computer mit der ID {vm} finden."
    return HostError(VIRTUALIZATION, OPERATION_FAILED, "InvalidParameter,Microsoft.HyperV.PowerShell.Commands.GetVM", text)


def bad_state(cmdlet: str, name: str) -> HostError:
    text = f"„{name}“: Der Vorgang kann nicht ausgeführt werden, während sich das Objekt im aktuellen Zustand befindet."
    return HostError(VIRTUALIZATION, OPERATION_FAILED, f"InvalidState,Microsoft.HyperV.PowerShell.Commands.{cmdlet}", text)


def in_use(path: str) -> HostError:
    text = f"Der Prozess kann nicht auf die Datei „{path}“ zugreifen, da sie von einem anderen Prozess verwendet wird."
    return HostError("System.IO.IOException", SHARING_VIOLATION, "IOException", text)
