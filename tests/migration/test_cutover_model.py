"""Every state the cutover can reach: the protocol of docs/flow.md as a transition system, searched to the end.

The tool may die between any two steps, any reply may be lost, what was sent may land late, HA starts a source that nothing
fences, a person may lift the fence (until a start of the target was sent) and stop the source again. A state is wrong when

    two      source and target both run
    stale    the target's first start finds bytes older than the source's
    lost     the journal is rolled back, the target had run, and nobody accepted that its writes are gone
    none     the journal is at rest and nothing runs that should
    stuck    no way leads from here to rest with one copy running

Each mutant leaves one rule out, and each one is caught.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest

RULES = {
    "fence": "the source is fenced, and a target is started only while it is",
    "witness": "the source is seen off, by asking it, before anything depends on it",
    "recheck": "the source is looked at again right before the start",
    "record first": "the journal goes back to FENCED before the fence is set again",
    "refence": "when the fence was gone, the final delta is taken again",
    "intent": "START_INTENT and `maybe` are recorded before the start is sent",
    "revoke": "a rollback undefines the target and sees it gone before it touches the source",
    "order": "a rollback takes the target away first, and lifts the fence after that",
    "pending": "a rollback waits until no stop is under way any more",
    "consent": "behind the commit point only a person rolls back",
    "seen": "STARTED is recorded only when the target is seen running",
}
CAUGHT_ALONE = ("fence", "recheck", "refence", "record first", "intent", "revoke", "order", "pending", "consent", "seen")


class State(NamedTuple):
    """Truth: src, fence, dst, defined, fresh, frozen, stopping, starting, ran, consent. Journal: phase, maybe.
    The process: alive, armed (it has just looked), here (it sent every start itself), todo (the journal has yet to go back)."""

    phase: str = "COPY"
    alive: bool = True
    src: bool = True
    fence: bool = False
    defined: bool = False
    dst: bool = False
    fresh: bool = False
    frozen: str = "no"
    stopping: bool = False
    starting: bool = False
    ran: bool = False
    maybe: bool = False
    armed: bool = False
    here: bool = False
    consent: bool = False
    todo: bool = False


Step = tuple[str, State]


@dataclass(frozen=True)
class Protocol:
    """The rules that hold; a mutant has one fewer."""

    without: frozenset[str] = frozenset()

    def holds(self, rule: str) -> bool:
        return rule not in self.without

    # ---- what the tool believes when it looks

    def sees_off(self, s: State) -> bool:
        return (not s.src and not s.stopping) or not self.holds("witness")

    def sees_fence(self, s: State) -> bool:
        return s.fence or not self.holds("fence")

    def sees_safe(self, s: State) -> bool:
        return self.sees_off(s) and self.sees_fence(s)

    # ---- steps

    def steps(self, s: State) -> Iterator[Step]:
        yield from environment(s)
        if not s.alive:
            yield "tool resumed", s._replace(alive=True)
            return
        yield "tool killed", s._replace(alive=False, armed=False, here=False, todo=False)
        if s.todo:
            yield "back to FENCED", s._replace(phase="FENCED", frozen="no", todo=False)
            return
        yield from {
            "COPY": self.copy,
            "STOP_INTENT": self.stop,
            "FENCED": self.final,
            "FINAL": self.intend,
            "START_INTENT": self.start,
            "STARTED": self.prove,
            "ROLLBACK_INTENT": self.roll_back,
        }.get(s.phase, nothing)(s)
        if s.phase in ("STOP_INTENT", "FENCED", "FINAL"):
            yield "something fails: ROLLBACK_INTENT", s._replace(phase="ROLLBACK_INTENT", armed=False)

    def copy(self, s: State) -> Iterator[Step]:
        if s.src and not s.dst:
            yield "STOP_INTENT", s._replace(phase="STOP_INTENT")

    def stop(self, s: State) -> Iterator[Step]:
        if self.holds("fence") and not s.fence:
            yield "fence", s._replace(fence=True)
            return
        if s.src:
            yield "stop", s._replace(src=False)
            yield "stop sent, lands late", s._replace(stopping=True)
        if self.sees_safe(s):
            yield "FENCED", s._replace(phase="FENCED", frozen="no")

    def final(self, s: State) -> Iterator[Step]:
        if not self.sees_safe(s):
            yield from self.refence(s)
            return
        if s.frozen == "no":
            yield "freeze", s._replace(frozen="stale" if s.src else "current")
        else:
            yield "copy the final delta", s._replace(fresh=s.frozen == "current" and not s.src, phase="FINAL")

    def refence(self, s: State) -> Iterator[Step]:
        """The journal goes back to FENCED first, and the fence is set after that; both only when it is seen to be gone."""
        if not self.sees_off(s) or s.fence:
            return
        back = s._replace(phase="FENCED", frozen="no")
        if not self.holds("refence"):
            yield "fence again", s._replace(fence=True)
        elif not self.holds("record first"):
            yield "fence again", s._replace(fence=True, todo=True)
        elif s != back:
            yield "back to FENCED", back
        else:
            yield "fence again", back._replace(fence=True)

    def intend(self, s: State) -> Iterator[Step]:
        if not self.sees_safe(s):
            yield from self.refence(s)
        elif self.holds("intent"):
            yield "START_INTENT", s._replace(phase="START_INTENT")
        elif not s.dst:
            yield "start target without intent", s._replace(defined=True, dst=True, ran=True)
        else:
            yield "STARTED", s._replace(phase="STARTED")

    def start(self, s: State) -> Iterator[Step]:
        if s.dst or not self.holds("seen"):
            yield "STARTED", s._replace(phase="STARTED", armed=False)
            return
        if not s.defined:
            yield "define", s._replace(defined=True)
        elif not s.armed:
            if self.sees_safe(s) or not self.holds("recheck"):
                yield "look; note maybe", s._replace(armed=True, here=s.here or not s.maybe, maybe=True)
        else:
            yield "start", s._replace(dst=True, ran=True, armed=False)
            yield "start sent, lands late", s._replace(starting=True, armed=False)
            yield "start refused", s._replace(armed=False)
        if s.maybe and s.here and not s.armed:
            yield "give up: undefine, seen gone", s._replace(defined=False, maybe=False, here=False, phase="ROLLBACK_INTENT")
        if not s.maybe and not self.sees_safe(s):
            yield "the source runs: undefine", s._replace(defined=False, phase="ROLLBACK_INTENT")
        yield from self.back_behind_commit_point(s)

    def prove(self, s: State) -> Iterator[Step]:
        yield from self.back_behind_commit_point(s)
        if s.dst and s.defined:
            yield "COMMITTED", s._replace(phase="COMMITTED")

    def back_behind_commit_point(self, s: State) -> Iterator[Step]:
        if not s.maybe:
            yield "never sent: ROLLBACK_INTENT", s._replace(phase="ROLLBACK_INTENT")
            return
        yield "a person accepts the loss", s._replace(phase="ROLLBACK_INTENT", consent=True, armed=False)
        if not self.holds("consent"):
            yield "rolls back by itself", s._replace(phase="ROLLBACK_INTENT", armed=False)

    def roll_back(self, s: State) -> Iterator[Step]:
        if s.dst and (self.holds("revoke") or s.fence):
            yield "stop target", s._replace(dst=False)
        if s.defined and not s.dst and self.holds("revoke"):
            yield "undefine target", s._replace(defined=False)
        gone = not s.dst and (not s.defined or not self.holds("revoke"))
        if not gone and self.holds("order"):
            return
        if s.stopping and self.holds("pending"):
            return
        if s.fence:
            yield "unfence", s._replace(fence=False)
        elif not s.src:
            yield "start source", s._replace(src=True, fresh=False)
        elif gone:
            yield "ROLLED_BACK", s._replace(phase="ROLLED_BACK")


def nothing(_: State) -> Iterator[Step]:
    return iter(())


def environment(s: State) -> Iterator[Step]:
    """What others do, whenever they like."""
    if s.src and (s.fresh or s.frozen == "current"):
        yield "source writes", s._replace(fresh=False, frozen="stale" if s.frozen == "current" else s.frozen)
    busy = s.phase in ("STOP_INTENT", "FENCED", "FINAL", "START_INTENT", "ROLLBACK_INTENT")
    if busy and not s.src and not s.fence:
        yield "HA starts the source", s._replace(src=True, fresh=False)
    unsent = s.phase == "START_INTENT" and not s.maybe
    if (s.phase in ("FENCED", "FINAL") or unsent) and s.fence:
        yield "a person lifts the fence", s._replace(fence=False)
    if s.phase in ("FENCED", "FINAL") and s.src:
        yield "a person stops the source", s._replace(src=False)
    if s.stopping:
        yield "late stop lands", s._replace(src=False, stopping=False)
    if s.starting:
        landed = s._replace(starting=False, dst=True, ran=True) if s.defined else s._replace(starting=False)
        yield "late start lands" if s.defined else "late start finds no domain", landed


def wrong(s: State, before: State | None) -> str | None:
    if s.src and s.dst:
        return "two"
    first = s.dst and before is not None and not before.ran
    if first and not s.fresh:
        return "stale"
    if s.phase == "ROLLED_BACK" and s.ran and not s.consent:
        return "lost"
    if s.phase == "ROLLED_BACK" and not s.src:
        return "none"
    if s.phase == "STARTED" and not s.ran:
        return "none"
    return None


def at_rest(s: State) -> bool:
    return (s.phase in ("COPY", "ROLLED_BACK") and s.src and not s.dst) or (s.phase in ("STARTED", "COMMITTED") and s.dst)


@dataclass
class Search:
    """All reachable states, how each was first reached, and what is wrong with some."""

    came_from: dict[State, tuple[State, str] | None]
    wrong: dict[str, State]

    def trace(self, s: State) -> str:
        names = []
        while (step := self.came_from[s]) is not None:
            s, name = step
            names.append(name)
        return " > ".join(reversed(names))


def search(protocol: Protocol) -> Search:
    found = Search({State(): None}, {})
    back: dict[State, list[State]] = {}
    waiting = deque([State()])
    while waiting:
        s = waiting.popleft()
        for name, to in protocol.steps(s):
            back.setdefault(to, []).append(s)
            if to in found.came_from:
                continue
            found.came_from[to] = (s, name)
            kind = wrong(to, s)
            if kind is None:
                waiting.append(to)
            else:
                found.wrong.setdefault(kind, to)
    _look_for_stuck(found, back)
    return found


def _look_for_stuck(found: Search, back: dict[State, list[State]]) -> None:
    good = {s for s in found.came_from if at_rest(s)}
    waiting = deque(good)
    while waiting:
        for before in back.get(waiting.popleft(), []):
            if before not in good:
                good.add(before)
                waiting.append(before)
    stuck = [s for s in found.came_from if s not in good and s not in found.wrong.values() and wrong(s, None) is None]
    if stuck:
        found.wrong["stuck"] = stuck[0]


def test_the_protocol_has_no_wrong_state() -> None:
    found = search(Protocol())
    assert {kind: found.trace(s) for kind, s in found.wrong.items()} == {}
    assert len(found.came_from) > 200
    phases = {s.phase for s in found.came_from}
    assert phases == {
        "COPY", "STOP_INTENT", "FENCED", "FINAL", "START_INTENT", "STARTED", "COMMITTED", "ROLLBACK_INTENT", "ROLLED_BACK",
    }  # fmt: skip


@pytest.mark.parametrize("rule", CAUGHT_ALONE)
def test_each_rule_is_needed(rule: str) -> None:
    found = search(Protocol(frozenset({rule})))
    assert found.wrong, f"nothing goes wrong without: {RULES[rule]}"


@pytest.mark.parametrize(
    ("without", "kind"),
    [
        ({"witness"}, "stale"),
        ({"witness", "recheck"}, "two"),
        ({"fence", "recheck"}, "two"),
        ({"revoke", "consent"}, "lost"),
    ],
)
def test_what_goes_wrong_is_what_is_expected(without: set[str], kind: str) -> None:
    assert kind in search(Protocol(frozenset(without))).wrong


def test_a_mutant_differs_by_its_rule_only() -> None:
    assert replace(Protocol(), without=frozenset()) == Protocol()
    assert set(CAUGHT_ALONE) < set(RULES)
