"""Our seSparse extents as others read them: qemu-img through the descriptor, and a file that ESXi wrote."""

from __future__ import annotations

import io
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.images.vmdk_cases import (
    dissect_content,
    needs_qemu,
    qemu_content,
    qemu_kinds,
    qemu_refusal,
    random_case,
    reader_of,
)

from tokvm.core.units import GiB, KiB, MiB, TiB
from tokvm.testing.sesparse_giant import scattered_grains, write_giant_sesparse
from tokvm.testing.sesparse_writer import GRAIN_SIZE, SesparseOptions, write_sesparse, write_sesparse_extent
from tokvm.testing.vmdk_descriptor import Identity
from tokvm.testing.vmdk_flat_writer import write_flat

SECTOR = 512
TABLE = 16 * MiB
EDGES = [SECTOR, GRAIN_SIZE - SECTOR, GRAIN_SIZE, GRAIN_SIZE + SECTOR, TABLE - SECTOR, TABLE, TABLE + SECTOR]


@needs_qemu
@pytest.mark.parametrize("size", EDGES)
@pytest.mark.slow
def test_qemu_reads_it(tmp_path: Path, size: int) -> None:
    options = SesparseOptions() if size % GRAIN_SIZE == 0 else SesparseOptions(first_grain=4090, seed=7)
    case = random_case(size, size, longest=3000, trims=True)
    path, extent = write_sesparse(
        tmp_path / "disk.vmdk", size=size, runs=case.runs, zeros=case.zeros, unmapped=case.unmapped, options=options
    )
    assert extent.name == "disk-sesparse.vmdk"
    assert qemu_content(path) == case.over()
    assert qemu_kinds(path, size, GRAIN_SIZE) == case.kinds(GRAIN_SIZE, explicit_zeros=True)


@needs_qemu
@pytest.mark.slow
def test_qemu_reads_a_chain_over_a_flat_disk(tmp_path: Path) -> None:
    size = TABLE + MiB + 1536
    base = random_case(1, size, longest=9000)
    write_flat(tmp_path / "disk.vmdk", size=size, runs=base.runs, zeros=base.zeros, identity=Identity(1))
    content, hint = base.over(), "disk.vmdk"
    for number in range(1, 4):
        case = random_case(300 + number, size, longest=4000, trims=True)
        path, _ = write_sesparse(
            tmp_path / f"disk-{number:06}.vmdk", size=size, runs=case.runs, zeros=case.zeros, unmapped=case.unmapped,
            read_parent=reader_of(content), identity=Identity(number + 1, number, hint),
            options=SesparseOptions(first_grain=5000 * number, seed=number),
        )  # fmt: skip
        content, hint = case.over(content), path.name
        assert qemu_content(path) == content
        assert qemu_kinds(path, size, GRAIN_SIZE) == case.kinds(GRAIN_SIZE, explicit_zeros=True)


def test_it_is_byte_for_byte_what_esxi_writes(expand: Callable[[str], Path]) -> None:
    """ESXi's extent of 16 MiB of one letter: all but the journal's contents and the room it keeps at the end."""
    try:
        theirs = expand("dissect/sesparse.vmdk").read_bytes()
    except FileNotFoundError:
        pytest.skip("no external fixtures (TOKVM_FIXTURES)")
    out = io.BytesIO()
    write_sesparse_extent(out, size=512 * MiB, runs=[(0, b"a" * TABLE)])
    ours = out.getvalue()
    assert ours[: 2 * SECTOR + 24] == theirs[: 2 * SECTOR + 24]
    assert ours[4096 * SECTOR :] == theirs[4096 * SECTOR : len(ours)]
    assert len(theirs) - len(ours) == GRAIN_SIZE


def words(raw: bytes, at: int, count: int) -> tuple[int, ...]:
    return struct.unpack_from(f"<{count}Q", raw, at)


