"""What the VMDK writers share: a disk's content cut into grains, places for grains in a file, and little-endian tables.

    runs, zeros, unmapped ─► pieces (ascending, disjoint) ─► spans of whole grains ─► places in the file

A grain that is written only in part becomes a DATA grain: its other bytes are read from what lies below, as a hypervisor does
on the first write (copy on write). So does a grain that is zeroed only in part.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from heapq import merge
from itertools import groupby, pairwise
from random import Random
from typing import BinaryIO, NamedTuple

from tokvm.core.units import SECTOR, MiB

Bytes = bytes | bytearray | memoryview
Run = tuple[int, Bytes]
Range = tuple[int, int]
ReadBelow = Callable[[int, int], Bytes]

_ZEROS = memoryview(bytes(MiB))
_FIRST_WINDOW, _LAST_WINDOW = 8, 4096


class Kind(Enum):
    DATA = "data"
    ZERO = "zero"
    UNMAPPED = "unmapped"


class Piece(NamedTuple):
    """A range of the guest disk of one kind, whole sectors. `data` is there for DATA only."""

    offset: int
    length: int
    kind: Kind
    data: memoryview = _ZEROS

    def part(self, start: int, stop: int) -> Piece:
        """The piece from guest offset `start` to `stop`, which lie inside of it."""
        if self.kind is not Kind.DATA:
            return Piece(start, stop - start, self.kind)
        return Piece(start, stop - start, self.kind, self.data[start - self.offset : stop - self.offset])


class Span(NamedTuple):
    """Whole grains of one kind, from grain number `first` on. DATA has grains * grain_size bytes."""

    kind: Kind
    first: int
    grains: int
    data: memoryview


def nothing_below(_offset: int, length: int) -> bytes:
    """What lies below a base."""
    return bytes(length)


def below(read_parent: ReadBelow | None, *, has_parent: bool) -> ReadBelow | None:
    """Where the rest of a partly written grain comes from; None refuses such grains."""
    return read_parent if read_parent is not None or has_parent else nothing_below


def pieces_of(size: int, runs: Iterable[Run], zeros: Iterable[Range] = (), unmapped: Iterable[Range] = ()) -> Iterator[Piece]:
    """All of a disk's content in guest order. Each argument ascends; none overlaps another; runs are taken when needed."""
    if size < SECTOR or size % SECTOR:
        raise ValueError(f"the disk's size {size:#x} is not made of whole sectors")
    sources = (
        (Piece(offset, len(data), Kind.DATA, memoryview(data).cast("B")) for offset, data in runs),
        (Piece(offset, length, Kind.ZERO) for offset, length in zeros),
        (Piece(offset, length, Kind.UNMAPPED) for offset, length in unmapped),
    )
    return _checked(size, merge(*sources, key=lambda piece: piece.offset))


def _checked(size: int, pieces: Iterable[Piece]) -> Iterator[Piece]:
    end = 0
    for piece in pieces:
        offset, length = piece.offset, piece.length
        if offset < end or length < 0 or offset + length > size:
            raise ValueError(f"{offset:#x}+{length:#x} is out of order or behind the disk's end {size:#x}")
        if offset % SECTOR or length % SECTOR:
            raise ValueError(f"{offset:#x}+{length:#x} is not made of whole sectors")
        end = offset + length
        if length:
            yield piece


