"""One migration, driven: every verb takes the lock, looks where the journal stands, asks the world, and goes on.

(published early: signatures are final, the body follows)
"""

from __future__ import annotations

from tokvm.migration.doors import Clock, Doors, Morpher, Observer, Silent, SystemClock
from tokvm.migration.journal import Journal
from tokvm.migration.records import MigrationRecord
from tokvm.migration.reports import CutoverReport, FinishReport, StatusReport, SyncReport

__all__ = ["Clock", "Doors", "Migration", "Morpher", "Observer", "Silent", "SystemClock", "status_of"]


def status_of(journal: Journal, record: MigrationRecord) -> StatusReport:
    """What the journal alone says."""
    raise NotImplementedError


class Migration:
    """The verbs. Each may be run again after any interruption and goes on."""

    def __init__(self, journal: Journal, record: MigrationRecord, doors: Doors) -> None: ...

    def sync(self, *, passes: int | None = None, budget_s: float | None = None) -> SyncReport:
        raise NotImplementedError

    def cutover(
        self, *, budget_s: float | None = None, force_off: bool = False, deadline_s: float = 300.0, proof_s: float = 300.0
    ) -> CutoverReport:
        raise NotImplementedError

    def rollback(self, *, accept_data_loss: bool = False) -> StatusReport:
        raise NotImplementedError

    def finish(self) -> FinishReport:
        raise NotImplementedError

    def status(self) -> StatusReport:
        raise NotImplementedError
