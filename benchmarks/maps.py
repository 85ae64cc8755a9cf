"""(e) What the maps of giants cost: open and walk over all of `windows()`, by growing size. No guest data is read."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

from benchmarks.giants import GIANTS, Giant, make_giant, shares
from benchmarks.measure import Result, Variant, alternate, apart, evict, need_room, worker
from benchmarks.report import MapLine, Section


def of_giants(folder: Path, *, quick: bool, repeats: int, tell: Callable[[str], None]) -> Iterator[Section]:
    """One section for each giant: cold walks, one share of its size after another."""
    sizes = list(shares(quick=quick))
    need_room(folder, int(max(giant.room for giant in GIANTS) * max(sizes)), "the tables of the giants")
    place = folder / "giants"
    for number, giant in enumerate(GIANTS):
        results = [_walk(number, giant, share, place, repeats=repeats, tell=tell) for share in sizes]
        line = MapLine(giant.label, tuple(result.variant for result in results))
        yield Section(f"Open and walk: {giant.label}", "", results, (line,))


def _walk(number: int, giant: Giant, share: Fraction, place: Path, *, repeats: int, tell: Callable[[str], None]) -> Result:
    place.mkdir()
    try:
        tell(f"{giant.label}: making {share} of it")
        path = apart(make_giant, number, place, share)
        variant = Variant(f"{giant.label}: {share}", (worker("walk", path),), evict(*place.iterdir()))
        (result,) = alternate([variant], repeats=repeats, payload=1, tell=tell)
        return result
    finally:
        shutil.rmtree(place)
