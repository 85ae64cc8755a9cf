"""Do the tables of a stream say what its grains said? Each grain names its own place in the disk; the tables, the directory and
the footer that follow name it again. A flipped bit in either is found, and so is a grain that was lost on the way.

    grain grain … | table | grain grain … | table | … | directory | footer | end of stream

Kept: one bit per grain of the disk (which came), and 9 bytes for each that no table has listed yet.
"""

from __future__ import annotations

from array import array

import numpy as np

from tokvm.core.errors import ImageError
from tokvm.core.extents import Column
from tokvm.core.units import SECTOR
from tokvm.images.fields import bad_field
from tokvm.images.vmdk.grains import Mask
from tokvm.images.vmdk.header import ENTRIES, Flags
from tokvm.images.vmdk.inflate import Keys
from tokvm.images.vmdk.sparse import ZERO_GRAIN
from tokvm.images.vmdk.stream_prefix import StreamPrefix

_NO_GRAINS = -1  # of a table that lists nothing that came: which one it is cannot be told


class StreamTables:
    """What came since `position`; what came before that was checked then, or will be by the tables that come now."""

    def __init__(self, name: str, prefix: StreamPrefix, position: int) -> None:
        self._name = name
        self._prefix = prefix
        self._since = position
        self._zeroed = Flags.ZEROED_GRAINS in prefix.header.flags
        grains = -(-prefix.size // prefix.header.grain_bytes)
        self._grains = grains
        self._came = np.zeros(-(-grains // 8), np.uint8).data  # memory for what is touched, whatever size is claimed
        self._keys = array("Q")  # of grains that no table has listed, ascending: by sector
        self._listed = bytearray()
        self._tables: dict[int, int] = {}  # sector -> number
        self.directory_at: int | None = None

    def grain(self, at: int, number: int) -> None:
        """A grain came at byte `at`."""
        byte, bit = number >> 3, 1 << (number & 7)
        if self._came[byte] & bit:
            lba = number * self._prefix.header.grain_sectors
            raise bad_field(self._name, at, "lba of a compressed grain", lba, "each grain once in a stream")
        self._came[byte] |= bit
        self._keys.append((at // SECTOR) << 32 | number)
        self._listed.append(0)

    def table(self, at: int, raw: bytes | bytearray) -> None:
        """A grain table came at byte `at`."""
        entries = np.frombuffer(raw, "<u4").astype(np.int64)
        index = np.flatnonzero(entries > ZERO_GRAIN if self._zeroed else entries)
        index = index[~self._is_earlier(entries[index] * SECTOR)]
        keys = np.frombuffer(self._keys, np.uint64)
        sectors = (keys >> np.uint64(32)).astype(np.int64)
        place = np.minimum(np.searchsorted(sectors, entries[index]), max(len(keys) - 1, 0))
        found = sectors[place] == entries[index] if len(keys) else np.zeros(len(index), np.bool_)
        self._check(found, at, index, entries, "the sector of a grain that came before it")
        number = (keys[place] & np.uint64(0xFFFFFFFF)).astype(np.int64) if len(keys) else place
        self._check(number % ENTRIES == index, at, index, entries, "the sector of the grain that is in this place of the disk")
        table = number // ENTRIES
        self._check(table == table[:1] if len(table) else found, at, index, entries, "the sector of a grain of the same table")
        self._tables[at // SECTOR] = int(table[0]) if len(table) else _NO_GRAINS
        del keys, sectors
        self._list(place)

    def directory(self, at: int, raw: bytes | bytearray) -> None:
        """The grain directory came at byte `at`."""
        self._all_listed()
        count = -(-self._grains // ENTRIES)
        entries = np.frombuffer(raw, "<u4")[:count].astype(np.int64)
        for table in np.flatnonzero(entries).tolist():
            sector = int(entries[table])
            known = self._tables.pop(sector, None)
            earlier = known is None and bool(self._is_earlier(np.array([sector * SECTOR]))[0])
            if not earlier and known not in (table, _NO_GRAINS):
                allowed = "the sector of this grain table, as it came"
                raise bad_field(self._name, at + 4 * table, f"grain directory entry {table}", f"{sector:#x}", allowed)
        left = [(number, sector) for sector, number in self._tables.items() if number != _NO_GRAINS]
        if left:
            number, sector = left[0]
            read = f"{int(entries[number]):#x}"
            raise bad_field(self._name, at + 4 * number, f"grain directory entry {number}", read, f"{sector:#x}, where it came")
        self.directory_at = at

    def end(self, at: int) -> None:
        """The end-of-stream marker came at byte `at`."""
        listed = self._prefix.listed
        if listed is None:
            if self.directory_at is None:
                raise bad_field(self._name, at, "marker", "the end of the stream", "a grain directory and a footer before it")
            return
        came: Keys = np.frombuffer(self._keys, np.uint64)
        expected = listed[(listed >> np.uint64(32)).astype(np.int64) * SECTOR >= self._since]
        missing, more = np.setdiff1d(expected, came), np.setdiff1d(came, expected)
        if len(more):
            raise self._stray(int(more[0]))
        if len(missing):
            sector, number = divmod(int(missing[0]), 1 << 32)
            read = f"no grain {number} at sector {sector:#x}"
            raise bad_field(self._name, at, "the stream", read, "every grain that its tables list")

    def _is_earlier(self, at: Column) -> Mask:
        """Of a place in the stream that this run did not read."""
        return (at >= self._prefix.grains_at) & (at < self._since)

    def _check(self, right: Mask, at: int, index: Column, entries: Column, allowed: str) -> None:
        if right.all():
            return
        place = int(index[int(np.argmin(right))])
        raise bad_field(self._name, at + 4 * place, f"entry {place} of a grain table", f"{int(entries[place]):#x}", allowed)

    def _list(self, place: Column) -> None:
        """These grains are in a table now; as long as tables follow their grains there is nothing left to remember."""
        flags = np.frombuffer(self._listed, np.uint8)
        flags[place] = 1
        done = bool(flags.all())
        del flags
        if done:
            self._keys = array("Q")
            self._listed = bytearray()

    def _all_listed(self) -> None:
        left = self._listed.find(0)
        if left >= 0:
            raise self._stray(self._keys[left])

    def _stray(self, key: int) -> ImageError:
        sector, number = divmod(key, 1 << 32)
        return bad_field(self._name, sector * SECTOR, "a compressed grain", f"grain {number}", "a grain that a table lists")
