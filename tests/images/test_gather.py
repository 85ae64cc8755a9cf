"""How a map becomes reads: everything once, whatever the layers look like, and few large pieces where many small ones meet."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tokvm.core.disk import BufferPool
from tokvm.core.extents import Extent, ExtentKind, ExtentMap
from tokvm.images.base import Linkage, MappedLayer
from tokvm.images.chain import Chain
from tokvm.images.gather import UNIT, Fill, fills, in_order
from tokvm.images.reader import ChainReader

SECTOR = 512


def random_map(rng: random.Random, layers: int) -> ExtentMap:
    """DATA runs of several layers with gaps; each layer's file holds the guest's bytes at the same distance per block."""
    extents, at = [], rng.randrange(8) * SECTOR
    shift = [rng.randrange(1, 99) * 4 * UNIT + SECTOR for _ in range(layers)]
    while at < 3 * UNIT:
        length = rng.choice((1, 3, 8, 8, 100, 3000)) * SECTOR
        layer = rng.randrange(layers)
        extents.append(Extent(at, length, ExtentKind.DATA, at + shift[layer], layer))
        at += length + rng.choice((0, 0, 0, 1, 8, 64)) * SECTOR
    return ExtentMap.of(0, 4 * UNIT, extents)


def sources(fill: Fill) -> dict[int, tuple[int, int]]:
    """For each sector of the buffer: the (layer, file offset) it holds at the end."""
    found = {}
    for layer, file_offset, at, length in fill.reads:
        for step in range(0, length, SECTOR):
            found[at + step] = (layer, file_offset + step)
    return found


@pytest.mark.parametrize("size", [512, 4096, 12288, 65536, UNIT, 2 * UNIT])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.slow
def test_every_sector_comes_once_and_from_its_own_place(seed: int, size: int) -> None:
    data = random_map(random.Random(seed), layers=1 + seed % 4)
    expected = {e.offset + s: (e.layer, e.file_offset + s) for e in data for s in range(0, e.length, SECTOR)}
    seen: dict[int, tuple[int, int]] = {}
    for fill in fills(in_order(data), size):
        held = sources(fill)
        for offset, length, at in fill.pieces:
            assert at + length <= size
            assert size < 4096 or at % 4096 == offset % 4096
            for step in range(0, length, SECTOR):
                assert offset + step not in seen
                seen[offset + step] = held[at + step]
    assert seen == expected


@pytest.mark.parametrize("seed", range(4))
def test_the_order_does_not_depend_on_the_buffers(seed: int) -> None:
    rows = in_order(random_map(random.Random(seed), layers=3))

    def sectors(size: int) -> list[int]:
        return [o + s for fill in fills(rows, size) for o, length, _ in fill.pieces for s in range(0, length, SECTOR)]

    assert sectors(512) == sectors(65536) == sectors(UNIT)


def test_small_pieces_over_a_base_become_one_large_chunk(kit: Any) -> None:
    """4 KiB pieces of a child in a full block of its parent: one chunk, and one read of the parent through the holes."""
    base = kit.Vhd(UNIT, block_size=UNIT, name="b", seed=1)
    base.sectors = {sector: bytes([sector % 251]) * SECTOR for sector in range(UNIT // SECTOR)}
    child = kit.Vhd(UNIT, kind=4, block_size=UNIT, name="c", parent="b", seed=2)
    child.sectors = {sector + step: b"\xff" * SECTOR for sector in range(64, 4000, 500) for step in range(8)}
    reader = ChainReader(kit.chain(base.build(), child.build()), pool=BufferPool(2, UNIT))
    chunks = list(reader.chunks())
    assert [(chunk.offset, chunk.length) for chunk in chunks] == [(0, UNIT)]
    assert bytes(chunks[0].data or b"") == child.over(base.over(b""))
    chunks[0].release()
    fill = next(fills(in_order(next(reader.covered()).only(ExtentKind.DATA)), UNIT))
    assert len([layer for layer, *_ in fill.reads if layer == 0]) == 1


def test_an_empty_map_needs_no_buffer() -> None:
    assert list(fills(in_order(ExtentMap.empty(0, UNIT)), UNIT)) == []


class CountingFile:
    """A ReadAt over bytes that remembers what was asked for."""

    name = "memory"

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.size = len(raw)
        self.asked: list[tuple[int, int]] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.asked.append((offset, len(buffer)))
        buffer[:] = self.raw[offset : offset + len(buffer)]

    def close(self) -> None: ...


class Backwards(MappedLayer):
    """Grains of 4 KiB: the disk's first is the file's last."""

    GRAIN = 4096

    def map_part(self, start: int, stop: int, max_rows: int | None) -> ExtentMap:
        at = np.arange(start, stop, self.GRAIN)
        return ExtentMap.build(start, stop, at, self.GRAIN, int(ExtentKind.DATA), self.size - self.GRAIN - at)

    def describe(self) -> dict[str, object]:
        return {}


def test_small_pieces_that_are_neighbours_in_the_file_are_one_read() -> None:
    grains = [bytes([number + 1]) * Backwards.GRAIN for number in range(16)]
    file = CountingFile(b"".join(grains))
    reader = ChainReader(Chain.open([Backwards(file, size=file.size, linkage=Linkage())]), pool=BufferPool(2, UNIT))
    found = bytearray(file.size)
    for chunk in reader.chunks():
        found[chunk.offset : chunk.offset + chunk.length] = chunk.data or b""
        chunk.release()
    assert bytes(found) == b"".join(reversed(grains))
    assert file.asked == [(0, file.size)]
