"""vim-cmd's way to print an object.

    (vim.vm.Summary) {
       vm = 'vim.VirtualMachine:3',
       runtime = (vim.vm.RuntimeInfo) {
          powerState = "poweredOn",
          question = (vim.vm.QuestionInfo) null,
          bootTime = <unset>
       }
    }

Three blanks a level; a comma and a blank behind each field but the last. Up to ESXi 6.0 `dynamicType = <unset>` comes first and
the last field has its comma too (OLD); some hosts leave out what is unset (LEAN). Strings are printed as they are: no quote and
no line's end in them is escaped. Seen in published dumps of ESXi 5.0, 6.5, 7.0.3, 8.0.1 and 9.0.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

INDENT = "   "
NEW, OLD, LEAN = "new", "old", "lean"


class Null(NamedTuple):
    """`(type) null`"""

    type: str


class Ref(NamedTuple):
    """`'vim.HostSystem:ha-host'`"""

    name: str


class Unset(NamedTuple):
    """`<unset>`"""


class Object(NamedTuple):
    type: str
    fields: Sequence[tuple[str, Value]]


class Many(NamedTuple):
    """`(type) [ … ]`"""

    type: str
    items: Sequence[Value]


Value = Object | Many | Null | Ref | Unset | str | int | bool
UNSET = Unset()


def dump(value: Value, *, style: str) -> str:
    return "\n".join(_lines(value, "", style=style)) + "\n"


def _lines(value: Value, indent: str, *, style: str) -> list[str]:
    """The first without indentation: it stands behind its name."""
    match value:
        case Object(type_, fields):
            named: list[tuple[str, Value]] = [("dynamicType", UNSET), *fields] if style == OLD else list(fields)
            if style == LEAN:
                named = [(name, one) for name, one in named if one != UNSET]
            inside = [_named(name, _lines(one, indent + INDENT, style=style)) for name, one in named]
            return _block(f"({type_}) {{", inside, "}", indent, last_comma=style == OLD)
        case Many(type_, []):
            return [f"({type_}) []"]
        case Many(type_, items):
            inside = [_lines(one, indent + INDENT, style=style) for one in items]
            return _block(f"({type_}) [", inside, "]", indent, last_comma=False)
        case _:
            return [_scalar(value)]


def _named(name: str, lines: list[str]) -> list[str]:
    return [f"{name} = {lines[0]}", *lines[1:]]


def _block(head: str, inside: list[list[str]], tail: str, indent: str, *, last_comma: bool) -> list[str]:
    found = [head]
    for number, lines in enumerate(inside):
        comma = ", " if last_comma or number < len(inside) - 1 else ""
        found += [f"{indent}{INDENT}{lines[0]}", *lines[1:-1], lines[-1]] if len(lines) > 1 else [f"{indent}{INDENT}{lines[0]}"]
        found[-1] += comma
    return [*found, f"{indent}{tail}"]


def _scalar(value: Value) -> str:
    match value:
        case Null(type_):
            return f"({type_}) null"
        case Ref(name):
            return f"'{name}'"
        case Unset():
            return "<unset>"
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case _:
            return f'"{value}"'


def zulu(seconds: float) -> str:
    """A moment as hostd writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1e6):06}Z"
