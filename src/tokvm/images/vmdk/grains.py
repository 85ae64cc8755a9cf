"""A grain directory and its grain tables, which all sparse VMDK kinds have, as rows of a map.

    directory   one place per table, 0: no table     kept as u32: 4 million of a 62 TiB seSparse are 16 MiB
    table       one entry per grain, 0: ABSENT        read when the walk comes to it, neighbouring ones at once
    grain       grain_bytes of the guest disk; the disk's last one is clipped

Each kind says by `meaning` what its entries mean. A walk decodes a batch of tables, checks every grain of it (inside the file,
outside the file's structures, no two at one place), and hands out as many rows as its caller has room for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokvm.core.extents import Column, ExtentKind, ExtentMap
from tokvm.core.units import MiB
from tokvm.images.base import ReadAt, announcer
from tokvm.images.claims import Claims
from tokvm.images.fields import bad_field

Entries = npt.NDArray[np.uint32] | npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
Region = tuple[str, int, int]  # a structure of the file: what it is, its first byte, the byte after its last
PartMap = Callable[[int, int, int | None], ExtentMap]

_BATCH = 2 * MiB  # bytes of tables decoded at once
_ANNOUNCE_FROM = 4  # that many separate reads are worth announcing


class GrainRows:
    """offset, length, file_offset (-1: ZERO) of what is not ABSENT, ascending."""

    __slots__ = ("columns",)

    def __init__(self, *columns: Column) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def take(self, which: slice) -> GrainRows:
        return GrainRows(*(column[which] for column in self.columns))

    @property
    def offset(self) -> Column:
        return self.columns[0]

    @classmethod
    def none(cls) -> GrainRows:
        return cls(*(np.empty(0, np.int64) for _ in range(3)))

    @classmethod
    def joined(cls, parts: Sequence[GrainRows]) -> GrainRows:
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate(c) for c in zip(*(part.columns for part in parts), strict=True))) if parts else cls.none()


@dataclass(frozen=True, slots=True, eq=False)
class Directory:
    """Where each table is: at origin + place * step; place 0: there is none. entries_at: where the directory itself is."""

    place: npt.NDArray[np.uint32]
    entries_at: int
    entry_bytes: int
    origin: int
    step: int

    def offset(self, tables: Column) -> Column:
        return self.origin + self.place[tables].astype(np.int64) * self.step

    @property
    def present(self) -> Column:
        return np.flatnonzero(self.place)


class Structures:
    """The bytes of a file where no grain may be."""

    def __init__(self, regions: Iterable[Region], tables: Column, table_bytes: int) -> None:
        some = [(begin, end) for _, begin, end in regions if begin < end]
        begins = np.concatenate((np.array([begin for begin, _ in some], np.int64), tables))
        ends = np.concatenate((np.array([end for _, end in some], np.int64), tables + table_bytes))
        order = np.argsort(begins, kind="stable")
        self.begin = begins[order]
        self._end = np.maximum.accumulate(ends[order])

    def hits(self, begin: Column, end: Column) -> Mask:
        """Which of the ranges reach into a structure?"""
        before = np.searchsorted(self.begin, end) - 1
        return (before >= 0) & (self._end[np.maximum(before, 0)] > begin)


class GrainTables(ABC):
    """The map of one sparse extent file; implements `parts.Part` but for `describe`."""

    entry_type: str  # numpy's, little-endian
    entries: int  # of a table, a power of two
    warnings: tuple[str, ...] = ()

    def __init__(self, file: ReadAt, directory: Directory, *, size: int, grain_bytes: int, structures: Structures) -> None:
        self.file = file  # where the rows' file offsets are good
        self.size = size
        self.grain_bytes = grain_bytes
        self.directory = directory
        self.structures = structures
        self._table_file = file
        self._announce = announcer(file)

    @property
    def table_bytes(self) -> int:
        return self.entries * np.dtype(self.entry_type).itemsize

    @property
    def span(self) -> int:
        """Guest bytes of a table."""
        return self.entries * self.grain_bytes

    @property
    def grains(self) -> int:
        return -(-self.size // self.grain_bytes)

    @abstractmethod
    def meaning(self, entries: Entries, grain: Column) -> Column:
        """The file offset of each grain, -1 for ZERO, of entries that are not 0. `faults` knows what is wrong with them."""

    @abstractmethod
    def faults(self, entries: Entries, where: Column) -> Iterable[tuple[Mask, str]]:
        """(which entries are wrong, what would be allowed) beyond what is asked of every grain."""

    def walker(self) -> PartMap:
        return _Walk(self, self.claims()).map_part

    def map_part(self, start: int, stop: int, max_rows: int | None) -> ExtentMap:
        return _Walk(self, None).map_part(start, stop, max_rows)

    def claims(self) -> Claims | None:
        return Claims(self.file.size, self.grain_bytes)

    def batches(self, tables: Column) -> Iterator[Column]:
        step = max(1, _BATCH // self.table_bytes)
        for at in range(0, len(tables), step):
            yield tables[at : at + step]

    def used_entries(self, tables: Column) -> tuple[Entries, Column]:
        """(entries that are not 0, the grain of each) of these tables; what lies behind the disk's end is not looked at."""
        raw = self._read_tables(tables).ravel()
        index = np.flatnonzero(raw)
        shift = (tables - np.arange(len(tables))) * self.entries
        grain = index + shift[index // self.entries]
        if len(grain) and int(grain[-1]) >= self.grains:
            keep = slice(0, int(np.searchsorted(grain, self.grains)))
            index, grain = index[keep], grain[keep]
        return raw[index], grain

    def rows(self, tables: Column, claims: Claims | None) -> GrainRows:
        """The rows of these tables, whose grains are all checked."""
        entries, grain = self.used_entries(tables)
        if not len(entries):
            return GrainRows.none()
        where = self.meaning(entries, grain)
        for wrong, allowed in self.faults(entries, where):
            self._refuse(wrong, entries, grain, allowed)
        self.check_grains(entries, grain, where, claims)
        breaks = np.ones(len(grain), np.bool_)
        shift = np.where(where < 0, -1, where - grain * self.grain_bytes)  # stays the same where guest and file go on together
        breaks[1:] = (np.diff(grain) != 1) | (np.diff(shift) != 0)
        head = np.flatnonzero(breaks)
        length = np.diff(head, append=len(grain)) * self.grain_bytes
        return GrainRows(grain[head] * self.grain_bytes, length, where[head])

    def check_grains(self, entries: Entries, grain: Column, where: Column, claims: Claims | None) -> None:
        """Every grain inside the file (the disk's last one: as far as the disk needs it), outside of structures, alone."""
        data = where >= 0
        if not data.all():
            entries, grain, where = entries[data], grain[data], where[data]
        behind = where > self.file.size - self.grain_bytes
        if behind.any():
            needed = np.minimum(self.size - grain * self.grain_bytes, self.grain_bytes)
            behind &= where + needed > self.file.size
            self._refuse(behind, entries, grain, f"a grain that ends at or before the file's end at {self.file.size:#x}")
        inside = self.structures.hits(where, where + self.grain_bytes)
        self._refuse(inside, entries, grain, "a grain outside of headers, descriptor, directories and tables")
        taken = None if claims is None else claims.take(where)
        if taken is not None:
            mask = np.zeros(len(grain), np.bool_)
            mask[taken] = True
            self._refuse(mask, entries, grain, "a place of the file that no other grain takes")

    def _refuse(self, wrong: Mask, entries: Entries, grain: Column, allowed: str) -> None:
        if not wrong.any():
            return
        place = int(np.argmax(wrong))
        raise self.bad_entry(int(grain[place]), int(entries[place]), allowed)

    def bad_entry(self, grain: int, entry: int, allowed: str) -> Exception:
        table, index = divmod(grain, self.entries)
        at = int(self.directory.offset(np.array([table]))[0]) + index * np.dtype(self.entry_type).itemsize
        return bad_field(self._table_file.name, at, f"entry {index} of grain table {table}", f"{entry:#x}", allowed)

    def _read_tables(self, tables: Column) -> Entries:
        """One row per table. Tables that lie one behind the other in the file are one read."""
        offset = self.directory.offset(tables)
        order = np.argsort(offset, kind="stable")
        ascending = offset[order]
        raw = np.empty((len(tables), self.entries), self.entry_type)
        view = raw.view(np.uint8).reshape(-1).data
        head = np.flatnonzero(np.diff(ascending, prepend=-1) != self.table_bytes)
        head[:1] = 0
        reads = list(zip(head.tolist(), [*head[1:].tolist(), len(tables)], ascending[head].tolist(), strict=True))
        if len(reads) >= _ANNOUNCE_FROM:
            for first, last, at in reads:
                self._announce(at, (last - first) * self.table_bytes)
        for first, last, at in reads:
            self._table_file.read_into(at, view[first * self.table_bytes : last * self.table_bytes])
        if bool((order[1:] > order[:-1]).all()):
            return raw
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return raw[back]


class _Walk:
    """One walk front to back; each table is decoded once. GrainRows that the caller had no room for wait here."""

    def __init__(self, tables: GrainTables, claims: Claims | None) -> None:
        self._tables = tables
        self._claims = claims
        self._held = GrainRows.none()
        self._next: int | None = None  # the first table that was not decoded

    def map_part(self, start: int, stop: int, max_rows: int | None) -> ExtentMap:
        span = self._tables.span
        if self._next is None:
            self._next = start // span
        found: list[GrainRows] = []
        room = max_rows
        while True:
            ready = self._held.take(slice(0, int(np.searchsorted(self._held.offset, stop))))
            if room is not None and len(ready) > room:
                stop = int(ready.offset[room])
                ready = ready.take(slice(0, room))
            found.append(ready)
            if room is not None:
                room -= len(ready)
            if self._next * span >= stop:
                break
            self._held = self._load(-(-stop // span))
        rows = GrainRows.joined(found)
        self._keep_from(stop)
        return _as_map(rows, start, stop)

    def _load(self, last: int) -> GrainRows:
        """The rows of the next batch of tables before `last`."""
        assert self._next is not None
        present = self._next + np.flatnonzero(self._tables.directory.place[self._next : last])
        batch = next(self._tables.batches(present), present)
        self._next = last if len(batch) == len(present) else int(batch[-1]) + 1
        return self._tables.rows(batch, self._claims) if len(batch) else GrainRows.none()

    def _keep_from(self, stop: int) -> None:
        offset, length, _ = self._held.columns
        self._held = self._held.take(slice(int(np.searchsorted(offset + length, stop, side="right")), None))


def _as_map(rows: GrainRows, start: int, stop: int) -> ExtentMap:
    if not len(rows):
        return ExtentMap.empty(start, stop)
    offset, length, where = rows.columns
    kind = np.where(where < 0, int(ExtentKind.ZERO), int(ExtentKind.DATA))
    return ExtentMap.build(start, stop, offset, length, kind, where)


def check_tables(directory: Directory, *, table_bytes: int, limit: int, regions: Sequence[Region], name: str) -> None:
    """Every table inside the file's `limit` bytes, outside of its structures and apart from the others."""
    present = directory.present
    begin = directory.offset(present)
    order = np.argsort(begin, kind="stable")
    begin, present = begin[order], present[order]
    end = begin + table_bytes
    tests: list[tuple[Mask, str]] = [(end > limit, f"a table that ends at or before {limit:#x}")]
    tests += [
        ((begin < to) & (end > at), f"a table outside the {what} at {at:#x} to {to:#x}") for what, at, to in regions if at < to
    ]
    tests.append((np.concatenate((np.diff(begin) < table_bytes, [False])), "tables that do not overlap one another"))
    for wrong, allowed in tests:
        if wrong.any():
            table = int(present[np.argmax(wrong)])
            at = directory.entries_at + table * directory.entry_bytes
            raise bad_field(name, at, f"grain directory entry {table}", f"{int(directory.place[table]):#x}", allowed)


def check_regions(regions: Sequence[Region], *, size: int, name: str) -> None:
    """Every structure inside the file and apart from the others."""
    last: Region = ("", 0, 0)
    for what, begin, end in sorted(regions, key=lambda region: region[1:]):
        if begin >= end:
            continue
        if begin < last[2]:
            raise bad_field(name, begin, f"the {what}", f"at {begin:#x}", f"behind the {last[0]}, which ends at {last[2]:#x}")
        if end > size:
            raise bad_field(name, begin, f"the {what}", f"at {begin:#x} to {end:#x}", f"inside the file's {size} bytes")
        last = (what, begin, end)
