"""The giants of the maps part: images of the largest disks that a format can have, as sparse files of a few GiB.

Their tables are real; of their data only what a map needs is there (VHD's and VHDX's bitmaps), the rest is holes.
`share`: the disk's size, its data and its tables, as a part of the whole giant's.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from uuid import UUID

from benchmarks.inputs import KiB, MiB
from benchmarks.measure import GiB
from tokvm.images.vhd.structs import FOOTER_SIZE, HEADER_SIZE, DiskType, DynamicHeader, Footer
from tokvm.testing.sesparse_giant import scattered_grains, write_giant_sesparse
from tokvm.testing.vhd_writer import chs_geometry
from tokvm.testing.vhdx_structs import BlockState
from tokvm.testing.vhdx_writer import write_vhdx
from tokvm.testing.vmdk_descriptor import Identity

TiB = 1024 * GiB
DATA = 100 * GiB
_VHD_BLOCK, _BITMAP = 2 * MiB, 512
_TABLES = 1 << 16  # grain tables of seSparse in use: 2 GiB of them, 400 grains in each
_CHILD = Identity(cid=2, parent_cid=1, parent_hint="disk.vmdk")
Make = Callable[[Path, Fraction], str]


@dataclass(frozen=True, slots=True)
class Giant:
    """`make` returns the file to open. room: bytes that the whole giant takes on the disk."""

    label: str
    make: Make
    room: int


def _vhdx(folder: Path, share: Fraction, *, block_size: int) -> str:
    size = int(64 * TiB * share)
    states = dict.fromkeys(_scattered(size, block_size, int(DATA * share)), int(BlockState.FULLY_PRESENT))
    path = folder / "giant.vhdx"
    write_vhdx(path, size=size, kind="dynamic", data_write_guid=UUID(int=1), block_size=block_size, states=states)
    return str(path)


def _avhdx(folder: Path, share: Fraction) -> str:
    """Two pieces of 4 KiB in each block that it has."""
    size = int(64 * TiB * share)
    page = memoryview(bytes(4 * KiB))
    blocks = _scattered(size, MiB, int(DATA * share))
    runs = ((block * MiB + inside, page) for block in blocks for inside in (64 * KiB, 512 * KiB))
    path = folder / "giant.avhdx"
    write_vhdx(
        path,
        size=size,
        kind="differencing",
        data_write_guid=UUID(int=2),
        parent_linkage=UUID(int=1),
        locator={"relative_path": ".\\giant.vhdx"},
        block_size=MiB,
        runs=runs,
    )
    return str(path)


def _scattered(size: int, block_size: int, data: int) -> list[int]:
    return sorted(random.Random(size).sample(range(size // block_size), data // block_size))


def _vhd(folder: Path, share: Fraction, *, bits: Callable[[int], bytes], data: int) -> str:
    """A differencing VHD whose blocks have the bitmaps `bits(block)` and no data, in any order in the file."""
    import numpy as np  # not in the process that measures: its size would be a part of what it starts

    size = int(2040 * GiB * share)
    blocks = np.array(_scattered(size, _VHD_BLOCK, int(data * share)))
    footer = Footer(
        DiskType.DIFFERENCING, size, UUID(int=2), FOOTER_SIZE, size, chs_geometry(size), b"win ", 0xA0000, timestamp=0
    )
    header = DynamicHeader(FOOTER_SIZE + HEADER_SIZE, size // _VHD_BLOCK, _VHD_BLOCK, UUID(int=1))
    bat = np.full(header.entries, 0xFFFFFFFF, ">u4")
    first = -(-(header.bat_offset + header.bat_bytes) // (4 * KiB)) * 4 * KiB
    starts = first + np.random.default_rng(1).permutation(len(blocks)) * (_VHD_BLOCK + _BITMAP)
    bat[blocks] = starts // 512
    path = folder / "giant.vhd"
    with path.open("wb", buffering=0) as out:
        out.write(footer.pack() + header.pack() + bat.tobytes())
        for block, start in zip(blocks.tolist(), starts.tolist(), strict=True):
            os.pwrite(out.fileno(), bits(block), start)
        os.pwrite(out.fileno(), footer.pack(), first + len(blocks) * (_VHD_BLOCK + _BITMAP))
    return str(path)


def _whole(_block: int) -> bytes:
    return b"\xff" * _BITMAP


def _pages(block: int) -> bytes:
    """Every other 4 KiB, at random: a byte is 8 sectors."""
    return bytes(255 * (number & 1) for number in random.Random(block).randbytes(_BITMAP))


def _sesparse(folder: Path, share: Fraction) -> str:
    size = int(62 * TiB * share)
    count = int(DATA * share) // (4 * KiB)
    grains = scattered_grains(size=size, count=count, tables=int(_TABLES * share), seed=1)
    return str(write_giant_sesparse(folder / "giant.vmdk", size=size, grains=grains, identity=_CHILD, seed=1)[0])


GIANTS = (
    Giant("VHDX, 64 TiB, blocks of 1 MiB, 100 GiB of them", partial(_vhdx, block_size=MiB), GiB),
    Giant("VHDX, 64 TiB, blocks of 32 MiB, 100 GiB of them", partial(_vhdx, block_size=32 * MiB), GiB),
    Giant("AVHDX, 64 TiB, 102 400 partial blocks of 1 MiB", _avhdx, 2 * GiB),
    Giant("VHD, 2040 GiB, 100 GiB in whole blocks", partial(_vhd, bits=_whole, data=DATA), GiB),
    Giant("VHD, 2040 GiB, 100 GiB in pieces of 4 KiB", partial(_vhd, bits=_pages, data=2 * DATA), 2 * GiB),
    Giant("seSparse, 62 TiB, 26 million grains of 4 KiB", _sesparse, 4 * GiB),
)


def make_giant(number: int, folder: Path, share: Fraction) -> str:
    return GIANTS[number].make(folder, share)


def shares(*, quick: bool) -> Iterator[Fraction]:
    yield from (Fraction(1, over) for over in ((64, 16) if quick else (64, 16, 4, 1)))