def materialised(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Zeros as written bytes, for formats that cannot say zero in another way."""
    for piece in pieces:
        if piece.kind is Kind.DATA:
            yield piece
            continue
        for offset in range(piece.offset, piece.offset + piece.length, MiB):
            length = min(MiB, piece.offset + piece.length - offset)
            yield Piece(offset, length, Kind.DATA, _ZEROS[:length])


def per_extent(pieces: Iterable[Piece], ends: Sequence[int]) -> Iterator[tuple[int, Iterator[Piece]]]:
    """(number, its pieces, offsets from the extent's start) of every extent file, the empty ones too. `ends`: in the disk."""
    groups = groupby(_cut_at(pieces, ends), key=lambda pair: pair[0])
    waiting = next(groups, None)
    for number in range(len(ends)):
        if waiting is not None and waiting[0] == number:
            yield number, (piece for _, piece in waiting[1])
            waiting = next(groups, None)
        else:
            yield number, iter(())


def _cut_at(pieces: Iterable[Piece], ends: Sequence[int]) -> Iterator[tuple[int, Piece]]:
    number = 0
    for piece in pieces:
        at, end = piece.offset, piece.offset + piece.length
        while at < end:
            while at >= ends[number]:
                number += 1
            stop, start = min(end, ends[number]), ends[number - 1] if number else 0
            yield number, piece.part(at, stop)._replace(offset=at - start)
            at = stop


def spans_of(pieces: Iterable[Piece], size: int, grain_size: int, read_below: ReadBelow | None) -> Iterator[Span]:
    """Whole grains in guest order. A disk's last grain is whole too: zeros behind the disk's end."""
    partial: _PartialGrain | None = None
    for piece in pieces:
        for cut in _at_grains(piece, grain_size):
            if partial is not None and partial.number != cut.offset // grain_size:
                yield partial.span()
                partial = None
            if cut.length % grain_size:
                partial = partial or _PartialGrain(cut.offset // grain_size, grain_size, size, read_below)
                partial.add(cut)
            else:
                yield Span(cut.kind, cut.offset // grain_size, cut.length // grain_size, cut.data)
    if partial is not None:
        yield partial.span()


def _at_grains(piece: Piece, grain_size: int) -> Iterator[Piece]:
    """A piece as the rest of a grain, whole grains, and the start of a grain; any of them may be missing."""
    start, stop = piece.offset, piece.offset + piece.length
    first, last = min(stop, -(-start // grain_size) * grain_size), max(start, stop // grain_size * grain_size)
    if first > last:
        yield piece
        return
    for begin, end in ((start, first), (first, last), (last, stop)):
        if begin < end:
            yield piece.part(begin, end)


class _PartialGrain:
    """A grain that comes in more than one piece."""

    def __init__(self, number: int, grain_size: int, size: int, read_below: ReadBelow | None) -> None:
        self.number = number
        self._start = self._at = number * grain_size
        self._stop = min(self._start + grain_size, size)
        self._data = bytearray(grain_size)
        self._kinds: set[Kind] = set()
        self._read_below = read_below

    def add(self, piece: Piece) -> None:
        self._fill(piece.offset)
        if piece.kind is Kind.DATA:
            self._put(piece.offset, piece.data)
        self._kinds.add(piece.kind)
        self._at = piece.offset + piece.length

    def span(self) -> Span:
        self._fill(self._stop)
        kind = self._kinds.pop() if len(self._kinds) == 1 else Kind.DATA
        return Span(kind, self.number, 1, memoryview(self._data))

    def _fill(self, stop: int) -> None:
        if stop == self._at:
            return
        if self._read_below is None:
            raise ValueError(f"grain {self.number} is written only in part, and without read_parent the rest is unknown")
        data = self._read_below(self._at, stop - self._at)
        if len(data) != stop - self._at:
            raise ValueError(f"read_parent gave {len(data)} of {stop - self._at} bytes at {self._at:#x}")
        self._put(self._at, data)
        self._kinds.add(Kind.DATA)

    def _put(self, offset: int, data: Bytes) -> None:
        self._data[offset - self._start : offset - self._start + len(data)] = data


class Part(NamedTuple):
    """Grains of one kind, of one grain table, from `entry` on. DATA has grains * grain_size bytes."""

    kind: Kind
    table: int
    entry: int
    grains: int
    data: memoryview


def parts_of(
    pieces: Iterable[Piece], size: int, grain_size: int, per_table: int, read_below: ReadBelow | None
) -> Iterator[Part]:
    """The spans of a disk, cut where grain tables end."""
    for span in spans_of(pieces, size, grain_size, read_below):
        done = 0
        while done < span.grains:
            table, entry = divmod(span.first + done, per_table)
            count = min(span.grains - done, per_table - entry)
            yield Part(span.kind, table, entry, count, span.data[done * grain_size : (done + count) * grain_size])
            done += count


class Places:
    """Hands out places for grains (or tables): one after another, or shuffled by a seed with some left empty.

    A place is `step` units wide. `end` is the end of the last place in use, `limit` what it may not pass. Shuffled places come
    from windows that grow, in stretches of random length, so any number of grains can be placed without knowing how many come.
    """

    def __init__(self, start: int, step: int, *, limit: int, seed: int | None = None) -> None:
        self.end = start
        self._free = start
        self._step = step
        self._limit = limit
        self._rng = None if seed is None else Random(seed)
        self._window = _FIRST_WINDOW
        self._stretches: list[tuple[int, int]] = []

    def take(self, count: int) -> Iterator[tuple[int, int]]:
        """(place, how many places from there on) until `count` are taken."""
        while count:
            if not self._stretches:
                self._open_window(count)
            place, length = self._stretches.pop()
            used = min(length, count)
            if used < length:
                self._stretches.append((place + used * self._step, length - used))
            self.end = max(self.end, place + used * self._step)
            count -= used
            yield place, used

    def reserve(self, units: int) -> int:
        """Room for something else behind all that is handed out."""
        place = self._free
        self._advance(units)
        self.end = self._free
        return place

    def _open_window(self, count: int) -> None:
        start = self._free
        if self._rng is None:
            self._advance(count * self._step)
            self._stretches = [(start, count)]
            return
        width = max(1, min(self._window, (self._limit - start) // self._step))
        self._window = min(2 * self._window, _LAST_WINDOW)
        self._advance(width * self._step)
        cuts = [0, *sorted(self._rng.sample(range(1, width), width // 3)), width]
        self._stretches = [(start + a * self._step, b - a) for a, b in pairwise(cuts)]
        self._rng.shuffle(self._stretches)

    def _advance(self, units: int) -> None:
        if self._free + units > self._limit:
            raise ValueError(f"the format cannot place {units} more units behind {self._free}: it ends at {self._limit}")
        self._free += units


def u32_table(entries: int) -> array[int]:
    return array("I", bytes(4 * entries))


def u64_table(entries: int) -> array[int]:
    return array("Q", bytes(8 * entries))


def little_endian(table: array[int]) -> bytes:
    if sys.byteorder == "big":
        table = table[:]
        table.byteswap()
    return table.tobytes()


def write_at(out: BinaryIO, file_offset: int, data: Bytes) -> None:
    out.seek(file_offset)
    out.write(data)


def end_at(out: BinaryIO, file_size: int) -> None:
    """Make the file at least `file_size` long: readers refuse a file that is cut."""
    if out.seek(0, 2) < file_size:
        write_at(out, file_size - 1, b"\0")
