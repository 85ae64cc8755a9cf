"""The commit of one overlay onto its disk: first every old byte into the undo log, then the new bytes.

    overlay: clusters of 64 KiB   ─┐
    disk:    the same ranges      ─┴─► pages that differ ─► undo log (old bytes) ─► disk (new bytes), flush

Most pages of an overlay's clusters are as they were; those are neither saved nor written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokvm.core.disk import DiskWriter
from tokvm.core.units import KiB, round_up
from tokvm.guest.base import GuestError
from tokvm.guest.overlay import Overlay
from tokvm.guest.undo import Subject, UndoLog, write_log

PAGE = 4 * KiB


@dataclass(frozen=True, slots=True)
class Commit:
    """A disk that is held, the overlay that nobody writes to any more, and where the undo log is or will be."""

    disk: DiskWriter
    overlay: Overlay
    log: Path

    def save_old(self) -> None:
        """The undo log, on the medium when this returns."""
        subject = Subject(self.disk.identity, self.disk.size, self.overlay.sha256())
        write_log(self.log, subject, _old_bytes(self.disk, self.overlay))

    def checked_log(self) -> UndoLog:
        """The complete log, of this disk and of this very overlay; the caller closes it."""
        undo = UndoLog.open(self.log)
        try:
            undo.refuse_other(self.disk)
            if undo.subject.overlay != self.overlay.sha256():
                what = "the overlay changed since its undo log was written"
                raise GuestError(what, where=str(self.overlay.path), fix="undo the morph, and run it again")
        except BaseException:
            undo.close()
            raise
        return undo

    def write_new(self, undo: UndoLog) -> None:
        """What the log has the old bytes of, as the overlay has it; flushed. TargetError: the disk holds a part of it."""
        for record in undo.records:
            self.disk.write(record.offset, memoryview(self.overlay.read(record.offset, record.length)))
        self.disk.flush()


def _old_bytes(disk: DiskWriter, layer: Overlay) -> Iterator[tuple[int, bytes]]:
    """What the commit will change, page by page: an overlay holds whole clusters, most of whose bytes are as they were."""
    for offset, length in layer.ranges():
        old = bytes(disk.read_back(offset, length))
        for start, stop in _differing(old, layer.read(offset, length)):
            yield offset + start, old[start:stop]


def _differing(old: bytes, new: bytes) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of pages that differ."""
    whole = round_up(len(old), PAGE)
    rows = [np.frombuffer(data.ljust(whole, b"\0"), np.uint64).reshape(-1, PAGE // 8) for data in (old, new)]
    differs = np.concatenate(([False], (rows[0] != rows[1]).any(axis=1), [False]))
    edges = np.flatnonzero(differs[1:] != differs[:-1]) * PAGE
    for start, stop in edges.reshape(-1, 2):
        yield int(start), min(int(stop), len(old))
