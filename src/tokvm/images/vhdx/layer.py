"""VHDX and AVHDX files: Hyper-V's disks, fixed, dynamic and differencing, with or without writes in their log.

    0       identifier, headers, region tables      fixed places: `structs`, `front`
    1 MiB … log | BAT | metadata | blocks, bitmaps   at whole MiB, in any order: `log`, `bat`, `metadata`

    headers ─► log, replayed in memory ─► region table ─► metadata ─► BAT ─► rows

Little-endian. A block that is not in the file is ABSENT: zeros, or the parent's in a differencing disk. The last block is
stored whole by most writers and read only as far as the disk goes.
Spec: Microsoft, [MS-VHDX] "Virtual Hard Disk v2 (VHDX) File Format" v8 (2024).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from tokvm.core.extents import Column, ExtentKind, ExtentMap
from tokvm.core.units import KiB
from tokvm.images.base import Linkage, MappedLayer, ReadAt, announcer
from tokvm.images.rows import Bits, Rows, bitmap_runs, bounded_map
from tokvm.images.vhdx.bat import BlockTable, Geometry, Slice
from tokvm.images.vhdx.front import FoundHeader, find_header, find_regions, read_creator
from tokvm.images.vhdx.log import Replay, replay
from tokvm.images.vhdx.metadata import Metadata
from tokvm.images.vhdx.structs import BAT_REGION, FRONT, METADATA_REGION, NULL_GUID, BlockState, Header

log = logging.getLogger(__name__)

_ENTRIES = 1 << 14  # of the BAT looked at in one go: 128 KiB
_BATCH_SECTORS = 1 << 19  # bitmaps unpacked at once: 64 KiB, and at worst as many rows as bits
_GAP = 64 * KiB  # of a bitmap block between two wanted places: reading it costs less than a second read
_KINDS = np.array([ExtentKind.ABSENT, *[ExtentKind.ZERO] * 3, *[ExtentKind.ABSENT] * 2, ExtentKind.DATA, ExtentKind.ABSENT])


class VhdxLayer(MappedLayer):
    """A parsed VHDX. Implements `images.base.Layer`; made by `open_vhdx`. `file` is the image with its log replayed."""

    format = "vhdx"

    def __init__(
        self,
        file: ReadAt,
        *,
        creator: str,
        header: Header,
        metadata: Metadata,
        table: BlockTable,
        replayed: Replay | None,
        warnings: tuple[str, ...],
    ) -> None:
        linkage = _linkage(header, metadata)
        super().__init__(file, size=metadata.size, linkage=linkage, sector_size=metadata.logical_sector, warnings=warnings)
        self.creator = creator
        self.header = header
        self.metadata = metadata
        self._table = table
        self._replayed = replayed

    def map_part(self, start: int, stop: int, max_rows: int | None) -> ExtentMap:
        parts = self._parts(start, stop)
        return bounded_map(start, stop, parts, block_size=self.metadata.block_size, max_rows=max_rows)

    def _parts(self, start: int, stop: int) -> Iterator[Rows]:
        """The rows of all blocks that reach into [start, stop), ascending, a few blocks at a time."""
        geometry = self._table.geometry
        first, last = start // geometry.block_size, -(-stop // geometry.block_size)
        chunks = first // geometry.ratio, -(-last // geometry.ratio)
        step = max(1, _BATCH_SECTORS // geometry.sectors)
        for found in self._table.slices(*chunks, entries=_ENTRIES):
            begin, end = max(first - found.first, 0), min(last - found.first, len(found.state))
            partial = begin + np.flatnonzero(found.state[begin:end] == BlockState.PARTIALLY_PRESENT)
            cuts = [begin, *partial[step::step].tolist(), end]
            for place, until in pairwise(cuts):
                yield self._rows(found, np.arange(place, until))

    def _rows(self, found: Slice, blocks: Column) -> Rows:
        """Of these blocks of the slice; neighbours that go on in guest and file are one row."""
        size = self._table.geometry.block_size
        state = found.state[blocks]
        is_whole = (state != BlockState.NOT_PRESENT) & (state != BlockState.PARTIALLY_PRESENT)
        whole, partial = blocks[is_whole], blocks[state == BlockState.PARTIALLY_PRESENT]
        columns: list[Rows] = [
            ((found.first + whole) * size, np.full(len(whole), size), _KINDS[state[is_whole]], found.start[whole])
        ]
        if len(partial):
            columns.append(self._partial_rows(found, partial))
        begin, end = (found.first + int(place) for place in (blocks[0], blocks[-1] + 1))
        merged = ExtentMap.build(begin * size, end * size, *(np.concatenate(column) for column in zip(*columns, strict=True)))
        return merged.offset, merged.length, merged.kind, merged.file_offset

    def _partial_rows(self, found: Slice, blocks: Column) -> Rows:
        """DATA where the bits are set. What the parent decides has no row."""
        geometry = self._table.geometry
        chunk, inside = np.divmod(blocks, geometry.ratio)
        bits = self._bitmaps(found.bitmap[chunk] + inside * geometry.bitmap_bytes, geometry.bitmap_bytes)
        head, length, is_here = bitmap_runs(bits, geometry.sectors, "little")
        head, length = head[is_here], length[is_here]
        row, sector = np.divmod(head, geometry.sectors)
        at, block = sector * geometry.sector_size, blocks[row]
        return (
            (found.first + block) * geometry.block_size + at,
            length * geometry.sector_size,
            np.full(len(at), int(ExtentKind.DATA)),
            found.start[block] + at,
        )

    def _bitmaps(self, places: Column, width: int) -> Bits:
        """`width` bytes from each of these places in the file. Those near one another are read at once; all are announced."""
        step = np.diff(places)
        first = np.flatnonzero(np.concatenate(([True], (step < 0) | (step > width + _GAP))))
        last = np.append(first[1:], len(places)) - 1
        starts, lengths = places[first], places[last] + width - places[first]
        raw = np.empty(int(lengths.sum()), np.uint8)
        begins = np.cumsum(lengths) - lengths
        reads = list(zip(starts.tolist(), begins.tolist(), lengths.tolist(), strict=True))
        announce, view = announcer(self.file), raw.data
        for start, _, length in reads:
            announce(start, length)
        for start, begin, length in reads:
            self.file.read_into(start, view[begin : begin + length])
        shift = np.repeat(begins - starts, last - first + 1)
        found: Bits = raw[(places + shift)[:, np.newaxis] + np.arange(width)]
        return found

    def describe(self) -> dict[str, object]:
        header, metadata = self.header, self.metadata
        locator = metadata.locator
        return {
            "format": self.format,
            "type": metadata.kind,
            "virtual_size": metadata.size,
            "block_size": metadata.block_size,
            "logical_sector_size": metadata.logical_sector,
            "physical_sector_size": metadata.physical_sector,
            "identity": self.identity,
            "parent_identity": self.parent_identity,
            "parent_identities": list(self.linkage.parents),
            "parent_locator": dict(locator.entries) if locator is not None else {},
            "virtual_disk_id": str(metadata.disk_id),
            "file_write_id": str(header.file_write_guid),
            "creator": self.creator,
            "header_sequence": header.sequence,
            "log": self._log_state,
            "blocks": self._table.geometry.blocks,
            "blocks_by_state": {name.lower(): count for name, count in self._table.counts.items()},
            "warnings": list(self.warnings),
        }

    @property
    def _log_state(self) -> str:
        if self._replayed is None:
            return "clean"
        return f"replayed in memory: {self._replayed.entries} entries, {self._replayed.writes} writes"


def _linkage(header: Header, metadata: Metadata) -> Linkage:
    """A null data write guid names nobody; a null guid among the parent's is left out by its parser."""
    ids = (str(header.data_write_guid),) if header.data_write_guid != NULL_GUID else ()
    return Linkage(ids, tuple(str(one) for one in metadata.locator.linkage) if metadata.locator is not None else ())


