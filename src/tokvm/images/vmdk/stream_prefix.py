"""The beginning of a stream-optimised VMDK as a stream: header, descriptor, and what else lies before the first grain."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from tokvm.core.errors import ImageError
from tokvm.core.units import SECTOR, MiB
from tokvm.images.base import ReadAt
from tokvm.images.fields import MAX_READ, bad_field
from tokvm.images.stream_cursor import StreamCursor
from tokvm.images.vmdk.descriptor import Descriptor
from tokvm.images.vmdk.header import AT_END, HEADER_SIZE, SparseHeader
from tokvm.images.vmdk.inflate import Keys, slot_keys
from tokvm.images.vmdk.parts import size_of
from tokvm.images.vmdk.sparse import SparseFile, SparsePart, read_directories, read_embedded

_MAX_PREFIX = 16 * MiB  # ESX: 64 KiB


@dataclass(frozen=True, slots=True, eq=False)
class StreamPrefix:
    """size: of the disk. grains_at: the byte where the first marker is. listed: keys (`inflate.slot_keys`) of all grains,
    ascending, where the tables come first; None where they come between the grains, as ESX sends them."""

    header: SparseHeader
    descriptor: Descriptor
    fingerprint: str
    size: int
    grains_at: int
    listed: Keys | None
    warnings: tuple[str, ...]


class _Bytes:
    """The prefix as a ReadAt."""

    def __init__(self, name: str, raw: bytearray) -> None:
        self.name = name
        self.size = len(raw)
        self._raw = memoryview(raw)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._raw[offset : offset + len(buffer)]

    def close(self) -> None:
        """Nothing to close."""


def read_prefix(cursor: StreamCursor, name: str) -> StreamPrefix:
    """Everything before the first grain, or ImageError when it is not a whole disk's stream."""
    raw = cursor.read_bytes(HEADER_SIZE, "the header")
    header = SparseHeader.parse(raw, name=name, offset=0)
    if not header.markers:
        raise bad_field(name, 8, "KDMV flags", f"{int(header.flags):#x}", "a stream's: compressed, with markers")
    grains_at = header.overhead * SECTOR
    first = max(HEADER_SIZE, (header.descriptor_sector + header.descriptor_sectors) * SECTOR)
    if not first <= grains_at <= _MAX_PREFIX:
        raise bad_field(name, 64, "KDMV overhead", header.overhead, f"{first // SECTOR} to {_MAX_PREFIX // SECTOR} in a stream")
    raw += cursor.read_bytes(grains_at - HEADER_SIZE, "the descriptor")
    found = _Bytes(name, raw)
    descriptor = _read_descriptor(found, header)
    size = size_of(header.capacity, descriptor.extents[0].sectors, name=name, offset=12)
    directory_bytes = 4 * -(-size // header.span)
    if directory_bytes > MAX_READ:
        raise bad_field(name, 20, "KDMV grain size", header.grain_bytes, "larger grains on so large a disk")
    warnings, listed = descriptor.warnings, None
    if header.directory_sector != AT_END:
        tables = read_directories(SparseFile(found, header, descriptor, None), size)
        warnings, listed = (*warnings, *tables.warnings), _listed(tables)
        if len(listed) and int(listed[0] >> np.uint64(32)) < header.overhead:  # it would be read past
            allowed = f"at most {int(listed[0] >> np.uint64(32))}, where the first grain is"
            raise bad_field(name, 64, "KDMV overhead", header.overhead, allowed)
    digest = hashlib.blake2b(raw, digest_size=16).hexdigest()
    return StreamPrefix(header, descriptor, f"vmdk-{digest}", size, grains_at, listed, warnings)


def _read_descriptor(file: ReadAt, header: SparseHeader) -> Descriptor:
    """The descriptor of a whole disk."""
    found = read_embedded(file, header)
    if found is None:
        allowed = "the place of a descriptor in a stream"
        raise bad_field(file.name, 28, "KDMV descriptor sector", header.descriptor_sector, allowed)
    if found.linkage.parents:
        raise ImageError(
            f"the stream is a child of {found.linkage.parents[0]}, not a whole disk",
            where=file.name,
            fix="export the disk of a VM or a snapshot, not a single layer of it",
        )
    return found


def _listed(tables: SparsePart) -> Keys:
    """All grains, by the tables, which all lie in the prefix."""
    keys = [np.empty(0, np.uint64)]
    for batch in tables.batches(tables.directory.present):
        entries, grain = tables.used_entries(batch)
        data = tables.meaning(entries, grain) >= 0
        keys.append(slot_keys(entries[data].astype(np.uint64), grain[data]))
    return np.sort(np.concatenate(keys))
