"""Where a migration stands, and every way from there: one table. The journal refuses whatever is not a row of it.

    COPY ─► STOP_INTENT ─► FENCED ─► FINAL ─► (MORPHED) ─► START_INTENT ─► STARTED ─► COMMITTED
      ▲          └──────────┴─────────┴───────────┴───────────────┴───────────┴───────────┤
      └── ROLLED_BACK ◄── ROLLBACK_INTENT ◄───────────────────────────────────────────────┘

An INTENT is recorded before the act; what follows it is recorded after the world was asked. START_INTENT is the commit point:
before it a rollback loses nothing, behind it the target may have written. docs/flow.md says what a resume does in each phase.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    COPY = "COPY"
    STOP_INTENT = "STOP_INTENT"
    FENCED = "FENCED"
    FINAL = "FINAL"
    MORPHED = "MORPHED"
    START_INTENT = "START_INTENT"
    STARTED = "STARTED"
    COMMITTED = "COMMITTED"
    ROLLBACK_INTENT = "ROLLBACK_INTENT"
    ROLLED_BACK = "ROLLED_BACK"


class Event(StrEnum):
    """What happened, or is about to (…_INTENT phases)."""

    CUT_OVER = "cut-over"
    SOURCE_OFF = "source-off"
    REFENCED = "refenced"
    FINAL_DONE = "final-done"
    MORPH_DONE = "morph-done"
    START = "start"
    TARGET_ON = "target-on"
    COMMIT = "commit"
    ROLL_BACK = "roll-back"
    SOURCE_BACK = "source-back"
    SYNC_AGAIN = "sync-again"


@dataclass(frozen=True, slots=True)
class Transition:
    event: Event
    source: Phase
    target: Phase


TRANSITIONS: tuple[Transition, ...] = (
    Transition(Event.CUT_OVER, Phase.COPY, Phase.STOP_INTENT),
    Transition(Event.SOURCE_OFF, Phase.STOP_INTENT, Phase.FENCED),
    Transition(Event.FINAL_DONE, Phase.FENCED, Phase.FINAL),
    Transition(Event.MORPH_DONE, Phase.FINAL, Phase.MORPHED),
    Transition(Event.START, Phase.FINAL, Phase.START_INTENT),
    Transition(Event.START, Phase.MORPHED, Phase.START_INTENT),
    Transition(Event.TARGET_ON, Phase.START_INTENT, Phase.STARTED),
    Transition(Event.COMMIT, Phase.STARTED, Phase.COMMITTED),
    # the fence was found gone while the source was off: it may have run, so the final delta is taken again
    Transition(Event.REFENCED, Phase.FENCED, Phase.FENCED),
    Transition(Event.REFENCED, Phase.FINAL, Phase.FENCED),
    Transition(Event.REFENCED, Phase.MORPHED, Phase.FENCED),
    Transition(Event.ROLL_BACK, Phase.STOP_INTENT, Phase.ROLLBACK_INTENT),
    Transition(Event.ROLL_BACK, Phase.FENCED, Phase.ROLLBACK_INTENT),
    Transition(Event.ROLL_BACK, Phase.FINAL, Phase.ROLLBACK_INTENT),
    Transition(Event.ROLL_BACK, Phase.MORPHED, Phase.ROLLBACK_INTENT),
    Transition(Event.ROLL_BACK, Phase.START_INTENT, Phase.ROLLBACK_INTENT),
    Transition(Event.ROLL_BACK, Phase.STARTED, Phase.ROLLBACK_INTENT),
    Transition(Event.ROLL_BACK, Phase.COMMITTED, Phase.ROLLBACK_INTENT),
    Transition(Event.SOURCE_BACK, Phase.ROLLBACK_INTENT, Phase.ROLLED_BACK),
    Transition(Event.SYNC_AGAIN, Phase.ROLLED_BACK, Phase.COPY),
)

AT_REST = frozenset({Phase.COPY, Phase.STARTED, Phase.COMMITTED, Phase.ROLLED_BACK})
"""Phases in which one copy runs and nothing is under way; from every other one the next command has to go on."""

LOSSLESS_ROLLBACK = frozenset({Phase.STOP_INTENT, Phase.FENCED, Phase.FINAL, Phase.MORPHED})
"""Phases in which the target cannot have run, so that going back loses nothing."""


def after(event: Event, phase: Phase) -> Phase | None:
    """Where `event` leads from `phase`; None when there is no such way."""
    return next((row.target for row in TRANSITIONS if row.event is event and row.source is phase), None)
