"""How far the morph of a VM's disks has come, as one small file: the only thing that a later run believes.

    FOLDER/morph.json   {"version": 1, "state": …, "touched": …, "disks": [{path, format, size, identity, written, cells}, …]}

Replaced as a whole, on the medium before what it announces begins. No file: nothing was begun, or all of it was undone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path

from tokvm.guest import durable
from tokvm.guest.base import GuestDisk, GuestError

NAME = "morph.json"
VERSION = 1
_LIMIT = 4 << 20
_FIX = "look into the file; without it nobody can tell whether the disks hold half a morph: copy them again"


class MorphState(StrEnum):
    """Each on the medium before the next begins. From COMMITTING on the disks hold other bytes than before.

    OVERLAYS: overlays may be there, and a morph may write to them. LOGGED: every old byte is in the undo logs. UNDOING: they
    are being put back."""

    NOTHING = "nothing"
    OVERLAYS = "overlays"
    LOGGED = "undo complete"
    COMMITTING = "committing"
    COMMITTED = "committed"
    UNDOING = "undoing"


@dataclass(frozen=True, slots=True)
class DiskNote:
    """One disk as `begin` found it, but for `written`: the mark (see canary.py) at `begin`, and once COMMITTED that after the
    commit. cells: digest of the sampled cells at `begin`. size: bytes."""

    path: str
    format: str
    size: int
    identity: str
    written: str
    cells: str

    @property
    def disk(self) -> GuestDisk:
        return GuestDisk(self.path, self.format)


@dataclass(frozen=True, slots=True)
class MorphRecord:
    """touched: an undo found that somebody else had written to the committed disks."""

    state: MorphState
    disks: tuple[DiskNote, ...]
    touched: bool = False

    @classmethod
    def read(cls, folder: Path) -> MorphRecord | None:
        """None: no morph. GuestError: the file cannot be read or makes no sense."""
        path = folder / NAME
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            raise GuestError(f"the morph's record cannot be read: {exc.strerror}", where=str(path), fix=_FIX) from exc
        with os.fdopen(fd, "rb") as file:
            text = file.read(_LIMIT)
        return cls._parse(text, path)

    @classmethod
    def _parse(cls, text: bytes, path: Path) -> MorphRecord:
        try:
            found = json.loads(text)
            if found["version"] != VERSION:
                raise ValueError(f"version {found['version']!r}")
            notes = tuple(DiskNote(**note) for note in found["disks"])
            return cls(MorphState(found["state"]), notes, bool(found["touched"]))
        except (ValueError, KeyError, TypeError) as exc:
            raise GuestError(f"the morph's record makes no sense: {exc}", where=str(path), fix=_FIX) from exc

    def write(self, folder: Path) -> None:
        durable.write_file(folder / NAME, json.dumps({"version": VERSION, **asdict(self)}, indent=1).encode())

    def at(self, state: MorphState, *, written: Sequence[str] = (), touched: bool = False) -> MorphRecord:
        """The same morph one step on; `written`: new marks, one for each disk."""
        marks = written or [note.written for note in self.disks]
        notes = tuple(replace(note, written=mark) for note, mark in zip(self.disks, marks, strict=True))
        return MorphRecord(state, notes, touched)


def forget_record(folder: Path) -> None:
    """No morph any more, on the medium when this returns."""
    with durable.storing(folder):
        (folder / NAME).unlink(missing_ok=True)
        durable.sync_folder(folder)
