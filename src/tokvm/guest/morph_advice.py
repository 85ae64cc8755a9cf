"""What an operator does about a morph that stands in the way: every morph is undone by the command that made it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Advice:
    """The fix of an error. half: the disks hold half a morph; touched: somebody wrote to the disks of a whole one since."""

    half: str
    touched: str


UNMORPH = Advice(
    half="undo it first: tokvm unmorph",
    touched="if they shall stay so: tokvm unmorph --forget; if the morph shall go: tokvm unmorph, and copy them anew",
)
"""Disks alone."""


def of_cutover(migration: str) -> Advice:
    """A migration's disks, before their VM has run."""
    return Advice(
        half=f"undo it first: tokvm rollback {migration}",
        touched=f"go back, and copy them anew: tokvm rollback {migration}, then tokvm sync",
    )


def of_modernise(migration: str) -> Advice:
    """A migrated VM's disks: it ran on them, so they are worth more than their source's."""
    again = f"tokvm modernise {migration}"
    return Advice(half=f"do not start it; {again} puts the disks right first", touched=f"{again} keeps them, and goes on")
