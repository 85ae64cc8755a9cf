"""Does the target hold what the passes wrote? Read back from the medium and compared with the manifests.

    manifests, oldest first ─► newest record of each byte ─► runs of up to 4 MiB ─► O_DIRECT ─► BLAKE3 of each piece
                                                             zero ranges         ─► all bytes zero

Through the page cache this would prove nothing: a byte flipped below it still compares equal. What a target's own filesystem
calls a hole needs no reading.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from tokvm.core.errors import TargetError
from tokvm.core.extents import ExtentMap
from tokvm.core.units import KiB, MiB
from tokvm.transfer.manifest import CELL, ManifestReader, digest
from tokvm.transfer.resolve import resolve, windows

log = logging.getLogger(__name__)

RUN = 4 * MiB
GAP = 64 * KiB  # reading through a gap of this size costs less than a second read
CANARIES = 8

Piece = tuple[int, int, bytes]  # offset, length, digest; an empty digest: must be zeros


@runtime_checkable
class Readable(Protocol):
    """What verification needs: every DiskWriter has it, and `targets.readback.ReadBack`."""

    @property
    def size(self) -> int: ...

    def read_back(self, offset: int, length: int) -> memoryview: ...


@runtime_checkable
class HoleAware(Protocol):
    def is_hole(self, offset: int, length: int) -> bool: ...


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """verified_bytes were compared and are right. unverifiable_bytes: no whole record speaks for them (no pass wrote them down,
    or a later pass overwrote only a part of their cell and did not seal it anew). skipped_bytes: left out by `sample`.
    bad: (offset, length) of what differs, ascending."""

    verified_bytes: int
    unverifiable_bytes: int
    bad: list[tuple[int, int]]
    skipped_bytes: int = 0

    @property
    def good(self) -> bool:
        return not self.bad


def verify(
    target: Readable,
    manifests: Sequence[str | Path],
    *,
    progress: Callable[[int], None],
    sample: float | None = None,
    workers: int = 3,
    seed: int | None = None,
) -> VerifyReport:
    """Check every byte that the manifests (oldest first) speak for, or the fraction `sample` of the pieces, chosen at random.

    progress: bytes looked at since the last call. A sample of n pieces misses a damaged fraction f with chance (1 - f)^n.
    """
    if not manifests:
        return VerifyReport(0, target.size, [])
    choice = random.Random(seed)
    total = _Total(progress)
    with ExitStack() as stack:
        readers = [ManifestReader.open(path) for path in manifests]
        for reader in readers:
            stack.callback(reader.close)
        pool = stack.enter_context(ThreadPoolExecutor(workers, thread_name_prefix="verify"))
        for start, stop in windows(readers[-1].header.size):
            found = resolve(readers, start, stop)
            total.unverifiable += found.stale + found.silent
            pieces = [(int(row["offset"]), int(row["length"]), row["digest"].tobytes()) for row in found.whole]
            pieces += [(at, size, b"") for at, length in found.zeros for at, size in _cut(at, length)]
            if sample is not None:
                kept = [piece for piece in pieces if choice.random() < sample]
                total.skipped += sum(piece[1] for piece in pieces) - sum(piece[1] for piece in kept)
                pieces = kept
            _check_all(target, sorted(pieces), pool, workers, total)
    return VerifyReport(total.verified, total.unverifiable, _merged(total.bad), total.skipped)


def canary(target: Readable, path: Path, *, rewritten: Iterable[ExtentMap] | None = None) -> None:
    """Before a pass writes: a few pieces that its earlier run, or the pass before it, wrote must still be there, or something
    else wrote to the target. `path`: that run's manifest. rewritten: what may have been written over since; None: nothing."""
    reader = ManifestReader.open(path)
    try:
        kept = None if rewritten is None else _Gaps(rewritten)
        cells = {offset // CELL for offset in reader.sample(CANARIES if kept is None else 4 * CANARIES)}
        if kept is not None:
            cells = {cell for cell in cells if kept.hold(cell * CELL, min(CELL, reader.header.size - cell * CELL))}
        for cell in sorted(sorted(cells, key=lambda _: random.random())[:CANARIES]):
            start = cell * CELL
            found = resolve([reader], start, min(start + CELL, reader.header.size))
            for row in found.whole:
                offset, length = int(row["offset"]), int(row["length"])
                if digest(target.read_back(offset, length)) != row["digest"].tobytes():
                    raise TargetError(
                        "the target no longer holds what the passes wrote to it",
                        where=f"{getattr(target, 'path', 'target')}@{offset:#x}",
                        fix="something else wrote to it: copy this disk anew with another state directory",
                    )
    finally:
        reader.close()


class _Gaps:
    """The ABSENT ranges of some maps, to be asked."""

    def __init__(self, maps: Iterable[ExtentMap]) -> None:
        pairs = [one.gaps() for one in maps]
        self._start = np.concatenate([pair[0] for pair in pairs] or [np.empty(0, np.int64)])
        self._stop = self._start + np.concatenate([pair[1] for pair in pairs] or [np.empty(0, np.int64)])

    def hold(self, offset: int, length: int) -> bool:
        """All of the range lies in one of them."""
        at = int(np.searchsorted(self._start, offset, side="right")) - 1
        return at >= 0 and bool(offset + length <= self._stop[at])


class _Total:
    def __init__(self, progress: Callable[[int], None]) -> None:
        self.progress = progress
        self.verified = self.unverifiable = self.skipped = 0
        self.bad: list[tuple[int, int]] = []

    def take(self, good: int, bad: list[tuple[int, int]]) -> None:
        self.verified += good
        self.bad += bad
        self.progress(good + sum(length for _, length in bad))


def _cut(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """A zero range in pieces of one run."""
    for at in range(offset, offset + length, RUN):
        yield at, min(RUN, offset + length - at)


def _check_all(target: Readable, pieces: list[Piece], pool: ThreadPoolExecutor, workers: int, total: _Total) -> None:
    """A few runs in flight, so that memory stays bounded whatever the window holds."""
    waiting: list[Future[tuple[int, list[tuple[int, int]]]]] = []
    for run in _runs(pieces):
        waiting.append(pool.submit(check_run, target, run))
        if len(waiting) > workers + 1:
            total.take(*waiting.pop(0).result())
    for future in waiting:
        total.take(*future.result())


def _runs(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Neighbouring pieces that one read can fetch."""
    run: list[Piece] = []
    for piece in pieces:
        if run and (piece[0] - (run[-1][0] + run[-1][1]) > GAP or piece[0] + piece[1] - run[0][0] > RUN):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def check_run(target: Readable, run: list[Piece]) -> tuple[int, list[tuple[int, int]]]:
    """(bytes that are right, ranges that are not)."""
    start, end = run[0][0], run[-1][0] + run[-1][1]
    if all(not piece[2] for piece in run) and isinstance(target, HoleAware) and target.is_hole(start, end - start):
        return sum(piece[1] for piece in run), []
    held = target.read_back(start, end - start)
    good, bad = 0, []
    for offset, length, expected in run:
        data = held[offset - start : offset - start + length]
        right = digest(data) == expected if expected else not np.frombuffer(data, np.uint8).any()
        if right:
            good += length
        else:
            bad.append((offset, length))
    return good, bad


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for offset, length in sorted(ranges):
        if merged and merged[-1][0] + merged[-1][1] == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((offset, length))
    return merged
