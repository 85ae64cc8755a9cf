"""Our COWD extents as others read them: qemu-img through the descriptor, and dissect."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from tests.images.vmdk_cases import dissect_content, needs_qemu, qemu_content, qemu_kinds, random_case, reader_of

from tokvm.core.units import KiB, MiB, TiB
from tokvm.testing.cowd_writer import CowdOptions, write_cowd, write_cowd_extent
from tokvm.testing.vmdk_descriptor import Identity
from tokvm.testing.vmdk_flat_writer import write_flat

SECTOR = 512
TABLE = 2 * MiB  # what one table of sectors covers


@needs_qemu
@pytest.mark.parametrize(
    ("size", "seed"), [(SECTOR, None), (TABLE - SECTOR, 1), (TABLE, None), (TABLE + SECTOR, 2), (2 * TABLE + 1536, None)]
)
@pytest.mark.slow
def test_qemu_reads_it(tmp_path: Path, size: int, seed: int | None) -> None:
    case = random_case(size, size, longest=700)
    path, extent = write_cowd(
        tmp_path / "disk.vmdk", size=size, runs=case.runs, zeros=case.zeros, options=CowdOptions(seed=seed)
    )
    assert extent.name == "disk-delta.vmdk"
    assert qemu_content(path) == case.over()
    assert qemu_kinds(path, size, SECTOR) == case.kinds(SECTOR, explicit_zeros=False)


@needs_qemu
@pytest.mark.parametrize("grain_size", [SECTOR, 4 * KiB, 64 * KiB])
@pytest.mark.slow
def test_qemu_reads_a_chain_over_a_flat_disk(tmp_path: Path, grain_size: int) -> None:
    size = TABLE + 1536
    base = random_case(1, size, longest=3000)
    write_flat(tmp_path / "disk.vmdk", size=size, runs=base.runs, zeros=base.zeros, identity=Identity(1))
    content, hint = base.over(), "disk.vmdk"
    for number in range(1, 4):
        case = random_case(200 + number, size, longest=500)
        path, _ = write_cowd(
            tmp_path / f"disk-{number:06}.vmdk", size=size, runs=case.runs, zeros=case.zeros, read_parent=reader_of(content),
            identity=Identity(number + 1, number, hint), options=CowdOptions(grain_size, seed=number),
        )  # fmt: skip
        content, hint = case.over(content), path.name
        assert qemu_content(path) == content
        assert qemu_kinds(path, size, grain_size) == case.kinds(grain_size, explicit_zeros=False)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.slow
def test_dissect_reads_it(tmp_path: Path, seed: int | None) -> None:
    size = 5 * MiB + 1536
    case = random_case(5, size, longest=500)
    _, extent = write_cowd(tmp_path / "disk.vmdk", size=size, runs=case.runs, zeros=case.zeros, options=CowdOptions(seed=seed))
    assert dissect_content([extent]) == case.over()


@needs_qemu
def test_zero_grains_read_as_zeros_over_a_parent(tmp_path: Path) -> None:
    """QEMU fetches the file's sector 1, which holds zeros (larger grains hold the directory); dissect knows zero grains."""
    size = TABLE + 1536
    case = random_case(6, size, longest=500)
    write_flat(tmp_path / "disk.vmdk", size=size, runs=[(0, b"\xa5" * size)], identity=Identity(1))
    path, extent = write_cowd(
        tmp_path / "disk-000001.vmdk", size=size, runs=case.runs, zeros=case.zeros, identity=Identity(2, 1, "disk.vmdk"),
        options=CowdOptions(zero_grains=True),
    )  # fmt: skip
    assert qemu_content(path) == case.over(b"\xa5" * size)
    assert dissect_content([extent]) == case.over()
    plain = write_cowd(tmp_path / "plain.vmdk", size=size, runs=case.runs, zeros=case.zeros)[1]
    assert plain.stat().st_size - extent.stat().st_size >= sum(length for _, length in case.zeros) - 4096 * SECTOR


def test_the_header_is_what_libyal_describes() -> None:
    out = io.BytesIO()
    write_cowd_extent(out, size=5 * MiB, runs=[(0, b"a" * SECTOR), (4 * MiB, b"b" * SECTOR)], options=CowdOptions(unclean=True))
    raw = out.getvalue()
    assert struct.unpack_from("<4s7I", raw) == (b"COWD", 1, 3, 10240, 1, 4, 3, 5 + 2 * 33)
    assert len(raw) == (5 + 2 * 33) * SECTOR
    assert raw[1648] == 1
    assert struct.unpack_from("<3I", raw, 4 * SECTOR) == (5, 0, 5 + 33)
    assert struct.unpack_from("<I", raw, 5 * SECTOR) == (5 + 32,)
    assert raw[(5 + 32) * SECTOR :][:SECTOR] == b"a" * SECTOR


def test_more_than_two_terabytes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 TiB"):
        write_cowd_extent(io.BytesIO(), size=2 * TiB, runs=[])


def test_the_largest_disk_is_a_small_file(tmp_path: Path) -> None:
    path = tmp_path / "d.vmdk"
    size = 2 * TiB - SECTOR
    extent = write_cowd(path, size=size, runs=[(0, b"a" * SECTOR), (size - SECTOR, b"z" * SECTOR)])[1]
    assert extent.stat().st_size < 5 * MiB


@pytest.mark.parametrize("grain_size", [0, 100, 513])
def test_grains_of_parts_of_sectors_are_refused(grain_size: int) -> None:
    with pytest.raises(ValueError, match="whole sectors"):
        write_cowd_extent(io.BytesIO(), size=MiB, runs=[], options=CowdOptions(grain_size))


def test_a_childs_partial_grain_needs_its_parent(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only in part"):
        write_cowd(
            tmp_path / "d.vmdk", size=MiB, runs=[(0, bytes(512))], identity=Identity(2, 1, "base.vmdk"),
            options=CowdOptions(4096),
        )  # fmt: skip
