"""Does this hold what the chain says? And is a chain whole, to its last byte?

compare   chain ── chunks, in the files' order ──► the same range of the other, past the page cache ──► what differs
verify    chain ── every table, every byte; with a hash: in the guest's order
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tokvm.app.watching import Progress
from tokvm.core.disk import BufferPool, Chunk
from tokvm.core.extents import ExtentKind
from tokvm.core.units import SECTOR, MiB
from tokvm.images.chain import Chain
from tokvm.images.random_access import ChainBytes
from tokvm.images.reader import ChainReader

PIECE = 4 * MiB
MAX_RANGES = 1000  # of differences that are listed; all of them are counted
_THREADS = 3
_AHEAD = 6
Ranges = list[tuple[int, int]]


class Readable(Protocol):
    """A target opened to be read (`targets.readback.ReadBack`), or a chain (`images.random_access.ChainBytes`)."""

    @property
    def size(self) -> int: ...

    def read_back(self, offset: int, length: int) -> memoryview: ...

    def is_hole(self, offset: int, length: int) -> bool: ...


@dataclass(slots=True)
class Comparison:
    """differing_bytes: in whole sectors. ranges: (offset, length), ascending, of MAX_RANGES differences at most."""

    compared_bytes: int = 0
    differing_bytes: int = 0
    ranges: Ranges = field(default_factory=list)

    @property
    def same(self) -> bool:
        return not self.differing_bytes

    def to_dict(self) -> dict[str, object]:
        return {
            "outcome": "same" if self.same else "different",
            "compared_bytes": self.compared_bytes,
            "differing_bytes": self.differing_bytes,
            "ranges": [{"offset": offset, "length": length} for offset, length in self.ranges],
        }


def compare(chain: Chain, other: Readable, progress: Progress) -> Comparison:
    """The chain's whole content against the other's; of a partial chain, what it says. What one disk has behind the other's end
    must be zeros."""
    reader = ChainReader(chain, pool=BufferPool(2 * _AHEAD))
    found = Comparison()
    progress.begin("compare", chain.size, 0)
    with ThreadPoolExecutor(_THREADS, "compare") as threads:
        waiting: deque[tuple[int, Future[Ranges]]] = deque()

        def settle(limit: int) -> None:
            while len(waiting) > limit:
                length, future = waiting.popleft()
                _add(found, future.result())
                found.compared_bytes += length
                progress.advance(length)

        for length, job in _jobs(chain, reader, other):
            waiting.append((length, threads.submit(job)))
            settle(_AHEAD)
        settle(0)
    found.ranges = sorted(found.ranges)[:MAX_RANGES]
    return found


def _jobs(chain: Chain, reader: ChainReader, other: Readable) -> Iterator[tuple[int, Callable[[], Ranges]]]:
    """(guest bytes, what finds the differences in them), together the whole of both disks."""
    both = min(chain.size, other.size)
    for chunk in reader.chunks():
        yield chunk.length, _Against(other, chunk, both).differences
    if chain.partial:
        return
    for window in reader.covered():
        for at, length in zip(*(column.tolist() for column in window.gaps()), strict=True):
            yield from _zero_jobs(other, at, min(at + length, both))
    yield from _zero_jobs(other, chain.size, other.size)


def _zero_jobs(other: Readable, start: int, stop: int) -> Iterator[tuple[int, Callable[[], Ranges]]]:
    step = 256 * PIECE
    for at in range(start, stop, step):
        end = min(at + step, stop)
        yield end - at, lambda at=at, end=end: _not_zero(other, at, end)  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class _Against:
    """One chunk of the chain and the other's bytes there. `both`: where the smaller of the two disks ends."""

    other: Readable
    chunk: Chunk
    both: int

    def differences(self) -> Ranges:
        chunk = self.chunk
        try:
            inside = max(0, min(chunk.offset + chunk.length, self.both) - chunk.offset)
            if chunk.kind is ExtentKind.ZERO or chunk.data is None:
                return _not_zero(self.other, chunk.offset, chunk.offset + inside)
            mine = np.frombuffer(chunk.data, np.uint8)
            theirs = np.zeros(len(mine), np.uint8)
            for at in range(0, inside, PIECE):
                end = min(at + PIECE, inside)
                theirs[at:end] = np.frombuffer(self.other.read_back(chunk.offset + at, end - at), np.uint8)
            return _differing(chunk.offset, mine != theirs)
        finally:
            chunk.release()


