"""Registry hives of a guest, read and edited by hivex inside the appliance (guestfs(3), hivex(3)).

    with Hive.open(appliance, "/Windows/System32/config/SYSTEM", write=True) as hive:
        hive.put(("ControlSet001", "Services", "viostor"), {"Start": 0, "Group": "SCSI miniport"})
        hive.commit()

Values in Python: int is REG_DWORD, str REG_SZ, Expand REG_EXPAND_SZ, list REG_MULTI_SZ, bytes REG_BINARY. Strings in a hive are
UTF-16 LE, as a rule with a NUL at the end. Names are found without regard to case; hivex keeps one open hive for each handle.

Each call is a message to the appliance, and hivex reads all names of a key to find one (some thousands below DeviceIds\\PCI),
so a node that was found, or made, is remembered: it is the key's offset in the hive, and no key is ever moved.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self

from tokvm.guest.appliance import Appliance
from tokvm.guest.base import GuestError

SZ, EXPAND_SZ, BINARY, DWORD, MULTI_SZ = 1, 2, 3, 4, 7
MAX_CHILDREN = 20_000
"""Of one key: a Windows Server's largest (DriverDatabase\\DeviceIds\\PCI) has some thousands."""
MAX_VALUE = 1 << 20

Path = Sequence[str]


class Expand(str):
    """A REG_EXPAND_SZ: `%SystemRoot%\\inf`."""

    __slots__ = ()


Value = int | str | Expand | list[str] | bytes


def pack(value: Value) -> tuple[int, bytes]:
    """Type and bytes, as a hive holds them."""
    match value:
        case bool():
            raise TypeError("a registry value is no bool")
        case int():
            return DWORD, struct.pack("<I", value)
        case Expand():
            return EXPAND_SZ, _utf16(value)
        case str():
            return SZ, _utf16(value)
        case bytes():
            return BINARY, value
        case _:
            return MULTI_SZ, b"".join(_utf16(one) for one in value) + b"\0\0"


def text(data: bytes) -> str:
    """A REG_SZ's text up to its NUL; a lone surrogate or half a character does not make it fail."""
    return data[: len(data) // 2 * 2].decode("utf-16-le", "replace").split("\0")[0]


def texts(data: bytes) -> list[str]:
    """A REG_MULTI_SZ's strings."""
    whole = data[: len(data) // 2 * 2].decode("utf-16-le", "replace")
    return [one for one in whole.split("\0") if one]


class Hive:
    """An open hive; a node is hivex' number of a key, 0 for none. `_known`: (node, name in lower case) → the node below it;
    `_made`: those made here, of which all that is below them is known."""

    def __init__(self, appliance: Appliance, path: str) -> None:
        self._appliance = appliance
        self._g = appliance.g
        self.path = path
        self.root = int(self._g.hivex_root())
        self._known: dict[tuple[int, str], int] = {}
        self._made: set[int] = set()

    @classmethod
    @contextmanager
    def open(cls, appliance: Appliance, path: str, *, write: bool = False) -> Iterator[Self]:
        """GuestError when the file is no hive that hivex understands, or a call inside the block fails."""
        with appliance.translated(f"cannot {'edit' if write else 'read'} the registry hive {path!r}"):
            appliance.g.hivex_open(path, write=write)
            try:
                yield cls(appliance, path)
            finally:
                appliance.g.hivex_close()

    def find(self, path: Path, start: int = 0) -> int:
        """The node at `path` below `start` (0: the root), or 0."""
        node = start or self.root
        for name in path:
            node = self._child(node, name)
            if not node:
                return 0
        return node

    def _child(self, node: int, name: str) -> int:
        key = (node, name.lower())
        if key not in self._known:
            self._known[key] = 0 if node in self._made else int(self._g.hivex_node_get_child(node, name))
        return self._known[key]

    def _add(self, node: int, name: str) -> int:
        made = self._known[node, name.lower()] = int(self._g.hivex_node_add_child(node, name))
        self._made.add(made)
        return made

    def make(self, path: Path, start: int = 0) -> int:
        """The node at `path`, made with those above it where it is not there."""
        node = start or self.root
        for name in path:
            node = self._child(node, name) or self._add(node, name)
        return node

    def children(self, node: int) -> list[tuple[str, int]]:
        """Names and nodes below `node`. GuestError above MAX_CHILDREN."""
        found = self._g.hivex_node_children(node)
        if len(found) > MAX_CHILDREN:
            raise GuestError(f"a registry key with {len(found)} keys below it", where=self.path)
        return [(str(self._g.hivex_node_name(one["hivex_node_h"])), int(one["hivex_node_h"])) for one in found]

    def value(self, node: int, name: str) -> bytes | None:
        """A value's bytes, whatever its type; None when there is none of this name. GuestError above MAX_VALUE."""
        handle = int(self._g.hivex_node_get_value(node, name))
        if not handle:
            return None
        data = bytes(self._g.hivex_value_value(handle))
        if len(data) > MAX_VALUE:
            raise GuestError(f"a registry value {name!r} of {len(data)} bytes", where=self.path)
        return data

    def number(self, node: int, name: str) -> int | None:
        """A REG_DWORD's number; None when there is no such value or it has not four bytes."""
        data = self.value(node, name)
        return struct.unpack("<I", data)[0] if data is not None and len(data) == 4 else None

    def string(self, node: int, name: str) -> str | None:
        data = self.value(node, name)
        return None if data is None else text(data)

    def put(self, path: Path, values: Mapping[str, Value] = {}, start: int = 0) -> int:
        """Make the key and set `values` in it (others stay); "" is the key's default value."""
        node = self.make(path, start)
        for name, value in values.items():
            kind, data = pack(value)
            self._g.hivex_node_set_value(node, name, kind, data)
        return node

    def drop(self, path: Path, start: int = 0) -> bool:
        """Remove the key and all below it; whether it was there."""
        node = self.find(path, start)
        if node:
            self._g.hivex_node_delete_child(node)
            self._known.clear()  # what was below it is gone, too
            self._made.clear()
        return bool(node)

    def commit(self) -> None:
        """Write the hive over its file."""
        self._g.hivex_commit(None)


def control_set(hive: Hive) -> str:
    """The name of a SYSTEM hive's current control set, `ControlSet001`. GuestError when it does not say."""
    node = hive.find(("Select",))
    number = hive.number(node, "Current") if node else None
    if number is None or not 0 < number < 1000 or not hive.find((f"ControlSet{number:03}",)):
        raise GuestError("the registry does not say which control set is the current one", where=hive.path)
    return f"ControlSet{number:03}"


def _utf16(value: str) -> bytes:
    return f"{value}\0".encode("utf-16-le")
