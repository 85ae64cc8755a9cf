"""What does a target hold? Remembered beside it, so that a layer is applied only onto the disk it was made over.

    raw file   NAME.tokvm.json beside it        block device   <state directory>/targets/<hash of its identity>.json

    {"target": identity, "holds": {ids, format, name, size, sector_size} or null,
     "pending": {what, names, signature, fingerprint, checkpoint} or null, "applied": [signature, …]}

Recorded before the first byte (pending), at every checkpoint, and after the last flush (holds). The file is replaced as a
whole: written, flushed, renamed, its directory flushed. `target` binds it to the very file or device, so a copy put in its
place, or a new file of the same name, is not taken for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tokvm.app.state import default_state_dir, prepare_state_dir
from tokvm.core.errors import JournalError
from tokvm.targets.rawfile import sync_directory
from tokvm.transfer.checkpoint import Checkpoint

VERSION = 1
SUFFIX = ".tokvm.json"
MAX_NOTE = 4 << 20


@dataclass(frozen=True, slots=True)
class Content:
    """The disk that the target holds, as its top layer was known. ids: names a child may call it by. size: bytes."""

    ids: tuple[str, ...]
    format: str
    name: str
    size: int
    sector_size: int


@dataclass(frozen=True, slots=True)
class Pending:
    """What is being written. signature: of what the layers say, whatever their files are called or when they were copied.
    fingerprint: of the reader, for which the checkpoint is good."""

    what: str
    names: tuple[str, ...]
    signature: str
    fingerprint: str
    checkpoint: Checkpoint | None = None
    grown_from: int | None = None


@dataclass(frozen=True, slots=True)
class Held:
    target: str
    holds: Content | None = None
    pending: Pending | None = None
    applied: tuple[str, ...] = field(default=())

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1)

    @classmethod
    def parse(cls, text: str, where: str) -> Held:
        try:
            found = json.loads(text)
            if found.pop("version") != VERSION:
                raise ValueError("another version")
            holds, pending = found.pop("holds"), found.pop("pending")
            return cls(
                holds=None if holds is None else Content(**(holds | {"ids": tuple(holds["ids"])})),
                pending=None if pending is None else _pending(pending),
                applied=tuple(found.pop("applied")),
                **found,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise JournalError(
                f"what the target holds cannot be read from its note: {exc}",
                where=where,
                fix="nobody can tell what the target holds now: remove the note and convert the whole chain anew",
            ) from exc


def _pending(found: dict[str, Any]) -> Pending:
    checkpoint = found.pop("checkpoint")
    names = tuple(found.pop("names"))
    return Pending(names=names, checkpoint=None if checkpoint is None else Checkpoint(**checkpoint), **found)


class Note:
    """The note about one target."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._now: Held | None = None

    @classmethod
    def of(cls, target: str) -> Note:
        """The note of the target at this path, whether there is one yet or not."""
        if not _is_device(target):
            return cls(Path(target + SUFFIX))
        folder = prepare_state_dir(default_state_dir()) / "targets"
        folder.mkdir(mode=0o700, exist_ok=True)
        name = hashlib.blake2b(str(Path(target).resolve()).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        return cls(folder / f"{name}.json")

    def read(self) -> Held | None:
        """What was noted last; None when nothing was. JournalError when it cannot be read."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise JournalError(
                f"the note cannot be opened: {exc.strerror}", where=str(self.path), fix="look what it is"
            ) from exc
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise JournalError("the note is no regular file", where=str(self.path), fix="look what it is, and move it away")
            text = file.read(MAX_NOTE).decode("utf-8", "replace")
        self._now = Held.parse(text, str(self.path))
        return self._now

    def write(self, held: Held) -> None:
        """Replace the note; on the medium when this returns."""
        fresh = self.path.with_name(self.path.name + ".new")
        try:
            fresh.unlink(missing_ok=True)
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(held.to_json())
                file.flush()
                os.fsync(fd)
            fresh.replace(self.path)
            sync_directory(self.path.parent)
        except OSError as exc:
            raise JournalError(
                f"the note about the target cannot be written: {exc.strerror}",
                where=str(self.path),
                fix="make room or give rights",
            ) from exc
        self._now = held

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """How far what is pending has come."""
        held = self._now
        if held is not None and held.pending is not None:
            self.write(replace(held, pending=replace(held.pending, checkpoint=checkpoint)))

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
        self._now = None


def _is_device(target: str) -> bool:
    try:
        return stat.S_ISBLK(Path(target).stat().st_mode)
    except OSError:
        return False
