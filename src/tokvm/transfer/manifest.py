"""What a pass wrote, as hashes that can be checked later: one append-only file per pass and disk.

    header 64 | frame | frame | …
    header: magic "tokvm-manifest-1" 16 | pass u32 | disk u32 | size u64 | cell u32 | zeros | CRC-32 of the first 60 bytes u32
    frame:  magic "TKVF" | record count u32 | sequence u32 | CRC-32 of sequence and records u32 | records, 32 bytes each
    record: offset u64 | length u32 | kind u32 | first 16 bytes of BLAKE3 (zeros for ZERO)

Little-endian; offset and length are bytes of the guest disk. DATA and SEAL records never cross a 64 KiB grid line of the guest
disk (a cell); ZERO records are as long as they like, up to 2 GiB. A newer record wins over older ones where they overlap,
within a file and from file to file.

    DATA  these bytes were handed to the target by this pass
    ZERO  this pass made the range read as zeros
    SEAL  the whole cell was read back from the medium after this pass had written a part of it (see transfer/reseal.py)

A torn or damaged tail (power loss in mid-append) is dropped when the file is opened again; what a checkpoint counts on was
flushed before the checkpoint was recorded, so nothing of it is in the tail.
"""

from __future__ import annotations

import logging
import os
import random
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from tokvm.core.errors import JournalError
from tokvm.core.units import GiB, KiB

log = logging.getLogger(__name__)

CELL = 64 * KiB
ZERO_PIECE = 2 * GiB
DIGEST = 16
MAGIC = b"tokvm-manifest-1"
FRAME_MAGIC = b"TKVF"
RECORD = np.dtype([("offset", "<u8"), ("length", "<u4"), ("kind", "<u4"), ("digest", "V16")])
Records = npt.NDArray[np.void]

_HEADER = struct.Struct("<16sIIQI24xI")
_FRAME = struct.Struct("<4sIII")
_PACK = struct.Struct("<QII16s")
FRAME_RECORDS = 1 << 16


class RecordKind(IntEnum):
    DATA = 1
    ZERO = 2
    SEAL = 3


@dataclass(frozen=True, slots=True)
class ManifestHeader:
    """Which pass over which disk (both counted by the journal), and the disk's size in bytes."""

    number: int
    disk: int
    size: int

    def pack(self) -> bytes:
        body = _HEADER.pack(MAGIC, self.number, self.disk, self.size, CELL, 0)[:-4]
        return body + struct.pack("<I", zlib.crc32(body))

    @classmethod
    def parse(cls, raw: bytes, *, where: str) -> ManifestHeader:
        if len(raw) < _HEADER.size or raw[:16] != MAGIC or struct.unpack("<I", raw[60:64])[0] != zlib.crc32(raw[:60]):
            raise JournalError(
                "the manifest's header is damaged", where=where, fix="delete the file; its pass cannot be verified"
            )
        _, number, disk, size, cell, _ = _HEADER.unpack(raw[: _HEADER.size])
        if cell != CELL:
            raise JournalError(f"the manifest has cells of {cell} bytes", where=where, fix="use the tokvm that wrote it")
        return cls(number, disk, size)


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where a frame's records lie in the file, and between which guest offsets."""

    file_offset: int
    count: int
    first: int
    last: int


def digest(data: memoryview | bytes) -> bytes:
    return blake3(data).digest(DIGEST)


