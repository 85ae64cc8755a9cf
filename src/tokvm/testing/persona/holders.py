"""Which sftp-server holds which file.

STATE_DIR/handles/<pid>.json   {"pid", "tick", "started", "paths": {handle: path as the host names it}} of one sftp-server

A process that is gone holds nothing, unless orphans are on: then what it held when its connection broke stays held by its
record, as by an sftp-server that its sshd left behind, until the record is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any, TypedDict

from tokvm.testing import pids
from tokvm.testing.persona.store import Store, replace


class Holder(TypedDict):
    pid: int
    tick: int
    started: float
    paths: dict[str, str]


def this_process() -> Holder:
    """One that holds nothing yet."""
    return Holder(pid=os.getpid(), tick=pids.start_tick(os.getpid()) or 0, started=time.time(), paths={})


def note(store: Store[Any], holder: Holder) -> None:
    replace(store.path("handles", f"{holder['pid']}.json"), json.dumps(holder))


def forget(store: Store[Any], pid: int) -> None:
    store.path("handles", f"{pid}.json").unlink(missing_ok=True)


def is_alive(holder: Holder) -> bool:
    """A real process of ours; else it is only remembered."""
    return pids.start_tick(holder["pid"]) == holder["tick"]


def holders(store: Store[Any], *, orphans: bool) -> list[Holder]:
    """Every sftp-server there is: the living, and the orphans that hold something."""
    found = []
    for path in sorted(store.path("handles").glob("*.json")):
        with contextlib.suppress(FileNotFoundError):
            holder: Holder = json.loads(path.read_text(encoding="ascii"))
            if is_alive(holder) or (orphans and holder["paths"]):
                found.append(holder)
            else:
                path.unlink(missing_ok=True)
    return found
