"""Our streamOptimized VMDKs as others read them: qemu-img and dissect."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import pytest
from tests.images.vmdk_cases import Case, dissect_content, needs_qemu, qemu_content, qemu_refusal, random_case

from tokvm.core.units import KiB, MiB
from tokvm.testing.vmdk_stream_writer import GrainHeader, StreamOptions, Tables, write_stream, write_stream_file

SECTOR = 512
GRAIN_SIZE = 64 * KiB
SIZE = 33 * MiB + 1536
SMALL = 8 * KiB
EDGES = [SECTOR, SMALL - SECTOR, SMALL, SMALL + SECTOR, 4 * MiB - SECTOR, 4 * MiB, 4 * MiB + SECTOR]


class OneWay(io.RawIOBase):
    """A pipe: writable, not seekable."""

    def __init__(self) -> None:
        self.raw = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.raw += data
        return len(data)


def soft_case(seed: int, size: int) -> Case:
    """Content that can be compressed: every sector holds one byte, 512 times."""
    case = random_case(seed, size, longest=5000)
    runs = [(at, b"".join(data[index : index + 1] * SECTOR for index in range(len(data) // SECTOR))) for at, data in case.runs]
    return Case(size, runs, [], [])


@needs_qemu
@pytest.mark.parametrize("tables", list(Tables))
@pytest.mark.parametrize(("seed", "level"), [(None, 6), (5, 0), (6, 9)])
@pytest.mark.slow
def test_qemu_reads_it(tmp_path: Path, tables: Tables, seed: int | None, level: int) -> None:
    case = soft_case(level, SIZE)
    path, out = tmp_path / "disk.vmdk", OneWay()
    options = StreamOptions(tables=tables, seed=seed, level=level)
    if tables is Tables.BEHIND:
        write_stream(out, size=SIZE, runs=case.runs, options=options)  # type: ignore[arg-type]
        path.write_bytes(out.raw)
    else:
        write_stream_file(path, size=SIZE, runs=case.runs, options=options)
    assert qemu_content(path) == case.over()


@needs_qemu
@pytest.mark.parametrize(("size", "short"), [*((size, True) for size in EDGES), (SECTOR, False), (4 * MiB + SECTOR, False)])
@pytest.mark.slow
def test_qemu_reads_disks_of_any_size(tmp_path: Path, size: int, short: bool) -> None:
    case = random_case(size, size, longest=1000)
    options = StreamOptions(SMALL, level=1, short_last_grain=short)
    (path,) = write_stream_file(tmp_path / "disk.vmdk", size=size, runs=case.runs, options=options)
    assert qemu_content(path) == Case(size, case.runs, [], []).over()


@pytest.mark.parametrize("tables", list(Tables))
@pytest.mark.parametrize("grain_size", [8 * KiB, MiB])
@pytest.mark.slow
def test_dissect_reads_it(tmp_path: Path, tables: Tables, grain_size: int) -> None:
    case = random_case(3, 8 * MiB, longest=2000)
    options = StreamOptions(grain_size, tables=tables, seed=3)
    (path,) = write_stream_file(tmp_path / "disk.vmdk", size=8 * MiB, runs=case.runs, options=options)
    assert dissect_content([path]) == Case(8 * MiB, case.runs, [], []).over()


def test_dissect_reads_grains_that_have_only_their_size(tmp_path: Path) -> None:
    case = random_case(3, 8 * MiB, longest=2000)
    options = StreamOptions(tables=Tables.FRONT, grain_header=GrainHeader.SIZE, seed=4)
    (path,) = write_stream_file(tmp_path / "disk.vmdk", size=8 * MiB, runs=case.runs, options=options)
    assert dissect_content([path]) == Case(8 * MiB, case.runs, [], []).over()


@needs_qemu
@pytest.mark.slow
def test_qemu_reads_grains_that_have_no_header(tmp_path: Path) -> None:
    case = soft_case(3, SIZE)
    options = StreamOptions(tables=Tables.FRONT, grain_header=GrainHeader.NONE, seed=4)
    (path,) = write_stream_file(tmp_path / "disk.vmdk", size=SIZE, runs=case.runs, options=options)
    assert qemu_content(path) == case.over()


@needs_qemu
def test_an_empty_stream_is_a_whole_file(tmp_path: Path) -> None:
    for tables in Tables:
        (path,) = write_stream_file(tmp_path / "d.vmdk", size=MiB, runs=[], options=StreamOptions(tables=tables))
        assert qemu_content(path) == bytes(MiB)


@needs_qemu
def test_a_cut_stream_is_refused(tmp_path: Path) -> None:
    (path,) = write_stream_file(tmp_path / "d.vmdk", size=MiB, runs=[(0, b"a" * 512)])
    path.write_bytes(path.read_bytes()[:-SECTOR])
    assert "Could not open" in qemu_refusal(path)


def walked(raw: bytes) -> list[tuple[str, int]]:
    """(what, value) of everything in a stream from sector 128 on, by its markers alone."""
    found, at = [], 128
    while at * SECTOR < len(raw):
        value, length, kind = struct.unpack_from("<QII", raw, at * SECTOR)
        if length:
            found.append(("grain", value))
            at += -(-(12 + length) // SECTOR)
        else:
            found.append((("end", "table", "directory", "footer")[kind], value))
            at += 1 + value
    return found


def test_the_markers_alone_lead_through_a_stream() -> None:
    out = io.BytesIO()
    write_stream(out, size=100 * MiB, runs=[(0, b"a" * 512), (65 * MiB, b"b" * 512), (95 * MiB, b"c" * 512)])
    assert walked(out.getvalue()) == [
        ("grain", 0), ("table", 4), ("grain", 65 * 2048), ("grain", 95 * 2048), ("table", 4), ("directory", 1), ("footer", 1),
        ("end", 0),
    ]  # fmt: skip


def test_shuffled_grains_come_before_their_tables() -> None:
    out = io.BytesIO()
    runs = [(grain * GRAIN_SIZE, b"a" * 512) for grain in range(0, 1600, 7)]
    write_stream(out, size=100 * MiB, runs=runs, options=StreamOptions(seed=1))
    found = walked(out.getvalue())
    grains = [value // 128 for what, value in found if what == "grain"]
    assert sorted(grains) == list(range(0, 1600, 7))
    assert grains != sorted(grains)
    assert [what for what, _ in found[len(grains) :]] == ["table"] * 4 + ["directory", "footer", "end"]


@pytest.mark.parametrize("tables", list(Tables))
def test_its_header_is_vmwares(tables: Tables) -> None:
    """As in a file of vmware-vdiskmanager's; it puts its tables in front."""
    out = io.BytesIO()
    write_stream(out, size=10 * MiB, runs=[], options=StreamOptions(tables=tables))
    fields = struct.unpack_from("<4sIIQQQQIQQQB4sH", out.getvalue())
    assert fields == (
        b"KDMV", 3, 0x30001, 20480, 128, 1, 20, 512, 0, 21 if tables is Tables.FRONT else 2**64 - 1, 128, 0, b"\n \r\n", 1
    )  # fmt: skip


def test_runs_are_read_when_needed() -> None:
    out, when = OneWay(), []

    def read() -> Any:
        for grain in range(4):
            when.append(len(out.raw))
            yield grain * GRAIN_SIZE, bytes([grain]) * GRAIN_SIZE

    write_stream(out, size=4 * GRAIN_SIZE, runs=read())  # type: ignore[arg-type]
    assert when == sorted(set(when))


def test_tables_behind_grains_without_markers_are_refused() -> None:
    with pytest.raises(ValueError, match="found by their markers"):
        StreamOptions(grain_header=GrainHeader.SIZE)
