"""One pass: everything a reader hands out, onto a writer, with checkpoints that never claim more than the medium holds.

    1. state UNKNOWN: what the reader leaves ABSENT is zeroed, unless the target is known to be zero;
       a delta of a disk that grew: all behind its earlier end is
    2. chunks, in the reader's order ─► pipeline ─► target
    3. about every 32 MiB: the writes so far are flushed ─► manifest flushed ─► Checkpoint recorded ─► …
    4. a delta pass: cells that were only partly overwritten are read back and sealed anew

A failed write or flush ends the pass with TargetError; the last recorded checkpoint stays true, and what was written behind it
is written again by the next run. The reader's errors pass through, and nothing is recorded for them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Protocol, cast

from tokvm.core.disk import Chunk, DiskReader, DiskWriter
from tokvm.core.errors import ImageError, TargetError
from tokvm.core.extents import ExtentKind
from tokvm.core.units import GiB
from tokvm.transfer.bucket import TokenBucket
from tokvm.transfer.checkpoint import Checkpoint, PassLimits, PassResult, PassStopped, StopReason, TargetState
from tokvm.transfer.manifest import ManifestWriter, zero_records
from tokvm.transfer.pipeline import Pipeline
from tokvm.transfer.reseal import reseal
from tokvm.transfer.verify import canary

__all__ = ["Checkpoint", "PassLimits", "PassResult", "PassStopped", "StopReason", "TargetState", "run_pass"]

log = logging.getLogger(__name__)

DEFAULT_LIMITS = PassLimits()
_START = Checkpoint(position=0, data_bytes=0, zero_bytes=0, zeroed=False)
_ZERO_STEP = GiB
_NAP_S = 0.1


class _Closable(Protocol):
    def close(self) -> None: ...


def run_pass(
    reader: DiskReader,
    writer: DiskWriter,
    *,
    state: TargetState,
    resume: Checkpoint | None,
    record: Callable[[Checkpoint], None],
    progress: Callable[[int], None],
    manifest: ManifestWriter | None = None,
    limits: PassLimits = DEFAULT_LIMITS,
    cancelled: Callable[[], bool] | None = None,
    total_deadline: float | None = None,
    grown_from: int | None = None,
) -> PassResult:
    """Copy. `record`, `progress` and `cancelled` are called in the calling thread only.

    resume: the last Checkpoint recorded for a reader with the same fingerprint (the caller compares it), or None.
    progress: bytes of DATA done since the last call, this run only; a bar starts at `resume.data_bytes`.
    total_deadline: a `time.monotonic()` instant. When it passes, or `cancelled()` says so, what is in flight is finished,
    flushed and recorded, and PassStopped is raised. (It is looked at between chunks: a reader that blocks needs its own.)
    grown_from: the disk's size at the previous pass. A larger target may hold anything behind it, and a delta does not say what
    never held data there, so it is zeroed first. None: the size is the same.
    """
    if reader.size > writer.size:
        raise TargetError(f"the disk has {reader.size} bytes, the target {writer.size}", fix="give a larger target")
    job = _Pass(reader, writer, record, progress, manifest, limits, _Stop(cancelled, total_deadline), resume or _START)
    grown = [] if grown_from is None else [(grown_from, max(0, reader.size - grown_from))]
    if resume is not None and manifest is not None and resume.position:
        canary(writer, manifest.path)
    return job.run(state, grown)


class _Stop:
    """Whether somebody wants the pass to stop, and why."""

    def __init__(self, cancelled: Callable[[], bool] | None, deadline: float | None) -> None:
        self._cancelled = cancelled
        self.deadline = deadline

    def reason(self) -> StopReason | None:
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return StopReason.DEADLINE
        if self._cancelled is not None and self._cancelled():
            return StopReason.CANCELLED
        return None


class _Pass:
    """One run of a pass. `_at` is what the next checkpoint will say."""

    def __init__(
        self,
        reader: DiskReader,
        writer: DiskWriter,
        record: Callable[[Checkpoint], None],
        progress: Callable[[int], None],
        manifest: ManifestWriter | None,
        limits: PassLimits,
        stop: _Stop,
        start: Checkpoint,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._record = record
        self._progress = progress
        self._manifest = manifest
        self._limits = limits
        self._stop = stop
        self._at = start
        self._recorded = start
        self._since_bytes = 0
        self._since = time.monotonic()
        self._bucket = TokenBucket(limits.rate_limit) if limits.rate_limit else None

    def run(self, state: TargetState, grown: list[tuple[int, int]]) -> PassResult:
        began, had = time.monotonic(), self._at.data_bytes
        if not self._at.zeroed:
            if state is TargetState.UNKNOWN:
                self._zero(self._absent())
            elif grown:
                self._zero(grown)
        self._at = replace(self._at, zeroed=True)
        with Pipeline(self._writer, workers=self._limits.workers, manifest=self._manifest) as pipeline:
            reason = self._copy(pipeline)
            pipeline.close_epoch(self._at)
            pipeline.drain()
            self._collect(pipeline)
        if reason is not None:
            raise PassStopped(reason, self._recorded)
        unsealed = self._reseal() if state is TargetState.PREVIOUS_PASS else 0
        seconds = time.monotonic() - began
        return PassResult(self._at.data_bytes, self._at.zero_bytes, seconds, self._at.data_bytes - had, unsealed)

    def _copy(self, pipeline: Pipeline) -> StopReason | None:
        """Submit chunks until there are no more (None) or somebody says stop."""
        chunks = self._reader.chunks(self._at.position)
        with closing(cast(_Closable, chunks)) if hasattr(chunks, "close") else closing(_Nothing()):
            for chunk in chunks:
                reason = self._stop.reason() or self._throttle(chunk, pipeline)
                if reason is not None:
                    chunk.release()
                    return reason
                self._submit(pipeline, chunk)
                self._collect(pipeline)
                if self._due():
                    pipeline.close_epoch(self._at)
                    self._since_bytes, self._since = 0, time.monotonic()
        return None

    def _submit(self, pipeline: Pipeline, chunk: Chunk) -> None:
        length, kind, position = chunk.length, chunk.kind, chunk.position
        if chunk.offset < 0 or length < 0 or chunk.offset + length > self._reader.size:
            chunk.release()
            raise ImageError(
                f"the source handed out {length} bytes at {chunk.offset:#x} of a disk of {self._reader.size} bytes",
                fix="report this: nothing outside the disk was written",
            )
        pipeline.submit(chunk)
        data = length if kind is ExtentKind.DATA else 0
        zero = length if kind is ExtentKind.ZERO else 0
        self._at = replace(
            self._at, position=position, data_bytes=self._at.data_bytes + data, zero_bytes=self._at.zero_bytes + zero
        )
        self._since_bytes += data

    def _due(self) -> bool:
        """Half of `checkpoint_bytes`, because two epochs can be at stake at a time."""
        enough = self._since_bytes >= max(1, self._limits.checkpoint_bytes // 2)
        return enough or time.monotonic() - self._since >= self._limits.checkpoint_s / 2

    def _collect(self, pipeline: Pipeline) -> None:
        moved = pipeline.moved()
        if moved:
            self._progress(moved)
        for checkpoint in pipeline.finished():
            self._commit(checkpoint)

    def _commit(self, checkpoint: Checkpoint) -> None:
        self._record(checkpoint)
        self._recorded = checkpoint

    def _throttle(self, chunk: Chunk, pipeline: Pipeline) -> StopReason | None:
        """Wait for the rate limit, in naps short enough to hear a stop or a failure."""
        if self._bucket is None or chunk.kind is not ExtentKind.DATA:
            return None
        until = time.monotonic() + self._bucket.take(chunk.length)
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _NAP_S))
            pipeline.check()
            self._collect(pipeline)
            reason = self._stop.reason()
            if reason is not None:
                return reason
        return None

    def _zero(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Make the ranges (ascending) read as zeros from `zeroed_to` on; and write down that they do."""
        known = self._writer.known_zero
        for offset, length in _steps(ranges, self._at.zeroed_to):
            if not known:
                self._writer.zero(offset, length)
            if self._manifest is not None:
                self._manifest.append(zero_records(offset, length))
            self._at = replace(self._at, zero_bytes=self._at.zero_bytes + length, zeroed_to=offset + length)
            reason = self._stop.reason()
            if reason is not None or time.monotonic() - self._since >= self._limits.checkpoint_s:
                self._checkpoint_here()
            if reason is not None:
                raise PassStopped(reason, self._recorded)
        self._at = replace(self._at, zeroed=True, zeroed_to=self._reader.size)
        self._checkpoint_here()

    def _absent(self) -> Iterator[tuple[int, int]]:
        """What the reader says nothing about."""
        for window in self._reader.covered():
            offsets, lengths = window.gaps()
            yield from zip(offsets.tolist(), lengths.tolist(), strict=True)

    def _checkpoint_here(self) -> None:
        self._writer.flush()
        if self._manifest is not None:
            self._manifest.flush()
        self._commit(self._at)
        self._since = time.monotonic()

    def _reseal(self) -> int:
        if self._manifest is None or self._limits.reseal_s <= 0:
            return 0
        until = time.monotonic() + self._limits.reseal_s
        if self._stop.deadline is not None:
            until = min(until, self._stop.deadline)
        return reseal(self._writer, self._manifest, until=until, workers=self._limits.workers)


def _steps(ranges: Iterable[tuple[int, int]], begin: int) -> Iterator[tuple[int, int]]:
    """The ranges from `begin` on, in steps short enough to stop between."""
    for offset, length in ranges:
        end = offset + length
        for at in range(max(offset, begin), end, _ZERO_STEP):
            yield at, min(_ZERO_STEP, end - at)


class _Nothing:
    def close(self) -> None:
        """For an iterator that has nothing to close."""
