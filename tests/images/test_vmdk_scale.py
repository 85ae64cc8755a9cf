"""Large VMDKs: maps in seconds and in bounded memory. Each in a process of its own, so that its peak is its own."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from tests.images.naive_vmdk import descriptor, padded
from tests.images.test_scale import probe

from tokvm.core.units import GiB, MiB, TiB

SECTOR = 512
TABLE = 4096 * 8


def scattered_sesparse(path: Path, *, size: int, tables: int, per_table: int) -> Path:
    """Grains at random places of random tables, in random order in the file; the grains themselves are a hole."""
    rng = np.random.default_rng(1)
    count = size // (4096 * 4096)
    gd_sectors = -(-8 * count // SECTOR)
    gt = 4 + gd_sectors
    grains_at = gt + 64 * tables
    words = [0xCAFEBABE, 0x200000001, size // SECTOR, 8, 64, 0, 0, 0, 0, 0, 1, 1, 2, 1, 3, 1, 4, gd_sectors, gt, 64 * tables]
    words += [grains_at, 0, grains_at, 0, grains_at, size // SECTOR]
    directory = np.zeros(count, "<u8")
    directory[rng.choice(count, tables, replace=False)] = (1 << 60) + rng.permutation(tables).astype("<u8")
    index = rng.permutation(tables * per_table).astype("<u8")
    with path.open("wb") as file:
        file.write(struct.pack("<26Q", *words).ljust(SECTOR, b"\0") + struct.pack("<4Q", 0xCAFECAFE, 1, 2, 0))
        file.seek(4 * SECTOR)
        file.write(directory.tobytes())
        file.seek(gt * SECTOR)
        for table in range(tables):
            entries = np.zeros(4096, "<u8")
            mine = index[table * per_table : (table + 1) * per_table]
            place = rng.choice(4096, per_table, replace=False)
            entries[place] = np.uint64(3 << 60) | (mine & np.uint64(0xFFF)) << np.uint64(48) | mine >> np.uint64(12)
            file.write(entries.tobytes())
        file.truncate(grains_at * SECTOR + tables * per_table * 4096)
    return path


@pytest.mark.slow
def test_62_tebibytes_with_scattered_grains_map_at_once(tmp_path: Path) -> None:
    """300 000 grains of 4 KiB in 300 tables."""
    found = probe(scattered_sesparse(tmp_path / "delta.vmdk", size=62 * TiB, tables=300, per_table=1000))
    assert found["data"] == 300_000 * 4096
    assert found["most"] <= 1 << 17
    assert found["cpu_s"] < 2
    assert found["peak"] < 250 * MiB


@pytest.mark.slow
def test_62_tebibytes_with_100_gib_of_scattered_grains_map_in_seconds(tmp_path: Path) -> None:
    """26 million grains in 25 000 tables."""
    found = probe(scattered_sesparse(tmp_path / "delta.vmdk", size=62 * TiB, tables=25_000, per_table=1040))
    assert found["data"] == 26_000_000 * 4096
    assert found["most"] <= 1 << 17
    assert found["cpu_s"] < 10
    assert found["peak"] < 300 * MiB


def packed_disk(path: Path, *, size: int, order: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Path:
    """Compressed grains of 64 KiB, four sectors each, in this order in the file; the grains themselves are a hole."""
    text = padded(descriptor(f'RW {size // SECTOR} SPARSE "x"', kind="streamOptimized"))
    count = len(order) // 512
    gd = 1 + len(text) // SECTOR
    gt = gd + -(-4 * count // SECTOR)
    data = gt + 4 * count
    values = (3, 0x30001, size // SECTOR, 128, 1, len(text) // SECTOR, 512, 0, gd, data, 0, b"\n \r\n", 1)
    head = struct.pack("<4sIIQQQQIQQQB4sH", b"KDMV", *values)
    with path.open("wb") as file:
        file.write(head.ljust(SECTOR, b"\0") + text)
        file.write(padded((gt + 4 * np.arange(count)).astype("<u4").tobytes()))
        file.write((data + 4 * order).astype("<u4").tobytes())
        file.truncate((data + 4 * len(order)) * SECTOR)
    return path


def test_64_gib_of_compressed_grains_map_at_once(tmp_path: Path) -> None:
    grains = np.arange(64 * GiB // 65536)
    found = probe(packed_disk(tmp_path / "stream.vmdk", size=64 * GiB, order=grains))
    assert (found["data"], found["rows"]) == (64 * GiB, 1)
    assert found["cpu_s"] < 2
    assert found["peak"] < 150 * MiB


@pytest.mark.slow
@pytest.mark.parametrize("order", ["ascending", "random"])
def test_a_tebibyte_of_compressed_grains_maps_in_seconds(tmp_path: Path, order: str) -> None:
    grains = np.arange(TiB // 65536)
    if order == "random":
        grains = np.random.default_rng(1).permutation(grains)
    found = probe(packed_disk(tmp_path / "stream.vmdk", size=TiB, order=grains))
    assert found["data"] == TiB
    assert found["cpu_s"] < 20
    assert found["peak"] < 600 * MiB
