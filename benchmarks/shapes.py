"""What the disks of the formats part hold, and the flat raw file that every copy of them is compared with.

large      base + 2 children: `inputs.large_layers`, runs of 1 to 16 MiB
small      the same base + 2 children of 4 KiB random runs, 1/16 of the base's data in each
pages      one layer: every other page of 4 KiB, at random
packed     one layer of what deflate halves: every other stretch of 64 MiB
packed-grains   the same content: every other grain of 64 KiB, at random

Half of the disk is data in all of them, so one dense file stands for what the kernel would have to move.
"""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.inputs import Extents, KiB, content, large_layers, make_noise, small_layers
from tokvm.testing.vhd_writer import Run, runs_of

SMALL_SHARE = 16
GRAIN = 64 * KiB
_TEXT = b"the quick brown fox jumps over the lazy dog; 0123456789 and so on\r\n"
_DENSE_SEED = 5


@dataclass(frozen=True, slots=True)
class Shape:
    """The layers of a disk, base first. `flat`: the raw file of what they read as."""

    name: str
    size: int
    layers: tuple[tuple[tuple[int, int], ...], ...]
    flat: str
    read: Callable[[int, int, int], bytes]

    @property
    def payload(self) -> int:
        """Children lie within the base's data, by construction."""
        return self.payload_to(self.size)

    def payload_to(self, end: int) -> int:
        """Bytes of data below the guest offset `end`."""
        return sum(max(0, min(offset + length, end) - offset) for offset, length in self.layers[0])

    def runs(self, layer: int) -> Iterator[Run]:
        """What one layer of the chain holds."""
        return runs_of(self.layers[layer], partial(self.read, layer))

    def merged_runs(self) -> Iterator[Run]:
        """What all of them together hold, for formats without children. Mapped, so who gathers it needs no memory."""
        with open(self.flat, "rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        yield from runs_of(self.layers[0], lambda offset, length: view[offset : offset + length])


def make_shape(folder: Path, name: str, size: int) -> Shape:
    """The shape, and its flat file, if it is not there yet."""
    noise = make_noise(size)
    read = partial(content, halved(noise) if name.startswith("packed") else noise)
    layers = tuple(tuple(layer) for layer in _LAYERS[name](size))
    shape = Shape(name, size, layers, str(folder / flat_name(name)), read)
    if not Path(shape.flat).exists():
        _flatten(shape)
    return shape


def flat_name(shape: str) -> str:
    return f"flat-{shape}.raw"


def make_dense(path: Path, size: int) -> None:
    """As many bytes as the shapes' disks have data."""
    noise = make_noise(_DENSE_SEED)
    with path.open("wb") as out:
        for at in range(0, size, len(noise)):
            out.write(noise[: min(len(noise), size - at)])


def _flatten(shape: Shape) -> None:
    path = Path(shape.flat)
    part = path.with_suffix(".part")
    with part.open("wb") as out:
        out.truncate(shape.size)
        for layer in range(len(shape.layers)):
            for offset, data in shape.runs(layer):
                out.seek(offset)
                out.write(data)
    part.rename(path)


def halved(noise: bytes) -> bytes:
    """The same length, half of it text: deflate makes about half of it, as of a guest's programs and documents."""
    text = _TEXT * (2 * KiB // len(_TEXT) + 1)
    return b"".join(noise[at : at + 2 * KiB] + text[: 2 * KiB] for at in range(0, len(noise), 4 * KiB))


def _at_random(size: int, unit: int) -> list[Extents]:
    """Half of the disk's units, neighbours as one run."""
    chosen = sorted(random.Random(unit).sample(range(size // unit), size // unit // 2))
    runs: Extents = []
    for number in chosen:
        at = number * unit
        if runs and sum(runs[-1]) == at:
            runs[-1] = (runs[-1][0], runs[-1][1] + unit)
        else:
            runs.append((at, unit))
    return [runs]


_LAYERS: dict[str, Callable[[int], list[Extents]]] = {
    "large": large_layers,
    "small": partial(small_layers, share=SMALL_SHARE),
    "pages": partial(_at_random, unit=4 * KiB),
    "packed": lambda size: [large_layers(size)[0]],
    "packed-grains": partial(_at_random, unit=GRAIN),
}
