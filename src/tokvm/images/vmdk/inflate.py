"""The compressed grains of a stream-optimised extent as a ReadAt: where grain after grain lies in the order of the file.

    file    … | lba 8, size 4, zlib … pad | lba, size, zlib … pad | grain table | lba, size, zlib … |
    slots     | 0: grain_bytes            | 1: grain_bytes        |               2: grain_bytes    |

Slot n is the n-th grain of the file. Ascending addresses are read ascending in the file, and grains that are neighbours in the
guest and in the file are one row of the map: one read of compressed bytes, then one inflate each (zlib lets other threads run).
How long a grain is, only its own header says; but it ends where the next one, or a table, begins. So opening reads the tables
and no grain. Kept of each grain: its sector and its number, as one u64.

Grains are zlib streams (RFC 1950), not raw deflate, each of at most a grain. Without markers there is no lba. The disk's last
grain may hold only what the disk needs.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tokvm.core.extents import Column
from tokvm.core.units import SECTOR, KiB
from tokvm.images.base import ReadAt
from tokvm.images.fields import bad_field
from tokvm.images.over import OverFile

Keys = npt.NDArray[np.uint64]

_LBA = struct.Struct("<QI")
_SIZE = struct.Struct("<I")
_GAP = 16 * KiB  # between grains: tables are read through
_GRAIN_BITS = np.uint64(32)
_GRAIN_MASK = np.uint64(0xFFFFFFFF)


def max_compressed(grain_bytes: int) -> int:
    """Bytes of a grain's zlib stream: what QEMU takes; deflate itself adds 5 bytes to 16 KiB at the worst."""
    return 2 * grain_bytes


def inflate(packed: memoryview | bytes | bytearray, *, grain_bytes: int, needed: int, name: str, offset: int) -> bytes:
    """The grain in this zlib stream: at least `needed` bytes, never more than a grain, whatever it would unfold to."""
    stream = zlib.decompressobj()
    try:
        grain = stream.decompress(packed, grain_bytes + 1)
    except zlib.error as exc:
        raise bad_field(name, offset, "a compressed grain", f"no zlib stream ({exc})", "a whole zlib stream") from exc
    if len(grain) > grain_bytes:
        raise bad_field(name, offset, "a compressed grain", f"more than {grain_bytes} bytes", f"at most a grain, {grain_bytes}")
    if not stream.eof:
        raise bad_field(name, offset, "a compressed grain", "a zlib stream without its end", "a whole zlib stream")
    if len(grain) < needed:
        raise bad_field(name, offset, "a compressed grain", f"{len(grain)} bytes", f"{needed} to {grain_bytes} bytes")
    return grain


def slot_keys(sector: Keys, grain: Column) -> Keys:
    return (sector.astype(np.uint64) << _GRAIN_BITS) | grain.astype(np.uint64)


