"""A transcript: every command sent to a source and its answer, without secrets, fit to become a golden file.

    DIR/20261126T013415Z-sync.jsonl      DIR 0700, file 0600; ASCII, a JSON object a line; `\\udc80` is a byte that is no UTF-8

    {"event": "begin", "format": 1, "time": …, "tokvm": …, "verb": "sync", "typed": "tokvm sync …"}
    {"event": "sent",  "n": 1, "time": …, "kind": "command", "host": "ssh://root@xen1", "command": "xe …", "stdin": …}
    {"event": "ended", "n": 1, "seconds": 0.012, "code": 0, "stdout": "…", "stderr": "…", "stdout_cut": {"bytes", "sha256"}}
    {"event": "sent",  "n": 2, …, "kind": "request", …}          {"event": "ended", "n": 2, …, "code": null: it goes on, …}
    {"event": "sent",  "n": 3, …, "kind": "stream", …}           {"event": "ended", "n": 3, …, "received": bytes, "code": 0}
    {"event": "sent",  "n": 4, …, "kind": "sftp", …}             {"event": "step",  "n": 4, "op": "open", "path": …, "size": …}
    {"event": "end",   "time": …, "seconds": …, "error": {"class", "what"}}

Where a command, its input or its answer holds base64 of a text (PowerShell's -EncodedCommand), `command_decoded` and so on list
the texts: who sends a transcript to others must be able to read it.

What was sent stands there before its answer does, so a killed run shows what it was at. `error` says what became of it in our
words, where that is not its exit code. Of disks and files there are sizes and error codes, never bytes.

A transcript is never worth a migration: a thread of its own cleans and writes (a full or hanging DIR stops nobody), and
whatever fails there ends the recording with one warning, and nothing else. One write(2) for each line; after `kill -9` or a
full disk the lines that are there are whole (the last of all may be torn by the kill itself).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Self

from tokvm import __version__
from tokvm.core.errors import TokvmError, UsageError
from tokvm.core.units import MiB, seconds_since
from tokvm.remote.process import Completed, ProgramTimeout
from tokvm.remote.scrub import Scrubber, secrets_of_environment
from tokvm.remote.ssh_config import quote

log = logging.getLogger(__name__)

FORMAT = 1
KEPT = 1 * MiB
"""Of one answer; the rest is a length and a hash."""
_WAITING_LIMIT = 64 * MiB
_CLOSE_S = 5.0
# What a machine may run out of at any time, before the run or in the middle of it; all else is a wrong DIR.
_SHORTAGES = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EMFILE, errno.ENFILE})

_ENCODED = ("command", "stdin", "stdout")
"""Where base64 may stand that only a machine would read: shown decoded as well."""

Event = dict[str, object]


class Kind(StrEnum):
    """What was opened on the host."""

    COMMAND = "command"
    REQUEST = "request"
    STREAM = "stream"
    SFTP = "sftp"
    SMB = "smb"


class Exchange:
    """One thing that was sent. Ends once; what comes after that is left out."""

    def __init__(self, recorder: Recorder, number: int) -> None:
        self._recorder = recorder
        self._number = number
        self._begun = time.monotonic()
        self._over = threading.Lock()

    def ended(self, **facts: object) -> None:
        """How it ended: code, stdout, stderr, whatever is known."""
        if self._over.acquire(blocking=False):
            self._recorder.put("ended", n=self._number, seconds=self._seconds(), **facts)

    def completed(self, done: Completed) -> None:
        self.ended(code=done.code, stdout=done.stdout, stderr=done.stderr)

    def failed(self, error: BaseException, **facts: object) -> None:
        """Its end is not known, or it never began."""
        said = {"stdout": error.stdout, "stderr": error.stderr} if isinstance(error, ProgramTimeout) else {}
        self.ended(**{**said, **facts}, error=_error(error))

    @contextlib.contextmanager
    def step(self, op: str, path: str, **facts: object) -> Iterator[Event]:
        """One request of a longer exchange; what it brought is put into the dict."""
        begun = time.monotonic()
        found: Event = {}
        try:
            yield found
        except BaseException as error:
            found["error"] = _error(error)
            raise
        finally:
            taken = round(time.monotonic() - begun, 6)
            self._recorder.put("step", n=self._number, op=op, path=path, **facts, seconds=taken, **found)

    def note(self, op: str, path: str, **facts: object) -> None:
        self._recorder.put("step", n=self._number, op=op, path=path, **facts)

    def _seconds(self) -> float:
        return round(time.monotonic() - self._begun, 6)


class Recorder:
    """Writes one transcript. Thread-safe; none of its methods but `open` raises or waits for the disk."""

    def __init__(self, file: _File, scrub: Scrubber) -> None:
        self._file = file
        self._scrub = scrub
        self._begun = time.monotonic()
        self._number = 0
        self._turn = threading.Condition()
        self._events: deque[tuple[Event, int] | None] = deque()
        self._waiting = 0
        self._stopped = False
        self._thread = threading.Thread(target=self._serve, name="transcript", daemon=True)

    @classmethod
    def open(cls, folder: Path, *, verb: str, typed: Sequence[str] = ()) -> Self:
        """A transcript begun in `folder`. UsageError: that is no place for one. OSError: the machine lacks something."""
        scrub = Scrubber(secrets_of_environment(os.environ))
        recorder = cls(_File.create(folder, verb), scrub)
        begin: Event = {"event": "begin", "format": FORMAT, "time": _now(), "tokvm": __version__, "verb": verb}
        try:
            recorder._file.append(recorder._line({**begin, "typed": quote([one.replace("\0", "") for one in typed])}))
        except OSError:
            recorder._file.discard()
            raise
        recorder._thread.start()
        return recorder

    @property
    def path(self) -> Path:
        return self._file.path

    def hide(self, *secrets: str) -> None:
        """Secrets that this process knows: removed wherever they stand."""
        self._scrub.hide(*secrets)

    def sent(self, kind: Kind, host: str, command: str = "", *, stdin: bytes | None = None) -> Exchange:
        """Something is about to be sent."""
        with self._turn:
            self._number += 1
            number = self._number
        facts: Event = {} if stdin is None else {"stdin": stdin}
        self.put("sent", n=number, time=_now(), kind=kind, host=host, command=command, **facts)
        return Exchange(self, number)

    def put(self, event: str, **facts: object) -> None:
        """One line, as soon as the thread comes to it. The values are cleaned there."""
        size = 200 + sum(len(value) for value in facts.values() if isinstance(value, str | bytes))
        with self._turn:
            if self._stopped:
                return
            if self._waiting + size <= _WAITING_LIMIT:
                self._waiting += size
                self._events.append(({"event": event, **facts}, size))
                self._turn.notify()
                return
        self._stop("the disk is too slow for what there is to write")

    def close(self, error: BaseException | None = None) -> None:
        """The end line, and a few seconds for the thread to write what is left."""
        facts: Event = {"time": _now(), "seconds": seconds_since(self._begun)}
        self.put("end", **facts, **({} if error is None else {"error": _error(error)}))
        with self._turn:
            self._events.append(None)
            self._turn.notify()
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            self._stop(f"it was not written within {_CLOSE_S:g} s")
            return
        self._stopped = True
        self._file.close()

    def _serve(self) -> None:
        while (event := self._next()) is not None:
            try:
                self._file.append(self._line(event))
            except OSError as exc:
                self._stop(exc.strerror or str(exc))
            except Exception as exc:  # noqa: BLE001 - a defect here must cost the transcript, not the migration
                self._stop(f"a defect in tokvm: {exc!r}")

    def _next(self) -> Event | None:
        with self._turn:
            while not self._events:
                self._turn.wait()
            found = self._events.popleft()
            if found is None:
                return None
            self._waiting -= found[1]
            return found[0]

    def _stop(self, why: str) -> None:
        with self._turn:
            if self._stopped:
                return
            self._stopped = True
            self._events = deque(one for one in self._events if one is None)
            self._waiting = 0
        log.warning("the recording ended early, the run goes on without it: %s (%s)", why, self.path)

    def _line(self, event: Event) -> bytes:
        """An event, cleaned, as a line."""
        cleaned: Event = {}
        for name, value in event.items():
            if isinstance(value, bytes):
                cleaned[name], cut = self._kept(value)
                if cut:
                    cleaned[f"{name}_cut"] = cut
            else:
                cleaned[name] = _mapped(value, self._scrub)
            if name in _ENCODED and (plain := Scrubber.decoded(str(cleaned[name]))):
                cleaned[f"{name}_decoded"] = plain
        return json.dumps(cleaned, separators=(",", ":")).encode("ascii") + b"\n"

    def _kept(self, data: bytes) -> tuple[str, Event | None]:
        """The beginning of an answer, up to a blank, so that no half of a token is left that nobody would know for one."""
        if len(data) <= KEPT:
            return self._scrub(data.decode("utf-8", "surrogateescape")), None
        end = max(data.rfind(blank, 0, KEPT) for blank in (b"\n", b" ", b"\0")) + 1
        text = data[: end or KEPT].decode("utf-8", "surrogateescape")
        return self._scrub(text), {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@contextlib.contextmanager
def recording(folder: Path | None, *, verb: str, typed: Sequence[str] = ()) -> Iterator[Recorder | None]:
    """A transcript of what is done inside; none when no folder is given, or the machine has no room for one (told once).

    UsageError, before anything is sent, when `folder` is no place for it.
    """
    recorder = None if folder is None else _begun(folder, verb, typed)
    if recorder is None:
        yield None
        return
    try:
        yield recorder
    except BaseException as error:
        recorder.close(error)
        raise
    recorder.close()


def _begun(folder: Path, verb: str, typed: Sequence[str]) -> Recorder | None:
    try:
        return Recorder.open(folder, verb=verb, typed=typed)
    except OSError as exc:
        log.warning("nothing is recorded, the run goes on without it: %s (%s)", exc.strerror, folder)
        return None


class _File:
    """The file of one transcript: whole lines only."""

    def __init__(self, path: Path, folder_fd: int, fd: int) -> None:
        self.path = path
        self._folder_fd = folder_fd
        self._fd = fd
        self._whole = 0

    @classmethod
    def create(cls, folder: Path, verb: str) -> Self:
        """A new file. UsageError when `folder` is no directory of our own; OSError (_SHORTAGES) when something is lacking."""
        folder_fd = _open_folder(folder.absolute())
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        try:
            for number in range(1, 1000):  # two runs in one second
                name = f"{stamp}-{verb}{'' if number == 1 else f'-{number}'}.jsonl"
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
                with contextlib.suppress(FileExistsError):
                    return cls(folder.absolute() / name, folder_fd, os.open(name, flags, 0o600, dir_fd=folder_fd))
            raise UsageError("a thousand transcripts of this second are there", where=str(folder), fix="try again")
        except OSError as exc:
            os.close(folder_fd)
            raise _unless_short(exc, folder) from exc
        except UsageError:
            os.close(folder_fd)
            raise

    def append(self, line: bytes) -> None:
        """The whole line, or none of it and OSError."""
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._whole)
            raise
        self._whole += len(line)

    def close(self) -> None:
        for fd in (self._fd, self._folder_fd):
            with contextlib.suppress(OSError):
                os.close(fd)

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.path.name, dir_fd=self._folder_fd)
        self.close()


def _open_folder(folder: Path) -> int:
    """The directory, made with mode 0700 when it is missing; a descriptor, so that nobody can exchange it under us."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as exc:
        raise _unless_short(exc, folder) from exc
    found = os.fstat(fd)
    if found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return fd
    os.close(fd)
    raise UsageError(
        f"others could write into the directory for transcripts (owner {found.st_uid}, mode {found.st_mode & 0o7777:04o})",
        where=str(folder),
        fix="give --record a directory of your own with mode 0700; a new one is made so",
    )


def _unless_short(exc: OSError, folder: Path) -> OSError | UsageError:
    """A wrong directory is the operator's to mend; what the machine lacks is no reason to refuse the run."""
    if exc.errno in _SHORTAGES:
        return exc
    if exc.errno in (errno.ELOOP, errno.ENOTDIR, errno.EEXIST) and folder.is_symlink():
        what = "the directory for transcripts is a symbolic link"
    else:
        what = f"transcripts cannot be written there: {exc.strerror}"
    return UsageError(what, where=str(folder), fix="give --record a directory of your own; a new one is made with mode 0700")


def _mapped(value: object, clean: Callable[[str], str]) -> object:
    """Every text in a value of ours cleaned; values are as deep as we make them."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {name: _mapped(one, clean) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(one, clean) for one in value]
    return value


def _error(error: BaseException) -> Event:
    found: Event = {"class": type(error).__name__}
    if isinstance(error, TokvmError):
        found |= {"what": error.what, "where": error.where}
        status = getattr(error, "status", None)  # SFTP's own code
        if status is not None:
            found["status"] = int(status)
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
