"""The state directory of a played host: one JSON document, locked while it changes, and logs of one JSON line each.

Imports little: every command of a persona is a process that loads this.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class Store(Generic[T]):
    """`read` is a snapshot; inside `change` the state (T, a TypedDict) is ours alone and written at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def read(self) -> T:
        with self.path("state.json").open(encoding="ascii") as file:
            return cast("T", json.load(file))

    @contextlib.contextmanager
    def change(self) -> Iterator[T]:
        """The state, locked; written back unless the body raises or changed nothing (a rename over a file costs 10 ms)."""
        with self.locked():
            text = self.path("state.json").read_text(encoding="ascii")
            state = cast("T", json.loads(text))
            yield state
            if json.dumps(state) != text:
                self.write(state)

    @contextlib.contextmanager
    def locked(self, name: str = "lock") -> Iterator[None]:
        lock = os.open(self.path(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def write(self, state: T) -> None:
        """Only under `locked`."""
        replace(self.path("state.json"), json.dumps(state))

    def append(self, name: str, record: dict[str, object]) -> None:
        """One JSON line, written at once, so that concurrent commands never mix theirs."""
        line = json.dumps({"time": time.time(), **record}) + "\n"
        file = os.open(self.path(name), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)


def new_uuid() -> str:
    """A random uuid; importing the uuid module would cost every command 8 ms."""
    raw = bytearray(os.urandom(16))
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    text = raw.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def replace(path: Path, text: str) -> None:
    """Whoever reads `path` sees the old text or the new one, whole."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    fresh.write_text(text, encoding="ascii")
    fresh.replace(path)
