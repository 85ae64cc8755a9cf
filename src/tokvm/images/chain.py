"""Layers stacked on one another: linkage checked, then merged into one map.

    top      layers[-1]   what it calls DATA or ZERO hides everything below
    …                     ABSENT: ask the layer below
    lowest   layers[0]    a base: ABSENT is zeros; or a delta (`Chain.partial`): ABSENT is what the target has already

A child may be larger than its parent (a disk that grew after the snapshot): beyond the parent's end its ABSENT ranges are
ZERO. Nothing that an image says about where its parent lies is ever followed: the chain is what the caller lists.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise

from tokvm.core.errors import ImageError
from tokvm.core.extents import Extent, ExtentKind, ExtentMap
from tokvm.core.text import printable
from tokvm.images.base import MAX_ROWS, UNKNOWN_PARENT, Layer, ReadAt, file_name
from tokvm.images.raw import RAW_IDENTITY, RawLayer

log = logging.getLogger(__name__)

MAX_DEPTH = 64  # XenServer stops at 30, ESX at 32, Hyper-V at about 50
_LIST_ALL = "list every layer of the disk once, base first, each child right after its parent"


class Chain:
    """Layers, base first, whose linkage was checked; made by `Chain.open`. Rows of its maps carry the layer's index."""

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        self.layers = layers

    @classmethod
    def open(cls, layers: Sequence[Layer], *, force_linkage: bool = False) -> Chain:
        """Check that each layer was made over the one before it.

        `force_linkage`: a child whose parent id does not match, or that is smaller than its parent, is logged instead of
        refused (an operator who knows better, after a tool changed an id). Loops and misplaced bases stay refused.
        """
        if not 1 <= len(layers) <= MAX_DEPTH:
            where = layers[-1].name if layers else "the chain"
            raise ImageError(f"{len(layers)} layers are given; allowed: 1 to {MAX_DEPTH}", where=where, fix=_LIST_ALL)
        _check_unique(layers)
        for parent, child in pairwise(layers):
            _check_order(parent, child)
        _check_loop(layers)
        for parent, child in pairwise(layers):
            for problem in _linkage_problems(parent, child):
                if not force_linkage:
                    raise problem
                log.warning("%s: %s; going on because linkage is forced", child.name, problem.what)
        return cls(tuple(layers))

    @staticmethod
    def raw(file: ReadAt) -> Layer:
        """A raw file as a base: `Chain.open([Chain.raw(file), child])`."""
        return RawLayer(file)

    @property
    def size(self) -> int:
        """Virtual size of the top layer, bytes."""
        return self.layers[-1].size

    @property
    def identity(self) -> str:
        return self.layers[-1].identity

    @property
    def parent_identity(self) -> str | None:
        """What the lowest layer was made over; None when it is a base."""
        return self.layers[0].parent_identity

    @property
    def partial(self) -> bool:
        """True for a chain of deltas without its base: ABSENT means unchanged, not zeros."""
        return self.parent_identity is not None

    @property
    def name(self) -> str:
        return self.layers[-1].name

    def windows(self) -> Iterator[ExtentMap]:
        """The merged map of the whole disk, as ascending windows of bounded row count."""
        bound = max(1, MAX_ROWS // len(self.layers))
        sources = [_Cursor(layer, bound) for layer in self.layers]
        start = 0
        while start < self.size:
            stop = min([self.size, *(source.stop(start) for source in sources)])
            yield self._merge(start, stop, [source.clip(start, stop) for source in sources])
            start = stop

    def window(self, start: int, stop: int) -> ExtentMap:
        """The merged map of [start, stop), clipped to the disk. Rows are as many as the range has: ask for small ranges."""
        stop = min(stop, self.size)
        if start >= stop:
            return ExtentMap.empty(start, start)
        return self._merge(start, stop, [layer.window(start, min(stop, layer.size)) for layer in self.layers])

    def _merge(self, start: int, stop: int, maps: Sequence[ExtentMap]) -> ExtentMap:
        """Merge one window of every layer; what a layer does not reach is not in its map."""
        merged = ExtentMap.empty(start, stop)
        end = 0  # of the parent, bytes
        for index, (layer, found) in enumerate(zip(self.layers, maps, strict=True)):
            if index:
                merged = _beyond_is_zero(merged, end)
            merged = _within(found.with_layer(index), start, stop).over(merged)
            end = layer.size
        return merged


class _Cursor:
    """A layer's own windows, read one after the other and handed out in smaller pieces."""

    def __init__(self, layer: Layer, max_rows: int) -> None:
        self._windows = layer.windows(max_rows=max_rows)
        self._size = layer.size
        self._now = ExtentMap.empty(0, 0)

    def stop(self, start: int) -> int:
        """How far the window that holds `start` goes; behind the layer's end there is nothing to wait for."""
        while self._now.stop <= start < self._size:
            self._now = next(self._windows)
        return self._now.stop if start < self._size else _FAR

    def clip(self, start: int, stop: int) -> ExtentMap:
        return self._now.clip(start, stop)


_FAR = 1 << 62


def _within(found: ExtentMap, start: int, stop: int) -> ExtentMap:
    """The same rows in the window [start, stop), which is not smaller than theirs."""
    return ExtentMap(start, stop, found.offset, found.length, found.kind, found.file_offset, found.layer)


def _beyond_is_zero(lower: ExtentMap, end: int) -> ExtentMap:
    """What a child finds below it: the merged map up to its parent's end, zeros from there on."""
    if end >= lower.stop:
        return lower
    if end <= lower.start:
        return ExtentMap.of(lower.start, lower.stop, [Extent(lower.start, lower.stop - lower.start, ExtentKind.ZERO)])
    beyond = ExtentMap.of(lower.start, lower.stop, [Extent(end, lower.stop - end, ExtentKind.ZERO)])
    return beyond.over(lower)


def _check_unique(layers: Sequence[Layer]) -> None:
    seen: dict[object, Layer] = {}
    for layer in layers:
        ids = layer.linkage.ids if layer.linkage.unique else ()
        for key in (*ids, *getattr(layer.file, "inodes", ())):
            if key in seen:
                what = f"it is the same layer as {printable(seen[key].name)} (id {layer.identity or 'none'})"
                raise ImageError(what, where=layer.name, fix=_LIST_ALL)
        for key in (*ids, *getattr(layer.file, "inodes", ())):
            seen[key] = layer


def _check_loop(layers: Sequence[Layer]) -> None:
    """The lowest layer's parent must not be in the chain."""
    lowest = layers[0]
    for layer in layers:
        common = set(lowest.linkage.parents) & set(layer.linkage.ids) if layer.linkage.unique else set()
        if common:
            what = f"the chain is a loop: its lowest layer names {common.pop()} as parent, which is {printable(layer.name)}"
            raise ImageError(what, where=lowest.name, fix="the ids were tampered with or a file was copied over another")


def _check_order(parent: Layer, child: Layer) -> None:
    if not child.linkage.parents:
        what = f"it is a base without a parent, but it is listed above {printable(parent.name)}"
        raise ImageError(what, where=child.name, fix=_LIST_ALL)


def _linkage_problems(parent: Layer, child: Layer) -> Iterator[ImageError]:
    forced = "--force-linkage if you know that they belong together"
    names = child.linkage.parents
    parent_name = printable(parent.name)
    found = f"{parent_name} is {parent.format} {parent.identity or 'without an id'}"
    raw_expected = RAW_IDENTITY in names
    if UNKNOWN_PARENT in names:
        yield ImageError(
            f"it does not say over which disk it was made, and {found}",
            where=child.name,
            fix=f"give the descriptor that belongs to it instead; {forced}",
        )
    elif not set(names) & set(parent.linkage.ids) or raw_expected != (parent.format == "raw"):
        expected = "a raw file (its parent id is null)" if raw_expected else f"parent {' or '.join(names)}"
        yield ImageError(
            f"it was made over {expected}, but {found}",
            where=child.name,
            fix=f"{_LIST_ALL}; {forced}",
        )
    elif not child.linkage.knows_file(parent.name):
        wanted = printable(child.linkage.parent_file)
        yield ImageError(
            f"it was made over the file {wanted}, but {file_name(parent_name)} is listed before it "
            f"(both are {parent.identity}: such an id does not tell the layers of a running VM apart)",
            where=child.name,
            fix=f"{_LIST_ALL}; {forced}, for example because files were renamed",
        )
    if child.size < parent.size:
        yield ImageError(
            f"its size {child.size} is smaller than {parent.size} of its parent {parent_name}; a child never shrinks",
            where=child.name,
            fix=f"{_LIST_ALL}; --force-linkage if the disk was really made smaller",
        )
    if child.sector_size != parent.sector_size and parent.format != "raw":
        yield ImageError(
            f"its logical sectors have {child.sector_size} bytes, those of its parent {parent_name} {parent.sector_size}",
            where=child.name,
            fix=f"{_LIST_ALL}; {forced}",
        )
