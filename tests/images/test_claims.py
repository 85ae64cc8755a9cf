"""Overlapping blocks are found, whatever batch they come in, against a plain search."""

from __future__ import annotations

import itertools
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tokvm.images import claims
from tokvm.images.claims import Claims


def overlaps(starts: list[int], unit: int) -> bool:
    ordered = sorted(starts)
    return any(b - a < unit for a, b in itertools.pairwise(ordered))


@settings(max_examples=300, deadline=None)
@given(
    unit=st.sampled_from([1, 2, 8, 128]),
    batches=st.lists(st.lists(st.integers(0, 2000), max_size=6), max_size=6),
    aligned=st.booleans(),
)
def test_an_overlap_is_found_in_the_batch_that_brings_it(unit: int, batches: list[list[int]], aligned: bool) -> None:
    known = Claims(2000 + unit, unit)
    so_far: list[int] = []
    for batch in batches:
        starts = [start // unit * unit + 3 % unit for start in batch] if aligned else batch
        found = known.take(np.array(starts, np.int64))
        assert (found is not None) == overlaps(so_far + starts, unit)
        if found is not None:
            others = so_far + starts[:found] + starts[found + 1 :]
            assert any(abs(starts[found] - other) < unit for other in others)
            return
        so_far += starts


def test_many_batches_of_neighbours_are_no_overlap() -> None:
    rng = random.Random(4)
    places = [place * 4096 + 512 for place in rng.sample(range(20_000), 10_000)]
    known = Claims(20_001 * 4096, 4096)
    for at in range(0, len(places), 777):
        assert known.take(np.array(places[at : at + 777], np.int64)) is None
    assert known.take(np.array([places[5000] + 4095], np.int64)) == 0


def test_behind_the_bound_only_a_batch_is_compared() -> None:
    far = claims.MAX_BINS + 10
    known = Claims(1 << 62, 1)
    assert known.take(np.array([far, far + 1], np.int64)) is None
    assert known.take(np.array([far], np.int64)) is None  # said in the docstring: not remembered
    assert known.take(np.array([far, far], np.int64)) == 1
