"""Our VHDX writer's files as others read them: qemu-img, libvhdi, dissect. (Our own reader: `test_random_chains`.)"""

from __future__ import annotations

import io
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from tests.images.vhdx_witnesses import BASE, Run, applied, by_dissect, by_libvhdi, by_qemu, write

from tokvm.core.units import GiB, MiB, TiB
from tokvm.testing.vhdx_structs import BlockState, crc32c, region_table

SECTOR = 512
CHILD = UUID(int=0xC)

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img (qemu-utils)")


def random_runs(seed: int, size: int, *, step: int = SECTOR, largest: int = MiB) -> list[Run]:
    """Ascending runs, multiples of `step`, some across block borders, the last bytes of the disk among them."""
    rng = random.Random(seed)
    runs, at = [], 0
    while (at := at + step * rng.randrange(1, largest // step)) < size - step:
        data = rng.randbytes(min(step * rng.randrange(1, largest // step), size - step - at))
        runs.append((at, data))
        at += len(data)
    return [*runs, (size - step, rng.randbytes(step))]


@needs_qemu
@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
@pytest.mark.parametrize("size", [SECTOR, MiB, 9 * MiB + 1536])
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.slow
def test_three_readers_agree_on_a_base(tmp_path: Path, kind: str, size: int, seed: int | None) -> None:
    runs = random_runs(size, size)
    path = tmp_path / "disk.vhdx"
    write(path, size=size, kind=kind, runs=runs, seed=seed, garbage=True)
    content = applied(runs, bytes(size))
    assert by_qemu(path) == content
    assert by_libvhdi(path) == content
    assert by_dissect(path) == content


@needs_qemu
@pytest.mark.parametrize("block_size", [MiB, 2 * MiB, 32 * MiB, pytest.param(256 * MiB, marks=pytest.mark.slow)])
def test_every_block_size_is_read(tmp_path: Path, block_size: int) -> None:
    size = block_size + MiB + SECTOR
    runs = [(SECTOR, b"a" * SECTOR), (block_size - SECTOR, b"b" * 1024), (size - SECTOR, b"c" * SECTOR)]
    write(tmp_path / "disk.vhdx", size=size, runs=runs, block_size=block_size)
    assert by_qemu(tmp_path / "disk.vhdx") == applied(runs, bytes(size))


@needs_qemu
@pytest.mark.parametrize("size", [4 * GiB, 9 * GiB + SECTOR])
def test_bitmap_entries_between_chunks_are_stepped_over(tmp_path: Path, size: int) -> None:
    places = [at for at in (0, 4 * GiB - SECTOR, 4 * GiB, 8 * GiB, size - SECTOR) if at < size]
    runs = [(at, bytes([1 + index, 0xAA]) * 256) for index, at in enumerate(sorted(set(places)))]
    write(tmp_path / "disk.vhdx", size=size, runs=runs)
    for offset, data in runs:
        command = ["qemu-io", "-r", "-f", "vhdx", "-c", f"read -v {offset} 512", str(tmp_path / "disk.vhdx")]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert bytes.fromhex("".join(line.split(":")[1][:50] for line in out.splitlines()[:32])) == data


@needs_qemu
def test_states_without_bytes_are_zeros_in_a_base(tmp_path: Path) -> None:
    size = 8 * MiB + 1536
    old = [(block * MiB, bytes([0xD0 + block]) * MiB) for block in (1, 2, 3)]
    kept = [(7 * MiB, b"k" * MiB)]
    ranges = {"undefined": [(8 * MiB, 1536)], "zeros": [(4 * MiB, MiB)]}
    states = {1: BlockState.NOT_PRESENT, 2: BlockState.ZERO, 3: BlockState.UNMAPPED, 5: BlockState.FULLY_PRESENT}
    layout = write(tmp_path / "disk.vhdx", size=size, runs=[*old, *kept], states=states, garbage=True, **ranges)
    raw = (tmp_path / "disk.vhdx").read_bytes()
    words = [struct.unpack_from("<Q", raw, layout.entry_offset(block))[0] for block in range(9)]
    assert [word & 0xFFFFF for word in words] == [0, 0, 2, 3, 2, 6, 0, 6, 1]
    assert raw[words[3] >> 20 << 20 :][:MiB] == old[2][1]
    assert by_qemu(tmp_path / "disk.vhdx") == by_dissect(tmp_path / "disk.vhdx") == applied(kept, bytes(size))


def write_chain(tmp_path: Path, size: int, children: list[dict[str, Any]], **options: Any) -> tuple[list[Run], list[Path]]:
    base = random_runs(4, size, step=4096)
    paths = [tmp_path / f"layer{index}.vhdx" for index in range(len(children) + 1)]
    write(paths[0], size=size, runs=base, **options)
    for index, child in enumerate(children):
        write(
            paths[index + 1], size=size, kind="differencing", data_write_guid=UUID(int=0xC0 + index),
            parent_linkage=UUID(int=0xC0 + index - 1) if index else BASE,
            locator={"relative_path": f".\\{paths[index].name}", "absolute_win32_path": f"C:\\vm\\{paths[index].name}"},
            **options, **child,
        )  # fmt: skip
    return base, paths


@pytest.mark.parametrize("logical_sector", [512, 4096])
@pytest.mark.parametrize("seed", [None, 11])
def test_children_read_the_same_elsewhere(tmp_path: Path, logical_sector: int, seed: int | None) -> None:
    size = 7 * MiB + 8192
    runs = random_runs(5, size, step=logical_sector)
    base, paths = write_chain(tmp_path, size, [{"runs": runs}], logical_sector=logical_sector, seed=seed, garbage=True)
    content = applied(runs, applied(base, bytes(size)))
    assert by_dissect(paths[1]) == content
    if logical_sector == SECTOR:  # 4096: libvhdi refuses the file
        assert by_libvhdi(paths[1], paths[0]) == content


def test_a_child_of_a_child_reads_the_same_elsewhere(tmp_path: Path) -> None:
    """In whole bytes of bitmap: in the middle of a chain, dissect is right about no others."""
    size = 5 * MiB + 4096
    runs = [random_runs(seed, size, step=8 * SECTOR, largest=MiB // 4) for seed in (6, 7)]
    base, paths = write_chain(tmp_path, size, [{"runs": runs[0]}, {"runs": runs[1]}], garbage=True)
    assert by_dissect(paths[2]) == applied(runs[1], applied(runs[0], applied(base, bytes(size))))


def every_state(size: int) -> tuple[dict[str, Any], Callable[[bytes], bytes]]:
    """Options of a child with a block in each state, and what it makes of its parent's content."""
    new = bytes(range(1, 129)) * (MiB // 128)
    runs = [(MiB, new), (2 * MiB + SECTOR, new[: 5 * SECTOR]), (3 * MiB, new), (8 * MiB, new[:1536])]
    states = {3: BlockState.ZERO, 4: BlockState.PARTIALLY_PRESENT, 9: BlockState.FULLY_PRESENT}
    options = {
        "runs": runs, "states": states, "zeros": [(5 * MiB, MiB)], "unmapped": [(6 * MiB, MiB)], "undefined": [(7 * MiB, MiB)],
    }  # fmt: skip
    zeroed = [(block * MiB, bytes(MiB)) for block in (3, 5, 6, 7)] + [(9 * MiB, bytes(size - 9 * MiB))]
    return options, lambda under: applied(zeroed, applied([runs[0], runs[1], runs[3]], under))


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("seed", [None, 12])
@pytest.mark.slow
def test_a_child_has_every_state(tmp_path: Path, stale: bool, seed: int | None) -> None:
    """Bits under other states than PARTIALLY_PRESENT change nothing."""
    size = 9 * MiB + 2048
    child, over = every_state(size)
    base, paths = write_chain(tmp_path, size, [child], seed=seed, stale_bitmaps=stale, garbage=True)
    assert by_dissect(paths[1]) == over(applied(base, bytes(size)))


def test_the_child_of_every_state_has_the_states_and_bits_of_the_specification() -> None:
    out = io.BytesIO()
    child, _ = every_state(10 * MiB)
    layout = write(out, size=10 * MiB, kind="differencing", parent_linkage=BASE, stale_bitmaps=True, **child)
    raw = out.getvalue()
    words = [struct.unpack_from("<Q", raw, layout.bat[0] + 8 * block)[0] for block in range(10)]
    assert [word & 7 for word in words] == [0, 6, 7, 2, 7, 2, 3, 1, 7, 6]
    assert [word >> 20 > 0 for word in words] == [False, True, True, True, True, False, False, False, True, True]
    (bitmap,) = struct.unpack_from("<Q", raw, layout.bat[0] + 8 * 4096)
    bits = raw[bitmap >> 20 << 20 :][:MiB]
    assert bitmap & 0xFFFFF == 6
    assert bits[2 * 256 : 3 * 256] == b"\x3e" + bytes(255)  # sectors 1 to 5, the first in the lowest bit
    assert bits[4 * 256 : 5 * 256] == bytes(256)
    assert bits[8 * 256 : 9 * 256] == b"\x07" + bytes(255)
    assert bits[:512] == bits[3 * 256 : 4 * 256] * 2 == b"\xa5" * 512


def test_each_chunk_has_its_bitmap_block(tmp_path: Path) -> None:
    size = 9 * GiB
    runs = [(4 * GiB - 1024, b"a" * 2048), (8 * GiB + SECTOR, b"b" * SECTOR), (size - SECTOR, b"c" * SECTOR)]
    write(tmp_path / "base.vhdx", size=size, runs=[(4 * GiB - 2048, b"p" * 4096)], block_size=32 * MiB)
    layout = write(
        tmp_path / "child.vhdx", size=size, runs=runs, kind="differencing", block_size=32 * MiB, data_write_guid=CHILD,
        parent_linkage=BASE, locator={"relative_path": "base.vhdx"}, seed=9,
    )  # fmt: skip
    assert set(layout.bitmaps) == {0, 1, 2}
    vhdx = pytest.importorskip("dissect.hypervisor.disk.vhdx")
    disk = vhdx.VHDX(tmp_path / "child.vhdx")
    tail = 32 * MiB - 2048
    assert disk.read_sectors(4 * GiB // SECTOR - 65536, 65536)[tail:] == b"p" * 1024 + b"a" * 1024
    assert disk.read_sectors(4 * GiB // SECTOR, 65536)[:4096] == b"a" * 1024 + b"p" * 1024 + bytes(2048)
    assert disk.read_sectors(8 * GiB // SECTOR, 65536)[:1536] == bytes(SECTOR) + b"b" * SECTOR + bytes(SECTOR)
    disk.fh.close()
    disk.parent.fh.close()


def test_a_parent_locator_is_read(tmp_path: Path) -> None:
    _, paths = write_chain(tmp_path, MiB, [{"runs": []}])
    pyvhdi = pytest.importorskip("pyvhdi")
    file = pyvhdi.file()
    file.open(str(paths[1]))
    assert file.get_parent_identifier() == str(BASE)
    assert file.get_parent_filename() == "C:\\vm\\layer0.vhdx"
    file.close()


def test_headers_say_who_wrote_what() -> None:
    out = io.BytesIO()
    write(out, size=MiB, sequences=(9, 8), file_write_guid=CHILD, creator="Tester ü")
    raw = out.getvalue()
    first, second = (raw[at : at + 80] for at in (64 << 10, 128 << 10))
    assert (first[:4], struct.unpack_from("<Q", first, 8)[0]) == (b"head", 9)
    assert struct.unpack_from("<Q", second, 8)[0] == 8
    assert first[16:64] == CHILD.bytes_le + BASE.bytes_le + bytes(16)
    assert raw[8:].startswith("Tester ü\0".encode("utf-16-le"))


def test_runs_are_read_when_they_are_needed(tmp_path: Path) -> None:
    taken: list[int] = []

    def runs() -> Any:
        for at in range(0, 8 * MiB, MiB):
            taken.append(out.tell())
            yield at, bytes([at >> 20]) * MiB

    with (tmp_path / "disk.vhdx").open("w+b") as out:
        write(out, size=8 * MiB, runs=runs())
    assert taken[-1] - taken[1] >= 5 * MiB


def test_a_disk_of_64_tib_takes_a_moment(tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    runs = [(at, b"x" * SECTOR) for at in (0, 63 * TiB, 64 * TiB - SECTOR)]
    layout = write(path, size=64 * TiB, block_size=32 * MiB, runs=runs, zeros=[(TiB, TiB)])
    assert path.stat().st_blocks * 512 < MiB
    assert layout.bat[1] == 17 * MiB
    with path.open("rb") as file:
        file.seek(layout.entry_offset((64 * TiB - 1) // (32 * MiB)))
        assert struct.unpack("<Q", file.read(8))[0] == layout.blocks[(64 * TiB - 1) // (32 * MiB)] | 6
        file.seek(layout.entry_offset(2 * TiB // (32 * MiB) - 1))
        assert struct.unpack("<2Q", file.read(16)) == (2, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": [(0, bytes(100))]}, "whole sectors"),
        ({"runs": [(512, bytes(512))], "logical_sector": 4096}, "whole sectors"),
        ({"runs": [(4 * MiB, bytes(512))]}, "behind the disk's end"),
        ({"runs": [(512, bytes(512)), (0, bytes(512))]}, "out of order"),
        ({"zeros": [(512, MiB)]}, "whole blocks"),
        ({"zeros": [(0, MiB - 512)]}, "whole blocks"),
        ({"unmapped": [(3 * MiB, 2 * MiB)]}, "whole blocks"),
        ({"zeros": [(0, 2 * MiB)], "unmapped": [(MiB, MiB)]}, "two states"),
        ({"zeros": [(MiB, MiB)], "runs": [(MiB, bytes(512))]}, "is to be ZERO"),
        ({"states": {4: 0}}, "no block 4"),
        ({"size": 100}, "whole sectors"),
        ({"size": 65 * TiB}, "64 TiB"),
        ({"block_size": 3 * MiB}, "power of two"),
        ({"logical_sector": 1024}, "512 or 4096"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(io.BytesIO(), **({"size": 4 * MiB} | options))


def test_the_checksum_is_castagnoli() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(b"a" + bytes(70000)) == crc32c_by_bits(b"a" + bytes(70000))
    raw = bytearray(region_table((3 * MiB, MiB), (2 * MiB, MiB)))
    stored, raw[4:8] = raw[4:8], bytes(4)
    assert int.from_bytes(stored, "little") == crc32c_by_bits(bytes(raw))


def crc32c_by_bits(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 & -(value & 1))
    return value ^ 0xFFFFFFFF


def test_it_starts_fast(tmp_path: Path) -> None:
    program = "import sys, tokvm.testing.vhdx_writer; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path).returncode == 0
