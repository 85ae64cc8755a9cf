"""What is kept of a `tokvm modernise`, so that every later command knows which hardware the VM is on.

    journal, in the plan   {"modern": {"way": …, "attempt": n, "proved": …}}
    FOLDER/before.xml      the domain's own definition from before virtio; once proved it is called replaced.xml

    (nothing) ── before.xml, then the journal ──► tried ── life was seen: the journal, then the new name ──► proved
        ▲                                           │
        └── the hardware was given back: the journal, then before.xml goes

What the journal does not say did not happen: a before.xml alone is a left-over. The file is for our eyes only (mode 0600): a
console's password may be in it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tokvm.app.plan import Modern, Plan
from tokvm.core.units import format_duration
from tokvm.guest import durable
from tokvm.guest.base import Way
from tokvm.migration.book import Book
from tokvm.migration.phases import Phase
from tokvm.migration.records import MigrationRecord

BEFORE = "before.xml"
REPLACED = "replaced.xml"


def modern_of(plan: Plan, record: MigrationRecord) -> Modern | None:
    """What `modernise` made of this cutover's target; None: nothing, or that target was rolled back since."""
    found = plan.modern
    runs = record.phase in (Phase.STARTED, Phase.COMMITTED)
    return found if found is not None and runs and found.attempt == record.attempt else None


class ModernLedger:
    """folder: private to this VM's modernise. way: what is tried now."""

    def __init__(self, book: Book, plan: Plan, folder: Path, way: Way) -> None:
        record = book.record()
        self._book = book
        self._plan = plan
        self._folder = folder
        self._tried = Modern(way, record.attempt)
        self._kept = modern_of(plan, record)

    @property
    def replaced(self) -> str:
        """Where the old definition is once virtio is proved."""
        return str(self._folder / REPLACED)

    def before(self) -> str | None:
        """The definition from before a try that nobody saw the end of; None when there is no such try."""
        if self._kept is None or self._kept.proved:
            return None
        try:
            return (self._folder / BEFORE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def trying(self, definition: str) -> None:
        durable.write_file(self._folder / BEFORE, definition.encode())
        self._keep(self._tried)

    def given_back(self) -> None:
        self._keep(None)
        with durable.storing(self._folder):
            (self._folder / BEFORE).unlink(missing_ok=True)

    def done(self, downtime_s: float | None) -> None:
        """The guest showed life on virtio. downtime_s: None when an earlier run stopped it."""
        proved = replace(self._kept or self._tried, proved=True)
        self._keep(proved)
        took = "" if downtime_s is None else f", down for {format_duration(downtime_s)}"
        self._book.note(f"modernised by the way {proved.way}{took}: it lives on virtio")
        with suppress(FileNotFoundError), durable.storing(self._folder):
            (self._folder / BEFORE).replace(self._folder / REPLACED)

    def _keep(self, modern: Modern | None) -> None:
        self._plan = replace(self._plan, modern=modern)
        self._book.replan(self._plan.kept().to_json())
        self._kept = modern
