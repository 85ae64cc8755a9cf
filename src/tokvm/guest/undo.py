"""The undo log of one disk: the old bytes of all that a commit will change, on the medium before the first of them changes.

    header   magic 8 | version u32 | length of identity u32 | size of the disk u64 | SHA-256 of the overlay 32 | identity
    record   "RECD"  | length u32 | offset u64 | SHA-256 of the old bytes 32 | old bytes        ascending, none overlap
    …
    end      "UEND"  | 0 u32 | number of records u64 | SHA-256 of everything before it 32       nothing follows

Little-endian. Offsets are bytes of the guest's disk. A log without its end was never complete, so nothing was changed yet.
Applying it is idempotent: old bytes over old bytes. It is exact as long as nobody else wrote to the disk since.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokvm.core.disk import DiskWriter
from tokvm.core.units import MiB
from tokvm.guest import durable
from tokvm.guest.base import GuestError

MAGIC = b"TOKVUNDO"
VERSION = 1
LONGEST = MiB
_LONGEST_IDENTITY = 4096
_HEADER = struct.Struct("<8sIIQ32s")
_ENTRY = struct.Struct("<4sIQ32s")
_RECORD, _END = b"RECD", b"UEND"
_FIX_LOST = "the disk cannot be put back from this log: copy it again (tokvm sync with another state directory)"


@dataclass(frozen=True, slots=True)
class Subject:
    """What a log is about. identity, size: the disk's. overlay: SHA-256 of the overlay file whose commit it undoes."""

    identity: str
    size: int
    overlay: bytes


@dataclass(frozen=True, slots=True)
class Saved:
    """One record. `at`: where its old bytes lie in the log."""

    offset: int
    length: int
    sha256: bytes
    at: int


def write_log(path: Path, subject: Subject, old: Iterable[tuple[int, bytes]]) -> None:
    """A whole log, on the medium with its name when this returns. `old`: (offset, bytes), ascending, at most LONGEST each."""
    with durable.storing(path):
        path.unlink(missing_ok=True)
        fd = durable.create(path)
        try:
            _write(fd, subject, old)
            os.fsync(fd)
        finally:
            os.close(fd)
        durable.sync_folder(path.parent)


def _write(fd: int, subject: Subject, old: Iterable[tuple[int, bytes]]) -> None:
    digest, count = hashlib.sha256(), 0

    def put(data: bytes) -> None:
        digest.update(data)
        durable.write_all(fd, data)

    identity = subject.identity.encode("utf-8", "surrogateescape")
    put(_HEADER.pack(MAGIC, VERSION, len(identity), subject.size, subject.overlay) + identity)
    for offset, data in old:
        put(_ENTRY.pack(_RECORD, len(data), offset, hashlib.sha256(data).digest()) + data)
        count += 1
    durable.write_all(fd, _ENTRY.pack(_END, 0, count, digest.digest()))


class UndoLog:
    """A complete log: every digest was checked when it was opened. Held open, so no other file can take its place."""

    def __init__(self, path: Path, fd: int, subject: Subject, records: list[Saved]) -> None:
        self.path = path
        self.subject = subject
        self.records = records
        self._fd = fd

    @classmethod
    def open(cls, path: Path) -> UndoLog:
        """GuestError when any byte of it is not as it was written."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as exc:
            raise GuestError(f"the undo log cannot be read: {exc.strerror}", where=str(path), fix=_FIX_LOST) from exc
        try:
            return cls(path, fd, *_Check(fd, path).all())
        except OSError as exc:
            os.close(fd)
            raise GuestError(f"the undo log cannot be read: {exc.strerror}", where=str(path), fix=_FIX_LOST) from exc
        except BaseException:
            os.close(fd)
            raise

    @property
    def changed(self) -> int:
        """Bytes that the commit changes."""
        return sum(record.length for record in self.records)

    def old(self, record: Saved) -> bytes:
        """The record's old bytes, checked once more: they go onto a disk now."""
        with durable.storing(self.path):
            data = os.pread(self._fd, record.length, record.at)
        if hashlib.sha256(data).digest() != record.sha256:
            raise GuestError("the undo log changed while it was read", where=f"{self.path}@{record.at:#x}", fix=_FIX_LOST)
        return data

    def restore(self, disk: DiskWriter) -> None:
        """Put the old bytes back, flush, and see on the medium that they are there. GuestError when this is another disk."""
        self.refuse_other(disk)
        for record in self.records:
            disk.write(record.offset, memoryview(self.old(record)))
        disk.flush()
        for record in self.records:
            if hashlib.sha256(disk.read_back(record.offset, record.length)).digest() != record.sha256:
                raise GuestError(
                    f"{record.length} bytes at {record.offset:#x} were put back, but the disk does not hold them",
                    where=self.subject.identity,
                    fix="check the storage below it (dmesg), then run `tokvm unmorph` or the same command again",
                )

    def refuse_other(self, disk: DiskWriter) -> None:
        if (disk.identity, disk.size) != (self.subject.identity, self.subject.size):
            raise GuestError(
                f"this is {disk.identity}, {disk.size} bytes; the log is of {self.subject.identity}, {self.subject.size} bytes",
                where=str(self.path),
                fix="give the path of the disk that was morphed",
            )

    def close(self) -> None:
        os.close(self._fd)


class _Check:
    """Reads a log from its beginning to its end, believing nothing."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._at = 0
        self._digest = hashlib.sha256()

    def all(self) -> tuple[Subject, list[Saved]]:
        subject = self._subject()
        records = list(self._records(subject.size))
        if self._at != os.fstat(self._fd).st_size:
            raise self._bad("something follows its end")
        return subject, records

    def _subject(self) -> Subject:
        magic, version, length, size, overlay = _HEADER.unpack(self._take(_HEADER.size))
        if magic != MAGIC or version != VERSION or length > _LONGEST_IDENTITY:
            raise self._bad("it is no undo log of this version")
        return Subject(self._take(length).decode("utf-8", "surrogateescape"), size, overlay)

    def _records(self, size: int) -> Iterator[Saved]:
        count, end = 0, 0
        while True:
            before = self._digest.digest()
            kind, length, offset, sha256 = _ENTRY.unpack(self._take(_ENTRY.size))
            if kind == _END:
                if (length, offset, sha256) != (0, count, before):
                    raise self._bad("its end does not match its records")
                return
            if kind != _RECORD or not 0 < length <= LONGEST or offset < end or offset + length > size:
                raise self._bad("a record makes no sense")
            at = self._at
            if hashlib.sha256(self._take(length)).digest() != sha256:
                raise self._bad("the bytes of a record are damaged")
            yield Saved(offset, length, sha256, at)
            count, end = count + 1, offset + length

    def _take(self, length: int) -> bytes:
        data = os.pread(self._fd, length, self._at)
        if len(data) != length:
            raise self._bad("it ends too early")
        self._digest.update(data)
        self._at += length
        return data

    def _bad(self, why: str) -> GuestError:
        return GuestError(f"the undo log cannot be used: {why}", where=f"{self._path}@{self._at:#x}", fix=_FIX_LOST)
