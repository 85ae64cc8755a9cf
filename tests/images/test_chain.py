"""Layers over one another: linkage, sizes, and the merged map against a naive byte model."""

from __future__ import annotations

import logging
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokvm.core.errors import ImageError
from tokvm.core.extents import Extent, ExtentKind
from tokvm.images import base as images_base
from tokvm.images import chain as chain_module
from tokvm.images.chain import MAX_DEPTH, Chain
from tokvm.images.open import open_image
from tokvm.images.reader import ChainReader

SECTOR = 512


def data(byte: int) -> bytes:
    return bytes([byte]) * SECTOR


def stack(kit: Any, rng: random.Random, sizes: list[int], block_size: int = 4096) -> tuple[list[bytes], bytes]:
    """(images base first, content) of random layers of these sizes."""
    images, content = [], b""
    for index, size in enumerate(sizes):
        vhd = kit.Vhd(size, kind=4 if index else 3, block_size=block_size, name=f"l{index}", seed=rng.randrange(1 << 30))
        vhd.parent = f"l{index - 1}" if index else None
        vhd.sectors = kit.random_sectors(rng, size, 5)
        images.append(vhd.build())
        content = vhd.over(content)
    return images, content


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), depth=st.integers(1, 6), grow=st.booleans())
@pytest.mark.slow
def test_a_chain_reads_like_its_layers_applied_one_by_one(kit: Any, seed: int, depth: int, grow: bool) -> None:
    rng = random.Random(seed)
    sizes = [rng.randrange(1, 60) * SECTOR for _ in range(depth)]
    images, content = stack(kit, rng, sorted(sizes) if grow else [max(sizes)] * depth)
    assert kit.content(ChainReader(kit.chain(*images))) == content


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), depth=st.integers(2, 5))
@pytest.mark.slow
def test_a_delta_chain_changes_a_copy_of_its_base(kit: Any, seed: int, depth: int) -> None:
    """The lowest layer left out, its content on the target: what the deltas name makes the whole disk of it."""
    rng = random.Random(seed)
    images, content = stack(kit, rng, sorted(rng.randrange(1, 60) * SECTOR for _ in range(depth)))
    base = kit.content(ChainReader(kit.chain(images[0])))
    deltas = kit.chain(*images[1:])
    assert deltas.partial
    assert kit.content(ChainReader(deltas), under=base) == content


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_windows_are_cut_where_any_layer_has_many_rows(kit: Any, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(chain_module, "MAX_ROWS", rows)
    images, content = stack(kit, random.Random(rows), [30 * SECTOR, 40 * SECTOR, 57 * SECTOR])
    chain = kit.chain(*images)
    windows = list(chain.windows())
    assert len(windows) > 3
    assert [window.start for window in windows] == [0, *(window.stop for window in windows[:-1])]
    assert windows[-1].stop == chain.size
    assert kit.content(ChainReader(chain)) == content
    whole = [extent for extent in chain.window(0, chain.size) if extent.kind is ExtentKind.DATA]
    assert sum(window.bytes_of(ExtentKind.DATA) for window in windows) == sum(extent.length for extent in whole)


def test_window_bounds_apply_to_disks_larger_than_one_window(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    size = images_base.WINDOW + 4096
    vhd = kit.Vhd(size, block_size=1 << 21, sectors={0: data(1), size // SECTOR - 1: data(2)})
    windows = list(kit.chain(vhd.build()).windows())
    assert [(window.start, window.stop) for window in windows] == [(0, images_base.WINDOW), (images_base.WINDOW, size)]


def test_rows_carry_the_index_of_their_layer(kit: Any) -> None:
    base = kit.Vhd(8192, block_size=4096, name="b", sectors={0: data(1), 1: data(1)})
    child = kit.Vhd(8192, kind=4, block_size=4096, name="c", parent="b", sectors={1: data(2)})
    rows = list(kit.chain(base.build(), child.build()).window(0, 1024))
    assert [(row.offset, row.layer) for row in rows] == [(0, 0), (512, 1)]


def test_a_child_hides_its_parent_even_with_zero_bytes(kit: Any) -> None:
    base = kit.Vhd(4096, block_size=4096, name="b", sectors={0: data(1)})
    child = kit.Vhd(4096, kind=4, block_size=4096, name="c", parent="b", sectors={0: bytes(512)})
    assert kit.content(ChainReader(kit.chain(base.build(), child.build()))) == bytes(4096)


def test_beyond_a_smaller_parent_a_child_is_zero_not_absent(kit: Any) -> None:
    lower = kit.Vhd(4096, kind=4, block_size=4096, name="b", parent="gone", sectors={0: data(1)})
    upper = kit.Vhd(12288, kind=4, block_size=4096, name="c", parent="b", sectors={16: data(2)})
    found = list(kit.chain(lower.build(), upper.build()).window(0, 12288))
    assert [(extent.offset, extent.end, extent.kind) for extent in found] == [
        (0, 512, ExtentKind.DATA),
        (4096, 8192, ExtentKind.ZERO),
        (8192, 8704, ExtentKind.DATA),
        (8704, 12288, ExtentKind.ZERO),
    ]


def test_a_raw_file_is_a_base_for_a_child_with_a_null_parent_id(kit: Any) -> None:
    raw = random.Random(1).randbytes(8192)
    child = kit.Vhd(8192, kind=4, block_size=4096, parent=None, sectors={3: data(4)})
    chain = Chain.open([Chain.raw(kit.File(raw)), open_image(kit.File(child.build()))])
    assert kit.content(ChainReader(chain)) == child.over(raw)
    assert kit.content(ChainReader(Chain.open([Chain.raw(kit.File(raw))]))) == raw


def test_identity_size_and_partial_are_those_of_the_ends(kit: Any) -> None:
    base = kit.Vhd(4096, block_size=4096, name="b")
    child = kit.Vhd(8192, kind=4, block_size=4096, name="c", parent="b")
    chain = kit.chain(base.build(), child.build())
    assert (chain.size, chain.identity, chain.partial) == (8192, str(child.id), False)
    assert kit.chain(child.build()).parent_identity == str(base.id)


def mismatch(kit: Any) -> list[bytes]:
    base = kit.Vhd(4096, block_size=4096, name="b")
    child = kit.Vhd(4096, kind=4, block_size=4096, name="c", parent="other")
    return [base.build(), child.build()]


def shrunk(kit: Any) -> list[bytes]:
    base = kit.Vhd(8192, block_size=4096, name="b", sectors={0: data(1), 12: data(9)})
    child = kit.Vhd(4096, kind=4, block_size=4096, name="c", parent="b", sectors={1: data(2)})
    return [base.build(), child.build()]


def wrong_order(kit: Any) -> list[bytes]:
    base = kit.Vhd(4096, block_size=4096, name="b")
    child = kit.Vhd(4096, kind=4, block_size=4096, name="c", parent="b")
    return [child.build(), base.build()]


def skipped(kit: Any) -> list[bytes]:
    images, _ = stack(kit, random.Random(2), [4096] * 3)
    return [images[0], images[2]]


def twice(kit: Any) -> list[bytes]:
    images, _ = stack(kit, random.Random(2), [4096] * 2)
    return [images[0], images[1], images[1]]


def loop(kit: Any) -> list[bytes]:
    lower = kit.Vhd(4096, kind=4, block_size=4096, name="x", parent="y")
    upper = kit.Vhd(4096, kind=4, block_size=4096, name="y", parent="x")
    return [lower.build(), upper.build()]


def raw_wanted(kit: Any) -> list[bytes]:
    base = kit.Vhd(4096, block_size=4096, name="b")
    return [base.build(), kit.Vhd(4096, kind=4, block_size=4096, name="c", parent=None).build()]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (mismatch, "made over parent"),
        (shrunk, "never shrinks"),
        (wrong_order, "a base without a parent"),
        (skipped, "made over parent"),
        (twice, "the same layer"),
        (loop, "is a loop"),
        (raw_wanted, "made over a raw file"),
        (lambda _: [], "0 layers"),
        (lambda kit: stack(kit, random.Random(3), [4096] * (MAX_DEPTH + 1))[0], "65 layers"),
    ],
)
def test_a_chain_that_does_not_fit_is_refused(kit: Any, images: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        kit.chain(*images(kit))
    assert caught.value.fix
    assert caught.value.where


def test_both_ids_are_named_when_a_parent_does_not_fit(kit: Any) -> None:
    with pytest.raises(ImageError) as caught:
        kit.chain(*mismatch(kit))
    for name in ("other", "b"):
        assert str(kit.Vhd(4096, name=name).id) in caught.value.what


@pytest.mark.parametrize("images", [mismatch, shrunk])
def test_forced_linkage_is_logged(kit: Any, images: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        chain = kit.chain(*images(kit), force_linkage=True)
    assert "linkage is forced" in caplog.text
    assert chain.size == 4096


@pytest.mark.parametrize("images", [wrong_order, twice, loop])
def test_nonsense_cannot_be_forced(kit: Any, images: Any) -> None:
    with pytest.raises(ImageError):
        kit.chain(*images(kit), force_linkage=True)


def test_what_a_forced_smaller_child_cut_off_does_not_come_back(kit: Any) -> None:
    images = shrunk(kit)
    grown = kit.Vhd(8192, kind=4, block_size=4096, name="d", parent="c", sectors={2: data(3)})
    content = kit.content(ChainReader(kit.chain(*images, grown.build(), force_linkage=True)))
    assert content == data(1) + data(2) + data(3) + bytes(8192 - 3 * 512)


def test_the_deepest_chain_is_read(kit: Any) -> None:
    images, content = stack(kit, random.Random(4), [40 * SECTOR] * MAX_DEPTH)
    assert kit.content(ChainReader(kit.chain(*images))) == content


def test_extents_of_a_window_are_clipped_to_it(kit: Any) -> None:
    vhd = kit.Vhd(8192, block_size=8192, sectors=dict.fromkeys(range(16), data(1)))
    chain = kit.chain(vhd.build())
    start = vhd.block_starts[0] + 512
    assert list(chain.window(1000, 2000)) == [Extent(1000, 1000, ExtentKind.DATA, start + 1000)]
    assert list(chain.window(9000, 9999)) == []
