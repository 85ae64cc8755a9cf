"""The largest VHDXs: maps in seconds and in bounded memory. Each in a process of its own, so that its peak is its own.

No file system here holds them, so the file is made up as it is read: a real front, a BAT that is computed, bitmaps of one byte.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.images.naive_vhdx import BAT, METADATA, TABLES, NaiveVhdx

from tokvm.core.errors import ImageError
from tokvm.core.extents import ExtentKind
from tokvm.core.units import GiB, MiB, TiB
from tokvm.images.chain import Chain
from tokvm.images.vhdx.layer import open_vhdx

BITMAPS, BLOCKS = GiB, 32 * GiB  # where they begin in the made-up file


class MadeUpFile:
    """A ReadAt. state: of every block. shuffled: they lie in no order. bits: each byte of the bitmaps."""

    name = "made-up.vhdx"

    def __init__(self, vhdx: NaiveVhdx, state: int, *, shuffled: bool = False, bits: int = 0) -> None:
        self.vhdx, self.state, self.bits = vhdx, state, bits
        self.size = BLOCKS + (vhdx.blocks + 1) * vhdx.block_size
        self.step = 0x9E3779B1 if shuffled else 1
        small = NaiveVhdx(MiB, is_child=vhdx.is_child)
        self.front = bytearray(small.build()[:BAT])
        for at in TABLES:
            self.front[at : at + 65536] = vhdx.regions()
        self.front[METADATA : METADATA + MiB] = vhdx.metadata()
        self.bat_end = BAT + 8 * vhdx.entries

    def read_into(self, offset: int, buffer: memoryview) -> None:
        assert 0 <= offset <= self.size - len(buffer)
        if offset < BAT:
            assert offset + len(buffer) <= BAT
            buffer[:] = self.front[offset : offset + len(buffer)]
        elif offset < self.bat_end:
            buffer[:] = memoryview(self.table((offset - BAT) // 8, len(buffer) // 8)).cast("B")
        else:
            buffer[:] = bytes([self.bits]) * len(buffer)

    def table(self, first: int, count: int) -> Any:
        """A part of the BAT. 2^n blocks times an odd number are the same blocks in another order."""
        if not self.state:
            return np.zeros(count, np.int64)
        width = self.vhdx.ratio + 1
        index = np.arange(first, first + count)
        chunk = index // width
        place = (index - chunk) * self.step % self.vhdx.blocks if self.step > 1 else index - chunk
        entries = (BLOCKS + place * self.vhdx.block_size) | self.state
        is_bitmap = index - chunk * width == self.vhdx.ratio
        return np.where(is_bitmap, (BITMAPS + chunk * MiB | 6) if self.vhdx.is_child else 0, entries)

    def close(self) -> None: ...


def measure(size: int, block_size: int, state: int, *, is_child: bool = False, **options: Any) -> None:
    """Run in a process of its own; prints what it found."""
    file = MadeUpFile(NaiveVhdx(size, block_size=block_size, is_child=is_child, parent="p"), state, **options)
    begin = time.process_time()
    chain = Chain.open([open_vhdx(file)])
    opened = time.process_time() - begin
    rows = [(len(window), window.bytes_of(ExtentKind.DATA), window.bytes_of(ExtentKind.ZERO)) for window in chain.windows()]
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert peak is not None
    print(json.dumps({
        "open_s": opened, "cpu_s": time.process_time() - begin, "windows": len(rows), "rows": sum(row[0] for row in rows),
        "most": max(row[0] for row in rows), "data": sum(row[1] for row in rows), "zero": sum(row[2] for row in rows),
        "peak": int(peak[1]) * 1024,
    }))  # fmt: skip


def measured(*arguments: object, **options: object) -> dict[str, Any]:
    words = [*map(repr, arguments), *(f"{name}={value!r}" for name, value in options.items())]
    code = f"from tests.images.test_vhdx_scale import measure; measure({', '.join(words)})"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_an_empty_disk_of_64_tebibytes_maps_at_once() -> None:
    found = measured(64 * TiB, 32 * MiB, 0)
    assert found["data"] == found["zero"] == 0
    assert found["windows"] == 1024
    assert found["cpu_s"] < 2
    assert found["peak"] < 150 * MiB


@pytest.mark.slow
@pytest.mark.parametrize(("block_size", "state"), [(MiB, 0), (MiB, 2), (MiB, 6), (32 * MiB, 6), (256 * MiB, 6)])
def test_64_tebibytes_in_any_state_map_in_seconds(block_size: int, state: int) -> None:
    found = measured(64 * TiB, block_size, state)
    assert found["data"] == (64 * TiB if state == 6 else 0)
    assert found["zero"] == (64 * TiB if state == 2 else 0)
    assert found["cpu_s"] < 20
    assert found["peak"] < 300 * MiB


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [MiB, 2 * MiB])
def test_64_tebibytes_in_no_order_map_in_seconds(block_size: int) -> None:
    found = measured(64 * TiB, block_size, 6, shuffled=True)
    assert found["data"] == 64 * TiB
    assert found["rows"] >= 64 * TiB // block_size - 1024
    assert found["cpu_s"] < 40
    assert found["peak"] < 300 * MiB


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [MiB, 32 * MiB, 256 * MiB])
def test_alternating_sectors_stay_within_bounds(block_size: int) -> None:
    """The most rows that bitmaps can say: every other sector of 4 GiB, 4 million rows."""
    found = measured(4 * GiB, block_size, 7, is_child=True, bits=0x55)
    assert found["rows"] == 4 * GiB // 1024
    assert found["most"] <= max(1 << 17, block_size // 1024)
    assert found["cpu_s"] < 15
    assert found["peak"] < 256 * MiB


def test_blocks_whose_bits_are_all_set_and_that_go_on_in_the_file_are_one_row() -> None:
    found = measured(4 * GiB, 32 * MiB, 7, is_child=True, bits=0xFF)
    assert (found["rows"], found["data"]) == (1, 4 * GiB)
    assert found["cpu_s"] < 2
    assert found["peak"] < 150 * MiB


def test_a_huge_table_with_a_bad_last_entry_is_refused_in_bounds() -> None:
    """A sparse file of half a gigabyte of BAT costs its writer nothing."""
    vhdx = NaiveVhdx(64 * TiB, block_size=MiB)
    file = MadeUpFile(vhdx, 0)
    honest, last = file.table, vhdx.entries - 1

    def table(first: int, count: int) -> Any:
        return honest(first, count) + 5 * (np.arange(first, first + count) == last)

    file.table = table  # type: ignore[method-assign]
    begin = time.process_time()
    with pytest.raises(ImageError, match=r"BAT\[67125246\] \(block 67108863\) is state 5"):
        open_vhdx(file)
    assert time.process_time() - begin < 4
