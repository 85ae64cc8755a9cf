"""Chunks of a chain: every byte once, in a fixed order that can be taken up anywhere, in bounded memory."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokvm.core.disk import BufferPool, Chunk, DiskReader
from tokvm.core.errors import ImageError
from tokvm.core.extents import ExtentKind
from tokvm.images import chain as chain_module
from tokvm.images.chain import Chain
from tokvm.images.files import open_file
from tokvm.images.open import open_image
from tokvm.images.reader import ChainReader

SECTOR = 512


def two_layers(kit: Any, seed: int, sectors: int = 200) -> tuple[list[bytes], bytes]:
    rng = random.Random(seed)
    base = kit.Vhd(sectors * SECTOR, block_size=16384, name="b", seed=seed)
    base.sectors = kit.random_sectors(rng, base.size, 8)
    child = kit.Vhd(sectors * SECTOR, kind=4, block_size=16384, name="c", parent="b", seed=seed + 1)
    child.sectors = kit.random_sectors(rng, base.size, 8)
    return [base.build(), child.build()], child.over(base.over(b""))


def taken(chunk: Chunk) -> tuple[int, int, ExtentKind, bytes | None]:
    copy = (chunk.offset, chunk.length, chunk.kind, None if chunk.data is None else bytes(chunk.data))
    chunk.release()
    return copy


def test_it_is_a_disk_reader(kit: Any) -> None:
    reader = ChainReader(kit.chain(two_layers(kit, 1)[0][0]))
    assert isinstance(reader, DiskReader)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), pool_size=st.sampled_from([512, 1000, 4096, 8192, 12288, 65536]), count=st.integers(1, 6))
@pytest.mark.slow
def test_any_pool_gives_the_same_bytes_and_all_buffers_back(kit: Any, seed: int, pool_size: int, count: int) -> None:
    images, content = two_layers(kit, seed)
    pool = BufferPool(count, pool_size)
    assert kit.content(ChainReader(kit.chain(*images), pool=pool)) == content
    assert kit.free_buffers(pool) == count


@pytest.mark.parametrize("rows", [3, 1 << 17])
def test_a_position_goes_on_exactly_behind_its_chunk(kit: Any, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(chain_module, "MAX_ROWS", rows)
    images, content = two_layers(kit, 11)
    reader = ChainReader(kit.chain(*images), pool=BufferPool(4, 4096))
    chunks = [(chunk.position, taken(chunk)) for chunk in reader.chunks()]
    assert chunks[-1][0] == sum(length for _, (_, length, _, _) in chunks)
    for done, (position, _) in enumerate(chunks):
        before = bytearray(len(content))
        for _, (offset, length, _, raw) in chunks[: done + 1]:
            before[offset : offset + length] = raw or bytes(length)
        rest = [taken(chunk) for chunk in reader.chunks(position)]
        assert sum(length for _, length, _, _ in rest) == chunks[-1][0] - position
        for offset, length, _, raw in rest:
            before[offset : offset + length] = raw or bytes(length)
        assert bytes(before) == content


@pytest.mark.slow
def test_positions_between_chunks_are_good_too(kit: Any) -> None:
    """A run may be taken up in its middle: a pass with other buffers than the last one goes on all the same."""
    images, _ = two_layers(kit, 3)
    large = ChainReader(kit.chain(*images), pool=BufferPool(4, 65536))
    small = ChainReader(kit.chain(*images), pool=BufferPool(4, 512))
    end = sum(taken(chunk)[1] for chunk in large.chunks())
    for position in range(0, end + 1, 512):
        rest = [taken(chunk) for chunk in large.chunks(position)]
        assert sum(length for _, length, _, _ in rest) == end - position
        fine = [taken(chunk) for chunk in small.chunks(position)]
        assert sorted(flat(rest)) == sorted(flat(fine))
    assert list(large.chunks(end)) == []


def flat(chunks: list[tuple[int, int, ExtentKind, bytes | None]]) -> list[tuple[int, ExtentKind]]:
    return [(offset + at, kind) for offset, length, kind, _ in chunks for at in range(0, length, SECTOR)]


def test_data_comes_in_file_order_within_a_layer(kit: Any) -> None:
    class Recording(kit.File):  # type: ignore[misc]
        reads: list[int]

        def read_into(self, offset: int, buffer: memoryview) -> None:
            super().read_into(offset, buffer)
            self.reads.append(offset)

    images, _ = two_layers(kit, 5)
    file = Recording(images[0])
    file.reads = []
    reader = ChainReader(Chain.open([open_image(file)]), pool=BufferPool(1, 4096))
    file.reads.clear()
    chunks = reader.chunks()
    first = next(chunks)
    file.reads.clear()
    first.release()
    assert len([taken(chunk) for chunk in chunks]) > 0
    assert file.reads == sorted(file.reads)


def test_total_counts_the_data(kit: Any) -> None:
    images, _ = two_layers(kit, 6)
    reader = ChainReader(kit.chain(*images))
    chunks = [taken(chunk) for chunk in reader.chunks()]
    assert reader.total == sum(length for _, length, kind, _ in chunks if kind is ExtentKind.DATA)


def test_page_aligned_guest_bytes_lie_on_page_aligned_addresses(kit: Any) -> None:
    vhd = kit.Vhd(1 << 20, block_size=65536, seed=7)
    vhd.sectors = {sector: bytes([1]) * SECTOR for start in (1, 24, 136, 333, 512) for sector in range(start, start + 100)}
    for chunk in ChainReader(kit.chain(vhd.build()), pool=BufferPool(4, 32768)).chunks():
        if chunk.data is not None:
            import numpy as np

            address = np.frombuffer(chunk.data, np.uint8).__array_interface__["data"][0]
            assert address % 4096 == chunk.offset % 4096
        chunk.release()


def test_a_reader_that_is_dropped_gives_its_buffers_back(kit: Any) -> None:
    images, _ = two_layers(kit, 8)
    pool = BufferPool(5, 4096)
    for count in (1, 2, 3):
        chunks = ChainReader(kit.chain(*images), pool=pool).chunks()
        held = [next(chunks) for _ in range(count)]
        chunks.close()  # type: ignore[attr-defined]
        for chunk in held:
            chunk.release()
            chunk.release()  # twice is once
        deadline = time.monotonic() + 5
        while kit.free_buffers(pool) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert kit.free_buffers(pool) == 5


def test_chunks_may_be_released_from_other_threads(kit: Any) -> None:
    images, content = two_layers(kit, 9)
    pool = BufferPool(2, 4096)
    got = bytearray(len(content))
    waiting: list[threading.Timer] = []
    for chunk in ChainReader(kit.chain(*images), pool=pool).chunks():
        if chunk.data is not None:
            got[chunk.offset : chunk.offset + chunk.length] = chunk.data
        waiting.append(threading.Timer(0.001, chunk.release))
        waiting[-1].start()
    for timer in waiting:
        timer.join()
    assert bytes(got) == content
    assert kit.free_buffers(pool) == 2


def test_a_read_error_arrives_in_order_and_frees_everything(kit: Any) -> None:
    vhd = kit.Vhd(1 << 20, block_size=65536, sectors=dict.fromkeys(range(2048), b"\1" * SECTOR))
    raw = vhd.build()
    bad = vhd.block_starts[9]

    class Broken(kit.File):  # type: ignore[misc]
        def read_into(self, offset: int, buffer: memoryview) -> None:
            if offset > bad and len(buffer) > 512:
                raise ImageError("medium error", where=f"{self.name}@{offset:#x}")
            super().read_into(offset, buffer)

    pool = BufferPool(6, 65536)
    chunks = ChainReader(Chain.open([open_image(Broken(raw))]), pool=pool).chunks()
    assert sum(taken(next(chunks))[1] for _ in range(9)) == 9 * 65536
    with pytest.raises(ImageError, match="medium error"):
        next(chunks)
    assert kit.free_buffers(pool) == 6


def test_the_fingerprint_names_content_and_order(kit: Any) -> None:
    images, _ = two_layers(kit, 10)
    one = ChainReader(kit.chain(*images)).fingerprint
    assert one == ChainReader(kit.chain(*images)).fingerprint
    assert one != ChainReader(kit.chain(images[0])).fingerprint
    assert one != ChainReader(kit.chain(images[0], two_layers(kit, 12)[0][1] + bytes(512), force_linkage=True)).fingerprint


def test_a_file_that_was_written_to_has_another_fingerprint(kit: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.vhd"
    path.write_bytes(two_layers(kit, 10)[0][0])

    def fingerprint() -> str:
        reader = ChainReader(Chain.open([open_image(open_file(path))]))
        reader_fingerprint = reader.fingerprint
        reader.close()
        return reader_fingerprint

    before = fingerprint()
    assert fingerprint() == before
    time.sleep(0.02)
    path.write_bytes(path.read_bytes())
    assert fingerprint() != before


def test_close_closes_the_files(kit: Any) -> None:
    chain = kit.chain(two_layers(kit, 1)[0][0])
    ChainReader(chain).close()
    assert chain.layers[0].file.closed
