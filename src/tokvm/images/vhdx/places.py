"""Do two things lie at one place of a VHDX? Everything in it begins at a whole MiB and takes whole MiB.

    file   |front|log|BAT|metadata| block | block |bitmap| …      a byte of memory for each MiB of the file, touched where used

Asked batch by batch. A block that overlaps another, a bitmap or a structure is damage: a write to one changed the other.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tokvm.core.extents import Column
from tokvm.core.units import MiB
from tokvm.images.vhdx.structs import Structure

_SLOTS_AT_ONCE = 1 << 20


class Places:
    """The MiB of a file of `size` bytes (at most MAX_FILE), and which of them are taken."""

    def __init__(self, size: int, structures: Iterable[Structure], longest: int) -> None:
        self._taken = np.zeros(-(-size // MiB) + -(-longest // MiB), np.bool_)
        for _, at, end in structures:
            self._taken[at // MiB : -(-end // MiB)] = True

    def take(self, starts: Column, length: int) -> int | None:
        """Take `length` bytes from each of these file offsets, which lie in the file. The index of one that overlaps something
        taken before, of this batch or an earlier one; None: all were free."""
        count = -(-length // MiB)
        step = max(1, _SLOTS_AT_ONCE // count)
        for place in range(0, len(starts), step):
            wrong = self._take(starts[place : place + step] // MiB, count)
            if wrong is not None:
                return place + wrong
        return None

    def _take(self, first: Column, count: int) -> int | None:
        if bool((np.diff(first) < count).any()):
            order = np.argsort(first, kind="stable")
            close = np.diff(first[order]) < count
            if close.any():
                return int(order[int(np.argmax(close)) + 1])
        slots = first if count == 1 else (first[:, np.newaxis] + np.arange(count)).ravel()
        taken = self._taken[slots]
        if taken.any():
            return int(np.argmax(taken)) // count
        self._taken[slots] = True
        return None