@pytest.mark.slow
def test_tables_maps_and_grains_point_at_each_other() -> None:
    """Backmap and free bitmap, which no reader needs, against what the tables say."""
    size, first = 6 * TABLE, 4090
    case = random_case(11, size, step=GRAIN_SIZE, longest=500, trims=True)
    out = io.BytesIO()
    write_sesparse_extent(
        out, size=size, runs=case.runs, zeros=case.zeros, unmapped=case.unmapped,
        options=SesparseOptions(first_grain=first, seed=5),
    )  # fmt: skip
    raw = out.getvalue()
    header = words(raw, 0, 26)
    directory, tables, bitmap, backmap, grains = (sector * SECTOR for sector in header[16:26:2])
    numbers = [entry & 0xFFFFFFFF for entry in words(raw, directory, 6) if entry]
    assert sorted(numbers) != numbers
    assert words(raw, SECTOR, 2)[1] == max(numbers) + 1
    used = {}
    for table, entry in enumerate(words(raw, directory, 6)):
        for place, word in enumerate(words(raw, tables + (entry & 0xFFFFFFFF) * 32 * KiB, 4096) if entry else ()):
            if word >> 60 == 3:
                used[(word >> 48 & 0xFFF) | (word & 0xFFFFFFFFFFFF) << 12] = table * 4096 + place
    assert len(used) == sum(len(data) for _, data in case.runs) // GRAIN_SIZE
    assert min(used) >= first
    assert max(used) >= 8192
    slots = header[25] // 8
    assert {slot for slot in range(slots) if raw[bitmap + slot // 8] >> slot % 8 & 1} == set(used)
    back = words(raw, backmap, slots)
    assert {slot: (word >> 48 & 0xFFF) | (word & 0xFFFFFFFFFFFF) << 12 for slot, word in enumerate(back) if word} == used
    assert {word >> 60 for word in back} == {0, 1}
    content = case.over()
    for slot, guest in used.items():
        start = grains + slot * GRAIN_SIZE
        assert raw[start : start + GRAIN_SIZE] == content[guest * GRAIN_SIZE : (guest + 1) * GRAIN_SIZE]


def test_untouched_tables_have_no_entry() -> None:
    out = io.BytesIO()
    write_sesparse_extent(out, size=5 * TABLE, runs=[(3 * TABLE, b"a" * 4096)], unmapped=[(TABLE, 4096)])
    assert words(out.getvalue(), 4096 * SECTOR, 5) == (0, 1 << 60, 0, 1 << 60 | 1, 0)
    assert words(out.getvalue(), 6144 * SECTOR, 2) == (1 << 60, 0)


def test_entries_of_trimmed_grains_may_keep_a_number() -> None:
    out = io.BytesIO()
    options = SesparseOptions(first_grain=5000, seed=1)
    write_sesparse_extent(out, size=TABLE, runs=[], unmapped=[(0, 8192)], options=options)
    assert [hex(word) for word in words(out.getvalue(), 6144 * SECTOR, 3)] == [
        hex(1 << 60 | (5000 & 0xFFF) << 48 | 1), hex(1 << 60 | (5001 & 0xFFF) << 48 | 1), "0x0"
    ]  # fmt: skip


@needs_qemu
def test_a_disk_that_was_not_closed_is_refused_by_qemu(tmp_path: Path) -> None:
    path, _ = write_sesparse(tmp_path / "disk.vmdk", size=MiB, runs=[], options=SesparseOptions(replay_journal=1))
    assert "Replaying journal not supported" in qemu_refusal(path)


@pytest.mark.slow
def test_dissect_reads_it_where_it_can(tmp_path: Path) -> None:
    """It takes unmapped grains for the parent's, so there are none here."""
    size = 2 * TABLE + 4096
    case = random_case(12, size, longest=3000)
    _, extent = write_sesparse(
        tmp_path / "disk.vmdk", size=size, runs=case.runs, zeros=case.zeros, options=SesparseOptions(first_grain=5000, seed=2)
    )
    assert dissect_content([extent]) == case.over()


def test_a_childs_partial_grain_needs_its_parent(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only in part"):
        write_sesparse(tmp_path / "d.vmdk", size=MiB, runs=[(0, bytes(512))], identity=Identity(2, 1, "base.vmdk"))


@needs_qemu
@pytest.mark.parametrize("seed", [None, 9])
@pytest.mark.parametrize("first_grain", [0, 4099])
@pytest.mark.slow
def test_the_giant_writer_says_the_same(tmp_path: Path, seed: int | None, first_grain: int) -> None:
    size = 20 * TABLE + 1536
    grains = np.append(scattered_grains(size=size, count=5000, tables=5, seed=4), (size - 1) // GRAIN_SIZE)
    runs = [(grain * GRAIN_SIZE, bytes(min(GRAIN_SIZE, size - grain * GRAIN_SIZE))) for grain in grains.tolist()]
    path, extent = write_giant_sesparse(
        tmp_path / "giant.vmdk", size=size, grains=grains, seed=seed, first_grain=first_grain, identity=Identity(2, 1)
    )
    assert len(runs) > 4000
    kinds = np.array(qemu_kinds(path, size, GRAIN_SIZE))
    assert np.flatnonzero(kinds == "data").tolist() == grains.tolist()
    assert set(kinds) == {"data", "absent"}
    if seed is None:
        small = tmp_path / "small.vmdk"
        write_sesparse(small, size=size, runs=runs, options=SesparseOptions(first_grain=first_grain))
        assert extent.read_bytes() == (tmp_path / "small-sesparse.vmdk").read_bytes()


@pytest.mark.parametrize("grains", [[3, 2], [1, 1], [-1], [256]])
def test_the_giant_writer_refuses_grains_that_make_no_sense(tmp_path: Path, grains: list[int]) -> None:
    with pytest.raises(ValueError, match="must ascend and lie inside"):
        write_giant_sesparse(tmp_path / "d.vmdk", size=MiB, grains=np.array(grains, dtype=np.int64))


@pytest.mark.slow
def test_a_giant_disk_takes_a_minute(tmp_path: Path) -> None:
    size = 62 * TiB
    started = time.monotonic()
    grains = scattered_grains(size=size, count=26_000_000, tables=20_000, seed=1)
    _, extent = write_giant_sesparse(tmp_path / "giant.vmdk", size=size, grains=grains, seed=1)
    took = time.monotonic() - started
    assert grains.size > 25_900_000
    assert extent.stat().st_blocks * SECTOR < 2 * GiB
    assert took < 100
