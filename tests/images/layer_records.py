"""What each format's layer file must say after what the guest did: the records of `disk_model`, one per way to keep a layer.

WholeRecord    fixed and flat disks
BitmapRecord   VHD: a bit per sector of the blocks that are in the file
StateRecord    VHDX: a state per block, bits only where it is PARTIALLY_PRESENT
GrainRecord    VMDK's sparse kinds: whole grains, filled up by copy on write
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum

from tests.images.disk_model import Claim, Range, Record

from tokvm.core.extents import ExtentKind


class WholeRecord(Record):
    """A fixed disk: every byte is in the file."""

    def write(self, offset: int, length: int) -> None:
        """Nothing to remember."""

    def claims(self) -> list[Claim]:
        return [(0, self.size, ExtentKind.DATA)]


class UnitRecord(Record):
    """What formats with blocks or grains share: units, and the sectors of each that were written, a bit per sector."""

    def __init__(self, size: int, *, base: bool, unit: int, sector: int) -> None:
        super().__init__(size, base=base)
        self.unit = unit
        self.sector = sector
        self.bits: dict[int, int] = {}

    def touched(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """(unit, bits of its sectors in the range)."""
        for number in range(offset // self.unit, -(-(offset + length) // self.unit)):
            first = max(offset - number * self.unit, 0) // self.sector
            last = min(offset + length - number * self.unit, self.unit) // self.sector
            yield number, (1 << last) - (1 << first)

    def whole(self, number: int) -> int:
        """The bits of all of the unit's sectors that the disk has."""
        return (1 << self.length(number) // self.sector) - 1

    def length(self, number: int) -> int:
        return min(self.unit, self.size - number * self.unit)

    def range_of(self, number: int) -> Range:
        return number * self.unit, self.length(number)

    def bit_ranges(self, number: int, bits: int) -> Iterator[Range]:
        """The runs of set bits, as ranges of the disk."""
        start = number * self.unit
        while bits:
            clear = (bits & -bits).bit_length() - 1
            bits >>= clear
            run = (~bits & bits + 1).bit_length() - 1
            yield start + clear * self.sector, run * self.sector
            start += (clear + run) * self.sector
            bits >>= run


class BitmapRecord(UnitRecord):
    """VHD: a block is in the file when one of its sectors was written. No word for zeros but zeros; trims are lost.

    In a base, the other sectors of a block that is in the file are zeros; in a child they are the parent's."""

    def write(self, offset: int, length: int) -> None:
        for number, bits in self.touched(offset, length):
            self.bits[number] = self.bits.get(number, 0) | bits

    def claims(self) -> list[Claim]:
        found: list[Claim] = []
        for number, bits in self.bits.items():
            found += [(*run, ExtentKind.DATA) for run in self.bit_ranges(number, bits)]
            if self.base:
                found += [(*run, ExtentKind.ZERO) for run in self.bit_ranges(number, self.whole(number) & ~bits)]
        return found


class State(Enum):
    """Of a VHDX block, by its number in the file."""

    NOT_PRESENT = 0
    UNDEFINED = 1
    ZERO = 2
    UNMAPPED = 3
    FULLY_PRESENT = 6
    PARTIALLY_PRESENT = 7


_WITHOUT_BYTES = (State.UNDEFINED, State.ZERO, State.UNMAPPED)


class StateRecord(UnitRecord):
    """VHDX. Whole blocks may become ZERO, UNMAPPED or UNDEFINED; a child's block becomes FULLY_PRESENT when all of it is
    written, or when there was nothing of the parent under it any more. A trim of less than a block is lost."""

    def __init__(self, size: int, *, base: bool, unit: int, sector: int, rng: random.Random) -> None:
        super().__init__(size, base=base, unit=unit, sector=sector)
        self.states: dict[int, State] = {}
        self._rng = rng

    def write(self, offset: int, length: int) -> None:
        for number, bits in self.touched(offset, length):
            state = self.states.get(number, State.NOT_PRESENT)
            self.bits[number] = self.bits.get(number, 0) | bits if state is State.PARTIALLY_PRESENT else bits
            if self.base or state in (*_WITHOUT_BYTES, State.FULLY_PRESENT) or bits == self.whole(number):
                self.states[number] = State.FULLY_PRESENT
            elif self.bits[number] == self.whole(number):
                self.states[number] = self._rng.choice((State.FULLY_PRESENT, State.PARTIALLY_PRESENT))
            else:
                self.states[number] = State.PARTIALLY_PRESENT

    def zero(self, offset: int, length: int) -> None:
        for number, bits in self.touched(offset, length):
            if bits == self.whole(number) and self._rng.random() < 0.8:
                self.states[number] = State.ZERO
            else:
                first = number * self.unit
                self.write(max(first, offset), min(offset + length, first + self.unit) - max(first, offset))

    def trim(self, offset: int, length: int) -> list[Range]:
        without_bytes = (*_WITHOUT_BYTES, State.NOT_PRESENT) if self.base else _WITHOUT_BYTES
        found = [number for number, bits in self.touched(offset, length) if bits == self.whole(number)]
        for number in found:
            self.states[number] = self._rng.choice(without_bytes)
        return [self.range_of(number) for number in found]

    def claims(self) -> list[Claim]:
        found: list[Claim] = []
        for number, state in self.states.items():
            if state is State.PARTIALLY_PRESENT:
                found += [(*run, ExtentKind.DATA) for run in self.bit_ranges(number, self.bits[number])]
            elif state is State.FULLY_PRESENT:
                found.append((*self.range_of(number), ExtentKind.DATA))
            elif state in _WITHOUT_BYTES:
                found.append((*self.range_of(number), ExtentKind.ZERO))
        return found


class GrainRecord(UnitRecord):
    """VMDK: a grain is in the file as a whole; what the guest did not write of it was copied from below at the first write.

    zeros: the format has entries for zeroed grains; trims: and for unmapped ones, which read as zeros, too. Otherwise zeros are
    written and trims are lost. `bits` are what the guest wrote, or all of a grain under which nothing is below any more."""

    def __init__(self, size: int, *, base: bool, unit: int, sector: int, zeros: bool, trims: bool) -> None:
        super().__init__(size, base=base, unit=unit, sector=sector)
        self.zeroed: set[int] = set()
        self.unmapped: set[int] = set()
        self._zeros = zeros
        self._trims = trims

    def write(self, offset: int, length: int) -> None:
        for number, bits in self.touched(offset, length):
            gone = number in self.zeroed or number in self.unmapped
            self.bits[number] = self.whole(number) if gone else self.bits.get(number, 0) | bits
            self.zeroed.discard(number)
            self.unmapped.discard(number)

    def zero(self, offset: int, length: int) -> None:
        for number, bits in self.touched(offset, length):
            if self._zeros and bits == self.whole(number):
                self._drop(number, self.zeroed)
            else:
                first = number * self.unit
                self.write(max(first, offset), min(offset + length, first + self.unit) - max(first, offset))

    def trim(self, offset: int, length: int) -> list[Range]:
        found = [number for number, bits in self.touched(offset, length) if self._trims and bits == self.whole(number)]
        for number in found:
            self._drop(number, self.unmapped)
        return [self.range_of(number) for number in found]

    def _drop(self, number: int, to: set[int]) -> None:
        self.bits.pop(number, None)
        self.zeroed.discard(number)
        self.unmapped.discard(number)
        to.add(number)

    def claims(self) -> list[Claim]:
        data: list[Claim] = [(*self.range_of(number), ExtentKind.DATA) for number in self.bits]
        return data + [(*self.range_of(number), ExtentKind.ZERO) for number in self.zeroed | self.unmapped]

    def written(self) -> list[Range]:
        """What the guest wrote: the bytes around it in its grains come from below."""
        return merged(run for number in sorted(self.bits) for run in self.bit_ranges(number, self.bits[number]))

    def ranges(self, numbers: Iterable[int]) -> list[Range]:
        return merged(self.range_of(number) for number in sorted(numbers))


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Ascending ranges, neighbours made one."""
    found: list[Range] = []
    for offset, length in ranges:
        if found and sum(found[-1]) == offset:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((offset, length))
    return found


def merged_claims(claims: Sequence[Claim]) -> list[Claim]:
    """Claims in order, neighbours of one kind made one: what two ways to say the same have in common."""
    found: list[Claim] = []
    for offset, length, kind in sorted(claims):
        if found and found[-1][0] + found[-1][1] == offset and found[-1][2] is kind:
            found[-1] = (found[-1][0], found[-1][1] + length, kind)
        else:
            found.append((offset, length, kind))
    return found
