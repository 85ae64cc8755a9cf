"""A boot menu's entry, and how its variables and versions read, whichever loader wrote it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

LINE_LIMIT = 8192
OPTIONS_LIMIT = 4096
"""The kernel's own limit on x86 is 2048 (COMMAND_LINE_SIZE)."""
ENTRIES_LIMIT = 500
_VARIABLE = re.compile(r"\$(?:\{(\w{1,64})\}|(\w{1,64}))")
_VERSION_PART = re.compile(r"\d{1,18}|[a-zA-Z]+")


@dataclass(frozen=True, slots=True)
class BootEntry:
    """kernel, initrds: paths as the loader sees them, from the root of *its* file system. options: its command line."""

    title: str
    ident: str = ""
    kernel: str = ""
    initrds: tuple[str, ...] = ()
    options: str = ""


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """`$name` and `${name}` replaced, once: a value's own `$` stays nothing. Unknown ones vanish, as in GRUB."""
    return _VARIABLE.sub(lambda match: variables.get(match[1] or match[2], "")[:OPTIONS_LIMIT], text)[: 4 * OPTIONS_LIMIT]


def options_of(words: list[str], variables: Mapping[str, str]) -> str:
    """The command line, cut at OPTIONS_LIMIT. It stops early: thousands of `$x` with a long x each would be gigabytes."""
    found, length = [], 0
    for one in words:
        found.append(expanded(one, variables))
        length += len(found[-1]) + 1
        if length > 4 * OPTIONS_LIMIT:
            break
    return " ".join(" ".join(found).split())[:OPTIONS_LIMIT]


def words_of(line: str) -> list[str]:
    """A line's words as a shell reads them; by blanks where the quotes do not match."""
    line = line[:LINE_LIMIT]
    if not any(one in line for one in "'\"\\"):
        return line.split()
    try:
        return shlex.split(line)
    except ValueError:
        return line.split()


def version_key(version: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts versions as rpm and dpkg roughly do: numbers as numbers, above letters."""
    parts = _VERSION_PART.findall(version[:256])
    return tuple((1, int(one), "") if one.isdigit() else (0, 0, one) for one in parts)
