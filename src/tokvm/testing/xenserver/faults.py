"""What goes wrong, when: STATE_DIR/faults.json, consumed command by command.

    [{"match": "xe vdi-export", "kind": "stall", "skip": 1, "times": 1, "at": 1048576, …}, …]

`match` is a piece of the command line; the first `skip` matching commands are spared, the next `times` (0: all) are hit.

| kind          | what happens                                                                                       |
|---------------|----------------------------------------------------------------------------------------------------|
| refuse        | nothing is done; `text` (or an API error `code`) on stderr, exit 1                                 |
| wait          | `seconds` pass before anything is done                                                             |
| lost_reply    | it is done, but the connection dies before the answer                                              |
| mute          | it is done, but xe says nothing and ends with exit 0                                               |
| drop          | the connection dies before it is done                                                              |
| hang          | nothing is done and nothing is ever answered                                                       |
| late          | the connection dies at once; it is done `seconds` later (`hidden`: not shown in current-operations)|
| short         | export: ends after `at` bytes, exit 0                                                              |
| fail          | export: ends after `at` bytes with an error and exit 1                                             |
| cut           | export: the connection dies after `at` bytes                                                       |
| stall         | export: after `at` bytes nothing more comes and nothing ends, as from a stopped process            |
| flip          | export: bit 0 of byte `at` (negative: from the end) is turned over                                 |
| slow          | export: at most `rate` bytes a second                                                              |
| new_identity  | export: another uuid and timestamp each time                                                       |
| wrong_parent  | export: the delta names a parent that is not the base                                              |
| full          | export: the whole disk instead of the delta                                                        |
| http_500      | export: the stream is an HTTP error page, exit 0 (xen-api 4603)                                    |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

from tokvm.testing.xenserver.state import Store, replace

EXPORT_KINDS = frozenset({"short", "fail", "cut", "stall", "flip", "slow", "new_identity", "wrong_parent", "full", "http_500"})
COMMAND_KINDS = frozenset({"refuse", "wait", "lost_reply", "mute", "drop", "hang", "late"})


class Settings(TypedDict, total=False):
    skip: int
    times: int
    at: int
    seconds: float
    rate: float
    text: str
    code: str
    hidden: bool


class Fault(Settings):
    match: str
    kind: str


def take(store: Store, line: str) -> list[Fault]:
    """The faults that hit this command; their counters go down."""
    path = store.path("faults.json")
    if not path.exists():
        return []
    with store.locked("faults.lock"):
        plan = _load(path)
        hit, left = [], []
        for fault in plan:
            if fault["match"] not in line:
                left.append(fault)
            elif fault.get("skip", 0) > 0:
                left.append({**fault, "skip": fault["skip"] - 1})
            else:
                hit.append(fault)
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
    if kind not in EXPORT_KINDS | COMMAND_KINDS:
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
