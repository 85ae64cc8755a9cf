"""A chain as a DiskReader: every byte once, in the order of the files, several reads ahead.

    window of guest space ── merged map ──► rows by (layer, file offset) ──► fills ──► chunks, in order
                                                                            │
                                     2-4 threads: preadv into pool buffers ◄┘

One fill is one pool buffer and one or more reads into it: a piece of a large run, or many small runs with the short gaps
between them. Guest bytes on a page boundary land on a page boundary of the buffer, so the writer can use O_DIRECT.
Order within a window: DATA by layer and file offset, then ZERO by guest offset. `position` counts the bytes handed out in
that order, ZERO too; the same chain gives the same order every time.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from tokvm.core.disk import BufferPool, Chunk
from tokvm.core.extents import Column, ExtentKind, ExtentMap
from tokvm.core.units import KiB
from tokvm.images.base import ReadAt
from tokvm.images.buffers import PAGE, SharedBuffer, page_offset
from tokvm.images.chain import Chain

THREADS = 3  # measured: 2 to 4 reach the device's limit, 8 are slower
READ_AHEAD = 4  # fills on their way; each is one pool buffer
_GAP = 16 * KiB  # reading through a gap of this size costs less than a second read

Row = tuple[int, int, int, int]  # layer, file offset, guest offset, length


@dataclass(slots=True)
class _Read:
    """One preadv: `length` bytes at `file_offset` of a layer, to `at` in the buffer."""

    layer: int
    file_offset: int
    at: int
    length: int


@dataclass(slots=True)
class _Fill:
    """What goes into one buffer: reads, and the (guest offset, length, place in the buffer) of each chunk."""

    reads: list[_Read] = field(default_factory=list)
    pieces: list[tuple[int, int, int]] = field(default_factory=list)


class ChainReader:
    """Implements `core.disk.DiskReader` over a chain of random-access images."""

    def __init__(self, chain: Chain, *, pool: BufferPool | None = None) -> None:
        self._chain = chain
        self._pool = pool or BufferPool()
        self._total: int | None = None
        self._files: list[ReadAt] = [layer.file for layer in chain.layers]

    @property
    def size(self) -> int:
        return self._chain.size

    @property
    def fingerprint(self) -> str:
        """Of the layers' ids and sizes, and of their files' modification times where there are any."""
        digest = hashlib.blake2b(digest_size=16)
        for layer in self._chain.layers:
            stamp = getattr(layer.file, "stamp", "")
            digest.update(f"{layer.format} {layer.identity} {layer.size} {layer.file.size} {stamp}\n".encode())
        return f"chain-{digest.hexdigest()}"

    @property
    def total(self) -> int:
        if self._total is None:
            self._total = sum(window.bytes_of(ExtentKind.DATA) for window in self.covered())
        return self._total

    def covered(self) -> Iterator[ExtentMap]:
        return self._chain.windows()

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
        order = np.lexsort((data.file_offset, data.layer))
        rows = _skip((data.layer[order], data.file_offset[order], data.offset[order], data.length[order]), skip)
        yield from self._data_chunks(rows, begin + min(skip, data_bytes), threads)
        rows = _skip((zero.layer, zero.file_offset, zero.offset, zero.length), max(skip - data_bytes, 0))
        position = begin + max(data_bytes, skip)
        for offset, length in zip(rows[2].tolist(), rows[3].tolist(), strict=True):
            position += length
            yield Chunk(offset, length, ExtentKind.ZERO, position)

    def _data_chunks(
        self, rows: tuple[Column, Column, Column, Column], position: int, threads: ThreadPoolExecutor
    ) -> Iterator[Chunk]:
        fills = _fills(zip(*(column.tolist() for column in rows), strict=True), self._pool.size)
        ahead: deque[tuple[Future[None], _Fill, SharedBuffer]] = deque()
        try:
            while self._read_ahead(fills, ahead, threads):
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
        self, fills: Iterator[_Fill], ahead: deque[tuple[Future[None], _Fill, SharedBuffer]], threads: ThreadPoolExecutor
    ) -> bool:
        """Start reads while buffers are free; wait for one only when nothing is on its way. False at the end."""
        while len(ahead) < READ_AHEAD:
            got = self._pool.try_acquire() if ahead else self._pool.acquire()
            if got is None:
                break
            fill = next(fills, None)
            if fill is None:
                got[1]()
                break
            buffer = SharedBuffer(*got)
            ahead.append((threads.submit(self._fill, fill, buffer.view), fill, buffer))
        return bool(ahead)

    def _fill(self, fill: _Fill, view: memoryview) -> None:
        for read in fill.reads:
            self._files[read.layer].read_into(read.file_offset, view[read.at : read.at + read.length])

    def close(self) -> None:
        for file in self._files:
            file.close()


def _cut(fill: _Fill, buffer: SharedBuffer, position: int) -> Iterator[Chunk]:
    """The chunks of a buffer that was read; it goes back when all that were taken are released."""
    view, release = buffer.view, buffer.release
    try:
        for offset, length, at in fill.pieces:
            position += length
            buffer.retain()
            yield Chunk(offset, length, ExtentKind.DATA, position, view[at : at + length], release)
    finally:
        buffer.release()


def _skip(rows: tuple[Column, Column, Column, Column], count: int) -> tuple[Column, Column, Column, Column]:
    """The rows without their first `count` bytes."""
    layer, file_offset, offset, length = rows
    ends = np.cumsum(length)
    first = int(np.searchsorted(ends, count, side="right"))
    layer, file_offset, offset, length = (column[first:].copy() for column in rows)
    if len(length):
        done = count - int(ends[first - 1]) if first else count
        file_offset[0] += done
        offset[0] += done
        length[0] -= done
    return layer, file_offset, offset, length


def _fills(rows: Iterator[Row], size: int) -> Iterator[_Fill]:
    """Pack rows, in order, into buffers of `size` bytes. A row is cut only where a buffer ends."""
    fill = _Fill()
    used = 0
    for layer, start, guest, whole in rows:
        file_offset, offset, length = start, guest, whole
        while length:
            last = fill.reads[-1] if fill.reads else None
            at, gap = _place(last, layer, file_offset, offset, used, size)
            room = size - at
            if room <= 0 or (fill.reads and length > room):
                yield fill
                fill, used = _Fill(), 0
                continue
            take = min(length, room)
            if last is not None and gap >= 0:
                last.length += gap + take
            else:
                fill.reads.append(_Read(layer, file_offset, at, take))
            fill.pieces.append((offset, take, at))
            used = at + take
            file_offset, offset, length = file_offset + take, offset + take, length - take
    if fill.reads:
        yield fill


def _place(last: _Read | None, layer: int, file_offset: int, offset: int, used: int, size: int) -> tuple[int, int]:
    """(place in the buffer, gap): where the bytes of guest `offset` go.

    gap: bytes between the last read's end and these when one read can take both, else -1.
    """
    if last is not None and last.layer == layer:
        gap = file_offset - (last.file_offset + last.length)
        if 0 <= gap <= _GAP and (used + gap) % PAGE == page_offset(offset, size):
            return used + gap, gap
    return -(-used // PAGE) * PAGE + page_offset(offset, size) if used else page_offset(offset, size), -1
