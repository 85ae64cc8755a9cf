"""The ring of a VHDX's log, as bytes: entries of one sequence, their tail, and noise around them.

    ring       … noise | entry before the tail | tail entry | entry | head entry | noise …     may go over the ring's end
    entry      64 bytes, descriptors (126 in the first 4 KiB, 128 in each further one), then 4 KiB of data per `desc`
    sequence   neighbours with consecutive numbers; the head names the tail, and only from there on are they replayed

Spec: Microsoft, "[MS-VHDX]: Virtual Hard Disk v2 (VHDX) File Format", v8, 2.3. No numpy.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import BinaryIO
from uuid import UUID, uuid5

from tokvm.core.units import KiB, round_up
from tokvm.testing.vhdx_structs import Header, sealed

PAGE = 4 * KiB
GARBAGE_PAGE = b"\xdd" * PAGE
_FIRST_SEQUENCES = (1, 1000, (1 << 32) - 2)  # the last: its entries differ in both halves of the number


class Damage(Enum):
    """Each leaves nothing that may be replayed, so the file must be refused."""

    CHECKSUM = "the tail entry's checksum is wrong"
    GUID = "the entries bear another log GUID than the header"
    TORN = "a data sector of the tail entry bears another sequence number, under a good checksum"
    TRUNCATED = "the file is shorter than it was when the head was written"


@dataclass(frozen=True, slots=True)
class Write:
    """A page's new bytes, or `length` zero bytes."""

    offset: int
    data: bytes | None = None
    length: int = PAGE


@dataclass(slots=True)
class Entry:
    """Of the sequence; its bytes are made when the places of all are known."""

    sequence: int
    writes: list[Write]

    @property
    def length(self) -> int:
        return round_up(64 + 32 * len(self.writes), PAGE) + PAGE * sum(write.data is not None for write in self.writes)

    def pack(self, tail: int, log_guid: UUID, flushed: int, last: int, *, torn: bool = False) -> bytes:
        raw = struct.pack("<4sIIIQII", b"loge", 0, self.length, tail, self.sequence, len(self.writes), 0)
        raw += log_guid.bytes_le + struct.pack("<QQ", flushed, last)
        sectors = b""
        for write in self.writes:
            if write.data is None:
                raw += struct.pack("<4sIQQQ", b"zero", 0, write.length, write.offset, self.sequence)
            else:
                data, wrong = write.data, torn and not sectors
                raw += b"desc" + data[4092:] + data[:8] + struct.pack("<QQ", write.offset, self.sequence)
                high, low = divmod(self.sequence - wrong, 1 << 32)
                sectors += b"data" + high.to_bytes(4, "little") + data[8:4092] + low.to_bytes(4, "little")
        return sealed(raw.ljust(round_up(len(raw), PAGE), b"\0") + sectors)


class Ring:
    """The log's bytes."""

    def __init__(self, header: Header, log_guid: UUID, damage: Damage | None, rng: random.Random) -> None:
        self._offset = header.log_offset
        self._raw = bytearray(header.log_length)
        self._guid = log_guid
        self._damage = damage
        self._rng = rng
        self._done = 0
        self._end = 0
        self.entries: list[Entry] = []
        self.places: list[int] = []

    def lay_out(self, done: list[list[Write]], batches: list[list[Write]], *, wrap: bool) -> None:
        first = self._rng.choice(_FIRST_SEQUENCES)
        self.entries = [Entry(first + index, writes) for index, writes in enumerate([*done, *batches])]
        self._done = len(done)
        lengths = [entry.length for entry in self.entries]
        if (total := sum(lengths)) > len(self._raw):
            raise ValueError(f"{total} bytes of entries do not fit into a log of {len(self._raw)}")
        before = [0, *accumulate(lengths)]
        if wrap:
            split = self._rng.choice([index for index, length in enumerate(lengths) if length > PAGE])
            start = len(self._raw) - before[split] - PAGE * self._rng.randrange(1, lengths[split] // PAGE)
        else:
            start = PAGE * self._rng.randrange((len(self._raw) - total) // PAGE + 1)
        self.places = [(start + at) % len(self._raw) for at in before[:-1]]
        self._end = start + total

    @property
    def wrapped(self) -> bool:
        return self._end > len(self._raw)

    def seal(self, flushed: int, last: int) -> None:
        """Make the entries' bytes, damaged as asked."""
        guid = uuid5(self._guid, "another") if self._damage is Damage.GUID else self._guid
        for index, (entry, place) in enumerate(zip(self.entries, self.places, strict=True)):
            tail = self.places[0 if index < self._done else self._done]
            torn = self._damage is Damage.TORN and index == self._done
            self._put(place, entry.pack(tail, guid, flushed, last, torn=torn))
        if self._damage is Damage.CHECKSUM:
            self._raw[self.places[self._done] + 4] ^= 1

    def fill(self, victim: int) -> None:
        """The free rest: entries that would spoil the page at `victim`, were they believed."""
        used = sum(entry.length for entry in self.entries)
        spoil = [Write(victim, GARBAGE_PAGE)]
        other = uuid5(self._guid, "other log")
        groups = [(other, [Entry(self.entries[0].sequence + 1_000_000, spoil)])]  # of another log, so its number means nothing
        if self._damage is None and self.entries[0].sequence > 100:
            older = [(self._guid, [Entry(at, spoil), Entry(at + 1, []), Entry(at + 2, spoil)]) for at in (10, 20)]
            groups = [groups[0], older[0], groups[0], older[1]]
        free = len(self._raw) - used - 2 * PAGE
        at = self._end + PAGE
        for guid, entries in groups:
            length = sum(entry.length for entry in entries)
            if length > free:
                break
            tail = at % len(self._raw)
            for entry in entries:
                self._put(at % len(self._raw), entry.pack(tail, guid, 0, 0))
                at += entry.length
            free -= length

    def _put(self, place: int, data: bytes) -> None:
        """Over the ring's end to its start, if need be."""
        here = min(len(data), len(self._raw) - place)
        self._raw[place : place + here] = data[:here]
        self._raw[: len(data) - here] = data[here:]

    def write(self, file: BinaryIO) -> None:
        file.seek(self._offset)
        file.write(self._raw)