class InflatedFile(OverFile):
    """Implements `images.base.ReadAt` over a file of compressed grains, which it owns.

    keys: of all grains, ascending. structures: ascending offsets where something else begins that a grain ends before.
    size: bytes of the disk, of which the last grain may hold a part.
    """

    def __init__(
        self, file: ReadAt, keys: Keys, *, grain_bytes: int, disk_size: int, markers: bool, structures: Column
    ) -> None:
        super().__init__(file)
        self.size = len(keys) * grain_bytes
        self._keys = keys
        self._grain_bytes = grain_bytes
        self._disk_size = disk_size
        self._head = _LBA if markers else _SIZE
        self._structures = structures

    def locate(self, _offset: int) -> tuple[str, int | None]:
        """Of no guest byte can be said where in the file it is."""
        return self.name, None

    def slots(self, sector: Keys, grain: Column) -> Column:
        """The slot of each grain; -1 where it is not in the table (the file changed while it was read)."""
        wanted = slot_keys(sector, grain)
        order = np.argsort(wanted, kind="stable")  # looked up in order: 20 times as fast in a table larger than the caches
        slot = np.empty(len(wanted), np.int64)
        slot[order] = np.searchsorted(self._keys, wanted[order])
        known = (
            self._keys[np.minimum(slot, len(self._keys) - 1)] == wanted if len(self._keys) else np.zeros(len(slot), np.bool_)
        )
        return np.where(known, slot, -1)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if not 0 <= offset <= self.size - len(buffer):
            raise bad_field(
                self.name, 0, "a read of grains", f"{len(buffer)} bytes at {offset:#x}", f"inside {self.size} bytes"
            )
        if not len(buffer):
            return
        first = offset // self._grain_bytes
        begin, end, grains = self._places(first, (offset + len(buffer) - 1) // self._grain_bytes + 1)
        at = first * self._grain_bytes - offset  # of the first grain in the buffer; negative: it begins before
        for one, other in _together(begin, end):
            packed = bytearray(end[other - 1] - begin[one])
            self.file.read_into(begin[one], memoryview(packed))
            self._unpack(packed, begin[one:other], end[one:other], grains[one:other], buffer, at + one * self._grain_bytes)

    def _unpack(
        self, packed: bytearray, begin: list[int], end: list[int], grains: list[int], buffer: memoryview, at: int
    ) -> None:
        """Grain after grain into the buffer, the first at `at`."""
        view, size = memoryview(packed), self._grain_bytes
        for start, stop, number in zip(begin, end, grains, strict=True):
            grain = self._inflate(view[start - begin[0] : stop - begin[0]], start, number)
            low, high = max(at, 0), min(at + size, len(buffer))
            if low == at and len(grain) == high - at:
                buffer[low:high] = grain
            else:
                buffer[low:high] = grain.ljust(size, b"\0")[low - at : high - at]
            at += size

    def will_read(self, offset: int, length: int) -> None:
        begin, end, _ = self._places(offset // self._grain_bytes, (offset + length - 1) // self._grain_bytes + 1)
        for one, other in _together(begin, end):
            self._announce(begin[one], end[other - 1] - begin[one])

    def _places(self, first: int, last: int) -> tuple[list[int], list[int], list[int]]:
        """(first byte, at most the last byte, grain number) of these slots."""
        keys = self._keys[first : last + 1]
        begin = (keys >> _GRAIN_BITS).astype(np.int64) * SECTOR
        behind = begin[1:] if last < len(self._keys) else np.append(begin[1:], self.file.size)
        begin = begin[: last - first]
        structure = np.searchsorted(self._structures, begin)
        end = np.minimum(behind, begin + self._head.size + max_compressed(self._grain_bytes))
        near = structure < len(self._structures)
        end[near] = np.minimum(end[near], self._structures[structure[near]])
        grains = (keys[: last - first] & _GRAIN_MASK).astype(np.int64)
        return begin.tolist(), end.tolist(), grains.tolist()

    def _inflate(self, packed: memoryview, at: int, number: int) -> bytes:
        head, guest = self._head.size, number * self._grain_bytes
        if len(packed) < head:
            raise bad_field(self.name, at, "a compressed grain", f"{len(packed)} bytes long", f"at least {head} bytes")
        *lba, length = self._head.unpack_from(packed)
        if lba and lba[0] * SECTOR != guest:
            raise bad_field(self.name, at, "lba of a compressed grain", lba[0], f"{guest // SECTOR}, as its grain table says")
        if not 1 <= length <= len(packed) - head:
            allowed = f"1 to {len(packed) - head} bytes, where the next structure begins"
            raise bad_field(self.name, at + head - 4, "size of a compressed grain", length, allowed)
        needed = min(self._grain_bytes, self._disk_size - guest)
        return inflate(
            packed[head : head + length], grain_bytes=self._grain_bytes, needed=needed, name=self.name, offset=at + head
        )


def _together(begin: list[int], end: list[int]) -> Iterator[tuple[int, int]]:
    """[first, last) of the slots that one read gets."""
    first = 0
    for place in range(1, len(begin)):
        if begin[place] - end[place - 1] > _GAP:
            yield first, place
            first = place
    yield first, len(begin)
