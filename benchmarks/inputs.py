"""The images that are copied: made once in the working folder, and again only when their recipe changes.

large    base + 2 children, runs of 1 to 16 MiB           what most disks are
small    the same base + 2 children of 4 KiB random runs  the worst case: a database's deltas

    base     every other stretch of 64 MiB is data (half of the disk)
    child 1  a quarter of the base's data, overwritten        child 2  an eighth

NAME-{0,1,2}.vhd   the chain                 NAME-flat.raw   what it reads as
NAME-flat.vhd      the same content as one dynamic VHD, made by qemu-img: what qemu-img can read
"""

from __future__ import annotations

import json
import random
import subprocess
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from uuid import UUID

from tokvm.testing.vhd_writer import blocks_of, runs_of, write_vhd

KiB = 1024
MiB = KiB * KiB
RECIPE = 3
STRETCH = 64 * MiB
_NOISE_SIZE = 32 * MiB
Extents = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain's files and what they hold. payload: bytes of the merged chain that are data."""

    name: str
    size: int
    payload: int
    layers: tuple[str, ...]
    flat_raw: str
    flat_vhd: str

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(Path(layer) for layer in self.layers)


def large_runs(folder: Path, size: int) -> Chain:
    return _chain(folder, "large", size, large_layers(size))


def small_runs(folder: Path, size: int) -> Chain:
    return _chain(folder, "small", size, small_layers(size))


def large_layers(size: int) -> list[Extents]:
    source = random.Random(1)
    base = [(at, STRETCH) for at in range(0, size, 2 * STRETCH)]
    return [base, _some_runs(base, source, 4), _some_runs(base, source, 8)]


def small_layers(size: int, share: int = 64) -> list[Extents]:
    """Children of 4 KiB pieces: 1/share of the base's data in each."""
    source = random.Random(2)
    base = [(at, STRETCH) for at in range(0, size, 2 * STRETCH)]
    places = [at for start, length in base for at in range(start, start + length, 4 * KiB)]
    return [base, *([(at, 4 * KiB) for at in sorted(source.sample(places, len(places) // share))] for _ in range(2))]


def spread(folder: Path, size: int, payload: int) -> Chain:
    """One layer over another: `payload` bytes in runs of 2 MiB, spread evenly over a disk of any size. No flat copies."""
    step = size // (payload // (2 * MiB)) // MiB * MiB
    base = [(at, 2 * MiB) for at in range(0, size - 2 * MiB + 1, step)]
    child = [(at + MiB, 4 * KiB) for at, _ in base]
    return _chain(folder, f"spread-{size >> 30}g", size, [base, child], flat=False)


def _some_runs(within: Extents, source: random.Random, share: int) -> Extents:
    """About 1/share of these extents, in runs of 1 to 16 MiB."""
    found: Extents = []
    for start, length in within:
        at = start
        while at < start + length:
            step = min(source.choice((1, 2, 4, 8, 16)) * MiB, start + length - at)
            if source.randrange(share) == 0:
                found.append((at, step))
            at += step
    return found


def _chain(folder: Path, name: str, size: int, layers: list[Extents], *, flat: bool = True) -> Chain:
    chain = Chain(
        name,
        size,
        _union(layers),
        tuple(str(folder / f"{name}-{i}.vhd") for i in range(len(layers))),
        str(folder / f"{name}-flat.raw"),
        str(folder / f"{name}-flat.vhd"),
    )
    note = folder / f"{name}.json"
    recipe = {"recipe": RECIPE, **asdict(chain), "layers": list(chain.layers)}
    if note.exists() and json.loads(note.read_text()) == recipe:
        return chain
    noise = make_noise(size)
    for index, extents in enumerate(layers):
        _write_layer(chain.paths[index], size, index, extents, noise)
    if flat:
        _flatten(chain, layers, noise)
    note.write_text(json.dumps(recipe))
    return chain


def _union(layers: list[Extents]) -> int:
    """Bytes named by at least one layer. Children lie within the base's data, by construction."""
    return sum(length for _, length in layers[0])


def make_noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(_NOISE_SIZE)


def content(noise: bytes, layer: int, offset: int, length: int) -> bytes:
    """Bytes that differ from layer to layer and from place to place; a reader's slip of one sector shows."""
    at = (offset // 512 * 4099 + layer * 1_000_003) % (_NOISE_SIZE // 2)
    return noise[at : at + length]


def _write_layer(path: Path, size: int, index: int, extents: Extents, noise: bytes) -> None:
    with path.open("wb", buffering=4 * MiB) as out:
        write_vhd(
            out,
            size=size,
            kind="differencing" if index else "dynamic",
            runs=runs_of(extents, partial(content, noise, index)),
            blocks=blocks_of(extents),
            unique_id=UUID(int=index + 1),
            parent_id=UUID(int=index) if index else None,
            parent_name=path.name.replace(f"-{index}.", f"-{index - 1}.") if index else "",
        )


def _flatten(chain: Chain, layers: list[Extents], noise: bytes) -> None:
    with Path(chain.flat_raw).open("wb") as out:
        out.truncate(chain.size)
        for index, extents in enumerate(layers):
            for offset, data in runs_of(extents, partial(content, noise, index)):
                out.seek(offset)
                out.write(data)
    options = "subformat=dynamic,force_size=on"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", options, chain.flat_raw, chain.flat_vhd], check=True)
