"""How the random chains are written in each format: the table that a new format is put into.

A ChainFormat is made for one chain, from its seed: it chooses block or grain size, sector, layout. `shape` tells the histories
what to aim at; `record` begins a layer; `write` makes layer `number` of the played ones a file, by the format's testing writer.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

from tests.images.disk_model import Layer, Record, Shape
from tests.images.layer_records import BitmapRecord, GrainRecord, State, StateRecord, WholeRecord, merged

from tokvm.core.units import SECTOR, GiB, KiB, MiB
from tokvm.testing.cowd_writer import CowdOptions, write_cowd
from tokvm.testing.sesparse_writer import SesparseOptions, write_sesparse
from tokvm.testing.vhd_writer import Kind, write_vhd
from tokvm.testing.vhdx_log_writer import Part, make_dirty
from tokvm.testing.vhdx_writer import write_vhdx
from tokvm.testing.vmdk_descriptor import Identity
from tokvm.testing.vmdk_flat_writer import write_flat
from tokvm.testing.vmdk_stream_writer import StreamOptions, write_stream
from tokvm.testing.vmdk_writer import SparseOptions, write_sparse


class ChainFormat(ABC):
    """One chain's way to be written."""

    suffix = ".vmdk"

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """What histories aim at."""

    @abstractmethod
    def record(self, size: int, base: bool) -> Record:
        """Of a new layer."""

    @abstractmethod
    def write(self, layers: Sequence[Layer], number: int, path: Path) -> None:
        """Make the file (a descriptor's extent files beside it)."""

    def seed(self) -> int | None:
        """For a writer that can shuffle: half of the time."""
        return self.rng.choice((None, self.rng.getrandbits(32)))


class Vhd(ChainFormat):
    suffix = ".vhd"

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.block = rng.choice((512, 2048, 4096, 16 * KiB, 64 * KiB, 512 * KiB))
        self.fixed = rng.random() < 0.15
        self.sectors = rng.randrange(1, 600)

    @property
    def shape(self) -> Shape:
        return Shape(SECTOR, self.block, self.sectors * SECTOR, largest=256 * KiB)

    def record(self, size: int, base: bool) -> Record:
        if base and self.fixed:
            return WholeRecord(size, base=True)
        return BitmapRecord(size, base=base, unit=self.block, sector=SECTOR)

    def write(self, layers: Sequence[Layer], number: int, path: Path) -> None:
        layer = layers[number]
        kind: Kind = "differencing" if number else "fixed" if self.fixed else "dynamic"
        with path.open("wb") as out:
            write_vhd(
                out, size=layer.size, kind=kind, runs=layer.runs(), unique_id=_id(number), block_size=self.block,
                parent_id=_id(number - 1) if number else None, parent_name=f"layer{number - 1}.vhd" if number else "",
                batmap=self.rng.random() < 0.3,
            )  # fmt: skip


