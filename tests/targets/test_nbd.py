"""Bytes through qemu-nbd into a qcow2: exact, in parallel, flushed, read back from the medium; and every way that it fails."""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tokvm.core.disk import BufferPool, Chunk, DiskWriter
from tokvm.core.errors import TargetError, UnsafeTarget
from tokvm.core.extents import ExtentKind, ExtentMap
from tokvm.core.units import KiB, MiB
from tokvm.images.chain import Chain
from tokvm.images.files import open_file
from tokvm.images.open import open_image
from tokvm.images.reader import ChainReader
from tokvm.remote import qemu_nbd
from tokvm.remote.nbd import NbdExport
from tokvm.remote.qemu_nbd import Cache, QemuNbd
from tokvm.targets.base import Target
from tokvm.targets.nbd import NbdTarget
from tokvm.targets.open import TargetSpec, open_target
from tokvm.targets.qcow2 import SERVED
from tokvm.targets.qcow2_readback import open_read_back
from tokvm.testing.vhd_writer import write_vhd
from tokvm.transfer.manifest import ManifestWriter
from tokvm.transfer.passes import Checkpoint, PassLimits, TargetState, run_pass
from tokvm.transfer.verify import verify

pytestmark = pytest.mark.skipif(shutil.which("qemu-nbd") is None or shutil.which("qemu-img") is None, reason="needs qemu-utils")
pytest.importorskip("nbd")

SIZE = 4 * MiB + 1536
EDGES = [0, 1, 511, 512, 513, 4095, 4096, 4097, 64 * KiB - 1, 64 * KiB, 64 * KiB + 1, MiB, MiB + 512]
PIECE = 64 * KiB


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "disk.qcow2"


@pytest.fixture
def take() -> Iterator[Callable[..., NbdTarget]]:
    """Opens qcow2 targets, and closes them."""
    opened: list[NbdTarget] = []

    def make(path: Path, size: int = SIZE, *, expect: str | None = None) -> NbdTarget:
        found = open_target(TargetSpec(str(path), format="qcow2"), size=size, expect=expect)
        assert isinstance(found, NbdTarget)
        opened.append(found)
        return found

    yield make
    for writer in opened:
        writer.close()


def noise(length: int, seed: int = 0) -> memoryview:
    return memoryview(random.Random(seed).randbytes(length))


def raw_of(path: Path) -> bytes:
    """The guest's disk as qemu-img reads it, and nothing wrong with the image."""
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], check=True)
    out = path.with_suffix(".converted")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(out)], check=True)
    return out.read_bytes()


def server_pid(writer: Target) -> int:
    assert isinstance(writer, NbdTarget)
    return writer._server.pid


def no_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokvm.targets.qcow2.open_direct", lambda *_: -1)


@pytest.mark.parametrize("offset", [0, 1, 512, 65535])
@pytest.mark.slow
def test_any_offset_and_length_lands_exactly(offset: int, disk: Path, take: Callable[..., NbdTarget]) -> None:
    """Against a byte model, over page-aligned, askew and read-only memory."""
    writer = take(disk)
    model = bytearray(SIZE)
    for seed, length in enumerate(EDGES):
        data = noise(length, seed)
        room = memoryview(mmap.mmap(-1, length + 1))
        for at, buffer in ((offset, data), (2 * MiB + offset, room[1:])):
            if not buffer.readonly:
                buffer[:] = data
            writer.write(at, buffer)
            model[at : at + length] = data
        assert bytes(writer.read_back(offset, length)) == bytes(data)
    writer.write(SIZE - 700, noise(700, 99))
    model[SIZE - 700 :] = noise(700, 99)
    writer.flush()
    assert bytes(writer.read_back(0, SIZE)) == model
    writer.close()
    assert raw_of(disk) == model


