"""Files that a hypervisor froze, and a chain of them as a DiskReader whose last word is whether what it read was frozen.

A hypervisor that merges snapshots rewrites layers in place. So at the end of a pass each file's marks are read again, and after
a long pass the hypervisor is asked for the chain once more, before the pass may count.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tokvm.core.disk import Chunk
from tokvm.core.errors import ImageError, SourceError
from tokvm.core.extents import ExtentMap
from tokvm.images.chain import Chain
from tokvm.images.reader import ChainReader

Places = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Habits:
    """What is special about one hypervisor's files.

    marks: by a file's size, the (offset, length) that change whenever somebody opens it for writing. damaged, changed: what to
    do about a file that is shorter than its structures say, or that changed as it was read. lanes: connections at most.
    read_size: bytes that one request asks for; None: as much as the server allows.
    """

    marks: Callable[[int], Places]
    damaged: str
    changed: str
    lanes: int = 3
    read_size: int | None = None


class FrozenFile(ABC):
    """One open file. `size` and `stamp` are what they were when it was opened. Implements `images.base.ReadAt`."""

    habits: Habits

    def __init__(self, path: str, name: str) -> None:
        self.path = path
        self.name = name
        self.size = -1
        self.stamp = ""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset < 0 or offset + len(buffer) > self.size:
            raise ImageError(
                f"cannot read {len(buffer)} bytes: the file ends at {self.size:#x}",
                where=f"{self.name}@{offset:#x}",
                fix=self.habits.damaged,
            )
        if len(buffer):
            self._fill(offset, buffer)

    def marks(self) -> str:
        """A digest of the places that change whenever somebody opens the image for writing, read now."""
        digest = hashlib.blake2b(digest_size=16)
        for offset, length in self.habits.marks(self.size):
            if offset + length <= self.size:
                raw = bytearray(length)
                self.read_into(offset, memoryview(raw))
                digest.update(raw)
        return digest.hexdigest()

    def is_unchanged(self) -> bool:
        size = self._size_now()
        try:
            return size == self.size and self.marks() == self.stamp
        except ImageError:  # it is shorter than a moment ago
            return False

    def size_changed(self, now: int) -> ImageError:
        return ImageError(
            f"its size changed from {self.size} to {now} while it was read", where=self.name, fix=self.habits.changed
        )

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _fill(self, offset: int, buffer: memoryview) -> None:
        """Read what is known to lie within the file."""

    @abstractmethod
    def _size_now(self) -> int | None:
        """Of the file that has this path now."""


class FrozenDisk:
    """Implements `core.disk.DiskReader`; owns `files`.

    still_so: asks the hypervisor whether the chain is the one that was opened; done after passes longer than `long_pass_s`, so
    that a final delta is spared these seconds. changed: the error for a file's name.
    """

    def __init__(
        self,
        chain: Chain,
        files: Sequence[FrozenFile],
        still_so: Callable[[], bool],
        *,
        changed: Callable[[str], SourceError],
        long_pass_s: float,
    ) -> None:
        self._reader = ChainReader(chain)
        self._files = files
        self._still_so = still_so
        self._changed = changed
        self._long_pass_s = long_pass_s

    @property
    def size(self) -> int:
        return self._reader.size

    @property
    def fingerprint(self) -> str:
        return self._reader.fingerprint

    @property
    def total(self) -> int:
        return self._reader.total

    def covered(self) -> Iterator[ExtentMap]:
        return self._reader.covered()

    def chunks(self, position: int = 0) -> Iterator[Chunk]:
        begun = time.monotonic()
        try:
            yield from self._reader.chunks(position)
        except ImageError:
            self.verify_unchanged()  # torn structures of a file that is being merged are no damage
            raise
        self.verify_unchanged(ask_host=time.monotonic() - begun > self._long_pass_s)

    def verify_unchanged(self, *, ask_host: bool = False) -> None:
        """SourceError when a layer was written to since it was opened, or the chain is another one now."""
        for file in self._files:
            if not file.is_unchanged():
                raise self._changed(file.name)
        if ask_host and not self._still_so():
            raise self._changed(self._files[-1].name)

    def close(self) -> None:
        for file in self._files:
            file.close()
