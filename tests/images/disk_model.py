"""A plain model of a disk with snapshots: bytes, and what a hypervisor puts into each layer's file.

    History   what the guest and the administrator did, per layer: writes, zeroing, trims, growth. Known from a seed
       │ play
    Layer     the disk's content when the layer was frozen, and its Record: what the layer's file must say
    Record    one per way to keep a layer, in `layer_records`

Records keep no bytes. What a file holds is the content's bytes at the places that its record calls DATA: sectors it does not
name were not written, grains are filled up by copy on write, and a snapshot's parent does not change any more.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from tokvm.core.extents import ExtentKind

Range = tuple[int, int]
Claim = tuple[int, int, ExtentKind]


class Content:
    """The bytes of a disk, in pages; a page that is not there is zeros. So a disk may have terabytes."""

    PAGE = 1 << 16

    def __init__(self, size: int, pages: dict[int, bytearray] | None = None) -> None:
        self.size = size
        self._pages = pages or {}

    def copy(self) -> Content:
        return Content(self.size, {number: bytearray(page) for number, page in self._pages.items()})

    def read(self, offset: int, length: int) -> bytes:
        raw = bytearray(length)
        for number, inside, at, take in self._pieces(offset, length):
            page = self._pages.get(number)
            if page is not None:
                raw[at : at + take] = page[inside : inside + take]
        return bytes(raw)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        for number, inside, at, take in self._pieces(offset, len(data)):
            page = self._pages.setdefault(number, bytearray(self.PAGE))
            page[inside : inside + take] = data[at : at + take]

    def zero(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > self.size:
            raise ValueError(f"{offset:#x}+{length:#x} is not inside of {self.size:#x}")
        end = offset + length
        for number in [number for number in self._pages if offset < (number + 1) * self.PAGE and number * self.PAGE < end]:
            first, last = max(offset - number * self.PAGE, 0), min(end - number * self.PAGE, self.PAGE)
            self._pages[number][first:last] = bytes(last - first)

    def difference(self, other: Content) -> str:
        """Where the two differ first; "" if they do not."""
        if self.size != other.size:
            return f"sizes {self.size} and {other.size}"
        none = bytes(self.PAGE)
        for number in sorted(self._pages.keys() | other._pages.keys()):
            mine, its = self._pages.get(number, none), other._pages.get(number, none)
            if mine != its:
                inside = next(at for at in range(self.PAGE) if mine[at] != its[at])
                return f"byte {number * self.PAGE + inside:#x}: {mine[inside]:#x} and {its[inside]:#x}"
        return ""

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """(page, offset in it, offset in the range, length)."""
        if offset < 0 or offset + length > self.size:
            raise ValueError(f"{offset:#x}+{length:#x} is not inside of {self.size:#x}")
        done = 0
        while done < length:
            number, inside = divmod(offset + done, self.PAGE)
            take = min(length - done, self.PAGE - inside)
            yield number, inside, done, take
            done += take


class Action(Enum):
    WRITE = "write"
    ZERO = "zero"  # write zeroes: reads as zeros afterwards
    TRIM = "trim"  # a hint: the format decides what of it reads as zeros afterwards
    GROW = "grow"  # to `length` bytes


@dataclass(frozen=True, slots=True)
class Op:
    action: Action
    offset: int
    length: int
    seed: int = 0

    def data(self) -> bytes:
        """What is written: mostly noise, sometimes one byte, sometimes zeros."""
        rng = random.Random(self.seed)
        kind = rng.random()
        if kind < 0.7:
            return rng.randbytes(self.length)
        return bytes([rng.randrange(256) if kind < 0.85 else 0]) * self.length


@dataclass(frozen=True, slots=True)
class Shape:
    """What a format can do, for the histories to aim at. unit: its block or grain, bytes; borders: offsets to write around."""

    sector: int
    unit: int
    size: int
    borders: tuple[int, ...] = ()
    grows: bool = True
    largest: int = 1 << 22


@dataclass(frozen=True, slots=True)
class History:
    size: int
    layers: tuple[tuple[Op, ...], ...]


def random_history(rng: random.Random, shape: Shape, *, depth: int, ops: int = 8) -> History:
    size, layers = shape.size, []
    for _ in range(depth):
        layer = []
        for _ in range(rng.randrange(ops + 1)):
            action = rng.choices(list(Action), (60, 15, 20, 5 if shape.grows else 0))[0]
            if action is Action.GROW:
                size += shape.sector * rng.choice((1, 7, 8, shape.unit // shape.sector, rng.randrange(1, 100)))
                layer.append(Op(action, 0, size))
            else:
                layer.append(Op(action, *_some_range(rng, shape, size), rng.getrandbits(48)))
        layers.append(tuple(layer))
    return History(shape.size, tuple(layers))


def _some_range(rng: random.Random, shape: Shape, size: int) -> Range:
    """Sectors: single ones, around borders, whole units, the first and the last of the disk."""
    sector, unit = shape.sector, shape.unit
    borders = [border for border in (*shape.borders, size // unit // 2 * unit, size // unit * unit) if border < size]
    count = rng.choice((1, 1, 2, 7, 8, 9, rng.randrange(1, 200)))
    match rng.randrange(6):
        case 0:
            start, length = rng.choice((0, size - sector, size - sector * min(count, size // sector))), sector * count
        case 1:
            start, length = rng.choice(borders) - sector * rng.randrange(count + 1), sector * count
        case 2:
            start, length = rng.choice(borders) // unit * unit, unit * rng.randrange(1, 4)
        case 3:
            start = rng.randrange(-(-size // unit)) * unit
            length = unit * rng.randrange(1, 3)
        case _:
            start = rng.choice((0, *borders)) + sector * rng.randrange(max(1, min(size, shape.largest) // sector))
            length = sector * count
    start = min(max(start, 0), size - sector)
    return start, min(length, size - start, shape.largest)


class Record(ABC):
    """What one layer's file says; made when the layer is begun."""

    def __init__(self, size: int, *, base: bool) -> None:
        self.size = size
        self.base = base

    @abstractmethod
    def write(self, offset: int, length: int) -> None:
        """The guest wrote to this range."""

    def zero(self, offset: int, length: int) -> None:
        """The guest asked for zeros in this range."""
        self.write(offset, length)

    def trim(self, offset: int, length: int) -> list[Range]:
        """The guest does not need this range any more. Returns what reads as zeros now; the rest is as it was."""
        return []

    def grow(self, size: int) -> None:
        self.size = size

    @abstractmethod
    def claims(self) -> list[Claim]:
        """What the file says, in any order: no DATA or ZERO more than this, and none less."""

    def data(self) -> list[Range]:
        return [(offset, length) for offset, length, kind in sorted(self.claims()) if kind is ExtentKind.DATA]


