"""The journal's pages about one migration: read, and written one transaction at a time, each of them sealed."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Protocol

from tokvm.core.errors import JournalError
from tokvm.core.machine import Snapshot
from tokvm.migration.phases import Event, Phase, after
from tokvm.migration.records import (
    DiskRecord,
    DowntimePart,
    EventRecord,
    Instant,
    MigrationRecord,
    PassKind,
    PassRecord,
    PassState,
    RehearsalRecord,
    SnapshotRecord,
    SnapshotState,
    StrangerTiming,
    TargetRan,
    TimingRecord,
)
from tokvm.migration.schema import OWN_ROWS
from tokvm.transfer.checkpoint import Checkpoint

Row = Sequence[object]


class Store(Protocol):
    """What a book needs of its journal."""

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]: ...

    def read(self, query: str, values: Sequence[object] = ()) -> list[tuple[object, ...]]: ...


def seal_of(rows: dict[str, list[tuple[object, ...]]]) -> str:
    text = json.dumps(rows, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def sealed(connection: sqlite3.Connection, migration: str) -> None:
    """Renew the seal; the last act of each transaction."""
    digest = seal_of({table: list(connection.execute(query, (migration,))) for table, query in OWN_ROWS.items()})
    connection.execute("INSERT OR REPLACE INTO seal VALUES (?, ?)", (migration, digest))


class Book:
    """One migration in the journal. Every method that writes is one transaction."""

    def __init__(self, store: Store, migration: str, wall: Callable[[], float]) -> None:
        self._store = store
        self.id = migration
        self._wall = wall

    # ---- reading

    def check_seal(self) -> None:
        rows = {table: self._store.read(query, (self.id,)) for table, query in OWN_ROWS.items()}
        kept = self._store.read("SELECT digest FROM seal WHERE migration = ?", (self.id,))
        if not kept or kept[0][0] != seal_of(rows):
            # another process may have written between the two reads: read again as one
            with self._store.transaction() as connection:
                rows = {table: list(connection.execute(query, (self.id,))) for table, query in OWN_ROWS.items()}
                kept = list(connection.execute("SELECT digest FROM seal WHERE migration = ?", (self.id,)))
        if not kept or kept[0][0] != seal_of(rows):
            raise JournalError(
                "the journal's rows do not fit their seal: it was damaged or changed by hand",
                where=self.id,
                fix="do not start anything by this journal: look at both hosts, move the journal away, and sync again",
            )

    def record(self) -> MigrationRecord:
        rows = self._rows(
            "SELECT id, vm_uuid, name, source, plan, vm, phase, created, owner, target_ran, attempt, down_wall, "
            "down_monotonic, down_boot, finished FROM migration WHERE id = ?"
        )
        if not rows:
            raise JournalError("the journal does not know this migration", where=self.id, fix="`tokvm status` lists them")
        return _migration(rows[0])

    @property
    def phase(self) -> Phase:
        return Phase(str(self._rows("SELECT phase FROM migration WHERE id = ?")[0][0]))

    def disks(self) -> list[DiskRecord]:
        rows = self._rows("SELECT number, key, size, path, identity FROM disk WHERE migration = ? ORDER BY number")
        return [_disk(row) for row in rows]

    def snapshots(self) -> list[SnapshotRecord]:
        """All of them, oldest first, removed ones too."""
        rows = self._rows(
            "SELECT number, mark, state, kind, wall, after_event, key, disks FROM snapshot WHERE migration = ? ORDER BY number"
        )
        return [_snapshot(row) for row in rows]

    def passes(self) -> list[PassRecord]:
        """All of them, by number and disk."""
        rows = self._rows(
            "SELECT number, disk, kind, since, fingerprint, state, checkpoint, bytes, seconds, size "
            "FROM pass WHERE migration = ? ORDER BY number, disk"
        )
        return [_pass(row) for row in rows]

    def events(self) -> list[EventRecord]:
        rows = self._rows("SELECT number, wall, event, source, target, note FROM event WHERE migration = ? ORDER BY number")
        return [EventRecord(_int(r[0]), _float(r[1]), str(r[2]), Phase(str(r[3])), Phase(str(r[4])), str(r[5])) for r in rows]

    def timings(self, attempt: int) -> list[TimingRecord]:
        """The parts of one cutover's downtime, in the order they come."""
        rows = self._rows("SELECT attempt, part, seconds, wall FROM timing WHERE migration = ?")
        found = [TimingRecord(_int(r[0]), DowntimePart(str(r[1])), _float(r[2]), _float(r[3])) for r in rows]
        order = list(DowntimePart)
        return sorted((t for t in found if t.attempt == attempt), key=lambda timing: order.index(timing.part))

    def rehearsals(self) -> list[RehearsalRecord]:
        """All of them, oldest first."""
        rows = self._rows("SELECT number, wall, way, works, document FROM rehearsal WHERE migration = ? ORDER BY number")
        return [RehearsalRecord(_int(r[0]), _float(r[1]), str(r[2]), bool(r[3]), json.loads(str(r[4]))) for r in rows]

    def stranger_timings(self) -> list[StrangerTiming]:
        """What stop, delta and start took in the newest cutovers of other migrations: the newest few hundred, oldest first."""
        rows = self._rows(
            "SELECT m.source, t.part, t.seconds, coalesce((SELECT sum(p.seconds) FROM pass AS p WHERE p.migration = m.id "
            "AND p.number = (SELECT max(number) FROM pass WHERE migration = m.id AND kind = 'final')), 0.0) "
            "FROM timing AS t JOIN migration AS m ON m.id = t.migration AND m.attempt = t.attempt "
            "WHERE m.id <> ? AND t.part IN ('stop', 'delta', 'start') ORDER BY t.wall DESC LIMIT 300"
        )
        return [StrangerTiming(str(r[0]), DowntimePart(str(r[1])), _float(r[2]), _float(r[3])) for r in reversed(rows)]

    def now(self) -> float:
        """The wall clock that the journal's times are by."""
        return self._wall()

    def _rows(self, query: str) -> list[tuple[object, ...]]:
        return self._store.read(query, (self.id,))

    # ---- writing

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._store.transaction() as connection:
            yield connection
            sealed(connection, self.id)

    def advance(self, event: Event, note: str = "") -> Phase:
        """Record an event; the phase it leads to. JournalError, and nothing recorded, when there is no such way.

        CUT_OVER begins a new attempt. ROLL_BACK after the target may have run voids all passes: what is on the target is
        not what was synced any more.
        """
        with self._write() as connection:
            before = Phase(str(connection.execute("SELECT phase FROM migration WHERE id = ?", (self.id,)).fetchone()[0]))
            to = after(event, before)
            if to is None:
                raise JournalError(f"{event} leads nowhere from {before}", where=self.id, fix="look at `tokvm status`")
            connection.execute(
                "INSERT INTO event (migration, wall, event, source, target, note) VALUES (?, ?, ?, ?, ?, ?)",
                (self.id, self._wall(), event, before, to, storable(note)),
            )
            if event is Event.CUT_OVER:
                connection.execute(
                    "UPDATE migration SET attempt = attempt + 1, target_ran = 'no', down_wall = NULL, down_monotonic = NULL, "
                    "down_boot = NULL WHERE id = ?",
                    (self.id,),
                )
            if event is Event.ROLL_BACK:
                connection.execute(
                    "UPDATE pass SET state = 'void' WHERE migration = ?1 "
                    "AND (SELECT target_ran FROM migration WHERE id = ?1) <> 'no'",
                    (self.id,),
                )
        return to

    def note(self, text: str) -> None:
        """Something worth knowing later that changes no phase."""
        with self._write() as connection:
            connection.execute(
                "INSERT INTO event (migration, wall, event, source, target, note) "
                "SELECT id, ?, 'note', phase, phase, ? FROM migration WHERE id = ?",
                (self._wall(), storable(text), self.id),
            )

    def replan(self, plan: Mapping[str, object]) -> None:
        """What the operator decided anew (JSON); the targets stay what they were."""
        self._update("UPDATE migration SET plan = ? WHERE id = ?", json.dumps(plan))

    def target_ran(self, ran: TargetRan) -> None:
        self._update("UPDATE migration SET target_ran = ? WHERE id = ?", ran)

    def down_since(self, instant: Instant) -> None:
        """The source was asked to stop now."""
        with self._write() as connection:
            values = (instant.wall, instant.monotonic, instant.boot, self.id)
            connection.execute("UPDATE migration SET down_wall = ?, down_monotonic = ?, down_boot = ? WHERE id = ?", values)
            connection.execute(
                "DELETE FROM timing WHERE migration = ?1 AND attempt = (SELECT attempt FROM migration WHERE id = ?1)",
                (self.id,),
            )

    def finished(self) -> None:
        self._update("UPDATE migration SET finished = ? WHERE id = ?", self._wall())

    def timing(self, attempt: int, part: DowntimePart, seconds: float) -> None:
        with self._write() as connection:
            values = (self.id, attempt, part, seconds, self._wall())
            connection.execute(
                "INSERT OR REPLACE INTO timing (migration, attempt, part, seconds, wall) VALUES (?, ?, ?, ?, ?)", values
            )

    def rehearsed(self, way: str, document: Mapping[str, object], *, works: bool) -> None:
        """A rehearsal came to its end, good or bad; everything it made is gone again."""
        with self._write() as connection:
            row = connection.execute("SELECT max(number) FROM rehearsal WHERE migration = ?", (self.id,)).fetchone()
            values = (self.id, _int(row[0] or 0) + 1, self._wall(), way, works, storable(json.dumps(document)))
            connection.execute(
                "INSERT INTO rehearsal (migration, number, wall, way, works, document) VALUES (?, ?, ?, ?, ?, ?)", values
            )

    def disk_identity(self, disk: int, identity: str) -> None:
        with self._write() as connection:
            values = (storable(identity), self.id, disk)
            connection.execute("UPDATE disk SET identity = ? WHERE migration = ? AND number = ?", values)

    def also_holds(self, disk: int, identity: str) -> DiskRecord | None:
        """Another disk, of this or of any unfinished migration, whose target says that it is the same one."""
        rows = self._store.read(
            "SELECT d.number, d.key, d.size, d.path, d.identity FROM disk AS d JOIN migration AS m ON m.id = d.migration "
            "WHERE d.identity = ? AND m.finished IS NULL AND NOT (m.id = ? AND d.number = ?)",
            (storable(identity), self.id, disk),
        )
        return _disk(rows[0]) if rows else None

    def disk_size(self, disk: int, size: int) -> None:
        with self._write() as connection:
            connection.execute("UPDATE disk SET size = ? WHERE migration = ? AND number = ?", (size, self.id, disk))

    def snapshot_intended(self, kind: PassKind) -> SnapshotRecord:
        """Before the hypervisor is asked: the number and mark of the next snapshot."""
        with self._write() as connection:
            row = connection.execute("SELECT max(number) FROM snapshot WHERE migration = ?", (self.id,)).fetchone()
            number = _int(row[0] or 0) + 1
            last = connection.execute("SELECT max(number) FROM event WHERE migration = ?", (self.id,)).fetchone()
            mark = f"tokvm-{self.id}-{'final-' if kind is PassKind.FINAL else ''}{number}"
            intended = SnapshotRecord(number, mark, SnapshotState.INTENDED, kind, self._wall(), _int(last[0] or 0))
            connection.execute(
                "INSERT INTO snapshot (migration, number, mark, state, kind, wall, after_event) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (self.id, number, mark, SnapshotState.INTENDED, kind, intended.wall, intended.after_event),
            )
        return intended

    def snapshot_made(self, number: int, snapshot: Snapshot) -> None:
        """The hypervisor said which one it is."""
        with self._write() as connection:
            connection.execute(
                "UPDATE snapshot SET state = 'made', key = ?, disks = ? WHERE migration = ? AND number = ?",
                (storable(snapshot.key), json.dumps(snapshot.disks), self.id, number),
            )

    def snapshot_removed(self, number: int) -> None:
        with self._write() as connection:
            connection.execute("UPDATE snapshot SET state = 'removed' WHERE migration = ? AND number = ?", (self.id, number))

    def pass_begun(self, begun: PassRecord) -> None:
        """A pass over one disk from its beginning; whatever this pass had recorded for this disk is forgotten."""
        with self._write() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO pass (migration, number, disk, kind, since, fingerprint, size, state) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, 'running')",
                (self.id, begun.number, begun.disk, begun.kind, begun.since, begun.fingerprint, begun.size),
            )

    def checkpoint(self, number: int, disk: int, checkpoint: Checkpoint) -> None:
        """The target's medium holds everything before it."""
        with self._write() as connection:
            connection.execute(
                "UPDATE pass SET checkpoint = ?, bytes = ? "
                "WHERE migration = ? AND number = ? AND disk = ? AND state = 'running'",
                (json.dumps(asdict(checkpoint)), checkpoint.data_bytes, self.id, number, disk),
            )

    def pass_seconds(self, number: int, disk: int, seconds: float) -> None:
        """Add the seconds of a run that ended early."""
        with self._write() as connection:
            values = (seconds, self.id, number, disk)
            connection.execute("UPDATE pass SET seconds = seconds + ? WHERE migration = ? AND number = ? AND disk = ?", values)

    def pass_done(self, number: int, disk: int, count: int, seconds: float) -> None:
        """All of it is on the medium. `seconds`: of the last run."""
        with self._write() as connection:
            connection.execute(
                "UPDATE pass SET state = 'done', bytes = ?, seconds = seconds + ? "
                "WHERE migration = ? AND number = ? AND disk = ?",
                (count, seconds, self.id, number, disk),
            )

    def void_passes(self, number: int | None = None) -> None:
        """Pass `number` (or all of them) can no longer be built upon."""
        with self._write() as connection:
            connection.execute(
                "UPDATE pass SET state = 'void' WHERE migration = ?1 AND (?2 IS NULL OR number = ?2)", (self.id, number)
            )

    def _update(self, statement: str, value: object) -> None:
        with self._write() as connection:
            connection.execute(statement, (value, self.id))