def test_zeroed_ranges_read_as_zeros_and_whole_clusters_are_given_back(disk: Path, take: Callable[..., NbdTarget]) -> None:
    writer = take(disk)
    writer.write(0, memoryview(b"\x53" * SIZE))
    writer.flush()
    full = disk.stat().st_blocks
    model = bytearray(b"\x53" * SIZE)
    for offset, length in [(0, 100), (1000, 70 * KiB), (0, 0), (MiB - 1, 2 * MiB + 2), (SIZE - 513, 513)]:
        writer.zero(offset, length)
        model[offset : offset + length] = bytes(length)
    writer.flush()
    assert bytes(writer.read_back(0, SIZE)) == model
    assert writer.is_hole(MiB, 2 * MiB)
    assert not writer.is_hole(MiB - 128 * KiB, MiB)
    assert not writer.is_hole(2 * MiB, 2 * MiB)
    writer.close()
    assert raw_of(disk) == model
    assert (full - disk.stat().st_blocks) * 512 > MiB


@pytest.mark.slow
def test_a_hole_larger_than_one_request_and_a_write_larger_than_one(disk: Path, take: Callable[..., NbdTarget]) -> None:
    size = 5 << 30
    writer = take(disk, size)
    writer.zero(512, size - 1024)
    assert writer.is_hole(0, size)
    data = memoryview(noise(MiB).tobytes() * 33)
    writer.write(size - len(data), data)
    assert bytes(writer.read_back(size - len(data), len(data))) == data
    assert not writer.is_hole(0, size)
    writer.close()
    assert disk.stat().st_blocks * 512 < 36 * MiB


def test_neighbours_written_by_many_threads_do_not_lose_each_others_bytes(disk: Path, take: Callable[..., NbdTarget]) -> None:
    """Odd borders inside clusters, more threads than connections, flushes in between."""
    writer = take(disk)
    rng = random.Random(5)
    cuts = sorted({0, SIZE, *(rng.randrange(SIZE) for _ in range(300))})
    model = noise(SIZE, 6)
    pieces = list(pairwise(cuts))
    rng.shuffle(pieces)

    def put(piece: tuple[int, int]) -> None:
        writer.write(piece[0], model[piece[0] : piece[1]])
        if piece[0] % 7 == 0:
            writer.flush()

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(put, pieces))
    writer.close()
    assert raw_of(disk) == model


def test_a_server_without_shared_flushes_gets_one_connection(tmp_path: Path) -> None:
    """`--shared=1`: a second connection would not be answered, and qemu-nbd does not say CAN_MULTI_CONN."""
    path = tmp_path / "plain.raw"
    path.write_bytes(bytes(MiB))
    with path.open("r+b") as file:
        server = QemuNbd.serve(file.fileno(), image_format="raw", where=str(path), cache=Cache.WRITEBACK, connections=0)
        try:
            export = NbdExport(server.socket, most=8)
            assert not export.multi_conn
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda n: export.write(n * 1000, memoryview(bytes([n + 1]) * 1000)), range(200)))
            export.flush()
            export.close()
        finally:
            assert server.stop()
    assert path.read_bytes()[: 200 * 1000] == b"".join(bytes([n + 1]) * 1000 for n in range(200))


def test_what_was_flushed_is_in_the_file_though_the_server_is_killed(disk: Path, take: Callable[..., NbdTarget]) -> None:
    """Data and tables: another opening finds them."""
    writer = take(disk)
    writer.write(2 * MiB, noise(MiB))
    writer.flush()
    os.kill(server_pid(writer), signal.SIGKILL)
    writer.close()
    assert raw_of(disk)[2 * MiB : 3 * MiB] == noise(MiB)


def test_outside_is_refused_and_a_closed_target_says_so(disk: Path, take: Callable[..., NbdTarget]) -> None:
    writer = take(disk)
    for call in (lambda: writer.write(SIZE - 1, noise(2)), lambda: writer.zero(SIZE, 1), lambda: writer.read_back(-1, 1)):
        with pytest.raises(TargetError, match="outside"):
            call()
    writer.write(0, noise(512))  # that was no failure of the medium
    writer.close()
    with pytest.raises(TargetError, match="closed"):
        writer.write(0, noise(512))
    assert raw_of(disk)[:512] == noise(512)