@dataclass(frozen=True, slots=True)
class Layer:
    record: Record
    content: Content

    @property
    def size(self) -> int:
        return self.content.size

    def runs(self, ranges: Iterable[Range] | None = None) -> list[tuple[int, bytes]]:
        """The bytes of these ranges, or of all that the record calls DATA."""
        found = self.record.data() if ranges is None else ranges
        return [(offset, self.content.read(offset, length)) for offset, length in found]


def play(history: History, begin: Callable[[int, bool], Record]) -> list[Layer]:
    """Do what the history says. begin(size, base) makes the record of a new layer."""
    content = Content(history.size)
    layers: list[Layer] = []
    for ops in history.layers:
        record = begin(content.size, not layers)
        for op in ops:
            _do(op, record, content)
        layers.append(Layer(record, content.copy()))
    return layers


def _do(op: Op, record: Record, content: Content) -> None:
    match op.action:
        case Action.WRITE:
            content.write(op.offset, op.data())
            record.write(op.offset, op.length)
        case Action.ZERO:
            content.zero(op.offset, op.length)
            record.zero(op.offset, op.length)
        case Action.TRIM:
            for offset, length in record.trim(op.offset, op.length):
                content.zero(offset, length)
        case Action.GROW:
            content.size = op.length
            record.grow(op.length)
