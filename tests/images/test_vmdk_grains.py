"""What the VMDK writers share: cutting content into grains, and places for them."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.images.vmdk_cases import random_case, reader_of

from tokvm.testing.vmdk_grains import Kind, Places, nothing_below, per_extent, pieces_of, spans_of

SECTOR = 512


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), sectors=st.integers(1, 200), grain=st.sampled_from([1, 2, 8, 16, 128]),
    longest=st.integers(2, 40),
)  # fmt: skip
def test_spans_say_what_was_written(seed: int, sectors: int, grain: int, longest: int) -> None:
    size, grain_size = sectors * SECTOR, grain * SECTOR
    case = random_case(seed, size, longest=longest, trims=True)
    parent = bytes(range(256)) * (2 * sectors)
    content, kinds = bytearray(parent), ["absent"] * -(-size // grain_size)
    content.extend(bytes(grain_size))
    end = 0
    pieces = pieces_of(size, case.runs, case.zeros, case.unmapped)
    for span in spans_of(pieces, size, grain_size, reader_of(parent)):
        assert span.first >= end
        end = span.first + span.grains
        start, length = span.first * grain_size, span.grains * grain_size
        word = "data" if span.kind is Kind.DATA else "zero"
        assert word == "zero" or len(span.data) == length
        kinds[span.first : end] = [word] * span.grains
        content[start : start + length] = span.data if word == "data" else bytes(length)
    assert bytes(content[:size]) == case.over(parent)
    assert kinds == case.kinds(grain_size, explicit_zeros=True)


def test_abutting_zeros_make_a_zero_grain() -> None:
    spans = list(spans_of(pieces_of(8192, [], [(0, 512), (512, 3584)]), 8192, 4096, None))
    assert [(span.kind, span.first, span.grains) for span in spans] == [(Kind.ZERO, 0, 1)]


def test_a_partly_written_grain_without_its_parent_is_refused() -> None:
    with pytest.raises(ValueError, match="grain 1 is written only in part"):
        list(spans_of(pieces_of(8192, [(4096, bytes(512))]), 8192, 4096, None))


def test_a_parent_that_gives_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="gave 1 of 3584 bytes at 0x200"):
        list(spans_of(pieces_of(8192, [(0, bytes(512))]), 8192, 4096, lambda _offset, _length: b"x"))


def test_the_last_short_grain_is_whole_without_a_parent() -> None:
    (span,) = spans_of(pieces_of(4608, [(4096, b"a" * 512)]), 4608, 4096, None)
    assert (span.first, bytes(span.data)) == (1, b"a" * 512 + bytes(3584))


@pytest.mark.parametrize(
    ("size", "runs", "zeros", "message"),
    [
        (0, [], [], "not made of whole sectors"),
        (1000, [], [], "not made of whole sectors"),
        (4096, [(0, bytes(100))], [], "not made of whole sectors"),
        (4096, [(100, bytes(512))], [], "not made of whole sectors"),
        (4096, [(4096, bytes(512))], [], "behind the disk's end"),
        (4096, [(512, bytes(512)), (0, bytes(512))], [], "out of order"),
        (4096, [(0, bytes(1024))], [(512, 512)], "out of order"),
        (4096, [], [(512, -512)], "out of order"),
    ],
)
def test_content_that_makes_no_sense_is_refused(
    size: int, runs: list[tuple[int, bytes]], zeros: list[tuple[int, int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        list(spans_of(pieces_of(size, runs, zeros), size, 4096, nothing_below))


def test_extents_get_their_pieces_and_the_empty_ones_get_none() -> None:
    data = bytes(range(256)) * 8
    found = {
        number: [(piece.offset, bytes(piece.data) if piece.kind is Kind.DATA else piece.length) for piece in pieces]
        for number, pieces in per_extent(pieces_of(8192, [(512, data)], [(6144, 1024)]), [1024, 1536, 2048, 6144, 8192])
    }
    assert found == {0: [(512, data[:512])], 1: [(0, data[512:1024])], 2: [(0, data[1024:1536])], 3: [(0, data[1536:])],
                     4: [(0, 1024)]}  # fmt: skip


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_places_are_disjoint_and_end_where_they_end(seed: int | None) -> None:
    places = Places(100, 8, limit=10**6, seed=seed)
    found: list[int] = []
    for count in (1, 5, 300, 2, 4000):
        for place, taken in places.take(count):
            found.extend(place + 8 * index for index in range(taken))
    room = places.reserve(32)
    found.extend(place for place, _ in islice(places.take(1), 1))
    assert len(found) == len(set(found)) == 4309
    assert min(found) >= 100
    assert all((place - 100) % 8 == 0 for place in found[:-1])
    assert not any(room - 8 < place < room + 32 for place in found)
    assert places.end == max(*(place + 8 for place in found), room + 32)
    assert (found == sorted(found)) == (seed is None)


@pytest.mark.parametrize("seed", [None, 3])
def test_every_place_up_to_the_limit_can_be_used_and_no_more(seed: int | None) -> None:
    places = Places(3, 1, limit=103, seed=seed)
    assert sum(taken for _, taken in places.take(100)) == 100
    assert places.end == 103
    with pytest.raises(ValueError, match="cannot place"):
        list(places.take(1))


def test_the_writers_start_fast(tmp_path: Path) -> None:
    names = "vmdk_writer, vmdk_flat_writer, vmdk_stream_writer, cowd_writer, sesparse_writer, sesparse_giant"
    program = f"import sys; from tokvm.testing import {names}; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path).returncode == 0
