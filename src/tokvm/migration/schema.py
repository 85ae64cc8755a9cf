"""The journal's tables, and the guards that live in the database itself.

transition ──(triggers)──► event ──► migration.phase
migration 1 ─ n disk, snapshot, pass, timing, event, rehearsal
seal: a hash over all rows of one migration, renewed in each transaction; a flipped bit does not go unseen
"""

from __future__ import annotations

APPLICATION_ID = 0x746F6B76  # "tokv"
VERSION = 3

TABLES = """
CREATE TABLE transition (
    event TEXT NOT NULL, source TEXT NOT NULL, target TEXT NOT NULL, PRIMARY KEY (event, source)
) STRICT, WITHOUT ROWID;

CREATE TABLE migration (
    id TEXT PRIMARY KEY, vm_uuid TEXT NOT NULL, name TEXT NOT NULL, source TEXT NOT NULL,
    plan TEXT NOT NULL, vm TEXT NOT NULL, phase TEXT NOT NULL, created REAL NOT NULL, owner TEXT NOT NULL,
    target_ran TEXT NOT NULL DEFAULT 'no' CHECK (target_ran IN ('no', 'maybe', 'yes')),
    attempt INTEGER NOT NULL DEFAULT 0,
    down_wall REAL, down_monotonic REAL, down_boot TEXT, finished REAL
) STRICT;

CREATE UNIQUE INDEX one_open_migration_of_a_vm ON migration (source, vm_uuid) WHERE finished IS NULL;

CREATE TABLE disk (
    migration TEXT NOT NULL REFERENCES migration, number INTEGER NOT NULL, key TEXT NOT NULL, size INTEGER NOT NULL,
    path TEXT NOT NULL, identity TEXT NOT NULL DEFAULT '', PRIMARY KEY (migration, number)
) STRICT, WITHOUT ROWID;

CREATE TABLE snapshot (
    migration TEXT NOT NULL REFERENCES migration, number INTEGER NOT NULL, mark TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('intended', 'made', 'removed')),
    kind TEXT NOT NULL CHECK (kind IN ('base', 'delta', 'final')), wall REAL NOT NULL, after_event INTEGER NOT NULL,
    key TEXT NOT NULL DEFAULT '', disks TEXT NOT NULL DEFAULT '{}', PRIMARY KEY (migration, number)
) STRICT, WITHOUT ROWID;

CREATE TABLE pass (
    migration TEXT NOT NULL REFERENCES migration, number INTEGER NOT NULL, disk INTEGER NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('base', 'delta', 'final')), since INTEGER, fingerprint TEXT NOT NULL,
    size INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('running', 'done', 'void')), checkpoint TEXT,
    bytes INTEGER NOT NULL DEFAULT 0, seconds REAL NOT NULL DEFAULT 0, PRIMARY KEY (migration, number, disk)
) STRICT, WITHOUT ROWID;

CREATE TABLE timing (
    migration TEXT NOT NULL REFERENCES migration, attempt INTEGER NOT NULL, part TEXT NOT NULL,
    seconds REAL NOT NULL, wall REAL NOT NULL, PRIMARY KEY (migration, attempt, part)
) STRICT, WITHOUT ROWID;

CREATE TABLE rehearsal (
    migration TEXT NOT NULL REFERENCES migration, number INTEGER NOT NULL, wall REAL NOT NULL, way TEXT NOT NULL,
    works INTEGER NOT NULL CHECK (works IN (0, 1)), document TEXT NOT NULL, PRIMARY KEY (migration, number)
) STRICT, WITHOUT ROWID;

CREATE TABLE event (
    number INTEGER PRIMARY KEY, migration TEXT NOT NULL REFERENCES migration, wall REAL NOT NULL,
    event TEXT NOT NULL, source TEXT NOT NULL, target TEXT NOT NULL, note TEXT NOT NULL DEFAULT ''
) STRICT;

CREATE TABLE seal (migration TEXT PRIMARY KEY REFERENCES migration, digest TEXT NOT NULL) STRICT, WITHOUT ROWID;
"""

GUARDS = """
CREATE TRIGGER a_migration_begins_with_copy BEFORE INSERT ON migration WHEN NEW.phase <> 'COPY'
BEGIN SELECT RAISE(ABORT, 'tokvm: a migration begins with COPY'); END;

CREATE TRIGGER a_phase_changes_by_a_transition BEFORE UPDATE OF phase ON migration
WHEN NOT EXISTS (SELECT 1 FROM transition WHERE source = OLD.phase AND target = NEW.phase)
BEGIN SELECT RAISE(ABORT, 'tokvm: no transition leads there'); END;

CREATE TRIGGER an_event_fits_the_phase BEFORE INSERT ON event
WHEN (SELECT phase FROM migration WHERE id = NEW.migration) IS NOT NEW.source
BEGIN SELECT RAISE(ABORT, 'tokvm: the migration is in another phase'); END;

CREATE TRIGGER an_event_is_a_transition BEFORE INSERT ON event
WHEN NOT (NEW.event = 'note' AND NEW.source = NEW.target)
 AND NOT EXISTS (SELECT 1 FROM transition WHERE event = NEW.event AND source = NEW.source AND target = NEW.target)
BEGIN SELECT RAISE(ABORT, 'tokvm: no transition leads there'); END;

CREATE TRIGGER an_event_moves_the_phase AFTER INSERT ON event WHEN NEW.event <> 'note'
BEGIN UPDATE migration SET phase = NEW.target WHERE id = NEW.migration; END;

CREATE TRIGGER events_stay BEFORE UPDATE ON event BEGIN SELECT RAISE(ABORT, 'tokvm: events are never changed'); END;
CREATE TRIGGER events_are_kept BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'tokvm: events are never removed'); END;
"""

OWN_ROWS = {
    "migration": "SELECT * FROM migration WHERE id = ?",
    "disk": "SELECT * FROM disk WHERE migration = ? ORDER BY number",
    "snapshot": "SELECT * FROM snapshot WHERE migration = ? ORDER BY number",
    "pass": "SELECT * FROM pass WHERE migration = ? ORDER BY number, disk",
    "timing": "SELECT * FROM timing WHERE migration = ? ORDER BY attempt, part",
    "rehearsal": "SELECT * FROM rehearsal WHERE migration = ? ORDER BY number",
    "event": "SELECT * FROM event WHERE migration = ? ORDER BY number",
}
"""All rows of one migration, in an order of their own: what its seal is over."""