def _not_zero(other: Readable, start: int, stop: int) -> Ranges:
    found: Ranges = []
    if start >= stop or other.is_hole(start, stop - start):
        return found
    for at in range(start, stop, PIECE):
        length = min(PIECE, stop - at)
        if not other.is_hole(at, length):
            found += _differing(at, np.frombuffer(other.read_back(at, length), np.uint8) != 0)
    return found


def _differing(offset: int, differs: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Ranges:
    """Runs of sectors in which a byte differs."""
    if not differs.any():
        return []
    sectors = np.logical_or.reduceat(differs, np.arange(0, len(differs), SECTOR))
    edges = np.flatnonzero(np.diff(sectors, prepend=False, append=False))
    starts, ends = edges[::2] * SECTOR, np.minimum(edges[1::2] * SECTOR, len(differs))
    return [(offset + start, end - start) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def _add(found: Comparison, ranges: Ranges) -> None:
    found.differing_bytes += sum(length for _, length in ranges)
    found.ranges += ranges[: max(0, 2 * MAX_RANGES - len(found.ranges))]


@dataclass(frozen=True, slots=True)
class Whole:
    """What reading all of a chain found. Bytes of the guest disk. sha256: of its raw content, when it was asked for."""

    size: int
    data_bytes: int
    zero_bytes: int
    absent_bytes: int
    sha256: str | None

    def to_dict(self) -> dict[str, object]:
        found: dict[str, object] = {"outcome": "whole", "size": self.size}
        found |= {"data_bytes": self.data_bytes, "zero_bytes": self.zero_bytes, "absent_bytes": self.absent_bytes}
        return found if self.sha256 is None else found | {"sha256": self.sha256}


def verify(chain: Chain, progress: Progress, *, hashed: bool) -> Whole:
    """Read every table and every byte, or ImageError about the first that is damaged."""
    reader = ChainReader(chain, pool=BufferPool(2 * _AHEAD))
    counts = dict.fromkeys(ExtentKind, 0)
    for window in reader.covered():
        for kind in ExtentKind:
            counts[kind] += window.bytes_of(kind)
    if hashed:
        digest = _hash(chain, progress)
    else:
        digest = None
        progress.begin("verify", counts[ExtentKind.DATA], 0)
        for chunk in reader.chunks():
            if chunk.kind is ExtentKind.DATA:
                progress.advance(chunk.length)
            chunk.release()
    return Whole(chain.size, counts[ExtentKind.DATA], counts[ExtentKind.ZERO], counts[ExtentKind.ABSENT], digest)


def _hash(chain: Chain, progress: Progress) -> str:
    """SHA-256 of the raw content, absent ranges as zeros: the reading of a few pieces runs ahead of the hashing."""
    content = ChainBytes(chain)
    digest, nothing = hashlib.sha256(), bytes(PIECE)
    progress.begin("verify", chain.size, 0)

    def piece(at: int, length: int) -> memoryview | bytes:
        return nothing[:length] if content.is_hole(at, length) else content.read_back(at, length)

    with ThreadPoolExecutor(_THREADS, "verify") as threads:
        waiting: deque[Future[memoryview | bytes]] = deque()
        at = 0
        while at < chain.size or waiting:
            while at < chain.size and len(waiting) < _AHEAD:
                length = min(PIECE, chain.size - at)
                waiting.append(threads.submit(piece, at, length))
                at += length
            raw = waiting.popleft().result()
            digest.update(raw)
            progress.advance(len(raw))
    return digest.hexdigest()