def test_a_dead_server_is_named_and_poisons(disk: Path, take: Callable[..., NbdTarget], tmp_path: Path) -> None:
    writer = take(disk)
    writer.write(0, noise(MiB))
    os.kill(server_pid(writer), signal.SIGKILL)
    with pytest.raises(TargetError, match="qemu-nbd was killed by signal 9") as caught:
        writer.write(MiB, noise(MiB))
    assert caught.value.where == f"{disk}@0x100000"
    assert "run the same command again" in caught.value.fix
    for call in (writer.flush, lambda: writer.zero(0, 1), lambda: writer.read_back(0, 1), lambda: writer.write(0, noise(1))):
        with pytest.raises(TargetError, match="signal 9"):
            call()
    writer.close()
    with pytest.raises(UnsafeTarget, match="no run of ours"):
        take(disk)
    again = take(disk, expect=writer.identity)
    again.write(MiB, noise(MiB))
    again.close()
    assert raw_of(disk)[MiB : 2 * MiB] == noise(MiB)


def test_a_server_that_hangs_cannot_hold_close_up(
    disk: Path, take: Callable[..., NbdTarget], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu_nbd, "_STOP_S", 0.3)
    writer = take(disk)
    writer.write(0, noise(512))
    writer.flush()
    os.kill(server_pid(writer), signal.SIGSTOP)
    began = time.monotonic()
    writer.close()
    assert time.monotonic() - began < 5
    assert raw_of(disk)[:512] == noise(512)


def test_a_program_that_does_not_serve_says_why(
    disk: Path, take: Callable[..., NbdTarget], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that QEMU refuses: the message is QEMU's, the file's name ours."""
    monkeypatch.setattr("tokvm.targets.qcow2.create_qcow2", lambda fd, **_: os.pwrite(fd, b"QFI\xfb" + bytes(508), 0))
    with pytest.raises(TargetError, match="cannot be served: qemu-nbd ended with exit code 1") as caught:
        take(disk)
    assert f"'{disk}'" in caught.value.what
    assert "/proc/" not in caught.value.what


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 8 MiB with O_DIRECT: ext4 on a loop device."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    image, point = tmp_path / "small.img", tmp_path / "small"
    with image.open("wb") as file:
        file.truncate(8 * MiB)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", str(image)], check=True)
    point.mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(point)], check=True)
    yield point
    subprocess.run(["umount", str(point)], check=True)


@pytest.mark.root
@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_read_back_shows_what_the_medium_holds_and_not_the_page_cache(
    cache: str, small: Path, take: Callable[..., NbdTarget], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit flips in the file below the filesystem, where no cache above learns of it: it must be seen."""
    if cache == "writeback":
        no_direct(monkeypatch)
    writer = take(small / "disk.qcow2", 4 * MiB)
    assert writer._cache.value == cache
    writer.write(MiB, noise(PIECE))
    writer.flush()
    assert bytes(writer.read_back(MiB, PIECE)) == noise(PIECE)
    medium = small.with_suffix(".img")
    at = medium.read_bytes().index(noise(PIECE)[:4096].tobytes())
    with medium.open("r+b") as file:
        file.seek(at + 100)
        file.write(bytes([noise(PIECE)[100] ^ 1]))
    assert [n for n, (a, b) in enumerate(zip(writer.read_back(MiB, PIECE), noise(PIECE), strict=True)) if a != b] == [100]


def fill(writer: DiskWriter, stop: int) -> None:
    for n in range(1, stop):
        writer.write(n * MiB, noise(MiB, n))
    writer.flush()


@pytest.mark.root
@pytest.mark.parametrize("cache", ["none", "writeback"])
@pytest.mark.slow
def test_a_full_filesystem_is_reported_and_after_making_room_it_goes_on(
    cache: str, small: Path, take: Callable[..., NbdTarget], monkeypatch: pytest.MonkeyPatch
) -> None:
    if cache == "writeback":
        no_direct(monkeypatch)
    ballast = small / "ballast"
    ballast.write_bytes(bytes(3 * MiB))
    writer = take(small / "disk.qcow2", 32 * MiB)
    writer.write(0, noise(MiB))
    writer.flush()
    with pytest.raises(TargetError, match="No space left on device") as caught:
        fill(writer, 8)
    assert "make room" in caught.value.fix
    with pytest.raises(TargetError, match="No space left"):
        writer.flush()
    writer.close()
    assert SERVED in os.listxattr(small / "disk.qcow2")  # so that the next run looks for what the failure left
    ballast.unlink()
    again = take(small / "disk.qcow2", 32 * MiB, expect=writer.identity)
    assert bytes(again.read_back(0, MiB)) == noise(MiB)
    again.write(MiB, noise(MiB, 1))
    again.flush()
    again.close()
    assert subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(small / "disk.qcow2")], check=False).returncode == 0


