"""Large disks: maps in seconds and in bounded memory. Each in a process of its own, so that its peak is its own."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.units import GiB, MiB, TiB

PROBE = """
import json, re, sys, time
from pathlib import Path
from tokvm.core.extents import ExtentKind
from tokvm.images.chain import Chain
from tokvm.images.files import open_file
from tokvm.images.open import open_image
begin = time.process_time()
chain = Chain.open([open_image(open_file(path)) for path in sys.argv[1:]])
rows = [(len(window), window.bytes_of(ExtentKind.DATA), window.bytes_of(ExtentKind.ZERO)) for window in chain.windows()]
print(json.dumps({"cpu_s": time.process_time() - begin, "windows": len(rows), "rows": sum(row[0] for row in rows),
    "most": max(row[0] for row in rows), "data": sum(row[1] for row in rows), "zero": sum(row[2] for row in rows),
    "peak": int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024}))
"""  # VmHWM and not ru_maxrss, which a process inherits from the one that started it


def probe(*paths: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", PROBE, *map(str, paths)], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def sparse_vhd(kit: Any, path: Path, *, size: int, present: range, bits: bytes, kind: int = 3) -> Path:
    """A dynamic or differencing VHD of 2 MiB blocks whose data is a hole in the host's file."""
    vhd = kit.Vhd(size, kind=kind, block_size=2 * MiB, parent="p" if kind == 4 else None)
    first = (1536 + 4 * vhd.entries + 511) // 512
    stride = (2 * MiB + 512) // 512
    bat = [0xFFFFFFFF] * vhd.entries
    with path.open("wb") as file:
        for place, block in enumerate(present):
            bat[block] = first + place * stride
            if any(bits):
                file.seek(bat[block] * 512)
                file.write(bits)
        file.seek(0)
        file.write(vhd.footer() + vhd.header() + struct.pack(f">{len(bat)}I", *bat))
        file.seek((first + len(present) * stride) * 512)
        file.write(vhd.footer())
    return path


def test_a_sparse_disk_of_two_tebibytes_maps_at_once(kit: Any, tmp_path: Path) -> None:
    size = 2 * TiB
    blocks = range(0, size // (2 * MiB), 1000)
    found = probe(sparse_vhd(kit, tmp_path / "huge.vhd", size=size, present=blocks, bits=b"\xff" * 512))
    assert found["data"] == len(blocks) * 2 * MiB
    assert found["cpu_s"] < 2
    assert found["peak"] < 150 * MiB


@pytest.mark.slow
def test_two_tebibytes_with_every_block_in_the_file_map_in_seconds(kit: Any, tmp_path: Path) -> None:
    size = 2 * TiB - 4 * GiB  # what fits behind 32-bit sectors, bitmaps included
    count = size // (2 * MiB)
    found = probe(sparse_vhd(kit, tmp_path / "full.vhd", size=size, present=range(count), bits=bytes(512)))
    assert found["zero"] == size
    assert found["cpu_s"] < 30
    assert found["peak"] < 300 * MiB


@pytest.mark.slow
def test_alternating_sectors_stay_within_bounds(kit: Any, tmp_path: Path) -> None:
    """The most rows that bitmaps can say: every other sector of 4 GiB, 8 million rows."""
    size = 4 * GiB
    found = probe(sparse_vhd(kit, tmp_path / "worst.vhd", size=size, present=range(2048), bits=b"\xaa" * 512))
    assert found["rows"] >= 2 * (size // 1024) - found["windows"]
    assert found["most"] <= (1 << 17) + 4096
    assert found["cpu_s"] < 30
    assert found["peak"] < 256 * MiB


@pytest.mark.slow
def test_a_delta_of_random_4_kib_writes_maps_fast(kit: Any, tmp_path: Path) -> None:
    """64 GiB, every other block touched, 12 runs in each: about 200 000 rows."""
    bits = (b"\xff" + bytes(39)) * 12 + bytes(32)
    present = range(0, 64 * GiB // (2 * MiB), 2)
    found = probe(sparse_vhd(kit, tmp_path / "delta.vhd", size=64 * GiB, present=present, bits=bits, kind=4))
    assert found["rows"] == 12 * len(present)
    assert found["cpu_s"] < 2
    assert found["peak"] < 200 * MiB
