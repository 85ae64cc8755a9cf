"""What a VHDX says about the guest disk: states, bitmaps, chunks, sizes, headers, linkage."""

from __future__ import annotations

import os
import random
import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.images.naive_vhdx import (
    MIB,
    NaiveVhdx,
    patched,
    random_layer,
)

from tokvm.core.errors import ImageError
from tokvm.core.extents import Extent, ExtentKind
from tokvm.images.base import MAX_ROWS, Layer
from tokvm.images.chain import Chain
from tokvm.images.reader import ChainReader
from tokvm.images.vhdx.layer import VhdxLayer, open_vhdx

FULL = {"max_examples": 15, "deadline": None, "suppress_health_check": list(HealthCheck)}


def layer_of(kit: Any, raw: bytes) -> VhdxLayer:
    return open_vhdx(kit.File(raw, "disk.vhdx"))


def chain_of(kit: Any, *images: bytes, force_linkage: bool = False) -> Chain:
    return Chain.open([layer_of(kit, raw) for raw in images], force_linkage=force_linkage)


def read(kit: Any, *images: bytes) -> bytes:
    found: bytes = kit.content(ChainReader(chain_of(kit, *images)))
    return found


def kinds(layer: Layer) -> list[tuple[int, int, ExtentKind]]:
    return [(extent.offset, extent.length, extent.kind) for extent in layer.window(0, layer.size)]


@settings(**FULL)  # type: ignore[arg-type]
@given(seed=st.integers(0, 2**32), tail=st.sampled_from([0, 512, 4096, MIB - 512]), sector=st.sampled_from([512, 4096]))
@pytest.mark.slow
def test_any_chain_of_three_reads_as_its_layers_over_one_another(kit: Any, seed: int, tail: int, sector: int) -> None:
    rng = random.Random(seed)
    tail -= tail % sector
    images: list[bytes] = []
    expected = b""
    parent = None
    size = MIB
    for name in ("base", "child", "grandchild"):
        size += rng.randrange(2) * MIB
        layer = random_layer(rng, size + tail, is_child=parent is not None, sector_size=sector, name=name, parent=parent)
        images.append(layer.build())
        expected = layer.over(expected)
        parent = name
        assert read(kit, *images) == expected


@pytest.mark.parametrize("is_child", [False, True])
def test_each_state_means_what_the_table_says(kit: Any, is_child: bool) -> None:
    vhdx = NaiveVhdx(6 * MIB, {1: 1, 2: 2, 3: 3, 4: 6}, is_child=is_child)
    raw = vhdx.build()
    layer = layer_of(kit, raw)
    assert kinds(layer) == [(MIB, 3 * MIB, ExtentKind.ZERO), (4 * MIB, MIB, ExtentKind.DATA)]
    assert list(layer.window(0, layer.size))[-1].file_offset == vhdx.places[4]
    assert layer.describe()["blocks_by_state"] == {
        "not_present": 2, "undefined": 1, "zero": 1, "unmapped": 1, "fully_present": 1,
    }  # fmt: skip


def test_in_a_child_zero_unmapped_and_undefined_hide_the_parent(kit: Any) -> None:
    base = NaiveVhdx(4 * MIB, dict.fromkeys(range(4), 6), name="base")
    child = NaiveVhdx(4 * MIB, {1: 1, 2: 2, 3: 3}, is_child=True, parent="base", name="child")
    found = read(kit, base.build(), child.build())
    assert found[:MIB] == base.block(0)
    assert not any(found[MIB:])


def test_a_partial_block_names_the_sectors_of_set_bits_least_significant_first(kit: Any) -> None:
    sectors = {0: bytes(512), 1: bytes(512), 9: bytes(512), 2047: bytes(512)}
    vhdx = NaiveVhdx(2 * MIB, {0: 7}, sectors, is_child=True)
    raw = vhdx.build()
    at = vhdx.bitmaps[0]
    assert raw[at : at + 2] == b"\x03\x02"
    start = vhdx.places[0]
    assert list(layer_of(kit, raw).window(0, 2 * MIB)) == [
        Extent(0, 1024, ExtentKind.DATA, start),
        Extent(9 * 512, 512, ExtentKind.DATA, start + 9 * 512),
        Extent(2047 * 512, 512, ExtentKind.DATA, start + 2047 * 512),
    ]


