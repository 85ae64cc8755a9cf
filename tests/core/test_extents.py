"""The extent algebra against a model that keeps one record per byte."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokvm.core.extents import Extent, ExtentKind, ExtentMap

SPACE = 48
ABSENT, ZERO, DATA = ExtentKind.ABSENT, ExtentKind.ZERO, ExtentKind.DATA


class Byte(NamedTuple):
    """What a map says about one byte of the guest disk; file offset and layer only for DATA."""

    kind: ExtentKind
    file_offset: int = 0
    layer: int = 0


Model = dict[int, Byte]


@st.composite
def extents(draw: st.DrawFn) -> list[Extent]:
    """Disjoint extents of SPACE in any order, touching ones and ones that go on in the file among them."""
    found, at, file_offset = [], 0, draw(st.integers(0, 1000))
    while at < SPACE:
        length = draw(st.integers(1, 12))
        kind = draw(st.sampled_from(list(ExtentKind)))
        if draw(st.booleans()):
            file_offset = draw(st.integers(0, 1000))
        if kind is not ABSENT:
            found.append(Extent(at, length, kind, file_offset, draw(st.integers(0, 1))))
        at, file_offset = at + length, file_offset + length
    return draw(st.permutations(found))


def model(found: list[Extent], start: int = 0, stop: int = SPACE) -> Model:
    told: Model = {}
    for extent in found:
        for at in range(max(extent.offset, start), min(extent.end, stop)):
            data = Byte(DATA, extent.file_offset + at - extent.offset, extent.layer)
            told[at] = data if extent.kind is DATA else Byte(extent.kind)
    return told


def told_by(found: ExtentMap) -> Model:
    """Every row checked for order on the way."""
    end = found.start
    for extent in found:
        assert extent.offset >= end
        assert extent.length > 0
        end = extent.end
    assert end <= found.stop
    return model(list(found), found.start, found.stop)


def assert_coalesced(found: ExtentMap) -> None:
    rows = list(found)
    for one, other in pairwise(rows):
        goes_on = one.end == other.offset and one.kind is other.kind
        if goes_on and one.kind is DATA:
            goes_on = one.layer == other.layer and one.file_offset + one.length == other.file_offset
        assert not goes_on


windows = st.tuples(st.integers(0, SPACE), st.integers(0, SPACE)).map(sorted)


@given(extents(), windows)
@pytest.mark.slow
def test_a_map_says_what_its_extents_say_within_its_window(found: list[Extent], window: list[int]) -> None:
    start, stop = window
    built = ExtentMap.of(start, stop, found)
    assert told_by(built) == model(found, start, stop)
    assert_coalesced(built)


@given(extents(), extents())
@pytest.mark.slow
def test_over_hides_what_is_below_and_lets_absent_through(upper: list[Extent], lower: list[Extent]) -> None:
    merged = ExtentMap.of(0, SPACE, upper).over(ExtentMap.of(0, SPACE, lower))
    assert told_by(merged) == model(lower) | model(upper)
    assert_coalesced(merged)


@given(extents(), extents(), extents())
@pytest.mark.slow
def test_over_is_associative(top: list[Extent], middle: list[Extent], bottom: list[Extent]) -> None:
    one, two, three = (ExtentMap.of(0, SPACE, found) for found in (top, middle, bottom))
    assert one.over(two).over(three) == one.over(two.over(three))


@given(extents())
@pytest.mark.slow
def test_over_itself_and_over_nothing_change_nothing(found: list[Extent]) -> None:
    whole = ExtentMap.of(0, SPACE, found)
    assert whole.over(whole) == whole
    assert whole.over(ExtentMap.empty(0, SPACE)) == whole
    assert ExtentMap.empty(0, SPACE).over(whole) == whole


@given(extents(), windows)
@pytest.mark.slow
def test_clip_is_the_part_inside(found: list[Extent], window: list[int]) -> None:
    start, stop = window
    clipped = ExtentMap.of(0, SPACE, found).clip(start, stop)
    assert told_by(clipped) == model(found, start, stop)
    assert (clipped.start, clipped.stop) == ((start, stop) if start < stop else (start, start))


@given(extents(), st.lists(st.integers(1, SPACE - 1), unique=True, max_size=5).map(sorted))
@pytest.mark.slow
def test_pieces_of_a_map_say_the_same_as_the_whole(found: list[Extent], cuts: list[int]) -> None:
    whole = ExtentMap.of(0, SPACE, found)
    pieces: Model = {}
    for start, stop in zip([0, *cuts], [*cuts, SPACE], strict=True):
        pieces |= told_by(whole.clip(start, stop))
    assert pieces == model(found)


@given(extents(), windows)
@pytest.mark.slow
def test_gaps_and_explicit_name_exactly_the_rest(found: list[Extent], window: list[int]) -> None:
    start, stop = window
    built = ExtentMap.of(start, stop, found)
    named = set(model(found, start, stop))
    offsets, lengths = built.gaps()
    gaps = {
        at for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True) for at in range(offset, offset + length)
    }
    assert gaps == set(range(start, stop)) - named
    whole = list(built.explicit())
    assert [at for extent in whole for at in range(extent.offset, extent.end)] == list(range(start, stop))
    assert {at for extent in whole if extent.kind is ABSENT for at in range(extent.offset, extent.end)} == gaps


@given(extents())
@pytest.mark.slow
def test_bytes_and_kinds_are_counted(found: list[Extent]) -> None:
    whole = ExtentMap.of(0, SPACE, found)
    told = model(found)
    for kind in ExtentKind:
        count = sum(1 for at in range(SPACE) if told.get(at, Byte(ABSENT)).kind is kind)
        assert whole.bytes_of(kind) == count
        if kind is not ABSENT:
            assert told_by(whole.only(kind)) == {at: byte for at, byte in told.items() if byte.kind is kind}


@given(extents())
@pytest.mark.slow
def test_with_layer_changes_the_layer_alone(found: list[Extent]) -> None:
    moved = ExtentMap.of(0, SPACE, found).with_layer(7)
    assert {at: byte._replace(layer=0) for at, byte in told_by(moved).items()} == {
        at: byte._replace(layer=0) for at, byte in model(found).items()
    }
    assert all(extent.layer == 7 for extent in moved if extent.kind is DATA)


def test_neighbours_join_only_when_guest_and_file_go_on() -> None:
    def rows(*found: Extent) -> int:
        return len(ExtentMap.of(0, 100, found))

    assert rows(Extent(0, 10, DATA, 50), Extent(10, 10, DATA, 60)) == 1
    assert rows(Extent(0, 10, DATA, 50), Extent(10, 10, DATA, 61)) == 2
    assert rows(Extent(0, 10, DATA, 50, 0), Extent(10, 10, DATA, 60, 1)) == 2
    assert rows(Extent(0, 10, DATA, 50), Extent(11, 10, DATA, 61)) == 2
    assert rows(Extent(0, 10, ZERO, 3), Extent(10, 10, ZERO, 90)) == 1
    assert rows(Extent(0, 10, ZERO), Extent(10, 10, DATA, 10)) == 2


@pytest.mark.parametrize("second", [Extent(0, 10, ZERO), Extent(9, 1, DATA), Extent(5, 2, DATA), Extent(0, 100, ZERO)])
def test_two_statements_about_one_byte_are_refused(second: Extent) -> None:
    with pytest.raises(ValueError, match="overlap"):
        ExtentMap.of(0, 100, [Extent(0, 10, DATA), second])


def test_maps_of_different_windows_do_not_merge() -> None:
    with pytest.raises(ValueError, match="different windows"):
        ExtentMap.empty(0, 10).over(ExtentMap.empty(0, 11))


def test_scalars_are_spread_and_columns_may_be_anything_like_arrays() -> None:
    built = ExtentMap.build(0, 1 << 50, [0, 1 << 40], 512, int(DATA), np.array([7, 9], np.uint32))
    assert list(built) == [Extent(0, 512, DATA, 7), Extent(1 << 40, 512, DATA, 9)]


def test_building_leaves_the_callers_columns_alone() -> None:
    offset, length = np.array([512, 0], np.int64), np.array([512, 512], np.int64)
    ExtentMap.build(100, 600, offset, length, int(DATA), [0, 0])
    assert offset.tolist() == [512, 0]
    assert length.tolist() == [512, 512]


def test_an_empty_map() -> None:
    empty = ExtentMap.empty(5, 10)
    assert len(empty) == 0
    assert list(empty.explicit()) == [Extent(5, 5, ABSENT)]
    assert empty.bytes_of(ABSENT) == 5
    assert list(empty.clip(20, 30)) == []
    assert empty != 5
