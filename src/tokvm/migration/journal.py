"""The journal: what tokvm remembers, in one SQLite file that refuses wrong transitions by itself.

    <state>/journal.db     STRICT tables, WAL, synchronous=FULL: a transaction that returned survives kill -9 and power loss
    <state>/<id>.lock      one process for each migration

The journal says what was intended and what was seen; on a resume the world is asked. A `Book` is the part about one migration.
"""

from __future__ import annotations

import json
import logging
import secrets
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from tokvm.core.errors import JournalError, UsageError
from tokvm.core.machine import VirtualMachine
from tokvm.migration import schema
from tokvm.migration.book import Book, sealed, storable
from tokvm.migration.lock import RunLocks
from tokvm.migration.phases import TRANSITIONS
from tokvm.migration.records import MigrationRecord

log = logging.getLogger(__name__)

BUSY_S = 30.0
PAGE = 4096
REPAIR = (
    "nothing was changed; move journal.db, journal.db-wal and journal.db-shm away (or restore them from a backup), look at "
    "both hosts with `tokvm ls` and `virsh list --all` before anything is started, and sync again: they are the truth"
)


class Journal:
    """An open journal. Not for several threads at once; several processes may have it open."""

    def __init__(self, path: Path, connection: sqlite3.Connection, wall: Callable[[], float]) -> None:
        self.path = path
        self._connection = connection
        self._wall = wall
        self._locks = RunLocks(path.parent)

    @classmethod
    def open(cls, state_dir: Path, *, wall: Callable[[], float] = time.time) -> Self:
        """The journal of a state directory, made when there is none. JournalError when it is damaged or not ours."""
        path = Path(state_dir) / "journal.db"
        connection: sqlite3.Connection | None = None
        try:
            _refuse_cut(path)
            path.touch(mode=0o600)
            connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
            journal = cls(path, connection, wall)
            journal._prepare()
        except (sqlite3.Error, OSError) as exc:
            if connection is not None:
                connection.close()
            raise JournalError(f"the journal cannot be opened: {exc}", where=str(path), fix=REPAIR) from exc
        except JournalError:
            if connection is not None:
                connection.close()
            raise
        return journal

    def _prepare(self) -> None:
        run = self._connection.execute
        version, ours = run("PRAGMA user_version").fetchone()[0], run("PRAGMA application_id").fetchone()[0]
        if (version, ours) not in ((0, 0), (schema.VERSION, schema.APPLICATION_ID)):
            raise JournalError(f"this is no journal of this tokvm (version {version})", where=str(self.path), fix=REPAIR)
        run(f"PRAGMA page_size = {PAGE}")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        run("PRAGMA foreign_keys = ON")
        run("PRAGMA recursive_triggers = ON")
        with self.transaction():
            if run("PRAGMA user_version").fetchone()[0] == 0:
                self._make()
            else:
                self._check()

    def _make(self) -> None:
        if self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise JournalError("the file holds tables, but is no journal", where=str(self.path), fix=REPAIR)
        for script in (schema.TABLES, schema.GUARDS):
            for statement in _statements(script):
                self._connection.execute(statement)
        rows = [(row.event, row.source, row.target) for row in TRANSITIONS]
        self._connection.executemany("INSERT INTO transition VALUES (?, ?, ?)", rows)
        self._connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        self._connection.execute(f"PRAGMA user_version = {schema.VERSION}")

    def _check(self) -> None:
        problems = [row[0] for row in self._connection.execute("PRAGMA integrity_check(3)")]
        if problems != ["ok"]:
            raise JournalError(f"the journal is damaged: {problems[0]}", where=str(self.path), fix=REPAIR)
        found = set(self._connection.execute("SELECT event, source, target FROM transition"))
        if found != {(str(row.event), str(row.source), str(row.target)) for row in TRANSITIONS}:
            raise JournalError("the journal's transitions are not this tokvm's", where=str(self.path), fix=REPAIR)
        schema_now = {row[0] for row in self._connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
        if schema_now != {_plain(s) for script in (schema.TABLES, schema.GUARDS) for s in _statements(script)}:
            raise JournalError("the journal's tables are not this tokvm's", where=str(self.path), fix=REPAIR)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and on the medium when it returns. SQLite's errors become JournalError."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
        except sqlite3.Error as exc:
            raise self._translated(exc) from exc

    def read(self, query: str, values: Sequence[object] = ()) -> list[tuple[object, ...]]:
        """All rows of a query."""
        try:
            return list(self._connection.execute(query, values))
        except sqlite3.Error as exc:
            raise self._translated(exc) from exc

    def _translated(self, exc: sqlite3.Error) -> JournalError:
        text = str(exc)
        if text.startswith("tokvm: "):
            fix = "another run may have gone on; look at `tokvm status`"
            return JournalError(f"the journal refuses: {text.removeprefix('tokvm: ')}", where=str(self.path), fix=fix)
        if "one_open_migration" in text or "migration.source, migration.vm_uuid" in text:
            return JournalError("the VM has an open migration already", where=str(self.path), fix="look at `tokvm status`")
        if "full" in text or "readonly" in text or "locked" in text:
            fix = "make room in (or write access to) the state directory, then run the same command again"
            return JournalError(f"the journal cannot be written: {text}", where=str(self.path), fix=fix)
        return JournalError(f"the journal fails: {text}", where=str(self.path), fix=REPAIR)

    def create(self, *, vm: VirtualMachine, source: str, plan: Mapping[str, object], targets: Sequence[str]) -> MigrationRecord:
        """Begin a migration of `vm`. `targets`: the paths, in the order of its disks. JournalError when it has an open one."""
        if len(targets) != len(vm.disks):
            raise UsageError(f"{len(vm.disks)} disks but {len(targets)} targets", where=vm.name, fix="give one target for each")
        migration = secrets.token_hex(4)
        created = self._wall()
        owner = f"{socket.gethostname()} {migration} {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(created))}"
        with self.transaction() as connection:
            connection.execute(
                "INSERT INTO migration (id, vm_uuid, name, source, plan, vm, phase, created, owner) "
                "VALUES (?, ?, ?, ?, ?, ?, 'COPY', ?, ?)",
                (migration, vm.uuid, storable(vm.name), source, json.dumps(plan), json.dumps(asdict(vm)), created, owner),
            )
            connection.executemany(
                "INSERT INTO disk (migration, number, key, size, path) VALUES (?, ?, ?, ?, ?)",
                [(migration, disk.index, disk.key, disk.size, path) for disk, path in zip(vm.disks, targets, strict=True)],
            )
            sealed(connection, migration)
        log.info("migration %s of %r begins", migration, vm.name)
        return self.book(migration).record()

    def book(self, migration: str) -> Book:
        """The part about one migration. JournalError when a bit of it was flipped."""
        book = Book(self, migration, self._wall)
        book.check_seal()
        return book

    def migrations(self) -> list[MigrationRecord]:
        """All of them, oldest first, finished ones too."""
        return [self.book(str(row[0])).record() for row in self.read("SELECT id FROM migration ORDER BY created, id")]

    def open_for(self, source: str, vm_uuid: str) -> MigrationRecord | None:
        """The open migration of a VM, if there is one."""
        rows = self.read(
            "SELECT id FROM migration WHERE source = ? AND vm_uuid = ? AND finished IS NULL ORDER BY created", (source, vm_uuid)
        )
        return self.book(str(rows[0][0])).record() if rows else None

    def find(self, text: str) -> MigrationRecord:
        """The migration meant by an id, a VM's uuid or a VM's name; of a VM's several the open one, else the newest."""
        found = [record for record in self.migrations() if storable(text) in (record.id, record.vm_uuid, record.name)]
        if not found:
            raise UsageError(f"no migration of {text!r} is known", where=str(self.path), fix="`tokvm status` lists them")
        open_ones = [record for record in found if record.finished is None]
        if len(open_ones) > 1:
            ids = ", ".join(f"{record.id} ({record.source})" for record in open_ones)
            raise UsageError(f"{text!r} means several migrations", where=ids, fix="give the id")
        if not open_ones and len({record.vm_uuid for record in found}) > 1:
            raise UsageError(f"{text!r} means several VMs", where=", ".join(r.id for r in found), fix="give the id")
        return (open_ones or found)[-1]

    def lock(self, migration: str) -> AbstractContextManager[None]:
        """Be the one process that works on it; the loser's JournalError names the winner. Again in this process: free."""
        return self._locks.hold(migration)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _refuse_cut(path: Path) -> None:
    """SQLite takes a file that is shorter than a page for a new one; ours is one only when nothing was ever locked here."""
    wal = path.with_name(path.name + "-wal")
    size = path.stat().st_size if path.exists() else 0
    if size >= PAGE or (wal.exists() and wal.stat().st_size):
        return
    if size or any(path.parent.glob("[0-9a-f]" * 8 + ".lock")):
        raise JournalError(f"the journal was cut to {size} bytes", where=str(path), fix=REPAIR)


def _statements(script: str) -> list[str]:
    """The statements of a script; a trigger's body holds semicolons of its own."""
    found, waiting = [], ""
    for line in script.splitlines(keepends=True):
        waiting += line
        if waiting.strip() and sqlite3.complete_statement(waiting):
            found.append(waiting.strip())
            waiting = ""
    return found


def _plain(statement: str) -> str:
    """A statement as SQLite keeps it in sqlite_master: without the last semicolon."""
    return statement.removesuffix(";")
