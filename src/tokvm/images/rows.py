"""Rows of a map on their way from blocks to a window: runs in bitmaps, and where a window with too many rows is cut.

blocks   |  0  |  1  |  2  | …          a layer hands out the rows of a few blocks at a time
rows     |--|-----|-|--|------|…        until there are more than the window may have; then it ends at a block's line
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import numpy.typing as npt

from tokvm.core.extents import Column, ExtentMap

Bits = npt.NDArray[np.uint8]
Rows = tuple[Column, Column, Column, Column]  # offset, length, kind, file_offset


def bounded_map(start: int, stop: int, parts: Iterable[Rows], *, block_size: int, max_rows: int | None) -> ExtentMap:
    """The map of [start, stop) from rows in ascending order, those of one block always in one part. It ends earlier, at a
    block's end, as soon as it would have more than `max_rows` rows (but not before the first block that has any)."""
    taken: list[Rows] = []
    count = 0
    for part in parts:
        if max_rows is not None and count + len(part[0]) > max_rows:
            part, stop = _cut(part, stop, block_size, max_rows - count, is_first=not count)  # noqa: PLW2901
            taken.append(part)
            break
        taken.append(part)
        count += len(part[0])
    if not taken:
        return ExtentMap.empty(start, stop)
    return ExtentMap.build(start, stop, *(np.concatenate(column) for column in zip(*taken, strict=True)))


def _cut(part: Rows, stop: int, block_size: int, room: int, *, is_first: bool) -> tuple[Rows, int]:
    """The rows of the leading blocks that fit into `room` (of the first rows: at least one block), and where they end."""
    block = part[0] // block_size
    last = int(block[room]) if room > 0 else int(block[0])  # the first block that does not fit as a whole
    if is_first and last == int(block[0]):
        last += 1
    keep = int(np.searchsorted(block, last))
    return (part[0][:keep], part[1][:keep], part[2][:keep], part[3][:keep]), min(stop, last * block_size)


def bitmap_runs(
    bits: Bits, sectors: int, order: Literal["big", "little"] = "big"
) -> tuple[Column, Column, npt.NDArray[np.bool_]]:
    """(head, length, value) of the runs of equal bits, in sectors counted through all rows; no run crosses a row.

    bits: one row of packed bits per block. order: which bit of a byte is first, the most significant ("big") or the least.
    """
    flat = np.unpackbits(bits, axis=1, count=sectors, bitorder=order).view(np.bool_)
    change = np.empty_like(flat)
    change[:, 0] = True
    np.not_equal(flat[:, 1:], flat[:, :-1], out=change[:, 1:])
    head = np.flatnonzero(change)
    length = np.diff(head, append=flat.size)
    return head, length, flat.ravel()[head]
