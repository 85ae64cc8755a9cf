"""How inputs are changed: libFuzzer's own changes, fields put wrong, and checksums made right again behind them.

Without the last step nearly every change ends at a checksum, and the code behind it is never reached.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fuzz.windows import Windows
from tokvm.core.units import KiB
from tokvm.images.vhd.structs import checksum
from tokvm.testing.vhdx_structs import sealed

Mutate = Callable[[bytes, int], bytes]  # libFuzzer's: data, the largest length
Repair = Callable[[Windows, bytearray], None]
_SMALL = [*range(17), 63, 64, 65, 127, 128, 255, 256, 511, 512, 513, 4095, 4096, 4097]
_POWERS = [1 << bit for bit in range(9, 64)]
VALUES = [*_SMALL, *_POWERS, *(power - 1 for power in _POWERS), *(power - 512 for power in _POWERS), (1 << 64) - 1]
_GRAIN_LENGTHS = (0, 1, 511, 512, 513, 4095, 4096, 4097, 65536)


@dataclass(frozen=True, slots=True)
class Mutator:
    """For inputs of these windows. order: of the format's integers. grains: offsets of compressed grains."""

    windows: Windows
    order: Literal["little", "big"]
    repair: Repair | None = None
    grains: tuple[int, ...] = ()

    def mutate(self, data: bytes, seed: int, library: Mutate) -> bytes:
        rng = random.Random(seed)
        raw = self.windows.fit(data)
        if rng.random() < 0.4:
            raw = self.windows.fit(library(bytes(raw), self.windows.length))
        else:
            for _ in range(rng.choice((1, 1, 2, 3))):
                self._put_wrong(rng, raw)
        if self.repair is not None and rng.random() < 0.95:
            self.repair(self.windows, raw)
        return bytes(raw)

    def _put_wrong(self, rng: random.Random, raw: bytearray) -> None:
        """One field: another value, one bit, another field's value, or one more or less."""
        width = rng.choice((1, 2, 4, 4, 8, 8))
        at = self._place(rng, width)
        value = int.from_bytes(raw[at : at + width], self.order)
        match rng.randrange(6 if self.grains else 5):
            case 0:
                value ^= 1 << rng.randrange(8 * width)
            case 1:
                value += rng.choice((-512, -8, -1, 1, 2, 8, 512))
            case 2:
                other = self._place(rng, width)
                value = int.from_bytes(raw[other : other + width], self.order)
            case 3 | 4:
                value = rng.choice(VALUES)
            case _:
                self._another_grain(rng, raw)
                return
        raw[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, self.order)

    def _place(self, rng: random.Random, width: int) -> int:
        """Of a field in the input: aligned in its window, at times near the window's start; at times the file's size."""
        if rng.random() < 0.05:
            return 0
        at, _, length = rng.choice(list(self.windows.spans()))
        last = max(0, length - width) // width
        place = rng.randint(0, last) if rng.random() < 0.7 else min(last, rng.randint(0, 4))
        return at + place * width

    def _another_grain(self, rng: random.Random, raw: bytearray) -> None:
        """A whole zlib stream of another length, with its size before it or with another."""
        packed = zlib.compress(bytes(rng.choice(_GRAIN_LENGTHS)))
        at, size = rng.choice(self.grains), rng.choice((len(packed), len(packed), len(packed) - 1, 1 << 31))
        self.windows.put(raw, at + 8, size.to_bytes(4, "little") + packed)


def repair_vhd(windows: Windows, raw: bytearray) -> None:
    """Footers and header. The header's place is where writers put it; elsewhere it is nothing to repair."""
    file = windows.expand(bytes(raw))
    for at, length, field in ((0, 512, 64), (512, 1024, 36), (file.size - 512, 512, 64)):
        if 0 <= at <= file.size - length:
            right = checksum(file.read(at, length), field)
            windows.put(raw, at + field, right.to_bytes(4, "big"))


def repair_vhdx(windows: Windows, raw: bytearray) -> None:
    """Headers, region tables, and log entries where the seeds have them, as long as they say they are."""
    places = [(64 * KiB, 4 * KiB), (128 * KiB, 4 * KiB), (192 * KiB, 64 * KiB), (256 * KiB, 64 * KiB)]
    file = windows.expand(bytes(raw))
    for at in (offset for _, offset, _ in windows.spans() if 1 << 20 <= offset < 2 << 20):
        head = file.read(at, 12) if at + 12 <= file.size else b""
        length = int.from_bytes(head[8:12], "little")
        if head[:4] == b"loge" and 0 < length <= 64 * KiB and not length % (4 * KiB):
            places.append((at, length))
    for at, length in places:
        if at + length <= file.size:
            windows.put(raw, at + 4, sealed(file.read(at, length))[4:8])
