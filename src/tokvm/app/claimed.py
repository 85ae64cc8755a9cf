"""Disks that a migration writes to are not for others: its next pass would write over what they did, and nobody would know."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokvm.core.errors import UnsafeTarget
from tokvm.core.text import readable
from tokvm.migration.journal import Journal
from tokvm.migration.runner import NEXT
from tokvm.targets.identities import identities_of, same_place


def refuse_claimed(paths: Iterable[str], state_dir: Path) -> None:
    """UnsafeTarget when one of these, by whatever name, is a target of a migration in the state directory that is not finished.

    The journal is only read, so a migration that is at work does not keep us waiting; none is made."""
    if not (state_dir / "journal.db").exists():
        return
    with Journal.open(state_dir) as journal:
        claims = [
            (record, disk)
            for record in journal.migrations()
            if record.finished is None
            for disk in journal.book(record.id).disks()
        ]
    for path in paths:
        identities = identities_of(path) if claims else frozenset()
        for record, disk in claims:
            if disk.identity in identities or same_place(path, disk.path):
                raise UnsafeTarget(
                    f"it is the target of a migration that is not finished ({readable(record.name)}, {record.phase}), "
                    "which would write over a morph that it does not know",
                    where=path,
                    fix=f"its own cutover morphs it: {NEXT[record.phase].format(id=record.id)}; "
                    f"it is free once that is finished (tokvm finish {record.id})",
                )
