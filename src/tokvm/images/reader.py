"""A chain as a DiskReader: every byte once, in the order of the files, several reads ahead.

    window of guest space ── merged map ──► rows in order ──► fills ──► chunks, in order
                                                               │
                        2-4 threads: preadv into pool buffers ◄┘

One fill is one pool buffer and one or more reads into it: a piece of a large run, or many small runs with the short gaps
between them, from one layer or several (`images.gather`). Guest bytes on a page boundary land on a page boundary of the
buffer, so the writer can use O_DIRECT.
Order within a window: DATA in the order of the files, then ZERO by guest offset. `position` counts the bytes handed out in
that order, ZERO too; the same chain gives the same order every time.
"""

from __future__ import annotations

import hashlib
import mmap
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from tokvm.core.disk import BufferPool, Chunk
from tokvm.core.extents import ExtentKind, ExtentMap
from tokvm.core.units import KiB
from tokvm.images.base import ReadAt, announcer
from tokvm.images.buffers import SharedBuffer
from tokvm.images.chain import Chain
from tokvm.images.gather import Fill, Read, Rows, fills, in_order

THREADS = 3  # measured: 2 to 4 reach the device's limit, 8 are slower
READ_AHEAD = 4  # fills on their way; each is one pool buffer
_SMALL_READ = 64 * KiB  # reads below this wait for the medium, not for its bandwidth: all of a buffer's are announced first
_TOGETHER = 256 * KiB  # of a file: small reads without gaps between them are one, and its bytes are copied to their places
_KEPT_ROWS = 1 << 19  # of merged maps, 40 bytes each: 20 MiB save walking the bitmaps two more times
_ORDER = 2  # of positions; another one for each change in the order that rows are handed out