def test_the_bitmap_of_a_fully_present_block_is_not_looked_at(kit: Any) -> None:
    vhdx = NaiveVhdx(2 * MIB, {0: 6, 1: 7}, {2048: bytes(512)}, is_child=True)
    raw = bytearray(vhdx.build())
    at = vhdx.bitmaps[0]
    for stale in (bytes(256), b"\xff" * 256, os.urandom(256)):
        raw[at : at + 256] = stale
        assert kinds(layer_of(kit, bytes(raw))) == [(0, MIB + 512, ExtentKind.DATA)]  # the two lie side by side


@pytest.mark.parametrize(
    ("sector", "block_size", "ratio"),
    [(512, MIB, 4096), (512, 32 * MIB, 128), (512, 256 * MIB, 16), (4096, MIB, 32768), (4096, 256 * MIB, 128)],
)
def test_blocks_on_both_sides_of_a_chunk_border_are_found(kit: Any, sector: int, block_size: int, ratio: int) -> None:
    """The BAT alone says it, so the blocks may lie in a file that has no content there."""
    vhdx = NaiveVhdx((2 * ratio + 2) * block_size, is_child=True, sector_size=sector, block_size=block_size)
    assert vhdx.ratio == ratio
    marks = {0: 2, ratio - 1: 2, ratio: 3, 2 * ratio - 1: 1, 2 * ratio: 2, 2 * ratio + 1: 2}
    vhdx.states = marks
    expected = [
        (0, 1), (ratio - 1, 2), (2 * ratio - 1, 3),
    ]  # fmt: skip
    found = layer_of(kit, vhdx.build())
    assert found.sector_size == sector
    rows = [row for window in found.windows() for row in window]
    covered = {(row.offset // block_size) + step for row in rows for step in range(row.length // block_size)}
    assert covered == {first + step for first, count in expected for step in range(count)}
    for block in marks:
        assert len(found.window(block * block_size, (block + 1) * block_size)) == 1


@pytest.mark.parametrize("sector", [512, 4096])
def test_partial_blocks_use_the_bitmap_of_their_own_chunk(kit: Any, sector: int) -> None:
    """Two chunks, 256 MiB blocks: bitmaps far from one another and in any order."""
    block_size = 256 * MIB
    vhdx = NaiveVhdx(0, is_child=True, sector_size=sector, block_size=block_size)
    vhdx.size = (vhdx.ratio + 1) * block_size
    first, last = vhdx.ratio - 1, vhdx.ratio
    front = bytearray(NaiveVhdx.build(vhdx))
    file = Sparse(bytes(front), 3 * block_size)
    width = vhdx.per_block // 8
    places = {first: 16 * MIB, last: 17 * MIB + block_size}
    bitmaps = {0: 6 * MIB, 1: 5 * MIB}
    for block, place in places.items():
        file.put(vhdx.entry_at(vhdx.index(block)), struct.pack("<Q", place | 7))
    for chunk, place in bitmaps.items():
        file.put(vhdx.entry_at(vhdx.bitmap_index(chunk)), struct.pack("<Q", place | 6))
    file.put(bitmaps[0] + (vhdx.ratio - 1) * width + width - 1, b"\x80")  # the last sector of the chunk
    file.put(bitmaps[1], b"\x01")  # the first sector of the next
    found = list(open_vhdx(file).window(0, vhdx.size))
    border = last * block_size
    assert found == [
        Extent(border - sector, sector, ExtentKind.DATA, places[first] + block_size - sector),
        Extent(border, sector, ExtentKind.DATA, places[last]),
    ]


class Sparse:
    """A ReadAt whose bytes are zeros but where something was put."""

    def __init__(self, front: bytes, size: int) -> None:
        self.name = "sparse.vhdx"
        self.size = size
        self.front = bytearray(front)
        self.read: list[tuple[int, int]] = []

    def put(self, at: int, data: bytes) -> None:
        self.front = self.front.ljust(at + len(data), b"\0")
        self.front[at : at + len(data)] = data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        assert 0 <= offset <= self.size - len(buffer)
        self.read.append((offset, len(buffer)))
        buffer[:] = bytes(self.front[offset : offset + len(buffer)]).ljust(len(buffer), b"\0")

    def close(self) -> None: ...


def test_neighbouring_bitmaps_are_read_at_once_and_announced(kit: Any) -> None:
    announced: list[tuple[int, int]] = []
    vhdx = NaiveVhdx(40 * MIB, dict.fromkeys(range(40), 7), {2048 * block: bytes(512) for block in range(40)}, is_child=True)
    file = Sparse(vhdx.build(), 64 * MIB)
    file.will_read = lambda offset, length: announced.append((offset, length))  # type: ignore[attr-defined]
    layer = open_vhdx(file)
    file.read.clear()
    assert len(layer.window(0, layer.size)) == 40
    assert announced == file.read == [(vhdx.bitmaps[0], 40 * 256)]


def test_bitmaps_with_a_short_gap_between_are_one_read_and_with_a_long_one_two(kit: Any) -> None:
    for other, reads in ((100, 1), (1000, 2)):
        vhdx = NaiveVhdx(1001 * MIB, {0: 7, other: 7}, {0: bytes(512), 2048 * other: bytes(512)}, is_child=True)
        file = Sparse(vhdx.build(), 64 * MIB)
        layer = open_vhdx(file)
        file.read.clear()
        assert [row.offset for row in layer.window(0, layer.size)] == [0, other * MIB]
        assert len(file.read) == reads


@pytest.mark.parametrize("size", [512, MIB - 512, MIB, MIB + 512, 3 * MIB - 512])
def test_the_last_block_is_clipped_to_the_disk(kit: Any, size: int) -> None:
    last = (size - 1) // MIB
    vhdx = NaiveVhdx(size, {last: 6})
    layer = layer_of(kit, vhdx.build())
    assert list(layer.window(0, 1 << 50)) == [Extent(last * MIB, size - last * MIB, ExtentKind.DATA, vhdx.places[last])]
    assert read(kit, vhdx.build()) == vhdx.over()


def test_a_last_block_that_was_stored_short_is_enough_but_no_shorter(kit: Any) -> None:
    vhdx = NaiveVhdx(MIB + 512, {1: 6})
    raw = vhdx.build()
    assert read(kit, raw[: vhdx.places[1] + 512]) == vhdx.over()
    with pytest.raises(ImageError, match=r"BAT\[1\] \(block 1\) is state 6.*end at or before"):
        layer_of(kit, raw[: vhdx.places[1] + 511])


def test_entries_past_the_need_are_not_looked_at(kit: Any) -> None:
    vhdx = NaiveVhdx(2 * MIB, {0: 6})
    raw = patched(vhdx.build(), (vhdx.entry_at(2), b"\xff" * 4096))
    assert read(kit, raw) == vhdx.over()


def test_offsets_in_entries_without_data_are_not_looked_at(kit: Any) -> None:
    """An unmapped block may keep its old place."""
    vhdx = NaiveVhdx(4 * MIB, {0: 6})
    changes = [(vhdx.entry_at(1), struct.pack("<Q", 5 << 20 | 3)), (vhdx.entry_at(2), struct.pack("<Q", 1 << 60 | 2))]
    assert kinds(layer_of(kit, patched(vhdx.build(), *changes))) == [
        (0, MIB, ExtentKind.DATA),
        (MIB, 2 * MIB, ExtentKind.ZERO),
    ]


@pytest.mark.parametrize("max_rows", [1, 2, 7, 100, MAX_ROWS])
@pytest.mark.slow
def test_windows_are_bounded_and_together_the_whole_map(kit: Any, max_rows: int) -> None:
    rng = random.Random(max_rows)
    vhdx = random_layer(rng, 9 * MIB + 512, is_child=True)
    vhdx.states[3] = 7
    vhdx.sectors |= {sector: bytes(512) for sector in range(3 * 2048, 4 * 2048, 2)}
    layer = layer_of(kit, vhdx.build())
    whole = list(layer.window(0, layer.size))
    pieces: list[Extent] = []
    at = 0
    for window in layer.windows(max_rows=max_rows):
        assert window.start == at < window.stop
        assert len(window) <= max_rows or window.stop - window.start <= 3 * MIB
        at = window.stop
        pieces += window
    assert at == layer.size
    assert [bytes_ for row in pieces for bytes_ in split(row)] == [bytes_ for row in whole for bytes_ in split(row)]


def split(row: Extent) -> list[tuple[int, ExtentKind, int]]:
    """By sector, so that it does not matter where a window cut the row."""
    is_data = row.kind is ExtentKind.DATA
    return [(row.offset + at, row.kind, row.file_offset + at if is_data else 0) for at in range(0, row.length, 512)]


def test_small_windows_say_the_same_as_large_ones(kit: Any) -> None:
    rng = random.Random(5)
    vhdx = random_layer(rng, 7 * MIB + 1536, is_child=True)
    layer = layer_of(kit, vhdx.build())
    whole = layer.window(0, layer.size)
    for _ in range(300):
        start = rng.randrange(layer.size)
        stop = min(layer.size, start + rng.choice((1, 511, 4096, MIB, 3 * MIB)))
        assert layer.window(start, stop) == whole.clip(start, stop)
