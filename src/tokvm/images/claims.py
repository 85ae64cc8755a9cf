"""Do two blocks or grains lie at one place of the file? Asked batch by batch, with bounded memory.

    file   |..|####|..|####|....          unit: the bytes that each takes
    bin    |0   |1   |2   |3   |          start // unit; a bin holds the start of at most one

Two starts in one bin overlap. Starts in neighbouring bins overlap when the later one lies at a smaller place in its bin. While
all starts lie at the same place in their bins (what most writers do) one byte of memory a bin is enough to know.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tokvm.core.extents import Column
from tokvm.core.units import MiB

MAX_BINS = 64 * MiB  # bytes of memory at the most, touched where the file is used only


class Claims:
    """The starts that were claimed so far, of one file of `size` bytes. Behind MAX_BINS units (4 TiB of 64 KiB grains, 256 GiB
    of 4 KiB ones) only starts of the same batch are compared: the check's memory must not grow with a hostile size."""

    def __init__(self, size: int, unit: int) -> None:
        self._unit = unit
        self._bins = min(-(-size // unit) + 2, MAX_BINS)
        self._taken = np.zeros(self._bins, np.bool_)
        self._phase: int | None = None
        self._place: npt.NDArray[np.int32] | None = None  # of the start in its bin, less the phase, once they differ

    def take(self, starts: Column) -> int | None:
        """Claim these file offsets. The index of one that overlaps another, of this batch or an earlier one; None: all free."""
        if not len(starts):
            return None
        order = np.argsort(starts, kind="stable")
        ascending = starts[order]
        close = np.diff(ascending) < self._unit
        if close.any():
            return int(order[int(np.argmax(close)) + 1])
        bins, place = np.divmod(ascending, self._unit)
        known = bins < self._bins - 1
        bins, place, order = bins[known], place[known], order[known]
        if not len(bins):
            return None
        taken = self._taken[bins] | self._reaches(bins, place)
        if taken.any():
            return int(order[int(np.argmax(taken))])
        self._taken[bins] = True
        if self._place is not None:
            self._place[bins] = place - self._phase
        return None

    def _reaches(self, bins: Column, place: Column) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Does the one in the bin before reach into this one, or this one into the one behind?"""
        if self._phase is None:
            self._phase = int(place[0])
        if self._place is None and bool((place == self._phase).all()):
            return np.zeros(len(bins), np.bool_)
        if self._place is None:
            self._place = np.zeros(self._bins, np.int32)  # zeros cost no memory where nothing is written
        before, behind, shift = np.maximum(bins - 1, 0), bins + 1, place - self._phase
        from_before = self._taken[before] & (bins > 0) & (self._place[before] > shift)
        return from_before | (self._taken[behind] & (self._place[behind] < shift))