class ChainReader:
    """Implements `core.disk.DiskReader` over a chain of random-access images."""

    def __init__(self, chain: Chain, *, pool: BufferPool | None = None) -> None:
        self._chain = chain
        self._pool = pool or BufferPool()
        self._total: int | None = None
        self._windows: list[ExtentMap] | None = None
        self._files: list[ReadAt] = [layer.file for layer in chain.layers]
        self._announce = [announcer(file) for file in self._files]
        self._local = threading.local()

    @property
    def size(self) -> int:
        return self._chain.size

    @property
    def fingerprint(self) -> str:
        """Of the layers' ids and sizes, and of their files' modification times where there are any."""
        digest = hashlib.blake2b(f"order {_ORDER}\n".encode(), digest_size=16)
        for layer in self._chain.layers:
            stamp = getattr(layer.file, "stamp", "")
            digest.update(f"{layer.format} {layer.identity} {layer.size} {layer.file.size} {stamp}\n".encode())
        return f"chain-{digest.hexdigest()}"

    @property
    def total(self) -> int:
        if self._total is None:
            deque(self.covered(), maxlen=0)
        return self._total or 0

    def covered(self) -> Iterator[ExtentMap]:
        """The merged maps: those of the first walk, when they were few enough to be kept. A walk to the end knows `total`."""
        if self._windows is not None:
            yield from self._windows
            return
        kept: list[ExtentMap] = []
        rows = total = 0
        for window in self._chain.windows():
            rows += len(window)
            total += window.bytes_of(ExtentKind.DATA)
            if rows <= _KEPT_ROWS:
                kept.append(window)
            else:
                kept.clear()
            yield window
        self._total = total
        if rows <= _KEPT_ROWS:
            self._windows = kept

    def chunks(self, position: int = 0) -> Iterator[Chunk]:
        begin = 0
        with ThreadPoolExecutor(THREADS, "image-read") as threads:
            for window in self.covered():
                end = begin + int(window.length.sum())
                if end > position:
                    yield from self._window_chunks(window, begin, max(position - begin, 0), threads)
                begin = end

    def _window_chunks(self, window: ExtentMap, begin: int, skip: int, threads: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The chunks of one window whose first byte has position `begin`, but for the first `skip` bytes."""
        data, zero = window.only(ExtentKind.DATA), window.only(ExtentKind.ZERO)
        data_bytes = int(data.length.sum())
        yield from self._data_chunks(in_order(data).skip(skip), begin + min(skip, data_bytes), threads)
        rows = Rows(zero.layer, zero.file_offset, zero.offset, zero.length).skip(max(skip - data_bytes, 0))
        position = begin + max(data_bytes, skip)
        for offset, length in zip(rows.offset.tolist(), rows.length.tolist(), strict=True):
            position += length
            yield Chunk(offset, length, ExtentKind.ZERO, position)

    def _data_chunks(self, rows: Rows, position: int, threads: ThreadPoolExecutor) -> Iterator[Chunk]:
        planned = fills(rows, self._pool.size)
        ahead: deque[tuple[Future[None], Fill, SharedBuffer]] = deque()
        try:
            while self._read_ahead(planned, ahead, threads):
                future, fill, buffer = ahead[0]
                future.result()
                ahead.popleft()
                for chunk in _cut(fill, buffer, position):
                    position = chunk.position
                    yield chunk
        finally:
            for future, _, buffer in ahead:
                future.cancel()
                future.add_done_callback(lambda _, buffer=buffer: buffer.release())  # type: ignore[misc]

    def _read_ahead(
        self, planned: Iterator[Fill], ahead: deque[tuple[Future[None], Fill, SharedBuffer]], threads: ThreadPoolExecutor
    ) -> bool:
        """Start reads while buffers are free; wait for one only when nothing is on its way. False at the end."""
        while len(ahead) < READ_AHEAD:
            got = self._pool.try_acquire() if ahead else self._pool.acquire()
            if got is None:
                break
            fill = next(planned, None)
            if fill is None:
                got[1]()
                break
            buffer = SharedBuffer(*got)
            ahead.append((threads.submit(self._fill, fill, buffer.view), fill, buffer))
        return bool(ahead)

    def _fill(self, fill: Fill, view: memoryview) -> None:
        together = list(_together(fill.reads))
        if len(together) > 1:
            for reads, length in together:
                if length < _SMALL_READ:
                    self._announce[reads[0][0]](reads[0][1], length)
        for reads, length in together:
            layer, begin, at, _ = reads[0]
            if len(reads) == 1:
                self._files[layer].read_into(begin, view[at : at + length])
                continue
            scratch = self._scratch()[:length]
            self._files[layer].read_into(begin, scratch)
            for _, file_offset, place, size in reads:
                view[place : place + size] = scratch[file_offset - begin : file_offset - begin + size]

    def _scratch(self) -> memoryview:
        """One for each thread."""
        found: memoryview | None = getattr(self._local, "scratch", None)
        if found is None:
            found = self._local.scratch = memoryview(mmap.mmap(-1, _TOGETHER))
        return found

    def close(self) -> None:
        for file in self._files:
            file.close()


def _together(reads: list[Read]) -> Iterator[tuple[list[Read], int]]:
    """(small reads that lie one behind the other in the file, or one read; their length together), in the given order."""
    found: list[Read] = []
    total = 0
    for read in reads:
        layer, file_offset, _, length = read
        goes_on = found and layer == found[0][0] and file_offset == found[0][1] + total
        if goes_on and max(length, found[0][3]) < _SMALL_READ and total + length <= _TOGETHER:
            found.append(read)
            total += length
            continue
        if found:
            yield found, total
        found, total = [read], length
    if found:
        yield found, total


def _cut(fill: Fill, buffer: SharedBuffer, position: int) -> Iterator[Chunk]:
    """The chunks of a buffer that was read; it goes back when all that were taken are released."""
    view, release = buffer.view, buffer.release
    try:
        for offset, length, at in fill.pieces:
            position += length
            buffer.retain()
            yield Chunk(offset, length, ExtentKind.DATA, position, view[at : at + length], release)
    finally:
        buffer.release()
