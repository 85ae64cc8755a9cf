"""Files and streams in memory, mostly zeros, of any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tokvm.core.errors import ImageError

Segment = tuple[int, bytes]


class SparseFile:
    """A ReadAt of `size` bytes: zeros but for its segments, of which a later one lies over an earlier one."""

    def __init__(self, segments: Sequence[Segment], size: int, name: str = "fuzz.img") -> None:
        self._segments = [(offset, memoryview(data)) for offset, data in segments if data]
        self.size = size
        self.name = name

    def read_into(self, offset: int, buffer: memoryview) -> None:
        end = offset + len(buffer)
        if offset < 0 or end > self.size:
            raise ImageError("past the end", where=f"{self.name}@{offset:#x}", fix="this file is hostile")
        buffer[:] = bytes(len(buffer))
        for at, data in self._segments:
            low, high = max(at, offset), min(at + len(data), end)
            if low < high:
                buffer[low - offset : high - offset] = data[low - at : high - at]

    def read(self, offset: int, length: int) -> bytes:
        raw = bytearray(length)
        self.read_into(offset, memoryview(raw))
        return bytes(raw)

    def close(self) -> None:
        """Nothing to close."""


class SparseStream:
    """A ByteStream of a file from `at` on, in pieces of at most `step` bytes."""

    def __init__(self, file: SparseFile, at: int, step: int) -> None:
        self._file = file
        self._at = min(at, file.size)
        self._step = step

    def read_into(self, buffer: memoryview) -> int:
        count = min(len(buffer), self._step, self._file.size - self._at)
        self._file.read_into(self._at, buffer[:count])
        self._at += count
        return count

    def finish(self) -> None:
        """The sender says that all was sent."""

    def close(self) -> None:
        """Nothing to close."""


@dataclass
class MemoryExtents:
    """Implements `images.base.ExtentFiles`; remembers what was asked for."""

    files: Mapping[str, SparseFile]
    other: SparseFile
    asked: list[str] = field(default_factory=list)

    def open(self, name: str) -> SparseFile:
        self.asked.append(name)
        return self.files.get(name, self.other)
