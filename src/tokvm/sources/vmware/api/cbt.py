"""Changed block tracking: which areas of a disk changed since a snapshot, or are in use at all.

    changeId    `52 de c0 d9 … 63/81`     the tracking's uuid / a sequence; the *snapshot's* disk bears the one that counts
    areas       QueryChangedDiskAreas(snapshot, deviceKey, startOffset, changeId) ─► startOffset, length, changedArea[]

A page tells about [startOffset, startOffset + length) and may have no area in it: the next one begins where it ends, not where
its last area ends (two tools stop at an empty page, and lose what changed behind it). To ask at the disk's end is a fault.
Another uuid means that tracking began anew (a crash of the host, a revert, a storage migration): nothing is known since then,
so everything is read. `*` asks for the areas in use; where the server cannot tell (FileFault), all are.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from tokvm.core.errors import SourceError
from tokvm.core.extents import Column
from tokvm.sources.vmware.api import faults
from tokvm.sources.vmware.api.client import Client

log = logging.getLogger(__name__)

IN_USE = "*"
MOST_AREAS = 1 << 22  # 64 MiB of them; a disk of 64 TiB in pieces of 16 MiB
_DOING = "asking which areas changed"


class Areas:
    """Byte ranges of a disk of `size` bytes, ascending and disjoint."""

    def __init__(self, size: int, offset: Column, length: Column) -> None:
        self.size = size
        self.offset = offset
        self.length = length

    @classmethod
    def of(cls, size: int, pairs: list[tuple[int, int]], *, where: str) -> Areas:
        """SourceError for areas that are outside of the disk, empty, or lie one over the other."""
        offset, length = np.array(pairs, np.int64).reshape(-1, 2).T
        order = np.argsort(offset, kind="stable")
        offset, length = offset[order], length[order]
        ends = offset + length
        if len(pairs) and (
            int(offset.min()) < 0 or int(length.min()) <= 0 or int(ends.max()) > size or bool(np.any(offset[1:] < ends[:-1]))
        ):
            raise SourceError("the server's areas overlap, or lie outside of the disk", where=where, fix="copy without CBT")
        return cls(size, offset, length)

    @property
    def digest(self) -> str:
        """Names these very areas: an order of reading that follows them is another one when they are others."""
        found = hashlib.blake2b(self.offset.tobytes(), digest_size=8)
        found.update(self.length.tobytes())
        return found.hexdigest()

    def ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of what is in [start, stop), clipped; the same as a file's `data_ranges`."""
        first = int(np.searchsorted(self.offset + self.length, start, side="right"))
        last = int(np.searchsorted(self.offset, stop, side="left"))
        for at, size in zip(self.offset[first:last].tolist(), self.length[first:last].tolist(), strict=True):
            begin, end = max(at, start), min(at + size, stop)
            yield begin, end - begin


def same_tracking(before: str, now: str) -> bool:
    """Do both ids belong to one tracking, so that areas between them can be told?"""
    return bool(before) and bool(now) and before.partition("/")[0] == now.partition("/")[0]


def changed(client: Client, vm: Any, snapshot: Any, number: int, size: int, since: str) -> Areas:
    """What changed between the change id `since` and the snapshot; for IN_USE what is in use. VsphereError as it says."""
    pairs: list[tuple[int, int]] = []
    start = 0
    while start < size:
        page = _page(client, vm, snapshot, number, start, since)
        pairs += [(int(one.start), int(one.length)) for one in page.changedArea or ()]
        after = int(page.startOffset) + int(page.length)
        if int(page.startOffset) != start or after <= start or len(pairs) > MOST_AREAS:
            raise SourceError(
                f"the server's page of areas at {start:#x} is about [{int(page.startOffset):#x}, {after:#x})",
                where=client.where,
                fix="copy without CBT",
            )
        start = after
    return Areas.of(size, pairs, where=client.where)


def _page(client: Client, vm: Any, snapshot: Any, number: int, start: int, since: str) -> Any:
    return client.ask(
        lambda: vm.QueryChangedDiskAreas(snapshot=snapshot, deviceKey=number, startOffset=start, changeId=since), _DOING
    )


def in_use(client: Client, vm: Any, snapshot: Any, number: int, size: int) -> Areas | None:
    """The areas in use; None when the server cannot tell, so that everything counts."""
    try:
        return changed(client, vm, snapshot, number, size, IN_USE)
    except faults.VsphereError as failed:
        log.info("%s; all of the disk is read", failed.what)
        return None
