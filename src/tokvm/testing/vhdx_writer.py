"""Writes VHDXs: Hyper-V's disks for the lab, and files for tests and measurements.

    1 MiB | log | metadata | BAT | block or bitmap block … | the last block, whole as well

Needs a file that can be sought in. Holes are left where nothing is written, so a disk of 64 TiB takes a moment. Blocks come as
the runs come; with a seed, regions and blocks are shuffled and have gaps between.
A block that runs touch is FULLY_PRESENT; in a differencing disk only if they cover all of it, else it is PARTIALLY_PRESENT with
exactly their bits. Blocks of `zeros`, `unmapped` and `undefined` have no bytes in the file. `states` overrules all of this.
Imports no numpy: it runs inside short-lived commands.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import BinaryIO, Literal
from uuid import UUID, uuid5

from tokvm.core.units import MiB, round_up
from tokvm.testing.vhd_writer import cut_at_blocks
from tokvm.testing.vhdx_structs import (
    BITMAP_PRESENT,
    BITMAP_SIZE,
    HEADER_OFFSETS,
    METADATA_SIZE,
    NULL_GUID,
    REGION_TABLE_OFFSETS,
    BlockState,
    Bytes,
    Geometry,
    Header,
    bat_entry,
    disk_items,
    file_identifier,
    metadata_region,
    region_table,
)

Run = tuple[int, Bytes]
Range = tuple[int, int]
Kind = Literal["fixed", "dynamic", "differencing"]
Pieces = list[tuple[int, memoryview]]

BLOCK_SIZE = {"fixed": 32 * MiB, "dynamic": 32 * MiB, "differencing": 2 * MiB}  # what Windows takes
VIRTUAL_DISK_ID = UUID(int=0x7664)
_PRESENT = (BlockState.FULLY_PRESENT, BlockState.PARTIALLY_PRESENT)
_STALE = b"\xa5"  # bits where none count
_GARBAGE = b"\xee"  # bytes where none count


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things came to lie in the file, bytes. blocks: block -> file offset; bitmaps: chunk -> file offset."""

    geometry: Geometry
    log: Range
    metadata: Range
    bat: Range
    blocks: Mapping[int, int]
    bitmaps: Mapping[int, int]
    file_size: int

    def entry_offset(self, block: int) -> int:
        """Of the block's BAT entry in the file."""
        return self.bat[0] + 8 * self.geometry.payload_entry(block)


def write_vhdx(
    out: BinaryIO | str | Path,
    *,
    size: int,
    kind: Kind,
    data_write_guid: UUID,
    runs: Iterable[Run] = (),
    states: Mapping[int, int] | None = None,
    zeros: Iterable[Range] = (),
    unmapped: Iterable[Range] = (),
    undefined: Iterable[Range] = (),
    block_size: int | None = None,
    logical_sector: int = 512,
    physical_sector: int = 4096,
    file_write_guid: UUID | None = None,
    virtual_disk_id: UUID = VIRTUAL_DISK_ID,
    parent_linkage: UUID | None = None,
    locator: Mapping[str, str] | None = None,
    creator: str = "tokvm",
    sequences: tuple[int, int] = (6, 7),
    leave_allocated: bool | None = None,
    log_length: int = MiB,
    seed: int | None = None,
    stale_bitmaps: bool = False,
    garbage: bool = False,
) -> Layout:
    """Write a disk of `size` bytes that holds `runs`: (guest offset, data), ascending, disjoint, whole logical sectors.

    Without `seed` the runs are consumed as they are written, one block in memory; with it they are gathered first.
    states: block number -> state, over what follows from the rest. With data for it, the block keeps its bytes and its place
    under any state (an unmapped block with old content); without, FULLY_ and PARTIALLY_PRESENT make an empty block. Reserved
    states, and PARTIALLY_PRESENT without a parent, are written as asked.
    zeros, unmapped, undefined: (guest offset, length) of whole blocks, apart from the disk's last one.
    parent_linkage: the parent's DataWriteGuid. locator: further entries; its own `parent_linkage` wins.
    sequences: of headers 1 and 2. stale_bitmaps: set bits under all blocks that are not PARTIALLY_PRESENT.
    garbage: nonzero bytes wherever a stored block's bytes do not count.
    """
    geometry = Geometry(size, block_size or BLOCK_SIZE[kind], logical_sector, kind == "differencing")
    ranges = _state_ranges(geometry, zeros=zeros, unmapped=unmapped, undefined=undefined)
    with _opened(out) as file:
        body = _Body(file, geometry, dict(states or {}), ranges, stale=stale_bitmaps, garbage=garbage)
        body.place(runs, fixed=kind == "fixed", log_length=log_length, seed=seed)
        layout = body.layout(log_length)
        _write_bat(file, layout, ranges, body.entries)
        links = {"parent_linkage": f"{{{parent_linkage or NULL_GUID}}}"} | dict(locator or {})
        items = disk_items(
            geometry, physical_sector=physical_sector, virtual_disk_id=virtual_disk_id, locator=links,
            leave_allocated=kind == "fixed" if leave_allocated is None else leave_allocated,
        )  # fmt: skip
        _write_at(file, layout.metadata[0], metadata_region(items))
        for offset in REGION_TABLE_OFFSETS:
            _write_at(file, offset, region_table(layout.bat, layout.metadata))
        writer = file_write_guid or uuid5(data_write_guid, "file")
        for offset, sequence in zip(HEADER_OFFSETS, sequences, strict=True):
            header = Header(sequence, writer, data_write_guid, NULL_GUID, *layout.log)
            _write_at(file, offset, header.pack())
        _write_at(file, 0, file_identifier(creator))
        extend(file, layout.file_size)
    return layout