def open_vhdx(file: ReadAt) -> VhdxLayer:
    """Parse and check a VHDX, or ImageError naming file, offset, field, the value read and the values allowed."""
    creator = read_creator(file)
    found = find_header(file)
    replayed = replay(file, found.header, offset=found.offset) if found.header.has_log else None
    image: ReadAt = replayed.file if replayed is not None else file
    tables = find_regions(image, found.header.log)
    metadata = Metadata.read(image, tables.regions[METADATA_REGION])
    structures = [("headers", 0, FRONT), *(region.structure for region in tables.regions.values())]
    if found.header.log_length:
        structures.append(found.header.log)
    table = BlockTable.read(image, tables.regions[BAT_REGION], Geometry.of(metadata), structures)
    warnings = (*found.warnings, *tables.warnings, *_log_warnings(found, replayed))
    for warning in warnings:
        log.warning("%s: %s", file.name, warning)
    return VhdxLayer(
        image,
        creator=creator,
        header=found.header,
        metadata=metadata,
        table=table,
        replayed=replayed,
        warnings=warnings,
    )


def _log_warnings(found: FoundHeader, replayed: Replay | None) -> tuple[str, ...]:
    if replayed is None:
        return ()
    return (
        f"the log holds {replayed.writes} writes that are not in their place yet, so the disk was in use or lost power; "
        "it is read as it is with them",
    )