@pytest.mark.root
def test_odd_writes_on_a_filesystem_with_4096_byte_sectors(
    tmp_path: Path, loop: Callable[..., str], take: Callable[..., NbdTarget]
) -> None:
    device, point = loop(size=32 * MiB, options=("--sector-size", "4096")), tmp_path / "point"
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    point.mkdir()
    subprocess.run(["mount", device, str(point)], check=True)
    try:
        writer, model = take(point / "disk.qcow2", MiB), bytearray(MiB)
        for seed, (offset, length) in enumerate([(512, 512), (1024, 200 * KiB), (MiB - 512, 512), (700 * KiB + 512, 70 * KiB)]):
            writer.write(offset, noise(length, seed))
            model[offset : offset + length] = noise(length, seed)
        writer.flush()
        assert writer._cache is Cache.NONE
        assert bytes(writer.read_back(0, MiB)) == model
        writer.close()
    finally:
        subprocess.run(["umount", str(point)], check=True)


def vhd_chain(tmp_path: Path) -> tuple[list[Path], bytes]:
    """A base and two differencing disks, of a size that ends inside a block; and what the guest sees."""
    size, rng = 9 * MiB + 3 * 512, random.Random(1)
    paths: list[Path] = []
    model = bytearray(size)
    for number in range(3):
        starts = sorted(rng.sample(range(size // 512 - 200), 12))
        stops = [*starts[1:], size // 512]
        runs = [
            (at * 512, rng.choice((rng.randbytes, bytes))(min(199, stop - at) * 512))
            for at, stop in zip(starts, stops, strict=True)
        ]
        for at, data in runs:
            model[at : at + len(data)] = data
        path = tmp_path / f"layer{number}.vhd"
        parent = UUID(int=number) if number else None
        name = paths[-1].name if number else ""
        with path.open("wb") as out:
            write_vhd(
                out, size=size, kind="differencing" if number else "dynamic", runs=runs, unique_id=UUID(int=number + 1),
                parent_id=parent, parent_name=name,
            )  # fmt: skip
        paths.append(path)
    return paths, bytes(model)


def copy(reader: Any, writer: DiskWriter, manifest: Path, number: int = 0) -> None:
    seal = ManifestWriter.open(manifest, number=number, disk=0, size=reader.size)
    state = TargetState.PREVIOUS_PASS if number else TargetState.UNKNOWN
    try:
        run_pass(reader, writer, state=state, resume=None, record=lambda _: None, progress=lambda _: None, manifest=seal)
    finally:
        seal.close()
        reader.close()


def chain_reader(paths: list[Path]) -> ChainReader:
    return ChainReader(Chain.open([open_image(open_file(path)) for path in paths]), pool=BufferPool(8))


class Pieces:
    """A DiskReader of 64 KiB pieces: (number, data, or None for a piece that reads as zeros)."""

    fingerprint = "pieces"

    def __init__(
        self, size: int, pieces: list[tuple[int, bytes | None]], before: Callable[[int], None] = lambda _: None
    ) -> None:
        self.size = size
        self._pieces = pieces
        self._before = before

    @property
    def total(self) -> int:
        return PIECE * sum(data is not None for _, data in self._pieces)

    def covered(self) -> Iterator[ExtentMap]:
        numbers = sorted((number, ExtentKind.ZERO if data is None else ExtentKind.DATA) for number, data in self._pieces)
        offset, kind = [number * PIECE for number, _ in numbers], [int(kind) for _, kind in numbers]
        yield ExtentMap.build(0, self.size, offset, [PIECE] * len(offset), kind, offset)

    def chunks(self, position: int = 0) -> Iterator[Chunk]:
        for at, (number, data) in enumerate(self._pieces[position:], position):
            self._before(at)
            kind = ExtentKind.ZERO if data is None else ExtentKind.DATA
            yield Chunk(number * PIECE, PIECE, kind, at + 1, None if data is None else memoryview(data))

    def close(self) -> None:
        """Holds nothing."""


def some_pieces(seed: int, count: int, of: int) -> list[tuple[int, bytes | None]]:
    rng = random.Random(seed)
    return [(number, rng.choice((None, rng.randbytes(PIECE), rng.randbytes(PIECE)))) for number in rng.sample(range(of), count)]


def laid(pieces: list[tuple[int, bytes | None]], under: bytes) -> bytes:
    model = bytearray(under)
    for number, data in pieces:
        model[number * PIECE : (number + 1) * PIECE] = data or bytes(PIECE)
    return bytes(model)


def test_a_vhd_chain_copied_by_a_pass_is_what_qemu_reads(tmp_path: Path, disk: Path, take: Callable[..., NbdTarget]) -> None:
    paths, model = vhd_chain(tmp_path)
    writer = take(disk, len(model))
    copy(chain_reader(paths), writer, tmp_path / "manifest")
    assert verify(writer, [tmp_path / "manifest"], progress=lambda _: None).good
    writer.close()
    assert raw_of(disk) == model
    stored = open_read_back(disk, expect=writer.identity)
    report = verify(stored, [tmp_path / "manifest"], progress=lambda _: None)
    assert (report.good, report.verified_bytes) == (True, len(model))
    stored.close()


def test_a_base_vhd_in_a_qcow2_compares_equal_for_qemu(tmp_path: Path, disk: Path, take: Callable[..., NbdTarget]) -> None:
    """No reader of ours on either side."""
    paths, model = vhd_chain(tmp_path)
    writer = take(disk, len(model))
    copy(chain_reader(paths[:1]), writer, tmp_path / "manifest")
    writer.close()
    vhd = f"driver=vpc,force_size_calc=current_size,file.driver=file,file.filename={paths[0]}"
    qcow2 = f"driver=qcow2,file.driver=file,file.filename={disk}"
    done = subprocess.run(["qemu-img", "compare", "--image-opts", vhd, qcow2], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "Images are identical.\n"), done.stderr


@pytest.mark.slow
def test_delta_passes_over_reopened_targets_leave_no_trace_of_the_old(
    tmp_path: Path, disk: Path, take: Callable[..., NbdTarget]
) -> None:
    model, identity = bytes(4 * MiB), None
    manifests: list[Path] = []
    for number in range(3):
        pieces = some_pieces(number, 30, 64)
        manifests.append(tmp_path / f"manifest{number}")
        writer = take(disk, len(model), expect=identity)
        copy(Pieces(len(model), pieces), writer, manifests[-1], number)
        assert verify(writer, manifests, progress=lambda _: None).bad == []
        writer.close()
        identity, model = writer.identity, laid(pieces, model)
        assert raw_of(disk) == model


def test_a_server_killed_in_the_middle_of_a_pass_ends_it_and_nothing_more_is_recorded(
    disk: Path, take: Callable[..., NbdTarget]
) -> None:
    """The last checkpoint is true, the next run goes on from it, and the result is exact."""
    pieces, size = some_pieces(3, 60, 64), 64 * PIECE
    limits = PassLimits(checkpoint_bytes=8 * PIECE)
    writer = take(disk, size)
    marks: list[Checkpoint] = []
    killed_at: list[int] = []

    def kill(at: int) -> None:
        if at == 40:
            killed_at.append(len(marks))
            os.kill(server_pid(writer), signal.SIGKILL)
            while Path(f"/proc/{server_pid(writer)}/exe").exists():
                time.sleep(0.001)

    with pytest.raises(TargetError, match="signal 9"):
        run_pass(
            Pieces(size, pieces, kill), writer, state=TargetState.UNKNOWN, resume=None, record=marks.append,
            progress=lambda _: None, limits=limits,
        )  # fmt: skip
    writer.close()
    assert 0 < killed_at[0] <= len(marks)
    assert marks[-1].position <= 40
    again = take(disk, size, expect=writer.identity)
    run_pass(
        Pieces(size, pieces), again, state=TargetState.UNKNOWN, resume=marks[-1], record=marks.append,
        progress=lambda _: None, limits=limits,
    )  # fmt: skip
    again.close()
    assert raw_of(disk) == laid(pieces, bytes(size))


VICTIM = """
import json, os, sys
from tokvm.targets.open import TargetSpec, open_target
writer = open_target(TargetSpec(sys.argv[1], format="qcow2"), size=64 << 20)
print(json.dumps([writer.identity, writer._server.pid, writer._server.socket]), flush=True)
done = 0
while True:
    for n in range(8):
        writer.write((done + n) % 1000 * (64 << 10), memoryview(bytes([1 + (done + n) % 1000 % 250]) * (64 << 10)))
    writer.flush()
    done += 8
    print(done, flush=True)
"""


@pytest.mark.slow
def test_kill_9_of_us_takes_the_server_along_and_loses_nothing_that_was_flushed(
    disk: Path, take: Callable[..., NbdTarget]
) -> None:
    for _ in range(2):
        disk.unlink(missing_ok=True)
        with subprocess.Popen([sys.executable, "-c", VICTIM, str(disk)], stdout=subprocess.PIPE, text=True) as victim:
            assert victim.stdout is not None
            identity, pid, socket = json.loads(victim.stdout.readline())
            flushed = 0
            while flushed < 200:
                flushed = int(victim.stdout.readline())
            victim.kill()
            rest = victim.stdout.read().splitlines()
        flushed = int(rest[-1]) if rest else flushed
        until = time.monotonic() + 10
        while Path(f"/proc/{pid}/exe").exists():
            assert time.monotonic() < until, "qemu-nbd outlived us"
            time.sleep(0.005)
        shutil.rmtree(Path(socket).parent)  # what is left, until the next run sweeps it a minute later
        with pytest.raises(UnsafeTarget, match="no run of ours"):
            take(disk, 64 * MiB)
        writer = take(disk, 64 * MiB, expect=identity)
        for n in range(min(flushed, 1000)):
            assert bytes(writer.read_back(n * PIECE, PIECE)) == bytes([1 + n % 250]) * PIECE
        writer.close()
        assert subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(disk)], check=False).returncode == 0


def test_the_server_outlives_the_thread_that_opened_it(disk: Path, take: Callable[..., NbdTarget]) -> None:
    """PR_SET_PDEATHSIG means the thread that forked."""
    found: list[NbdTarget] = []
    thread = threading.Thread(target=lambda: found.append(take(disk)))
    thread.start()
    thread.join()
    found[0].write(0, noise(MiB))
    found[0].flush()
    assert bytes(found[0].read_back(0, MiB)) == noise(MiB)
