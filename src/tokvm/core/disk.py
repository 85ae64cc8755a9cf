"""The two doors that disk bytes go through: a DiskReader hands out chunks, a DiskWriter takes them.

    images/, sources/  ── DiskReader.chunks() ──►  transfer/  ── DiskWriter.write()/zero() ──►  targets/

A reader chooses the order that is fastest for it (file order, or a stream's own order); a writer takes any order.
"""

from __future__ import annotations

import mmap
import queue
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from tokvm.core.extents import ExtentKind, ExtentMap
from tokvm.core.units import MiB

_HUGE_PAGE = 2 * MiB


@dataclass(slots=True)
class Chunk:
    """A piece of guest disk on its way from a reader to a writer.

    offset, length: bytes of the guest disk. kind: DATA (with `data`, exactly `length` bytes) or ZERO (`data` None).
    position: the reader's own place *after* this chunk; `DiskReader.chunks(position)` goes on right behind it.
    Whoever consumes the chunk calls `release()` once, which gives the buffer back to the reader.
    """

    offset: int
    length: int
    kind: ExtentKind
    position: int
    data: memoryview | None = None
    _release: Callable[[], None] | None = field(default=None, repr=False)

    def release(self) -> None:
        give_back, self._release = self._release, None
        self.data = None
        if give_back is not None:
            give_back()


@runtime_checkable
class DiskReader(Protocol):
    """One pass's worth of a guest disk: a base (all of it) or a delta (what changed)."""

    @property
    def size(self) -> int:
        """Virtual size of the disk, bytes."""
        ...

    @property
    def fingerprint(self) -> str:
        """Names this content in this order. A position is only good for a reader with the same fingerprint."""
        ...

    @property
    def total(self) -> int:
        """Bytes of DATA that `chunks(0)` will hand out at most, for progress and prediction."""
        ...

    def covered(self) -> Iterator[ExtentMap]:
        """Windows of the guest disk, ascending and together all of it: what `chunks(0)` will say something about.

        DATA and ZERO extents will be handed out (as DATA or ZERO chunks); what no extent names is ABSENT: in a base
        it reads as zeros, in a delta it is unchanged.
        """
        ...

    def chunks(self, position: int = 0) -> Iterator[Chunk]:
        """Everything behind `position` in the reader's order. No range is handed out twice."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class DiskWriter(Protocol):
    """An open, exclusively held target. Thread-safe: several writes may be in flight."""

    @property
    def size(self) -> int:
        """Bytes that can be written: the device's or file's size."""
        ...

    @property
    def identity(self) -> str:
        """What this target is, stable over reboots (by-id, serial, WWN, device:inode)."""
        ...

    @property
    def known_zero(self) -> bool:
        """True only if every byte is known to read as zero (we have just made it), so absent ranges need no zeroing."""
        ...

    def write(self, offset: int, data: memoryview) -> None:
        """All of `data` at `offset`, or TargetError naming target and offset."""
        ...

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros, whatever it held before."""
        ...

    def flush(self) -> None:
        """Everything written so far is on the medium, or TargetError. A failed flush is never retried."""
        ...

    def read_back(self, offset: int, length: int) -> memoryview:
        """The bytes as the medium holds them (past the page cache), for verification."""
        ...

    def close(self) -> None: ...


class BufferPool:
    """A fixed number of page-aligned buffers, so fit for O_DIRECT; bounds a pass's memory.

    `acquire` waits until a buffer is free. Buffers may be given back from any thread.
    They lie in huge pages where the host has them: a device's request has room for so many pieces of memory (virtio: 254), so
    with pages of 4 KiB it moves 1 MiB at a time; measured, O_DIRECT reads are half as fast then, at twice the CPU.
    """

    def __init__(self, count: int = 8, size: int = 2 * MiB) -> None:
        self.size = size
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        room = _huge_room(count * size)
        for number in range(count):
            self._free.put(room[number * size : (number + 1) * size])

    def acquire(self) -> tuple[memoryview, Callable[[], None]]:
        """A writable view of `size` bytes and the function that gives it back."""
        return self._hand_out(self._free.get())

    def try_acquire(self) -> tuple[memoryview, Callable[[], None]] | None:
        """The same without waiting; None when no buffer is free now (so reading ahead never starves what is due)."""
        try:
            return self._hand_out(self._free.get_nowait())
        except queue.Empty:
            return None

    def _hand_out(self, buffer: memoryview) -> tuple[memoryview, Callable[[], None]]:
        return buffer, lambda: self._free.put(buffer)


def _huge_room(size: int) -> memoryview:
    """Memory of its own that begins where a huge page may. Private: shared memory gets none on most hosts."""
    room = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        room.madvise(mmap.MADV_HUGEPAGE)
    start = -np.frombuffer(room, np.uint8).ctypes.data % _HUGE_PAGE
    return memoryview(room)[start : start + size]
