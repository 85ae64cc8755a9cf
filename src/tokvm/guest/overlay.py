"""qcow2 overlays: what a morph writes goes there, and the synced disk below stays as it is.

    target (raw, or a qcow2 of ours) ◄── overlay (the morph) ◄── trial overlay (a boot that leaves no trace)

An overlay is qcow2 version 2 (see remote/qemu_img.py: discards do not count as changes). Which clusters it holds says
`qemu-img map`; their bytes are read from the file itself, so nothing of the base is opened for that.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tokvm.core.units import SECTOR, MiB
from tokvm.guest import durable
from tokvm.guest.base import GuestDisk, GuestError
from tokvm.remote.process import ProgramError
from tokvm.remote.qemu_img import create_overlay, map_alone

STEP = MiB
_FIX_QEMU = "install a qemu-img of version 6.1 or newer (package qemu-utils), or check the folder's file system"


def create(path: Path, base: GuestDisk, *, size: int, locked: bool = True) -> GuestDisk:
    """A new, empty overlay over `base`, whose disk has `size` bytes. GuestError: it cannot be made; nothing is left then.

    locked: QEMU locks the base against writers for as long as it has the overlay open, as it does with every image. Not locked
    goes with raw bases only: QEMU keeps what it read of a qcow2's tables."""
    if not locked and base.format != "raw":
        raise GuestError(
            f"a {base.format} cannot be written below an overlay in use", where=base.path, fix="morph it afterwards"
        )
    if size % SECTOR:
        raise GuestError(f"the disk has {size} bytes, no whole number of sectors", where=base.path, fix="copy the disk again")
    with durable.storing(path):
        fd = durable.create(path)
    try:
        with _translated(), durable.storing(path):
            backing = str(Path(base.path).absolute())
            if not locked:
                backing = _without_lock(backing, base.format)
            create_overlay(fd, size=size, backing=backing, backing_format=base.format, where=str(path))
            os.fsync(fd)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    return GuestDisk(str(path), "qcow2")


def _without_lock(path: str, image_format: str) -> str:
    """QEMU's name (qemu-block-drivers(7)) for a base that it reads and does not lock."""
    driver = "host_device" if Path(path).is_block_device() else "file"
    name = {"driver": image_format, "file": {"driver": driver, "filename": path, "locking": "off"}}
    return "json:" + json.dumps(name)


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of clusters: `length` bytes at `offset` of the disk lie at `file_offset` of the overlay; None: they are zeros."""

    offset: int
    length: int
    file_offset: int | None


class Overlay:
    """An overlay that nobody writes to any more, on the medium; `pieces` ascend and do not overlap."""

    def __init__(self, path: Path, fd: int, size: int, pieces: list[Piece]) -> None:
        self.path = path
        self.size = size
        self.pieces = pieces
        self._fd = fd
        self._starts = [piece.offset for piece in pieces]

    @classmethod
    def open(cls, path: Path, *, size: int) -> Overlay:
        """The overlay of a disk of `size` bytes. GuestError: it is damaged, or a program still has it open for writing."""
        with durable.storing(path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            with durable.storing(path):
                os.fsync(fd)  # the appliance may have been told that nothing needs flushing (cache=unsafe)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise GuestError("the overlay is no file", where=str(path), fix="run the morph again")
            with _translated():
                rows = map_alone(fd, where=str(path))
            return cls(path, fd, size, pieces_in(rows, size, os.fstat(fd).st_size, str(path)))
        except BaseException:
            os.close(fd)
            raise

    def ranges(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of what the overlay holds, ascending, neighbours together, in steps of at most `STEP` bytes."""
        for start, stop in self._runs():
            for at in range(start, stop, STEP):
                yield at, min(STEP, stop - at)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes that the overlay itself holds."""
        parts, end = [], offset + length
        while offset < end:
            piece = self._piece_at(offset)
            step = min(end, piece.offset + piece.length) - offset
            parts.append(self._bytes(piece, offset, step))
            offset += step
        return b"".join(parts)

    def sha256(self) -> bytes:
        """Of the whole file."""
        with durable.storing(self.path):
            os.lseek(self._fd, 0, os.SEEK_SET)
            digest = hashlib.sha256()
            while part := os.read(self._fd, STEP):
                digest.update(part)
            return digest.digest()

    def close(self) -> None:
        os.close(self._fd)

    def _runs(self) -> Iterator[tuple[int, int]]:
        start = stop = 0
        for piece in self.pieces:
            if piece.offset != stop:
                yield start, stop
                start = piece.offset
            stop = piece.offset + piece.length
        yield start, stop

    def _piece_at(self, offset: int) -> Piece:
        index = bisect.bisect_right(self._starts, offset) - 1
        piece = self.pieces[index] if index >= 0 else None
        if piece is None or offset >= piece.offset + piece.length:
            raise GuestError(
                "the overlay does not hold these bytes", where=f"{self.path}@{offset:#x}", fix="run the morph again"
            )
        return piece

    def _bytes(self, piece: Piece, offset: int, length: int) -> bytes:
        if piece.file_offset is None:
            return bytes(length)
        found, at = bytearray(), piece.file_offset + offset - piece.offset
        with durable.storing(self.path):
            while len(found) < length:
                part = os.pread(self._fd, length - len(found), at + len(found))
                if not part:  # the last cluster need not be all in the file
                    part = bytes(length - len(found))
                found += part
        return bytes(found)


def pieces_in(rows: str, size: int, file_size: int, where: str) -> list[Piece]:
    """The clusters that a map names, checked; GuestError when it does not fit the disk or the file. A map names every byte of
    the disk, in order: one that leaves something out would lose what the morph wrote there."""
    try:
        found, at = [], 0
        parsed = json.loads(rows)
        if not isinstance(parsed, list):
            raise TypeError("it is no list")
        for row in parsed:
            piece = _piece(row, file_size)
            if piece.offset != at:
                raise ValueError(f"its rows have a gap or overlap at {at}")
            at += piece.length
            if row["present"]:
                found.append(piece)
        if at != size:
            raise ValueError(f"it is of {at} bytes, the disk of {size}")
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise GuestError(f"the overlay's map makes no sense: {exc}", where=where, fix=_FIX_QEMU) from exc
    return found


def _piece(row: dict[str, object], file_size: int) -> Piece:
    offset, length, at = row["start"], row["length"], row.get("offset")
    if not isinstance(offset, int) or not isinstance(length, int) or not isinstance(at, int | None):
        raise TypeError("a number is missing")
    if row.get("compressed") or (at is None and not row["zero"]):
        raise ValueError("clusters are packed")  # QEMU packs what it is told to pack, and nobody tells it to
    if length <= 0 or (at is not None and not 0 <= at < file_size):
        raise ValueError(f"{length} bytes at {at} do not lie in the file's {file_size}")
    return Piece(offset, length, at)


@contextmanager
def _translated() -> Iterator[None]:
    """qemu-img's failure as GuestError."""
    try:
        yield
    except ProgramError as exc:
        fix = exc.fix or "end what uses the disk, or make room in the folder, then run the command again"
        raise GuestError(exc.what, where=exc.where, fix=fix) from exc
