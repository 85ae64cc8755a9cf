"""One morph of one VM's disks, which a crash anywhere cannot leave half done for good.

    begin ──► OVERLAYS ── morph writes to the overlays ── commit: old bytes ──► LOGGED ──► COMMITTING ── new bytes ──► COMMITTED
                 │                                                     │            │                               │
    undo ────────┴─── delete ──────────────────────────────────────────┴─► NOTHING ◄─ old bytes, flush, look ─ UNDOING ◄┘ ◄┘

Each state is on the medium before what it stands for begins (morph_record.py). The disks are written by us and not by
`qemu-img commit`: we hold them exclusively, a page that the morph left as it was is not written, and a flush that fails is seen
on the descriptor that wrote. Disks are opened by the caller's `open_disk`, with all the interlocks of a target.

An undo is exact as long as nobody else wrote since the commit (a guest that ran did); it says which it was.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from tokvm.core.disk import DiskWriter
from tokvm.core.errors import UnsafeTarget
from tokvm.core.units import MiB, format_bytes
from tokvm.guest import canary, durable, overlay
from tokvm.guest.base import GuestDisk, GuestError
from tokvm.guest.committing import Commit
from tokvm.guest.morph_advice import UNMORPH, Advice
from tokvm.guest.morph_record import DiskNote, MorphRecord, MorphState, forget_record
from tokvm.guest.overlay import Overlay
from tokvm.guest.undo import UndoLog

log = logging.getLogger(__name__)

ROOM = 64 * MiB
# An appliance that was killed with its tokvm may hold its disks for a moment longer.
PATIENCE_S = 5.0
HALF = frozenset({MorphState.COMMITTING, MorphState.UNDOING})
"""States in which the disks may hold a part of the morph."""
_LEFTOVERS = ("disk-*.qcow2", "disk-*.undo", "trial-*.qcow2", f"*{durable.NEW}")

DiskOpener = Callable[[GuestDisk, str | None], DiskWriter]
"""Opens a disk exclusively; the second argument is the identity that it must have, None the first time. A TargetError else."""


class Undone(StrEnum):
    """NOTHING: the disks had not been touched. EXACT: they hold what they held at `begin`. TOUCHED: the morph's changes are
    gone, but somebody else wrote as well, or that cannot be told: compare the disks with their source, or copy them anew."""

    NOTHING = "nothing to undo"
    EXACT = "exact"
    TOUCHED = "touched by others"


class MorphStore:
    """folder: private to one VM's morph; overlays and undo logs need room there. disks: the VM's, in order.

    One process at a time works in a folder (flock); `close` gives it back."""

    def __init__(self, folder: Path, disks: Sequence[GuestDisk], open_disk: DiskOpener, *, advice: Advice = UNMORPH) -> None:
        self.folder = folder
        self.disks = tuple(disks)
        self._open_disk = open_disk
        self._advice = advice
        self._lock = -1
        self._begun = False
        self._empty: tuple[int, ...] = ()

    # ---- verbs

    def state(self) -> MorphState:
        record = MorphRecord.read(self.folder)
        return MorphState.NOTHING if record is None else record.state

    def touched(self) -> bool:
        """It is committed, and somebody wrote to the disks since (a guest that ran), or that cannot be told."""
        record = MorphRecord.read(self.folder)
        return record is not None and record.state is MorphState.COMMITTED and _touched(record)

    def begin(self, *, shared: bool = False) -> tuple[GuestDisk, ...]:
        """Fresh overlays, to be morphed. What an earlier morph left is undone first; GuestError when that one was committed and
        its disks were written since (by a guest that ran, most likely): then nothing is changed.

        shared: whoever opens the overlays does not lock the disks below, which are still to be written to: see `renew`."""
        durable.make_private(self.folder)
        self._take_lock()
        self._undo_earlier()
        self._refuse_full()
        notes = tuple(self._noted(disk) for disk in self.disks)
        if len({note.identity for note in notes}) != len(notes):
            raise GuestError("a disk was given twice", where=", ".join(note.path for note in notes), fix="give each once")
        MorphRecord(MorphState.OVERLAYS, notes).write(self.folder)
        made = tuple(
            overlay.create(self._overlay(number), note.disk, size=note.size, locked=not shared)
            for number, note in enumerate(notes)
        )
        with durable.storing(self.folder):
            durable.sync_folder(self.folder)
        self._begun = True
        self._empty = tuple(Path(layer.path).stat().st_size for layer in made)
        return made

    def renew(self) -> None:
        """The disks below were written to since `begin` (the last delta), and that is how they shall be now. GuestError when an
        overlay holds anything: it would hide what was written."""
        self._refuse_full()
        record = self._needed()
        sizes = tuple(self._overlay(number).stat().st_size for number in range(len(record.disks)))
        if record.state is not MorphState.OVERLAYS or not self._begun or sizes != self._empty:
            raise GuestError(
                "something was written to the overlays before the disks were complete",
                where=str(self.folder),
                fix="run the same command again",
            )
        MorphRecord(MorphState.OVERLAYS, tuple(self._noted(note.disk, note.identity) for note in record.disks)).write(
            self.folder
        )

    def trial(self) -> tuple[GuestDisk, ...]:
        """Overlays over the overlays, for a boot that leaves no trace; made anew each time."""
        record = self._needed()
        made = []
        for number, note in enumerate(record.disks):
            path = self.folder / f"trial-{number}.qcow2"
            with durable.storing(path):
                path.unlink(missing_ok=True)
            made.append(overlay.create(path, GuestDisk(str(self._overlay(number)), "qcow2"), size=note.size))
        return tuple(made)

    def commit(self) -> int:
        """The overlays' bytes onto the disks; bytes that changed. Nothing may have the overlays open. After COMMITTED again: 0.

        GuestError before the first byte: the disk below changed, no room for the undo log, the morph is another run's and did
        not end. TargetError: a disk failed; `undo` puts back what was written."""
        self._take_lock()
        record = self._needed()
        if record.state is MorphState.COMMITTED:
            return 0
        if record.state is MorphState.UNDOING or (record.state is MorphState.OVERLAYS and not self._begun):
            raise GuestError("this morph broke off before its end", where=str(self.folder), fix="run the morph again")
        with ExitStack() as stack:
            commits = [self._hold(stack, number, note, record.state) for number, note in enumerate(record.disks)]
            if record.state is MorphState.OVERLAYS:
                for commit in commits:
                    commit.save_old()
                record = self._advance(record.at(MorphState.LOGGED))
            logs = [stack.enter_context(closing(commit.checked_log())) for commit in commits]
            record = self._advance(record.at(MorphState.COMMITTING))
            for commit, undo in zip(commits, logs, strict=True):
                commit.write_new(undo)
            changed = sum(undo.changed for undo in logs)
        self._advance(record.at(MorphState.COMMITTED, written=[canary.written(note.path) for note in record.disks]))
        log.info("%s: %s changed on %d disks", self.folder, format_bytes(changed), len(record.disks))
        return changed

    def undo(self) -> Undone:
        """The disks as they were at `begin`, overlays and logs gone. From every state, any number of times."""
        if not self.folder.exists():
            return Undone.NOTHING
        self._take_lock()
        self._begun = False
        record = MorphRecord.read(self.folder)
        result = Undone.NOTHING
        if record is not None and record.state in HALF | {MorphState.COMMITTED}:
            result = self._restore(record)
        self._drop()
        return result

    def forget(self) -> None:
        """Overlays and undo logs are not needed any more; the disks stay as they are. Refused while a commit is half done."""
        if not self.folder.exists():
            return
        self._take_lock()
        if self.state() in HALF:
            raise GuestError("the disks hold half a morph", where=str(self.folder), fix=self._advice.half)
        self._drop()

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ---- begin

    def _undo_earlier(self) -> None:
        if self.touched() or self.undo() is Undone.TOUCHED:
            raise GuestError(
                "these disks were morphed before, and somebody wrote to them since (a guest that ran)",
                where=", ".join(disk.path for disk in self.disks),
                fix=self._advice.touched,
            )

    def _refuse_full(self) -> None:
        with durable.storing(self.folder):
            found = os.statvfs(self.folder)
        free = found.f_bavail * found.f_frsize
        if free < ROOM:
            raise GuestError(
                f"only {format_bytes(free)} are free for overlays and undo logs",
                where=str(self.folder),
                fix="make room there, or give another --state-dir",
            )

    def _noted(self, disk: GuestDisk, expect: str | None = None) -> DiskNote:
        with closing(self._patiently(disk, expect)) as found:
            found.flush()  # what an earlier writer left in the page cache counts as written before, not after
            size, identity, cells = found.size, found.identity, canary.cells(found)
        return DiskNote(str(Path(disk.path).absolute()), disk.format, size, identity, canary.written(disk.path), cells)

    # ---- commit

    def _hold(self, stack: ExitStack, number: int, note: DiskNote, state: MorphState) -> Commit:
        fits = state is MorphState.COMMITTING or _as_before(note)
        layer = stack.enter_context(closing(Overlay.open(self._overlay(number), size=note.size)))
        disk = stack.enter_context(closing(self._open_again(note)))
        if not fits or (state is not MorphState.COMMITTING and canary.cells(disk) != note.cells):
            raise GuestError(
                "the disk changed below the morph, so the morph does not fit it any more; it was not committed",
                where=note.path,
                fix="see who writes to it, then run the morph again",
            )
        return Commit(disk, layer, self._undo_log(number))

    def _advance(self, record: MorphRecord) -> MorphRecord:
        record.write(self.folder)
        return record

    # ---- undo

    def _restore(self, record: MorphRecord) -> Undone:
        """Every log is read and found whole, and every disk is held and found to be the one, before a byte is written."""
        touched = record.touched or (record.state is MorphState.COMMITTED and _touched(record))
        with ExitStack() as stack:
            logs = [stack.enter_context(closing(UndoLog.open(self._undo_log(n)))) for n in range(len(record.disks))]
            disks = [stack.enter_context(closing(self._open_again(note))) for note in record.disks]
            for undo, disk in zip(logs, disks, strict=True):
                undo.refuse_other(disk)
            self._advance(record.at(MorphState.UNDOING, touched=touched))
            for undo, disk in zip(logs, disks, strict=True):
                undo.restore(disk)
        return Undone.TOUCHED if touched else Undone.EXACT

    def _drop(self) -> None:
        """The record goes first: without it the rest means nothing."""
        forget_record(self.folder)
        with durable.storing(self.folder):
            for pattern in _LEFTOVERS:
                for path in self.folder.glob(pattern):
                    path.unlink(missing_ok=True)

    # ---- both

    def _needed(self) -> MorphRecord:
        record = MorphRecord.read(self.folder)
        if record is None:
            raise GuestError("no morph was begun", where=str(self.folder), fix="begin one")
        return record

    def _open_again(self, note: DiskNote) -> DiskWriter:
        disk = self._patiently(note.disk, note.identity)
        if (disk.identity, disk.size) != (note.identity, note.size):
            what = f"this is {disk.identity} of {disk.size} bytes, and the morph began on {note.identity}, {note.size} bytes"
            disk.close()
            raise GuestError(what, where=note.path, fix="give the disk that was morphed its name back")
        return disk

    def _patiently(self, disk: GuestDisk, expect: str | None) -> DiskWriter:
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self._open_disk(disk, expect)
            except UnsafeTarget:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    def _take_lock(self) -> None:
        if self._lock >= 0:
            return
        fd = durable.open_private(self.folder)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(fd)
            raise GuestError("another run works on this morph", where=str(self.folder), fix="wait for its end") from exc
        self._lock = fd

    def _overlay(self, number: int) -> Path:
        return self.folder / f"disk-{number}.qcow2"

    def _undo_log(self, number: int) -> Path:
        return self.folder / f"disk-{number}.undo"


def _touched(record: MorphRecord) -> bool:
    return not all(canary.same(note.written, canary.written(note.path)) for note in record.disks)


def _as_before(note: DiskNote) -> bool:
    """Nobody is known to have written since `begin`."""
    return note.written == canary.UNKNOWN or canary.same(note.written, canary.written(note.path))
