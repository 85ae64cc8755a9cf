"""What goes wrong, when: STATE_DIR/faults.json, consumed command by command.

    [{"match": "checkpoint", "kind": "lost_reply", "skip": 1, "times": 1, …}, …]

`match` is a script's name, or "" for any; the first `skip` commands that match are spared, the next `times` (0: all) are hit.

| kind        | what happens                                                                                        |
|-------------|-----------------------------------------------------------------------------------------------------|
| error       | nothing is done; the script reports an error with `type`, `hresult`, `id`, `message`                |
| error_after | it is done, and the script reports the error all the same                                           |
| wait        | `seconds` pass before anything is done                                                              |
| lost_reply  | it is done, but the connection dies before the answer                                               |
| drop        | the connection dies before it is done                                                               |
| hang        | nothing is done and nothing is ever answered                                                        |
| late        | the connection dies at once; it is done `seconds` later, by whatever the host has in hand           |
| cut_answer  | it is done; the answer ends in the middle, exit 0                                                   |
| no_answer   | it is done; PowerShell prints nothing at all, exit 0                                                |
| crash       | nothing is done; PowerShell dies with CLIXML on stderr, exit 1                                      |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

from tokvm.testing.hyperv.state import Store, replace

KINDS = frozenset({"error", "error_after", "wait", "lost_reply", "drop", "hang", "late", "cut_answer", "no_answer", "crash"})


class Settings(TypedDict, total=False):
    skip: int
    times: int
    seconds: float
    type: str
    hresult: int
    id: str
    message: str


class Fault(Settings):
    match: str
    kind: str


def take(store: Store, script: str) -> dict[str, Fault]:
    """The faults that hit this command, by kind; their counters go down."""
    path = store.path("faults.json")
    if not path.exists():
        return {}
    with store.locked("faults.lock"):
        plan = _load(path)
        hit: dict[str, Fault] = {}
        left = []
        for fault in plan:
            if fault["match"] not in ("", script):
                left.append(fault)
            elif fault.get("skip", 0) > 0:
                left.append({**fault, "skip": fault["skip"] - 1})
            else:
                hit[fault["kind"]] = fault
                left += _rest(fault)
        if left != plan:
            replace(path, json.dumps(left))
    return hit


def _rest(fault: Fault) -> list[Fault]:
    times = fault.get("times", 1)
    if times == 0:
        return [fault]
    return [{**fault, "times": times - 1}] if times > 1 else []


def add(store: Store, match: str, kind: str, settings: Settings) -> None:
    if kind not in KINDS:
        raise ValueError(f"no fault kind {kind!r}")
    fault: Fault = {**settings, "match": match, "kind": kind}
    path = store.path("faults.json")
    with store.locked("faults.lock"):
        replace(path, json.dumps([*_load(path), fault]))


def left(store: Store) -> list[Fault]:
    """What was planned and has not happened (yet)."""
    with store.locked("faults.lock"):
        return _load(store.path("faults.json"))


def clear(store: Store) -> None:
    with store.locked("faults.lock"):
        replace(store.path("faults.json"), "[]")


def _load(path: Path) -> list[Fault]:
    try:
        with path.open(encoding="ascii") as file:
            plan: list[Fault] = json.load(file)
            return plan
    except FileNotFoundError:
        return []