def extend(file: BinaryIO, size: int) -> None:
    """Let the file be at least this long."""
    if file.seek(0, 2) < size:
        _write_at(file, size - 1, b"\0")


def _opened(out: BinaryIO | str | Path) -> AbstractContextManager[BinaryIO]:
    return open(out, "w+b") if isinstance(out, str | Path) else nullcontext(out)


def _write_at(file: BinaryIO, offset: int, data: Bytes) -> None:
    file.seek(offset)
    file.write(data)


def _state_ranges(geometry: Geometry, **found: Iterable[Range]) -> list[tuple[int, int, BlockState]]:
    """(first block, block behind the last, state), ascending and disjoint."""
    ranges = []
    for name, extents in found.items():
        for offset, length in extents:
            end = offset + length
            if offset % geometry.block_size or (end % geometry.block_size and end != geometry.size) or end > geometry.size:
                raise ValueError(f"{name} {offset:#x}+{length:#x} is not made of whole blocks of the disk")
            state = BlockState[{"zeros": "ZERO"}.get(name, name.upper())]
            ranges.append((offset // geometry.block_size, -(-end // geometry.block_size), state))
    ranges.sort()
    for (_, stop, _), (first, _, _) in pairwise(ranges):
        if first < stop:
            raise ValueError(f"block {first} is given two states")
    return ranges


class _Space:
    """MiB-aligned places in the file, one behind the other; with a seed there are gaps between."""

    def __init__(self, rng: random.Random | None) -> None:
        self._rng = rng
        self.end = MiB

    def take(self, length: int) -> int:
        if self._rng is not None:
            self.end += MiB * self._rng.randrange(3)
        at, self.end = self.end, self.end + round_up(length, MiB)
        return at


@dataclass(slots=True)
class _Body:
    """Everything from 1 MiB on: finds the places and writes the blocks."""

    file: BinaryIO
    geometry: Geometry
    states: dict[int, int]
    ranges: list[tuple[int, int, BlockState]]
    stale: bool
    garbage: bool
    entries: dict[int, int] = field(default_factory=dict)
    blocks: dict[int, int] = field(default_factory=dict)
    bitmaps: dict[int, int] = field(default_factory=dict)
    regions: dict[str, int] = field(default_factory=dict)
    space: _Space = field(default_factory=lambda: _Space(None))

    def place(self, runs: Iterable[Run], *, fixed: bool, log_length: int, seed: int | None) -> None:
        for block, state in self.states.items():
            if not 0 <= block < self.geometry.blocks:
                raise ValueError(f"there is no block {block}, only {self.geometry.blocks}")
            self.entries[self.geometry.payload_entry(block)] = bat_entry(state, 0)
        grouped = groupby(cut_at_blocks(_checked(runs, self.geometry), self.geometry.block_size), key=lambda piece: piece[0])
        stored = ((block, [(inside, view) for _, inside, view in pieces]) for block, pieces in grouped)
        forced = range(self.geometry.blocks) if fixed else sorted(b for b, state in self.states.items() if state in _PRESENT)
        jobs = _with_empty(stored, forced)
        sizes = {"log": log_length, "metadata": METADATA_SIZE, "bat": self.bat_length}
        if seed is None:
            for name, length in sizes.items():
                self.regions[name] = self.space.take(length)
            for block, pieces in jobs:
                self._store(block, pieces)
        else:
            self._place_shuffled(list(jobs), sizes, random.Random(seed))

    def _place_shuffled(self, jobs: list[tuple[int, Pieces]], sizes: dict[str, int], rng: random.Random) -> None:
        self.space = _Space(rng)
        order: list[str | tuple[int, Pieces]] = [*sizes, *jobs]
        rng.shuffle(order)
        for job in order:
            if isinstance(job, str):
                self.regions[job] = self.space.take(sizes[job])
            else:
                self._store(*job)

    @property
    def bat_length(self) -> int:
        return round_up(8 * self.geometry.bat_entries, MiB)

    def layout(self, log_length: int) -> Layout:
        return Layout(
            self.geometry, (self.regions["log"], log_length), (self.regions["metadata"], METADATA_SIZE),
            (self.regions["bat"], self.bat_length), self.blocks, self.bitmaps, self.space.end,
        )  # fmt: skip

    def _store(self, block: int, pieces: Pieces) -> None:
        self._check_free(block)
        at = self.blocks[block] = self.space.take(self.geometry.block_size)
        bits = sum(self._bits(inside, len(view)) for inside, view in pieces)
        state = self.states.get(block, self._state_for(block, bits))
        if self.garbage:
            self._write_garbage(block, at, state)
        for inside, view in pieces:
            _write_at(self.file, at + inside, view)
        self.entries[self.geometry.payload_entry(block)] = bat_entry(state, at)
        if self.geometry.differencing and (self.stale or state == BlockState.PARTIALLY_PRESENT):
            self._write_bits(block, bits if state == BlockState.PARTIALLY_PRESENT else None)

    def _check_free(self, block: int) -> None:
        place = bisect_right(self.ranges, block, key=lambda found: found[0]) - 1
        if place >= 0 and block < self.ranges[place][1] and block not in self.states:
            raise ValueError(f"block {block} has data, but is to be {self.ranges[place][2].name}")

    def _state_for(self, block: int, bits: int) -> BlockState:
        partial = self.geometry.differencing and bits != self.geometry.whole(block)
        return BlockState.PARTIALLY_PRESENT if partial else BlockState.FULLY_PRESENT

    def _bits(self, inside: int, length: int) -> int:
        """The bitmap of one run as a number: the block's first sector is the lowest bit."""
        return ((1 << length // self.geometry.logical_sector) - 1) << inside // self.geometry.logical_sector

    def _write_garbage(self, block: int, at: int, state: int) -> None:
        """Where nobody may look: around the bits' sectors, under a state that has no bytes, behind the disk's end."""
        inside = self.geometry.size - block * self.geometry.block_size if state == BlockState.FULLY_PRESENT else 0
        if inside < self.geometry.block_size:
            _write_at(self.file, at + inside, _GARBAGE * (self.geometry.block_size - inside))

    def _write_bits(self, block: int, bits: int | None) -> None:
        chunk, inside = divmod(block, self.geometry.chunk_ratio)
        if chunk not in self.bitmaps:
            at = self.bitmaps[chunk] = self.space.take(BITMAP_SIZE)
            self.entries[self.geometry.bitmap_entry(chunk)] = bat_entry(BITMAP_PRESENT, at)
            if self.stale:
                _write_at(self.file, at, _STALE * BITMAP_SIZE)
        if bits is not None:
            width = self.geometry.bitmap_width
            _write_at(self.file, self.bitmaps[chunk] + inside * width, bits.to_bytes(width, "little"))


def _checked(runs: Iterable[Run], geometry: Geometry) -> Iterator[tuple[int, memoryview]]:
    end = 0
    for offset, data in runs:
        view = memoryview(data).cast("B")
        if offset < end or offset + len(view) > geometry.size:
            raise ValueError(f"run {offset:#x}+{len(view):#x} is out of order or behind the disk's end {geometry.size:#x}")
        if offset % geometry.logical_sector or len(view) % geometry.logical_sector:
            raise ValueError(f"run {offset:#x}+{len(view):#x} is not made of whole sectors")
        end = offset + len(view)
        yield offset, view


def _with_empty(stored: Iterable[tuple[int, Pieces]], forced: Iterable[int]) -> Iterator[tuple[int, Pieces]]:
    """The stored blocks, and the forced ones without data at their place among them."""
    waiting = iter(forced)
    empty = next(waiting, None)
    for block, pieces in stored:
        while empty is not None and empty <= block:
            if empty < block:
                yield empty, []
            empty = next(waiting, None)
        yield block, pieces
    while empty is not None:
        yield empty, []
        empty = next(waiting, None)


def _write_bat(file: BinaryIO, layout: Layout, ranges: list[tuple[int, int, BlockState]], entries: Mapping[int, int]) -> None:
    """What is not written stays 0: NOT_PRESENT."""
    geometry, at = layout.geometry, layout.bat[0]
    for first, stop, state in ranges:
        for begin in (first, *range((first // geometry.chunk_ratio + 1) * geometry.chunk_ratio, stop, geometry.chunk_ratio)):
            count = min(stop, (begin // geometry.chunk_ratio + 1) * geometry.chunk_ratio) - begin
            _write_at(file, at + 8 * geometry.payload_entry(begin), bat_entry(state, 0).to_bytes(8, "little") * count)
    for _, group in groupby(enumerate(sorted(entries)), key=_distance):
        indexes = [index for _, index in group]
        _write_at(file, at + 8 * indexes[0], b"".join(entries[index].to_bytes(8, "little") for index in indexes))


def _distance(numbered: tuple[int, int]) -> int:
    """The same for all of a row of consecutive numbers."""
    return numbered[1] - numbered[0]
