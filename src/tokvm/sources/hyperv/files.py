"""Files of a Windows host over a few SFTP connections, as `images.base.ReadAt`.

    RemoteFile ─┐                 ┌─ lane 0: connection ── one handle of each file
    RemoteFile ─┼─ a free lane ──►┼─ lane 1 …
    …           ┘                 └─ lane 2 …              opened when all others are busy and the read is worth it

Win32-OpenSSH answers a READ with at most 100 KiB (its 1395), and one connection is far from filling a link, so several are read
side by side. It opens files so that they cannot be renamed or deleted meanwhile: a merge waits for our handles, so they are
closed with the reader; an sftp-server whose connection broke may keep its own (1605; leftovers.ps1 finds it).
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from typing import Protocol

from tokvm.core.errors import ConnectionLost, ImageError, SourceError
from tokvm.core.units import KiB
from tokvm.remote.sftp import RemoteFileError, SftpClient, SftpFile

LANES = 3
READ_SIZE = 64 * KiB
_WORTH_A_LANE = 256 * KiB
_MARKS = ((64 * KiB, 4 * KiB), (128 * KiB, 4 * KiB))  # a VHDX' headers: whoever opens it for writing changes one of them
_FOOTER = 512  # a VHD's


class Connecting(Protocol):
    """What is needed of `remote.ssh.SshHost` for files."""

    def sftp(self) -> SftpClient: ...


class _Lane:
    """One connection and the files that are open on it."""

    def __init__(self, client: SftpClient, age: int) -> None:
        self.client = client
        self.age = age
        client.read_size = READ_SIZE
        self.files: dict[RemoteFile, SftpFile] = {}

    def file(self, wanted: RemoteFile) -> SftpFile:
        if wanted not in self.files:
            opened = self.client.open(wanted.path)
            if opened.size != wanted.size and wanted.size >= 0:
                opened.close()
                raise ImageError(
                    f"its size changed from {wanted.size} to {opened.size} while it was read",
                    where=wanted.name,
                    fix="a merge or a person changes the VM's files; run the same command again",
                )
            self.files[wanted] = opened
        return self.files[wanted]


class Lanes:
    """The connections of one source, made when needed and kept. Thread-safe."""

    def __init__(self, host: Connecting) -> None:
        self._host = host
        self._turn = threading.Condition()
        self._free: list[_Lane] = []
        self._count = 0
        self._age = 0  # counts the times a connection broke
        self._closed = False
        self.open_files: set[RemoteFile] = set()

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
                if self._count == 0 or (self._count < LANES and length >= _WORTH_A_LANE):
                    self._count += 1
                    break
                self._turn.wait()
            else:
                return self._free.pop()
        try:
            return _Lane(self._host.sftp(), self._age)
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


class RemoteFile:
    """One open file. `size` and `stamp` are what they were when it was opened. Implements `images.base.ReadAt`."""

    def __init__(self, lanes: Lanes, path: str, name: str) -> None:
        self._lanes = lanes
        self.path = path
        self.name = name
        self.size = -1
        self.stamp = ""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset < 0 or offset + len(buffer) > self.size:
            raise ImageError(
                f"cannot read {len(buffer)} bytes: the file ends at {self.size:#x}",
                where=f"{self.name}@{offset:#x}",
                fix="the image is damaged on the host; look at it with Test-VHD",
            )
        if not len(buffer):
            return
        with self._lanes.lane(len(buffer)) as lane:
            lane.file(self).read_into(offset, buffer)

    def marks(self) -> str:
        """A digest of the places that change whenever somebody opens the image for writing, read now."""
        digest = hashlib.blake2b(digest_size=16)
        for offset, length in (*_MARKS, (max(0, self.size - _FOOTER), min(_FOOTER, self.size))):
            if offset + length <= self.size:
                raw = bytearray(length)
                self.read_into(offset, memoryview(raw))
                digest.update(raw)
        return digest.hexdigest()

    def is_unchanged(self) -> bool:
        with self._lanes.lane(0) as lane:
            size = lane.client.stat(self.path).size
        try:
            return size == self.size and self.marks() == self.stamp
        except ImageError:  # it is shorter than a moment ago
            return False

    def close(self) -> None:
        with contextlib.suppress(SourceError):  # a connection that is gone has no handles to close
            self._lanes.forget(self)
