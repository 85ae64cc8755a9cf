"""The undo log: complete or nothing, of this disk or nothing."""

from __future__ import annotations

import hashlib
import random
from contextlib import closing
from pathlib import Path

import pytest

from tokvm.app.morph import open_disk
from tokvm.core.errors import TargetError
from tokvm.core.units import KiB, MiB
from tokvm.guest.base import GuestDisk, GuestError
from tokvm.guest.undo import LONGEST, Subject, UndoLog, write_log

SIZE = MiB + 512
RANGES = [(0, 512), (4 * KiB, 100 * KiB), (MiB, 512)]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture
def log(disk: Path, tmp_path: Path) -> Path:
    path, content = tmp_path / "undo", disk.read_bytes()
    with closing(open_disk(GuestDisk(str(disk)), None)) as held:
        subject = Subject(held.identity, held.size, b"o" * 32)
    write_log(path, subject, ((offset, content[offset : offset + length]) for offset, length in RANGES))
    return path


def restore(log: Path, disk: Path) -> None:
    with closing(UndoLog.open(log)) as undo, closing(open_disk(GuestDisk(str(disk)), None)) as held:
        undo.restore(held)


def spoil(disk: Path) -> None:
    with disk.open("r+b") as file:
        for offset, length in RANGES:
            file.seek(offset)
            file.write(b"\xee" * length)


def test_old_bytes_come_back_however_often(log: Path, disk: Path) -> None:
    before = disk.read_bytes()
    for _ in range(2):
        spoil(disk)
        assert disk.read_bytes() != before
        restore(log, disk)
        assert disk.read_bytes() == before
        restore(log, disk)
        assert disk.read_bytes() == before


def test_it_knows_what_it_is_about(log: Path) -> None:
    with closing(UndoLog.open(log)) as undo:
        assert (undo.subject.size, undo.subject.overlay) == (SIZE, b"o" * 32)
        assert [(record.offset, record.length) for record in undo.records] == RANGES
        assert undo.changed == sum(length for _, length in RANGES)


def small_log(path: Path) -> bytes:
    write_log(path, Subject("file:1:x", SIZE, bytes(32)), [(0, b"a" * 5), (512, b"b" * 3)])
    return path.read_bytes()


def test_one_that_ends_anywhere_before_its_end_is_none(tmp_path: Path) -> None:
    path = tmp_path / "undo"
    data = small_log(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(GuestError, match="ends too early"):
            UndoLog.open(path)


def test_no_byte_of_it_may_differ(tmp_path: Path) -> None:
    path = tmp_path / "undo"
    data = small_log(path)
    for position in range(len(data)):
        for flip in (0x01, 0x80):
            path.write_bytes(data[:position] + bytes([data[position] ^ flip]) + data[position + 1 :])
            with pytest.raises(GuestError, match="undo log"):
                UndoLog.open(path)


def test_nothing_may_follow_and_nothing_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "undo"
    path.write_bytes(small_log(path) + b"\0")
    with pytest.raises(GuestError, match="follows"):
        UndoLog.open(path)
    path.unlink()
    with pytest.raises(GuestError, match="No such file"):
        UndoLog.open(path)
    small_log(tmp_path / "other")
    path.symlink_to(tmp_path / "other")
    with pytest.raises(GuestError, match="cannot be read"):
        UndoLog.open(path)


@pytest.mark.parametrize(
    "records", [[(512, b"b"), (0, b"a")], [(0, b"ab"), (1, b"c")], [(SIZE, b"a")], [(0, bytes(LONGEST + 1))], [(0, b"")]]
)
def test_records_that_make_no_sense_are_refused(records: list[tuple[int, bytes]], tmp_path: Path) -> None:
    write_log(tmp_path / "undo", Subject("x", SIZE, bytes(32)), records)
    with pytest.raises(GuestError, match="makes no sense"):
        UndoLog.open(tmp_path / "undo")


def test_another_disk_gets_nothing(log: Path, disk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(SIZE))
    with pytest.raises(GuestError, match="the log is of"):
        restore(log, other)
    assert other.read_bytes() == bytes(SIZE)


def test_a_disk_that_does_not_keep_what_it_is_given_is_seen(log: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(disk)
    with closing(UndoLog.open(log)) as undo, closing(open_disk(GuestDisk(str(disk)), None)) as held:
        monkeypatch.setattr(held, "write", lambda _offset, _data: None)
        with pytest.raises(GuestError, match="does not hold them"):
            undo.restore(held)


def test_the_log_is_checked_again_as_it_is_used(log: Path, disk: Path) -> None:
    before = hashlib.sha256(disk.read_bytes()).digest()
    with closing(UndoLog.open(log)) as undo, closing(open_disk(GuestDisk(str(disk)), None)) as held:
        record = undo.records[1]
        with log.open("r+b") as file:
            file.seek(record.at + 7)
            file.write(b"\x00\x01\x02\x03")
        with pytest.raises(GuestError, match="changed while"):
            undo.restore(held)
        held.close()
        with pytest.raises(TargetError):
            undo.restore(held)
    assert hashlib.sha256(disk.read_bytes()).digest() == before
