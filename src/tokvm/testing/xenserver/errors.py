"""What xe prints when it refuses: a sentence, then one `name: value` line for each parameter, on stderr; exit 1.

The sentences are xapi's own (datamodel_errors.ml, as in the XenServer Management API guide, "Error handling")."""

from __future__ import annotations

SENTENCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "UUID_INVALID": ("The uuid you supplied was invalid.", ("type", "uuid")),
    "VM_BAD_POWER_STATE": (
        "You attempted an operation on a VM that was not in an appropriate power state at the time; for example, "
        "you attempted to start a VM that was already running.  The parameters returned are the VM's handle, and the expected "
        "and actual VM state at the time of the call.",
        ("vm", "expected", "actual"),
    ),
    "OPERATION_BLOCKED": (
        "You attempted an operation that was explicitly blocked (see the blocked_operations field of the given object).",
        ("ref", "code"),
    ),
    "OTHER_OPERATION_IN_PROGRESS": ("Another operation involving the object is currently in progress", ("class", "object")),
    "VDI_IN_USE": (
        "This operation cannot be performed because this VDI is in use by some other operation",
        ("vdi", "operation"),
    ),
    "MAP_DUPLICATE_KEY": (
        "You tried to add a key-value pair to a map, but that key is already there.",
        ("type", "param_name", "uuid", "key"),
    ),
    "VM_FAILED_SHUTDOWN_ACKNOWLEDGMENT": ("VM didn't acknowledge the need to shutdown.", ("vm",)),
    "VDI_INCOMPATIBLE_TYPE": (
        "This operation cannot be performed because the specified VDI is of an incompatible type "
        "(eg: an HA statefile cannot be attached to a guest)",
        ("vdi", "type"),
    ),
    "SR_FULL": ("The SR is full. Requested new size exceeds the maximum size", ("requested", "maximum")),
    "HOST_IS_SLAVE": (
        "You cannot make regular API calls directly on a pool member. Please pass API calls via the coordinator host.",
        ("Coordinator IP address",),
    ),
    "INTERNAL_ERROR": (
        "The server failed to handle your request, due to an internal error. The given message may give details useful for "
        "debugging the problem.",
        ("message",),
    ),
}


class XeError(Exception):
    """xe ends with `text` on stderr and exit code `code`."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.text = text
        self.code = code


class NotInContract(XeError):
    """A command that no row of the contract allows: a violation, recorded."""


def api_error(name: str, *values: str) -> XeError:
    """As xe prints an API failure it knows; unknown names come as error code and parameters."""
    known = SENTENCES.get(name)
    if known is None:
        return XeError(f"Error code: {name}\nError parameters: {', '.join(values)}")
    sentence, names = known
    return XeError("\n".join([sentence, *(f"{key}: {value}" for key, value in zip(names, values, strict=False))]))


def no_such(kind: str, uuid: str) -> XeError:
    return api_error("UUID_INVALID", kind, uuid)


def bad_power(uuid: str, name: str, expected: str, actual: str) -> XeError:
    return api_error("VM_BAD_POWER_STATE", f"{uuid} ({name})", expected, actual)
