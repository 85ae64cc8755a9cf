"""The bytes of an image that matter, without what lies between them.

    image    |aaaa|........|bb|...............|cccc|        windows: (offset, length), from the end when the offset is negative
    input    |size 6|aaaa|bb|cccc|                          size: of the file, u48, little-endian

A change of these windows makes another corpus of the kept one: `tests/hostile/test_fuzz_corpus.py` says so when seeds no longer
come through them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fuzz.memory import Segment, SparseFile

_SIZE = 6


@dataclass(frozen=True, slots=True)
class Windows:
    """places: (offset, length) of each. max_size: of the file; a larger one is cut to it."""

    places: tuple[tuple[int, int], ...]
    max_size: int = (1 << 48) - 1

    @property
    def length(self) -> int:
        """Of an input."""
        return sum(length for _, length in self.places) + _SIZE

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """(place in the input, offset, length) of each window."""
        at = _SIZE
        for offset, length in self.places:
            yield at, offset, length
            at += length

    def fit(self, data: bytes) -> bytearray:
        """Of the right length, whatever a mutation did to it."""
        return bytearray(data[: self.length].ljust(self.length, b"\0"))

    def size(self, data: bytes | bytearray) -> int:
        return min(int.from_bytes(data[:_SIZE], "little"), self.max_size)

    def expand(self, data: bytes, name: str = "fuzz.img") -> SparseFile:
        raw = bytes(self.fit(data))
        size = self.size(raw)
        segments: list[Segment] = []
        for at, offset, length in self.spans():
            start = offset if offset >= 0 else size + offset
            if 0 <= start < size:
                segments.append((start, raw[at : at + min(length, size - start)]))
        return SparseFile(segments, size, name)

    def put(self, data: bytearray, offset: int, value: bytes) -> None:
        """Write what lies at this offset of the file into an input, as far as a window shows it."""
        size = self.size(data)
        for at, place, length in self.spans():
            start = place if place >= 0 else size + place
            low, high = max(start, offset), min(start + length, offset + len(value))
            if low < high:
                data[at + low - start : at + high - start] = value[low - offset : high - offset]

    def compact(self, image: bytes | SparseFile) -> bytes:
        file = image if isinstance(image, SparseFile) else SparseFile([(0, image)], len(image))
        parts = [file.size.to_bytes(_SIZE, "little")]
        for _, offset, length in self.spans():
            start = offset if offset >= 0 else file.size + offset
            inside = max(0, min(length, file.size - start)) if start >= 0 else 0
            parts.append((file.read(start, inside) if inside else b"").ljust(length, b"\0"))
        return b"".join(parts)
