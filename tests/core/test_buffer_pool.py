"""A fixed number of aligned buffers, handed out and given back from any thread."""

from __future__ import annotations

import threading

import numpy as np

from tokvm.core.disk import BufferPool, Chunk
from tokvm.core.extents import ExtentKind


def test_buffers_have_their_size_and_begin_on_a_page() -> None:
    view, _ = BufferPool(1, 8192).acquire()
    assert len(view) == 8192
    assert not view.readonly
    assert np.frombuffer(view, np.uint8).__array_interface__["data"][0] % 4096 == 0


def test_no_more_buffers_than_promised() -> None:
    pool = BufferPool(3, 4096)
    got = [pool.acquire() for _ in range(3)]
    assert pool.try_acquire() is None
    got[1][1]()
    assert pool.try_acquire() is not None
    assert pool.try_acquire() is None


def test_buffers_in_use_are_different_memory() -> None:
    pool = BufferPool(2, 4096)
    (one, _), (other, _) = pool.acquire(), pool.acquire()
    one[:4], other[:4] = b"aaaa", b"bbbb"
    assert bytes(one[:4]) == b"aaaa"


def test_acquire_waits_for_another_thread_to_give_back() -> None:
    pool = BufferPool(1, 4096)
    _, give_back = pool.acquire()
    timer = threading.Timer(0.05, give_back)
    timer.start()
    assert len(pool.acquire()[0]) == 4096
    timer.join()


def test_a_chunk_gives_its_buffer_back_once() -> None:
    released: list[int] = []
    chunk = Chunk(0, 4, ExtentKind.DATA, 4, memoryview(b"data"), lambda: released.append(1))
    chunk.release()
    chunk.release()
    assert released == [1]
    assert chunk.data is None
