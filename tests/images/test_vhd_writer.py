"""Our VHD writer's files as others read them: qemu-img, libvhdi, and our own readers."""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from tokvm.core.units import MiB
from tokvm.images.reader import ChainReader
from tokvm.images.vhd.stream import StreamKind, VhdStream
from tokvm.testing.vhd_writer import blocks_of, runs_of, write_vhd

SECTOR = 512
Run = tuple[int, bytes]

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img (qemu-utils)")


def random_runs(seed: int, size: int, *, step: int = SECTOR) -> list[Run]:
    """Ascending runs, multiples of `step`, some across block borders, the last bytes of the disk among them."""
    rng = random.Random(seed)
    runs, at = [], 0
    while (at := at + step * rng.randrange(1, MiB // step)) < size - step:
        data = rng.randbytes(min(step * rng.randrange(1, MiB // step), size - step - at))
        runs.append((at, data))
        at += len(data)
    return [*runs, (size - step, rng.randbytes(step))]


def applied(runs: list[Run], under: bytes) -> bytes:
    raw = bytearray(under)
    for offset, data in runs:
        raw[offset : offset + len(data)] = data
    return bytes(raw)


def written(**options: Any) -> bytes:
    out = io.BytesIO()
    write_vhd(out, **({"unique_id": UUID(int=5)} | options))
    return out.getvalue()


class OneWay(io.RawIOBase):
    """A pipe: writable, not seekable."""

    def __init__(self) -> None:
        self.raw = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.raw += data
        return len(data)


@needs_qemu
@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
@pytest.mark.parametrize("size", [512, 2 * MiB, 9 * MiB + 1536])
def test_qemu_reads_it(tmp_path: Path, kind: str, size: int) -> None:
    runs = random_runs(size, size)
    path, out = tmp_path / "disk.vhd", tmp_path / "disk.raw"
    path.write_bytes(written(size=size, kind=kind, runs=runs))
    subprocess.run(["qemu-img", "convert", "-f", "vpc", "-O", "raw", str(path), str(out)], check=True)
    assert out.read_bytes() == applied(runs, bytes(size))


@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_libvhdi_reads_it(tmp_path: Path, kind: str) -> None:
    pyvhdi = pytest.importorskip("pyvhdi")
    size = 9 * MiB + 1536
    runs = random_runs(3, size)
    path = tmp_path / "disk.vhd"
    path.write_bytes(written(size=size, kind=kind, runs=runs))
    file = pyvhdi.file()
    file.open(str(path))
    assert file.read_buffer(size) == applied(runs, bytes(size))
    file.close()


def test_libvhdi_reads_a_chain(tmp_path: Path) -> None:
    """With whole bytes of bitmap: libvhdi takes every bit after a set one in its byte for set."""
    pyvhdi = pytest.importorskip("pyvhdi")
    size = 8 * MiB
    base_id, child_id = uuid4(), uuid4()
    base, child = random_runs(4, size), random_runs(5, size, step=8 * SECTOR)
    for name, options in (
        ("base.vhd", {"kind": "dynamic", "runs": base, "unique_id": base_id}),
        (
            "child.vhd",
            {"kind": "differencing", "runs": child, "unique_id": child_id, "parent_id": base_id, "parent_name": "base.vhd"},
        ),
    ):
        (tmp_path / name).write_bytes(written(size=size, **options))
    parent, top = pyvhdi.file(), pyvhdi.file()
    parent.open(str(tmp_path / "base.vhd"))
    top.open(str(tmp_path / "child.vhd"))
    assert top.get_parent_identifier() == str(base_id)
    assert top.get_parent_filename() == "base.vhd"
    top.set_parent(parent)
    assert top.read_buffer(size) == applied(child, applied(base, bytes(size)))
    top.close()
    parent.close()


@pytest.mark.parametrize("block_size", [512, 4096, 512 * 1024, 2 * MiB, 4 * MiB])
@pytest.mark.parametrize("batmap", [False, True])
@pytest.mark.slow
def test_both_of_our_readers_read_it(kit: Any, block_size: int, batmap: bool) -> None:
    size = 5 * MiB + 512
    base, child = random_runs(6, size), random_runs(7, size)
    parent = written(size=size, kind="dynamic", runs=base, block_size=block_size, batmap=batmap)
    top = written(
        size=size, kind="differencing", runs=child, block_size=block_size, batmap=batmap,
        unique_id=UUID(int=6), parent_id=UUID(int=5), parent_name="a parent with ünïcode.vhd",
        creator=b"tap\0", creator_version=0x10003,
    )  # fmt: skip
    chain = kit.chain(parent, top)
    content = applied(child, applied(base, bytes(size)))
    assert kit.content(ChainReader(chain)) == content
    assert sum(len(extent_data) for _, extent_data in child) == sum(
        int(window.length.sum()) for window in chain.layers[1].windows()
    )
    delta = VhdStream(kit.Exporter(top), name="delta", expect_size=size, expect_parent=StreamKind.DIFFERENCING)
    assert kit.content(delta, under=applied(base, bytes(size))) == content
    assert chain.layers[1].describe()["parent_name"] == "a parent with ünïcode.vhd"
    assert chain.layers[1].describe()["parent_locators"] == [{"code": "W2ru", "path": ".\\a parent with ünïcode.vhd"}]


def test_it_is_written_front_to_back_and_runs_are_read_when_needed() -> None:
    size = 16 * MiB
    extents = [(0, 4096), (3 * MiB - 512, 4 * MiB), (size - 512, 512)]
    out, when = OneWay(), []

    def read(offset: int, length: int) -> bytes:
        when.append((offset, len(out.raw)))
        return bytes([offset % 251]) * length

    write_vhd(
        out, size=size, kind="dynamic", unique_id=UUID(int=5),  # type: ignore[arg-type]
        runs=runs_of(extents, read), blocks=blocks_of(extents),
    )  # fmt: skip
    assert bytes(out.raw) == written(
        size=size, kind="dynamic", runs=list(runs_of(extents, lambda at, n: bytes([at % 251]) * n))
    )
    assert when[-1][1] > 6 * MiB


def test_an_empty_delta_is_a_whole_file(kit: Any) -> None:
    raw = written(size=MiB, kind="differencing", runs=[], parent_id=UUID(int=9))
    assert len(raw) == 512 + 1024 + 512 + 512
    assert list(VhdStream(kit.Exporter(raw), name="empty").chunks()) == []


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([(0, bytes(100))], "whole sectors"),
        ([(100, bytes(512))], "whole sectors"),
        ([(MiB, bytes(512))], "behind the disk's end"),
        ([(512, bytes(512)), (0, bytes(512))], "out of order"),
        ([(0, bytes(1024)), (512, bytes(512))], "out of order"),
    ],
)
def test_runs_that_make_no_sense_are_refused(runs: list[Run], message: str) -> None:
    for kind in ("fixed", "dynamic"):
        with pytest.raises(ValueError, match=message):
            written(size=MiB, kind=kind, runs=runs)


def test_a_run_outside_of_the_announced_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="touches block 3"):
        written(size=8 * MiB, kind="dynamic", runs=[(0, bytes(512)), (6 * MiB, bytes(512))], blocks=[0, 2])


@pytest.mark.parametrize(
    ("extents", "blocks"),
    [
        ([], []),
        ([(0, 1)], [0]),
        ([(2 * MiB - 1, 2)], [0, 1]),
        ([(0, 512), (1024, 512), (4 * MiB, 2 * MiB)], [0, 2]),
        ([(0, 6 * MiB), (6 * MiB, 1)], [0, 1, 2, 3]),
    ],
)
def test_blocks_of_extents(extents: list[tuple[int, int]], blocks: list[int]) -> None:
    assert blocks_of(extents) == blocks


def test_it_starts_fast(tmp_path: Path) -> None:
    program = "import sys, tokvm.testing.vhd_writer; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path).returncode == 0