def data_records(offset: int, data: memoryview, *, kind: RecordKind = RecordKind.DATA) -> bytes:
    """Packed records of the bytes at `offset`, one for each cell they touch."""
    packed = bytearray()
    at, end = offset, offset + len(data)
    while at < end:
        stop = min(end, (at // CELL + 1) * CELL)
        packed += _PACK.pack(at, stop - at, kind, digest(data[at - offset : stop - offset]))
        at = stop
    return bytes(packed)


def zero_records(offset: int, length: int) -> bytes:
    """Packed records that say the range reads as zeros."""
    cuts = range(offset, offset + length, ZERO_PIECE)
    return b"".join(_PACK.pack(at, min(ZERO_PIECE, offset + length - at), RecordKind.ZERO, b"") for at in cuts)


class ManifestReader:
    """A manifest on disk, read in parts: memory goes with the number of checkpoints, not with the number of records.

    `dropped`: bytes at the end that were torn or damaged and are not believed.
    """

    def __init__(self, path: Path, fd: int, header: ManifestHeader) -> None:
        self.path = path
        self.header = header
        self._fd = fd
        self._frames, self.end = _scan(fd)
        self.dropped = os.fstat(fd).st_size - self.end
        if self.dropped:
            log.warning("%s: %d bytes at the end are torn and were dropped", path, self.dropped)

    @classmethod
    def open(cls, path: str | Path) -> ManifestReader:
        """JournalError when there is no believable header."""
        path = Path(path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise JournalError(
                f"the manifest cannot be read: {exc.strerror}", where=str(path), fix="its pass cannot be verified"
            ) from exc
        try:
            return cls(path, fd, ManifestHeader.parse(os.pread(fd, _HEADER.size, 0), where=str(path)))
        except BaseException:
            os.close(fd)
            raise

    @property
    def frames(self) -> int:
        return len(self._frames)

    def __len__(self) -> int:
        return sum(frame.count for frame in self._frames)

    def records(self, start: int = 0, stop: int = 1 << 63) -> Records:
        """The records that touch [start, stop) of the guest disk, oldest first."""
        parts = []
        for frame in self._frames:
            if frame.first < stop and frame.last > start:
                rows = np.frombuffer(os.pread(self._fd, frame.count * RECORD.itemsize, frame.file_offset), RECORD)
                touches = (rows["offset"] < stop) & (rows["offset"] + rows["length"] > start)
                parts.append(rows[touches])
        return np.concatenate(parts) if parts else np.empty(0, RECORD)

    def sample(self, count: int) -> list[int]:
        """Guest offsets of up to `count` records, each from a frame chosen at random."""
        frames = random.sample(self._frames, min(count, len(self._frames)))
        places = [frame.file_offset + random.randrange(frame.count) * RECORD.itemsize for frame in frames]
        return [int(np.frombuffer(os.pread(self._fd, RECORD.itemsize, place), RECORD)[0]["offset"]) for place in places]

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def read_manifest(path: str | Path) -> Records:
    """All believable records of a manifest at once, oldest first. For small ones; `ManifestReader` reads in parts."""
    reader = ManifestReader.open(path)
    try:
        return reader.records()
    finally:
        reader.close()


def _scan(fd: int) -> tuple[list[_Frame], int]:
    """All good frames, and where the first bad one begins."""
    found: list[_Frame] = []
    at = _HEADER.size
    while True:
        head = os.pread(fd, _FRAME.size, at)
        if len(head) < _FRAME.size:
            return found, at
        magic, count, sequence, crc = _FRAME.unpack(head)
        if magic != FRAME_MAGIC or sequence != len(found) or not 0 < count <= FRAME_RECORDS:
            return found, at
        raw = os.pread(fd, count * RECORD.itemsize, at + _FRAME.size)
        if len(raw) != count * RECORD.itemsize or zlib.crc32(raw, sequence) != crc:
            return found, at
        rows = np.frombuffer(raw, RECORD)
        last = int((rows["offset"] + rows["length"]).max())
        found.append(_Frame(at + _FRAME.size, count, int(rows["offset"].min()), last))
        at += _FRAME.size + len(raw)


class ManifestWriter:
    """Appends to one manifest. Not thread-safe: `run_pass` packs records in its workers and appends them in one thread.

    Nothing counts before `flush` has returned: it writes what was added as one frame and syncs it.
    """

    def __init__(self, path: Path, fd: int, header: ManifestHeader, sequence: int) -> None:
        self.path = path
        self.header = header
        self._fd = fd
        self._sequence = sequence
        self._waiting = bytearray()

    @classmethod
    def open(cls, path: str | Path, *, number: int, disk: int, size: int) -> ManifestWriter:
        """Make the file, or go on behind its last good frame when it is of the same pass, disk and size."""
        path = Path(path)
        header = ManifestHeader(number, disk, size)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise _cannot(path, exc) from exc
        try:
            sequence = cls._prepare(path, fd, header)
        except OSError as exc:
            os.close(fd)
            raise _cannot(path, exc) from exc
        except JournalError:
            os.close(fd)
            raise
        return cls(path, fd, header, sequence)

    @staticmethod
    def _prepare(path: Path, fd: int, header: ManifestHeader) -> int:
        raw = os.pread(fd, _HEADER.size, 0)
        if len(raw) < _HEADER.size:  # new, or died while it was being made
            os.ftruncate(fd, 0)
            _write_all(fd, header.pack())
            os.fsync(fd)
            _sync_directory(path.parent)
            return 0
        if ManifestHeader.parse(raw, where=str(path)) != header:
            raise JournalError(
                "the manifest belongs to another pass, disk or size",
                where=str(path),
                fix="move it away; then its pass cannot be verified",
            )
        frames, end = _scan(fd)
        os.ftruncate(fd, end)
        os.lseek(fd, end, os.SEEK_SET)
        os.fdatasync(fd)
        return len(frames)

    def add(self, offset: int, data: memoryview) -> None:
        """These bytes were written at `offset`."""
        self.append(data_records(offset, data))

    def zero(self, offset: int, length: int) -> None:
        """The range was made to read as zeros."""
        self.append(zero_records(offset, length))

    def append(self, packed: bytes) -> None:
        """Records made by `data_records` or `zero_records`."""
        self._waiting += packed
        while len(self._waiting) >= FRAME_RECORDS * RECORD.itemsize:
            self._write_frame()

    def flush(self) -> None:
        """What was added is on the medium. Called after the target's own flush and before the checkpoint is recorded."""
        self._write_frame()
        try:
            os.fdatasync(self._fd)
        except OSError as exc:
            raise _cannot(self.path, exc) from exc

    def _write_frame(self) -> None:
        records = bytes(self._waiting[: FRAME_RECORDS * RECORD.itemsize])
        if not records:
            return
        crc = zlib.crc32(records, self._sequence)
        head = _FRAME.pack(FRAME_MAGIC, len(records) // RECORD.itemsize, self._sequence, crc)
        try:
            _write_all(self._fd, head + records)
        except OSError as exc:
            raise _cannot(self.path, exc) from exc
        self._sequence += 1
        del self._waiting[: len(records)]

    def read(self) -> ManifestReader:
        """A reader of what was flushed so far; the caller closes it."""
        return ManifestReader.open(self.path)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _cannot(path: Path, exc: OSError) -> JournalError:
    return JournalError(
        f"the manifest cannot be written: {exc.strerror}",
        where=str(path),
        fix="make room in the state directory, then run the same command again",
    )


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