def storable(text: str) -> str:
    """Text that SQLite takes: what was no UTF-8 where it came from (surrogates) becomes `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _int(value: object) -> int:
    if not isinstance(value, int):
        raise JournalError(
            f"the journal holds {value!r} where a number belongs", fix="it was damaged; restore it from a backup"
        )
    return value


def _float(value: object) -> float:
    return float(value) if isinstance(value, float | int) else float(_int(value))


def _migration(row: Row) -> MigrationRecord:
    down = None if row[11] is None else Instant(_float(row[11]), _float(row[12]), str(row[13]))
    return MigrationRecord(
        id=str(row[0]),
        vm_uuid=str(row[1]),
        name=str(row[2]),
        source=str(row[3]),
        plan=json.loads(str(row[4])),
        vm=json.loads(str(row[5])),
        phase=Phase(str(row[6])),
        created=_float(row[7]),
        owner=str(row[8]),
        target_ran=TargetRan(str(row[9])),
        attempt=_int(row[10]),
        down=down,
        finished=None if row[14] is None else _float(row[14]),
    )


def _disk(row: Row) -> DiskRecord:
    return DiskRecord(_int(row[0]), str(row[1]), _int(row[2]), str(row[3]), str(row[4]))


def _snapshot(row: Row) -> SnapshotRecord:
    return SnapshotRecord(
        number=_int(row[0]),
        mark=str(row[1]),
        state=SnapshotState(str(row[2])),
        kind=PassKind(str(row[3])),
        wall=_float(row[4]),
        after_event=_int(row[5]),
        key=str(row[6]),
        disks=json.loads(str(row[7])),
    )


def _pass(row: Row) -> PassRecord:
    return PassRecord(
        number=_int(row[0]),
        disk=_int(row[1]),
        kind=PassKind(str(row[2])),
        since=None if row[3] is None else _int(row[3]),
        fingerprint=str(row[4]),
        state=PassState(str(row[5])),
        checkpoint=None if row[6] is None else Checkpoint(**json.loads(str(row[6]))),
        bytes=_int(row[7]),
        seconds=_float(row[8]),
        size=_int(row[9]),
    )
