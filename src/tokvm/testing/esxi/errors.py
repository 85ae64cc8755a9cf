"""How commands on an ESXi host fail. vim-cmd prints its faults on standard output; busybox speaks on standard error."""

from __future__ import annotations

from tokvm.testing.esxi.dump import UNSET, Null, Object, Value


class NotInContract(Exception):
    """Something that no row of the contract allows: recorded as a violation."""


class VimFault(Exception):
    """A fault of hostd. doing: what vim-cmd had printed before (`Powering on VM:`), failed: how it calls the failure."""

    def __init__(self, type_: str, message: str, *fields: tuple[str, Value], doing: str = "", failed: str = "") -> None:
        super().__init__(message)
        self.type = type_
        self.message = message
        self.fields = fields
        self.doing = doing
        self.failed = failed

    def while_(self, doing: str, failed: str) -> VimFault:
        return VimFault(self.type, self.message, *self.fields, doing=doing, failed=failed)

    def text(self, *, style: str) -> str:
        """As vim-cmd prints it: `msg` is behind a line that has no comma, and what it quotes is not escaped."""
        from tokvm.testing.esxi.dump import dump

        type_ = self.type if "." in self.type else f"vim.fault.{self.type}"
        body = Object(type_, [("faultCause", Null("vmodl.MethodFault")), ("faultMessage", UNSET), *self.fields])
        lines = dump(body, style=style).splitlines()
        fault = "\n".join([*lines[:-1], f'   msg = "{self.message}"', "}"])
        return f"{self.doing}{self.failed}: {fault}\n" if self.failed else f"{self.doing}{fault}\n"


class CommandFailed(Exception):
    """A program of the shell failed."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.text = text
        self.code = code


def no_such_vm(vmid: str) -> VimFault:
    return VimFault("NotFound", f'Unable to find a VM corresponding to "{vmid}"')


def bad_state(wanted: str, now: str) -> VimFault:
    names = {"poweredOn": "Powered on", "poweredOff": "Powered off", "suspended": "Suspended"}
    text = f"The attempted operation cannot be performed in the current state ({names[now]})."
    return VimFault("InvalidPowerState", text, ("requestedState", wanted), ("existingState", now))


def no_tools() -> VimFault:
    return VimFault(
        "ToolsUnavailable", "Cannot complete operation because VMware Tools is not running in this virtual machine."
    )


def busy() -> VimFault:
    return VimFault("TaskInProgress", "The operation is not allowed because another task is already in progress.")


def locked(path: str) -> VimFault:
    text = f"Unable to access file {path} since it is locked"
    return VimFault("FileLocked", text, ("file", path))
