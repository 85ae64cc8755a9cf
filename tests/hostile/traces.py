"""What did a process touch? Read from `strace -ff -y`, one file a process."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CALLS = "open,openat,openat2,creat,execve,execveat,connect,bind,unlink,unlinkat,rename,renameat,renameat2,truncate,link,linkat"
_CALL = re.compile(r"^([a-z0-9_]+)\((.*)$")
_TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')
_AT = re.compile(r"^(?:AT_FDCWD|[0-9]+)<((?:[^<>\\]|\\.)*)>")
_ESCAPE = re.compile(rb"\\([0-7]{1,3}|.)", re.DOTALL)
_LETTERS = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"v": b"\v", b"f": b"\f"}


@dataclass(frozen=True, slots=True)
class Call:
    """paths: that it names, absolute. text: the whole line."""

    name: str
    paths: tuple[str, ...]
    text: str

    @property
    def writes(self) -> bool:
        return self.name in ("unlink", "unlinkat", "rename", "renameat", "renameat2", "creat", "truncate") or bool(
            re.search(r"\bO_(WRONLY|RDWR|CREAT|TRUNC)\b", self.text)
        )

    @property
    def opens(self) -> bool:
        return self.name in ("open", "openat", "openat2", "creat")


def calls(trace: Path) -> Iterator[Call]:
    for line in trace.read_bytes().decode("latin-1").splitlines():
        match = _CALL.match(line)
        if match is None:
            continue
        name, rest = match.groups()
        base = _AT.match(rest)
        texts = _TEXT.findall(rest) if name != "execve" else _TEXT.findall(rest)[:1]
        paths = tuple(_absolute(_plain(text), _plain(base[1]) if base else "/") for text in texts)
        yield Call(name, paths, line)


def _plain(text: str) -> str:
    """As strace writes a string: C's escapes for what is no printable ASCII."""

    def one(match: re.Match[bytes]) -> bytes:
        found = match[1]
        return bytes([int(found, 8)]) if found.isdigit() else _LETTERS.get(found, found)

    return os.fsdecode(_ESCAPE.sub(one, text.encode("latin-1")))


def _absolute(path: str, base: str) -> str:
    """Without resolving links: what was asked for. An empty path is the base itself (AT_EMPTY_PATH)."""
    return os.path.normpath(f"{base}/{path}" if not path.startswith("/") else path) if path else base
