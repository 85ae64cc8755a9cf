"""What goes wrong, when: STATE_DIR/faults.json, consumed command by command. The kinds are each host's own.

    [{"match": …, "kind": …, "skip": 1, "times": 1, …}, …]

Of the commands that match, the first `skip` are spared and the next `times` (0: all) are hit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar, cast

from tokvm.testing.persona.store import Store, replace


class Spared(TypedDict, total=False):
    """What every host's settings of a fault have."""

    skip: int
    times: int


class Planned(Spared):
    match: str
    kind: str


F = TypeVar("F", bound=Planned)


class FaultPlan(Generic[F]):
    """The faults of one kind of host. F: its faults, a TypedDict over Planned. kinds: those that there are."""

    def __init__(self, kinds: frozenset[str]) -> None:
        self._kinds = kinds

    def take(self, store: Store[Any], matches: Callable[[str], bool]) -> list[F]:
        """The faults that hit a command; `matches` is asked for each one's `match`. Their counters go down."""
        path = store.path("faults.json")
        if not path.exists():
            return []
        with store.locked("faults.lock"):
            plan = self._load(path)
            hit: list[F] = []
            left: list[F] = []
            for fault in plan:
                spared: Planned = fault
                if not matches(spared["match"]):
                    left.append(fault)
                elif spared.get("skip", 0) > 0:
                    left.append(cast("F", {**fault, "skip": spared["skip"] - 1}))
                else:
                    hit.append(fault)
                    left += self._rest(fault)
            if left != plan:
                replace(path, json.dumps(left))
        return hit

    @staticmethod
    def _rest(fault: F) -> list[F]:
        spared: Planned = fault
        times = spared.get("times", 1)
        if times == 0:
            return [fault]
        return [cast("F", {**fault, "times": times - 1})] if times > 1 else []

    def add(self, store: Store[Any], fault: F) -> None:
        if fault["kind"] not in self._kinds:
            raise ValueError(f"no fault kind {fault['kind']!r}")
        path = store.path("faults.json")
        with store.locked("faults.lock"):
            replace(path, json.dumps([*self._load(path), fault]))

    def left(self, store: Store[Any]) -> list[F]:
        """What was planned and has not happened (yet)."""
        with store.locked("faults.lock"):
            return self._load(store.path("faults.json"))

    def clear(self, store: Store[Any]) -> None:
        with store.locked("faults.lock"):
            replace(store.path("faults.json"), "[]")

    def _load(self, path: Path) -> list[F]:
        try:
            with path.open(encoding="ascii") as file:
                plan: list[F] = json.load(file)
                return plan
        except FileNotFoundError:
            return []
