"""Files of a host over a few SFTP connections, as `images.base.ReadAt`.

    RemoteFile ─┐                 ┌─ lane 0: connection ── one handle of each file
    RemoteFile ─┼─ a free lane ──►┼─ lane 1 …
    …           ┘                 └─ lane 2 …              opened when all others are busy and the read is worth it

One connection is far from filling a link, so several are read side by side. Whoever has a file open may keep the hypervisor
from merging it, so handles are closed with the reader.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Protocol

from tokvm.core.errors import ConnectionLost, ImageError, SourceError
from tokvm.core.units import KiB
from tokvm.remote.sftp import RemoteFileError, SftpClient, SftpFile
from tokvm.remote.sftp_wire import Status
from tokvm.sources.frozen import FrozenFile, Habits

_WORTH_A_LANE = 256 * KiB


class Connecting(Protocol):
    """What is needed of `remote.ssh.SshHost` for files."""

    def sftp(self) -> SftpClient: ...


class _Lane:
    """One connection and the files that are open on it."""

    def __init__(self, client: SftpClient, age: int, habits: Habits) -> None:
        self.client = client
        self.age = age
        if habits.read_size is not None:
            client.read_size = habits.read_size
        self.files: dict[RemoteFile, SftpFile] = {}

    def file(self, wanted: RemoteFile) -> SftpFile:
        if wanted not in self.files:
            opened = self._open(wanted)
            if opened.size != wanted.size and wanted.size >= 0:
                opened.close()
                raise wanted.size_changed(opened.size)
            self.files[wanted] = opened
        return self.files[wanted]

    def _open(self, wanted: RemoteFile) -> SftpFile:
        """One that was open before and cannot be opened now is being merged, or is gone."""
        try:
            return self.client.open(wanted.path)
        except RemoteFileError as refused:
            if wanted.size < 0:
                fix = refused.fix or wanted.habits.changed
                raise RemoteFileError(refused.what, status=refused.status, where=refused.where, fix=fix) from refused
            what = f"it was read a moment ago and can be opened no more: {refused.what}"
            raise ImageError(what, where=wanted.name, fix=wanted.habits.changed) from refused


class Lanes:
    """The connections of one source, made when needed and kept. Thread-safe."""

    def __init__(self, host: Connecting, habits: Habits) -> None:
        self._host = host
        self.habits = habits
        self._turn = threading.Condition()
        self._free: list[_Lane] = []
        self._count = 0
        self._age = 0  # counts the times a connection broke
        self._closed = False
        self.open_files: set[FrozenFile] = set()

    def open(self, path: str, *, name: str) -> RemoteFile:
        """The file at this SFTP path, open for reading."""
        made = RemoteFile(self, path, name)
        with self.lane(0) as lane:
            made.size = lane.file(made).size
        self.open_files.add(made)
        try:
            made.stamp = made.marks()
        except BaseException:
            made.close()
            raise
        return made

    @contextlib.contextmanager
    def lane(self, length: int) -> Iterator[_Lane]:
        """A lane for one read of `length` bytes. When a connection breaks, those made before that are not used again either:
        what cut one has mostly cut them all, and each would cost the caller a try to find that out."""
        lane = self._take(length)
        try:
            yield lane
        except (ImageError, RemoteFileError):
            self._give_back(lane)
            raise
        except BaseException:
            with self._turn:
                self._age += 1
            self._give_back(lane)
            raise
        else:
            self._give_back(lane)

    def _take(self, length: int) -> _Lane:
        with self._turn:
            while not self._free:
                if self._closed:
                    raise ConnectionLost("the connections to the source were closed")
                if self._count == 0 or (self._count < self.habits.lanes and length >= _WORTH_A_LANE):
                    self._count += 1
                    break
                self._turn.wait()
            else:
                return self._free.pop()
        try:
            return _Lane(self._host.sftp(), self._age, self.habits)
        except BaseException:
            with self._turn:
                self._count -= 1
                self._turn.notify()
            raise

    def _give_back(self, lane: _Lane) -> None:
        with self._turn:
            self._free.append(lane)
            old = [one for one in self._free if one.age != self._age or self._closed]
            self._free = [one for one in self._free if one not in old]
            self._count -= len(old)
            self._turn.notify_all()
        for one in old:
            one.client.close()

    def forget(self, file: RemoteFile) -> None:
        """Close its handles on all connections. Waits for reads under way."""
        self.open_files.discard(file)
        for lane in self._all():
            opened = lane.files.pop(file, None)
            try:
                if opened is not None:
                    opened.close()
            finally:
                self._give_back(lane)

    def _all(self) -> Iterator[_Lane]:
        """Every lane once, each taken for a moment."""
        seen: list[_Lane] = []
        while True:
            with self._turn:
                lane = next((one for one in self._free if one not in seen), None)
                if lane is None:
                    if len(seen) >= self._count:
                        return
                    self._turn.wait()
                    continue
                self._free.remove(lane)
            seen.append(lane)
            yield lane

    def close(self) -> None:
        with self._turn:
            self._closed = True
            lanes, self._free = self._free, []
            self._count -= len(lanes)
            self._turn.notify_all()
        for lane in lanes:
            lane.client.close()


class RemoteFile(FrozenFile):
    """A file over SFTP; its `path` is SFTP's."""

    def __init__(self, lanes: Lanes, path: str, name: str) -> None:
        super().__init__(path, name)
        self.habits = lanes.habits
        self._lanes = lanes

    def close(self) -> None:
        with contextlib.suppress(SourceError):  # a connection that is gone has no handles to close
            self._lanes.forget(self)

    def _fill(self, offset: int, buffer: memoryview) -> None:
        with self._lanes.lane(len(buffer)) as lane:
            lane.file(self).read_into(offset, buffer)

    def _size_now(self) -> int | None:
        """None: it is gone."""
        try:
            with self._lanes.lane(0) as lane:
                return lane.client.stat(self.path).size
        except RemoteFileError as refused:
            if refused.status != Status.NO_SUCH_FILE:
                raise
            return None
