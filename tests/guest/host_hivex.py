"""libguestfs' hivex calls, made by the host's own hivex on a file of the host, and counted: milliseconds, no appliance."""

from __future__ import annotations

import importlib
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any


class HostHivex:
    """An appliance and its `g` at once. `calls`: by name; `asked`: (node, name) of each search for a key."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.asked: list[tuple[int, str]] = []
        self._hive: Any = None

    @property
    def g(self) -> HostHivex:
        return self

    def translated(self, what: str) -> nullcontext[None]:
        return nullcontext()

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("hivex_"):
            self.calls[name] += 1
        return super().__getattribute__(name)

    def hivex_open(self, path: str, *, write: bool) -> None:
        self._path = path
        self._hive = importlib.import_module("hivex").Hivex(path, write=write)

    def hivex_close(self) -> None:
        self._hive = None

    def hivex_root(self) -> int:
        return int(self._hive.root())

    def hivex_node_get_child(self, node: int, name: str) -> int:
        self.asked.append((node, name.lower()))
        return int(self._hive.node_get_child(node, name) or 0)

    def hivex_node_add_child(self, node: int, name: str) -> int:
        return int(self._hive.node_add_child(node, name))

    def hivex_node_delete_child(self, node: int) -> None:
        self._hive.node_delete_child(node)

    def hivex_node_get_value(self, node: int, name: str) -> int:
        try:
            return int(self._hive.node_get_value(node, name) or 0)
        except RuntimeError:  # where libguestfs says 0
            return 0

    def hivex_value_value(self, value: int) -> bytes:
        return bytes(self._hive.value_value(value)[1])

    def hivex_node_set_value(self, node: int, name: str, kind: int, data: bytes) -> None:
        self._hive.node_set_value(node, {"key": name, "t": kind, "value": data})

    def hivex_commit(self, path: str | None) -> None:
        self._hive.commit(path or self._path)


def keys_of(path: Path) -> dict[str, dict[str, tuple[int, bytes]]]:
    """All of a hive: key → value → (type, bytes)."""
    hive = importlib.import_module("hivex").Hivex(str(path))
    found: dict[str, dict[str, tuple[int, bytes]]] = {}

    def walk(node: int, at: str) -> None:
        values = {hive.value_key(one): hive.value_value(one) for one in hive.node_values(node)}
        found[at] = {name: (int(kind), bytes(data)) for name, (kind, data) in values.items()}
        for child in hive.node_children(node):
            walk(child, f"{at}\\{hive.node_name(child)}")

    walk(hive.root(), "")
    return found
