"""The journal: it refuses what is no transition, survives a kill, and does not believe what was damaged."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from tokvm.core.errors import JournalError, UsageError
from tokvm.core.machine import Disk, Snapshot, VirtualMachine
from tokvm.migration.journal import Journal
from tokvm.migration.phases import AT_REST, TRANSITIONS, Event, Phase, after
from tokvm.migration.records import PassKind, PassRecord, PassState, TargetRan
from tokvm.transfer.checkpoint import Checkpoint

VM = VirtualMachine("uuid-1", "a 'name'\n", 1, 1 << 30, (Disk(0, "vdi-0", 4096), Disk(1, "vdi-1", 8192)))


def begin(path: Path) -> tuple[Journal, str]:
    journal = Journal.open(path)
    record = journal.create(vm=VM, source="fake://", plan={"x": [1]}, targets=["/t0", "/t1"])
    return journal, record.id


def walk_to(phase: Phase) -> list[Event]:
    """A shortest way from COPY."""
    ways: dict[Phase, list[Event]] = {Phase.COPY: []}
    while phase not in ways:
        for row in TRANSITIONS:
            if row.source in ways and row.target not in ways:
                ways[row.target] = [*ways[row.source], row.event]
    return ways[phase]


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    journal, key = begin(tmp_path)
    book = journal.book(key)
    intended = book.snapshot_intended(PassKind.BASE)
    assert intended.mark == f"tokvm-{key}-1"
    book.snapshot_made(1, Snapshot("snap", intended.mark, {"vdi-0": "f0", "vdi-1": "f1"}))
    book.pass_begun(PassRecord(1, 0, PassKind.BASE, None, "print", PassState.RUNNING))
    checkpoint = Checkpoint(position=4096, data_bytes=512, zero_bytes=7, zeroed=True)
    book.checkpoint(1, 0, checkpoint)
    journal.close()
    with Journal.open(tmp_path) as journal:
        book = journal.book(key)
        assert book.record().name == VM.name
        assert book.record().plan == {"x": [1]}
        assert [disk.path for disk in book.disks()] == ["/t0", "/t1"]
        assert book.snapshots()[0].disks == {"vdi-0": "f0", "vdi-1": "f1"}
        assert book.passes()[0].checkpoint == checkpoint
        assert journal.find("uuid-1").id == journal.find(VM.name).id == journal.find(key).id == key


def test_final_snapshots_say_so_in_their_mark(tmp_path: Path) -> None:
    journal, key = begin(tmp_path)
    journal.book(key).snapshot_intended(PassKind.BASE)
    assert journal.book(key).snapshot_intended(PassKind.FINAL).mark == f"tokvm-{key}-final-2"
    journal.close()


@pytest.mark.parametrize("phase", list(Phase))
def test_every_event_that_leads_nowhere_is_refused(tmp_path: Path, phase: Phase) -> None:
    journal, key = begin(tmp_path)
    book = journal.book(key)
    for event in walk_to(phase):
        book.advance(event)
    assert book.phase is phase
    for event in Event:
        if after(event, phase) is None:
            with pytest.raises(JournalError):
                book.advance(event)
    assert book.phase is phase
    journal.close()


@pytest.mark.parametrize("phase", list(Phase))
def test_the_database_itself_refuses_a_wrong_phase(tmp_path: Path, phase: Phase) -> None:
    """Whatever code writes it: the guard is a trigger over the table of transitions."""
    journal, key = begin(tmp_path)
    for event in walk_to(phase):
        journal.book(key).advance(event)
    journal.close()
    allowed = {row.target for row in TRANSITIONS if row.source is phase}
    with sqlite3.connect(tmp_path / "journal.db", isolation_level=None) as other:
        for wrong in set(Phase) - allowed:
            with pytest.raises(sqlite3.IntegrityError, match="tokvm"):
                other.execute("UPDATE migration SET phase = ?", (wrong,))
            with pytest.raises(sqlite3.IntegrityError, match="tokvm"):
                other.execute(
                    "INSERT INTO event (migration, wall, event, source, target) VALUES (?, 0, 'commit', ?, ?)",
                    (key, phase, wrong),
                )
    other.close()


def test_an_event_from_another_phase_is_refused(tmp_path: Path) -> None:
    journal, key = begin(tmp_path)
    insert = "INSERT INTO event (migration, wall, event, source, target) VALUES (?, 0, 'start', 'MORPHED', 'START_INTENT')"
    with pytest.raises(JournalError, match="another phase"), journal.transaction() as connection:
        connection.execute(insert, (key,))
    journal.close()


def test_events_are_never_changed_or_removed(tmp_path: Path) -> None:
    journal, key = begin(tmp_path)
    journal.book(key).advance(Event.CUT_OVER)
    for statement in ("UPDATE event SET note = 'x'", "DELETE FROM event"):
        with pytest.raises(JournalError, match="never"), journal.transaction() as connection:
            connection.execute(statement)
    journal.close()


def test_a_vm_has_one_open_migration(tmp_path: Path) -> None:
    journal, key = begin(tmp_path)
    with pytest.raises(JournalError, match="open migration"):
        journal.create(vm=VM, source="fake://", plan={}, targets=["/t0", "/t1"])
    journal.book(key).finished()
    second = journal.create(vm=VM, source="fake://", plan={}, targets=["/t0", "/t1"])
    assert journal.find(VM.uuid).id == second.id
    journal.close()


def test_an_unknown_name_is_a_usage_error(tmp_path: Path) -> None:
    journal, _ = begin(tmp_path)
    with pytest.raises(UsageError, match="status"):
        journal.find("nobody")
    journal.close()


def test_a_name_that_is_no_utf8_is_kept_and_found(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        vm = VirtualMachine("uuid-2", "caf\udce9", 1, 1, (Disk(0, "k", 512),))
        record = journal.create(vm=vm, source="fake://", plan={}, targets=["/t"])
        assert journal.find("caf\udce9").id == record.id


def test_rolling_back_a_target_that_ran_voids_what_was_copied(tmp_path: Path) -> None:
    journal, key = begin(tmp_path)
    book = journal.book(key)
    book.snapshot_intended(PassKind.BASE)
    book.pass_begun(PassRecord(1, 0, PassKind.BASE, None, "print", PassState.RUNNING))
    book.pass_done(1, 0, 512, 1.0)
    for event in walk_to(Phase.START_INTENT):
        book.advance(event)
    book.target_ran(TargetRan.MAYBE)
    book.advance(Event.ROLL_BACK)
    assert [one.state for one in book.passes()] == [PassState.VOID]
    journal.close()


def test_the_loser_names_the_winner(tmp_path: Path) -> None:
    journal, key = begin(tmp_path)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with Journal.open(tmp_path) as mine, mine.lock(key):
            os.write(ready[1], b"x")
            os.read(go[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        with pytest.raises(JournalError, match=rf"process {child} on .* since \d"), journal.lock(key):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for fd in (*ready, *go):
            os.close(fd)
    with journal.lock(key), journal.lock(key):
        assert (tmp_path / f"{key}.lock").exists()
    journal.close()


@pytest.mark.slow
def test_one_of_many_racing_runs_wins(tmp_path: Path) -> None:
    journal, key = begin(tmp_path)
    journal.close()
    children, gate = [], os.pipe()
    for _ in range(12):
        child = os.fork()
        if child == 0:
            os.close(gate[1])
            os.read(gate[0], 1)
            code = 1
            try:
                with Journal.open(tmp_path) as mine, mine.lock(key):
                    code = 0
                    signal.pause()
            except JournalError as lost:
                code = 2 if "another run works on this migration" in str(lost) else 3
            finally:
                os._exit(code)
        children.append(child)
    os.close(gate[0])
    os.close(gate[1])
    codes: dict[int, int] = {}
    until = time.monotonic() + 60
    while len(codes) < 11 and time.monotonic() < until:  # each by its own pid: other tests' children may be waiting too
        for child in set(children) - codes.keys():
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    (winner,) = set(children) - codes.keys()
    os.kill(winner, signal.SIGKILL)
    os.waitpid(winner, 0)
    assert list(codes.values()) == [2] * 11


def whole(path: Path) -> bytes:
    """A journal with some life in it, in one file."""
    journal, key = begin(path)
    book = journal.book(key)
    book.snapshot_intended(PassKind.BASE)
    for event in walk_to(Phase.FENCED):
        book.advance(event, "because")
    journal.close()
    return (path / "journal.db").read_bytes()


def survey(path: Path) -> list[tuple[str, str, str, str]]:
    with Journal.open(path) as journal:
        return [(r.id, r.phase, r.vm_uuid, journal.book(r.id).snapshots()[0].mark) for r in journal.migrations()]


def test_a_cut_journal_is_refused_with_advice(tmp_path: Path) -> None:
    good = whole(tmp_path)
    for length in range(1, len(good), 1024):
        (tmp_path / "journal.db").write_bytes(good[:length])
        with pytest.raises(JournalError) as refused:
            survey(tmp_path)
        assert "move" in refused.value.fix


def test_an_emptied_journal_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    journal, key = begin(tmp_path)
    with journal.lock(key):
        journal.close()
    (tmp_path / "journal.db").write_bytes(b"")
    with pytest.raises(JournalError, match="cut to 0 bytes"):
        Journal.open(tmp_path)


@pytest.mark.slow
def test_a_flipped_bit_is_harmless_or_refused(tmp_path: Path) -> None:
    """At a sample of all bytes: either the same answers, or JournalError; never another answer."""
    good = whole(tmp_path)
    right = survey(tmp_path)
    refused = 0
    for place in range(0, len(good), 193):
        damaged = bytearray(good)
        damaged[place] ^= 0x11
        for name in ("journal.db-wal", "journal.db-shm"):
            (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / "journal.db").write_bytes(damaged)
        try:
            assert survey(tmp_path) == right, f"a flip at {place} changed the answer"
        except JournalError:
            refused += 1
    assert refused > 20


def test_something_else_is_no_journal(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "journal.db") as other:
        other.execute("CREATE TABLE music (title TEXT)")
    other.close()
    with pytest.raises(JournalError, match="no journal"):
        Journal.open(tmp_path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    whole(tmp_path)
    with sqlite3.connect(tmp_path / "journal.db") as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(JournalError, match="version 99"):
        Journal.open(tmp_path)


def test_a_guard_that_was_dropped_is_missed(tmp_path: Path) -> None:
    whole(tmp_path)
    with sqlite3.connect(tmp_path / "journal.db") as other:
        other.execute("DROP TRIGGER a_phase_changes_by_a_transition")
    other.close()
    with pytest.raises(JournalError, match="tables"):
        Journal.open(tmp_path)


def write_much(journal: Journal, key: str) -> None:
    for number in range(400):
        journal.book(key).note(f"{number}" * 500)


@pytest.mark.slow
def test_a_full_state_directory_is_said_to_be_full(tmp_path: Path) -> None:
    journal, key = begin(tmp_path)
    journal.read("PRAGMA max_page_count = 40")
    with pytest.raises(JournalError, match="cannot be written"):
        write_much(journal, key)
    assert journal.book(key).phase is Phase.COPY
    journal.close()


def test_a_kill_in_the_middle_of_writing_loses_no_finished_transaction(tmp_path: Path) -> None:
    journal, key = begin(tmp_path)
    journal.close()
    count = os.pipe()
    child = os.fork()
    if child == 0:
        mine = Journal.open(tmp_path)
        for number in range(100_000):
            mine.book(key).note(str(number))
            os.write(count[1], b"x")
    os.read(count[0], 1)
    seen = 1
    while seen < 40:
        seen += len(os.read(count[0], 100))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(count[1])
    while got := os.read(count[0], 4096):
        seen += len(got)
    os.close(count[0])
    with Journal.open(tmp_path) as journal:
        notes = [event.note for event in journal.book(key).events()]
        assert len(notes) in (seen, seen + 1)
        assert notes == [str(number) for number in range(len(notes))]


def test_rest_is_where_one_copy_runs() -> None:
    assert {Phase.COPY, Phase.STARTED, Phase.COMMITTED, Phase.ROLLED_BACK} == AT_REST
