"""The inside of a pass: chunks to worker threads, and checkpoints that overlap with the writing that goes on.

    caller's thread ── submit(chunk) ──► queue ──► workers: hash, write ──► epoch: all its chunks written
          ▲                                                                      │
          └── finished(): checkpoints to record ◄── flusher: target flush, manifest flush ◄┘

An epoch is what lies between two checkpoints. Its flush runs while the next epoch is being written; a third cannot begin before
the first was flushed, so no more than two are ever at stake. Callbacks and the journal stay in the caller's thread.
Chunks bring their own buffers (the reader's pool bounds them); the queue bounds how many wait. After a failure the workers go
on taking chunks, only to release them: a reader that waits for a buffer would never come back otherwise.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np

from tokvm.core.disk import Chunk, DiskWriter
from tokvm.core.extents import ExtentKind
from tokvm.core.units import KiB
from tokvm.transfer.checkpoint import Checkpoint
from tokvm.transfer.manifest import ManifestWriter, data_records, zero_records

ZERO_FROM = 64 * KiB  # below this, written zeros are cheaper than a call that makes a hole
INLINE_UP_TO = 64 * KiB  # of whole pages: the page cache takes them in no time
_PAGE = 4 * KiB
_QUEUED_PER_WORKER = 4


@dataclass(slots=True)
class _Epoch:
    """`checkpoint` is None until the last chunk was submitted. `records`: packed manifest records of what was written."""

    pending: int = 0
    checkpoint: Checkpoint | None = None
    records: list[bytes] = field(default_factory=list)

    @property
    def written(self) -> bool:
        return self.checkpoint is not None and self.pending == 0


class Pipeline:
    """Used by one thread, as a context manager: leaving it joins all threads; what was not flushed then does not count."""

    def __init__(self, writer: DiskWriter, *, workers: int, manifest: ManifestWriter | None) -> None:
        self._writer = writer
        self._zeroed = writer.known_zero  # before our first write, and no range comes twice: what is to be zero is zero already
        self._manifest = manifest
        self._chunks: queue.Queue[tuple[Chunk, _Epoch] | None] = queue.Queue(max(1, workers) * _QUEUED_PER_WORKER)
        self._state = threading.Condition()
        self._open = _Epoch()
        self._closed: deque[_Epoch] = deque()  # submitted, not flushed yet; at most one
        self._flushed: deque[Checkpoint] = deque()
        self._failure: BaseException | None = None
        self._moved = 0  # by the workers
        self._moved_here = 0  # in the caller's thread
        self._ending = False
        self._threads = [
            threading.Thread(target=self._work, name=f"pass-writer-{n}", daemon=True) for n in range(max(1, workers))
        ]
        self._flusher = threading.Thread(target=self._flush_epochs, name="pass-flusher", daemon=True)

    def __enter__(self) -> Pipeline:
        for thread in (*self._threads, self._flusher):
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        with self._state:
            self._ending = True
            if kind is not None:
                self._failure = self._failure or value
            self._state.notify_all()
        for _ in self._threads:
            self._chunks.put(None)
        for thread in (*self._threads, self._flusher):
            thread.join()

    def submit(self, chunk: Chunk) -> None:
        """Take the chunk over. Waits while enough are under way; raises what went wrong with an earlier one."""
        epoch = self._open
        if self._is_quick(chunk):
            self.check()
            records = self._deliver(chunk)
            if chunk.kind is ExtentKind.DATA:
                self._moved_here += chunk.length
            if records:
                epoch.records.append(records)
            return
        with self._state:
            epoch.pending += 1
        self._chunks.put((chunk, epoch))
        self.check()

    def _is_quick(self, chunk: Chunk) -> bool:
        """Done sooner than another thread could be woken for it."""
        if chunk.kind is ExtentKind.DATA:
            return chunk.length <= INLINE_UP_TO and not (chunk.offset | chunk.length) % _PAGE
        return self._zeroed

    def close_epoch(self, checkpoint: Checkpoint) -> None:
        """Everything submitted so far belongs to `checkpoint`. Waits until the checkpoint before it was flushed."""
        with self._state:
            self._state.wait_for(lambda: not self._closed or self._failure is not None)
            self.check()
            self._open.checkpoint = checkpoint
            self._closed.append(self._open)
            self._open = _Epoch()
            self._state.notify_all()

    def drain(self) -> None:
        """Wait until every closed epoch was flushed."""
        with self._state:
            self._state.wait_for(lambda: not self._closed or self._failure is not None)
            self.check()

    def finished(self) -> list[Checkpoint]:
        """Checkpoints that may be recorded now, oldest first; each is handed out once."""
        if not self._flushed:  # asked once a chunk: no lock for it
            return []
        with self._state:
            found = list(self._flushed)
            self._flushed.clear()
        return found

    def moved(self) -> int:
        """Bytes of DATA written since the last call."""
        count, self._moved_here = self._moved_here, 0
        if self._moved:
            with self._state:
                count, self._moved = count + self._moved, 0
        return count

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while True:
            item = self._chunks.get()
            if item is None:
                return
            chunk, epoch = item
            if self._failure is not None:
                chunk.release()
                continue
            with self._guarded():
                records = self._deliver(chunk)
                with self._state:
                    epoch.pending -= 1
                    self._account(epoch, chunk, records)
                    if epoch.written:
                        self._state.notify_all()

    def _account(self, epoch: _Epoch, chunk: Chunk, records: bytes) -> None:
        if chunk.kind is ExtentKind.DATA:
            self._moved += chunk.length
        if records:
            epoch.records.append(records)

    def _deliver(self, chunk: Chunk) -> bytes:
        """Write one chunk; its packed manifest records, if there is a manifest."""
        try:
            data = chunk.data
            if chunk.kind is ExtentKind.ABSENT:
                return b""
            if data is None or chunk.kind is ExtentKind.ZERO or is_zero(data):
                if not self._zeroed:
                    self._writer.zero(chunk.offset, chunk.length)
                return zero_records(chunk.offset, chunk.length) if self._manifest is not None else b""
            records = data_records(chunk.offset, data) if self._manifest is not None else b""
            self._writer.write(chunk.offset, data)
            return records
        finally:
            chunk.release()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """What goes wrong in a thread is raised in the caller's; nobody waits for a thread that is gone."""
        try:
            yield
        except BaseException as exc:  # noqa: BLE001 - handed over whole, raised by check()
            with self._state:
                self._failure = self._failure or exc
                self._state.notify_all()

    def _flush_epochs(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._ending or self._failure is not None or self._next_is_written())
                if self._failure is not None or not self._next_is_written():
                    return
                epoch = self._closed[0]
            with self._guarded():
                self._flush(epoch)

    def _next_is_written(self) -> bool:
        return bool(self._closed) and self._closed[0].written

    def _flush(self, epoch: _Epoch) -> None:
        """The order that makes a checkpoint true: target, manifest, and only then the journal (in the caller's thread)."""
        self._writer.flush()
        if self._manifest is not None:
            for records in epoch.records:
                self._manifest.append(records)
            self._manifest.flush()
        with self._state:
            self._closed.popleft()
            if epoch.checkpoint is not None:
                self._flushed.append(epoch.checkpoint)
            self._state.notify_all()


def is_zero(data: memoryview) -> bool:
    """True for at least 64 KiB of nothing but zero bytes. Looks at the first page before it looks at all of it."""
    if len(data) < ZERO_FROM:
        return False
    columns = np.frombuffer(data, np.uint8)
    if columns[:_PAGE].any():
        return False
    whole = len(data) // 8 * 8
    return not columns[:whole].view(np.uint64).any() and not columns[whole:].any()