class Vhdx(ChainFormat):
    """Blocks of 1 MiB, as small as they get; children may have larger ones than their parents. A third have dirty logs."""

    suffix = ".vhdx"

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.sector = rng.choice((512, 512, 512, 4096))
        self.fixed = rng.random() < 0.1
        self.dirty = rng.random() < 0.35
        self.size = self.sector * rng.choice((1, rng.randrange(1, 4 * MiB // self.sector), 2 * MiB // self.sector))
        self.blocks: list[int] = []

    @property
    def shape(self) -> Shape:
        return Shape(self.sector, MiB, self.size, borders=(MiB, 2 * MiB), largest=3 * MiB)

    def record(self, size: int, base: bool) -> Record:
        self.blocks.append(self.rng.choice((MiB, MiB, MiB, 2 * MiB)))
        if base and self.fixed:
            return WholeRecord(size, base=True)
        return StateRecord(size, base=base, unit=self.blocks[-1], sector=self.sector, rng=self.rng)

    def write(self, layers: Sequence[Layer], number: int, path: Path) -> None:
        layer, rng = layers[number], self.rng
        states, runs = self.content(layer)
        write_vhdx(
            path, size=layer.size, kind="differencing" if number else "fixed" if self.fixed else "dynamic", runs=runs,
            states=states, block_size=self.blocks[number], logical_sector=self.sector, data_write_guid=_id(number),
            parent_linkage=_id(number - 1) if number else None, seed=self.seed(), stale_bitmaps=rng.random() < 0.5,
            garbage=rng.random() < 0.5, locator={"relative_path": f".\\layer{number - 1}.vhdx"} if number else None,
        )  # fmt: skip
        if self.dirty:
            make_dirty(
                path, seed=rng.getrandbits(32), entries=rng.randrange(1, 6), empty_head=rng.random() < 0.3,
                crowded=rng.random() < 0.2, wrap=rng.random() < 0.3, noise=rng.random() < 0.7,
                parts=frozenset(rng.sample(list(Part), rng.randrange(1, 5))) | {Part.BAT, Part.METADATA},
            )  # fmt: skip

    def content(self, layer: Layer) -> tuple[dict[int, int], list[tuple[int, bytes]]]:
        """States and runs; some blocks without bytes keep old ones, which must not be seen."""
        record = layer.record
        if not isinstance(record, StateRecord):
            return {}, layer.runs()
        states = {number: state.value for number, state in record.states.items()}
        without = (number for number, state in record.states.items() if state.value < State.FULLY_PRESENT.value)
        kept = [record.range_of(number) for number in without if self.rng.random() < 0.3]
        old = [(offset, b"old!" * (length // 4)) for offset, length in kept]
        return states, sorted([*layer.runs(), *old])


class VhdxOfChunks(Vhdx):
    """A disk of several chunks, each with a bitmap block: written around the chunks' borders only."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.fixed = False
        self.chunk = self.sector << 23
        self.size = 2 * self.chunk + self.sector * rng.randrange(1, 8192)

    @property
    def shape(self) -> Shape:
        return Shape(self.sector, MiB, self.size, borders=(self.chunk, 2 * self.chunk, GiB), largest=2 * MiB)


class _Grains(ChainFormat):
    """What VMDK's kinds share: ids, and whether a grain is given whole or is filled up by the writer."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.grain = SECTOR
        self.zeros = self.trims = False
        self.sectors = rng.choice((1, rng.randrange(1, 400), rng.randrange(1, 4000)))

    @property
    def shape(self) -> Shape:
        return Shape(SECTOR, self.grain, self.sectors * SECTOR, grows=False, largest=512 * KiB)

    def record(self, size: int, base: bool) -> Record:
        return GrainRecord(size, base=base, unit=self.grain, sector=SECTOR, zeros=self.zeros, trims=self.trims)

    def options(self, layers: Sequence[Layer], number: int) -> dict[str, object]:
        """Arguments that the VMDK writers share."""
        layer, record = layers[number], layers[number].record
        assert isinstance(record, GrainRecord)
        given = record.written() if self.rng.random() < 0.5 else merged(record.data())
        return {
            "size": layer.size, "runs": layer.runs(given), "zeros": record.ranges(record.zeroed),
            "identity": self.identity(number), "read_parent": layers[number - 1].content.read if number else None,
        }  # fmt: skip

    def identity(self, number: int) -> Identity:
        if not number:
            return Identity(0x100)
        return Identity(0x100 + number, 0x100 + number - 1, f"layer{number - 1}.vmdk")


class Sparse(_Grains):
    """Hosted sparse, one file or split; with zeroed grains or without."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.grain = rng.choice((8, 16, 128)) * SECTOR
        self.zeros = rng.random() < 0.5
        self.split = rng.choice((None, None, self.grain * rng.randrange(1, 40)))

    def write(self, layers: Sequence[Layer], number: int, path: Path) -> None:
        options = SparseOptions(
            self.grain, redundant=self.rng.random() < 0.5, zeroed_grains=self.zeros, all_tables=self.rng.random() < 0.5,
            seed=self.seed(),
        )  # fmt: skip
        write_sparse(path, options=options, split=self.split, **self.options(layers, number))  # type: ignore[arg-type]


class _OverFlat(_Grains):
    """ESXi's snapshots: the base is a flat disk."""

    def record(self, size: int, base: bool) -> Record:
        return WholeRecord(size, base=True) if base else super().record(size, base)

    def write(self, layers: Sequence[Layer], number: int, path: Path) -> None:
        if number:
            self.write_child(path, self.options(layers, number))
        else:
            flat = layers[0].runs()
            write_flat(path, size=layers[0].size, runs=flat, identity=self.identity(0))

    @abstractmethod
    def write_child(self, path: Path, options: dict[str, object]) -> None:
        """A snapshot's delta."""


class Cowd(_OverFlat):
    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.grain = rng.choice((1, 1, 1, 8)) * SECTOR
        self.zeros = rng.random() < 0.3

    def write_child(self, path: Path, options: dict[str, object]) -> None:
        own = CowdOptions(self.grain, zero_grains=self.zeros, seed=self.seed())
        write_cowd(path, options=own, **options)  # type: ignore[arg-type]


class Sesparse(_OverFlat):
    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.grain = 4 * KiB
        self.zeros = self.trims = True

    def write_child(self, path: Path, options: dict[str, object]) -> None:
        write_sesparse(path, options=SesparseOptions(self.rng.choice((0, 4090, 5000)), self.seed()), **options)  # type: ignore[arg-type]

    def options(self, layers: Sequence[Layer], number: int) -> dict[str, object]:
        record = layers[number].record
        assert isinstance(record, GrainRecord)
        return super().options(layers, number) | {"unmapped": record.ranges(record.unmapped)}


class Stream(_Grains):
    """An exported base with snapshots over it, as nobody has them, but the layers do not know."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.grain = 64 * KiB

    def write(self, layers: Sequence[Layer], number: int, path: Path) -> None:
        if number:
            own = SparseOptions(self.grain, seed=self.seed())
            write_sparse(path, options=own, **self.options(layers, number))  # type: ignore[arg-type]
        else:
            runs = layers[0].runs(merged(layers[0].record.data()))
            options = StreamOptions(grain_size=self.grain, seed=self.seed())
            with path.open("wb") as out:
                write_stream(out, size=layers[0].size, runs=runs, name=path.name, identity=self.identity(0), options=options)


FORMATS: dict[str, type[ChainFormat]] = {
    "vhd": Vhd,
    "vhdx": Vhdx,
    "vhdx of chunks": VhdxOfChunks,
    "vmdk sparse": Sparse,
    "vmdk cowd": Cowd,
    "vmdk sesparse": Sesparse,
    "vmdk stream": Stream,
}


def _id(number: int) -> UUID:
    return UUID(int=0xA000 + number)
