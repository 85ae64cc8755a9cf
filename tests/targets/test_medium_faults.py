"""A medium that misbehaves: short writes, EINTR, EIO, ENOSPC, a failing flush, a lying read through the cache."""

from __future__ import annotations

import errno
import mmap
import os
import random
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from tokvm.core.errors import TargetError, UnsafeTarget
from tokvm.core.units import KiB, MiB
from tokvm.targets import linux
from tokvm.targets.base import Target
from tokvm.targets.open import TargetSpec, open_target

SIZE = 4 * MiB + 1536  # neither a whole number of pages nor of MiB


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Target]:
    found = open_target(TargetSpec(str(tmp_path / "disk.raw")), size=SIZE)
    yield found
    found.close()


def aligned(size: int, seed: int = 0) -> memoryview:
    view = memoryview(mmap.mmap(-1, max(size, 1)))[:size]
    view[:] = random.Random(seed).randbytes(size)
    return view


EDGES = [0, 1, 511, 512, 513, 4095, 4096, 4097, 64 * KiB - 1, 64 * KiB, 64 * KiB + 1, MiB, MiB + 512]


@pytest.mark.parametrize("offset", [0, 1, 512, 4096, 65535, 65536])
def test_any_offset_and_length_lands_exactly(offset: int, tmp_path: Path) -> None:
    """Against a byte model, over every mix of direct and buffered parts."""
    path = tmp_path / "disk.raw"
    writer = open_target(TargetSpec(str(path)), size=SIZE)
    model = bytearray(SIZE)
    for seed, length in enumerate(EDGES):
        data = aligned(length, seed)
        writer.write(offset, data)
        model[offset : offset + length] = data
        askew = memoryview(bytearray(b"?" + bytes(data)))[1:]
        writer.write(2 * MiB + offset, askew)
        model[2 * MiB + offset : 2 * MiB + offset + length] = data
        assert bytes(writer.read_back(offset, length)) == bytes(data)
    writer.write(SIZE - 700, aligned(700, 99))
    model[SIZE - 700 :] = aligned(700, 99)
    writer.flush()
    writer.close()
    assert path.read_bytes() == model


@pytest.mark.parametrize("how", ["hole", "zero-range", "written"])
def test_zeroed_ranges_read_as_zeros_whatever_they_held(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = linux.fallocate

    def refuse(fd: int, mode: int, offset: int, length: int) -> None:
        if how == "written" or (how == "zero-range" and mode & linux.FALLOC_PUNCH_HOLE):
            raise OSError(errno.EOPNOTSUPP, "not here")
        real(fd, mode, offset, length)

    monkeypatch.setattr(linux, "fallocate", refuse)
    path = tmp_path / "disk.raw"
    path.write_bytes(b"\x53" * SIZE)
    writer = open_target(TargetSpec(str(path), force=True), size=SIZE)
    model = bytearray(b"\x53" * SIZE)
    for offset, length in [(0, 100), (1000, 70 * KiB), (128 * KiB, 64 * KiB), (MiB - 1, MiB + 2), (SIZE - 513, 513)]:
        writer.zero(offset, length)
        model[offset : offset + length] = bytes(length)
    writer.flush()
    assert bytes(writer.read_back(0, SIZE)) == model
    writer.close()
    assert path.read_bytes() == model


@pytest.mark.root
def test_a_device_is_zeroed_by_blkzeroout_and_survivors_are_counted(loop: Callable[..., str]) -> None:
    device = loop(size=8 * MiB)
    writer = open_target(TargetSpec(device), size=8 * MiB)
    writer.zero(0, 8 * MiB)
    writer.flush()
    assert bytes(writer.read_back(0, 8 * MiB)).count(0x53) == 0
    writer.write(8 * MiB - 512, aligned(512))
    with pytest.raises(TargetError, match="outside"):
        writer.write(8 * MiB - 512, aligned(1024))
    writer.close()


@pytest.mark.root
@pytest.mark.parametrize("sector", ["512", "4096"])
def test_odd_pieces_on_devices_with_512_and_4096_byte_sectors(sector: str, loop: Callable[..., str]) -> None:
    device = loop(size=2 * MiB, options=("--sector-size", sector))
    writer = open_target(TargetSpec(device), size=2 * MiB)
    model = bytearray(b"\x53" * (2 * MiB))
    for seed, (offset, length) in enumerate([(512, 512), (1024, 200 * KiB), (600 * KiB + 512, 70 * KiB), (2 * MiB - 512, 512)]):
        data = aligned(length, seed)
        writer.write(offset, data)
        model[offset : offset + length] = data
    writer.zero(MiB + 512, 128 * KiB)
    model[MiB + 512 : MiB + 512 + 128 * KiB] = bytes(128 * KiB)
    writer.flush()
    assert bytes(writer.read_back(0, 2 * MiB)) == model
    writer.close()


def test_neighbours_written_by_many_threads_do_not_lose_each_others_bytes(tmp_path: Path) -> None:
    """Odd borders inside pages, direct and buffered writes next to each other, eight threads."""
    writer = open_target(TargetSpec(str(tmp_path / "disk.raw")), size=SIZE)
    rng = random.Random(7)
    cuts = sorted({0, SIZE, *(rng.randrange(SIZE // 512) * 512 for _ in range(150))})
    pieces = [(low, aligned(high - low, low)) for low, high in pairwise(cuts)]
    rng.shuffle(pieces)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda piece: writer.write(*piece), pieces))
    writer.flush()
    assert bytes(writer.read_back(0, SIZE)) == b"".join(bytes(data) for _, data in sorted(pieces, key=lambda piece: piece[0]))
    writer.close()


@pytest.mark.parametrize("most", [1, 512, 4096, 5000])
def test_short_writes_are_continued(most: int, writer: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:most], offset))
    data = aligned(70 * KiB if most > 1 else 3000)
    writer.write(512, data)
    writer.flush()
    assert bytes(writer.read_back(512, len(data))) == bytes(data)


def test_interrupted_writes_are_repeated(writer: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, iter([True, True, False, True])

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if next(calls, False):
            raise InterruptedError(errno.EINTR, "interrupted")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    writer.write(0, aligned(100 * KiB))
    assert bytes(writer.read_back(0, 100 * KiB)) == bytes(aligned(100 * KiB))


def test_a_kernel_that_takes_nothing_is_an_error_not_a_loop(writer: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(TargetError, match="took no bytes"):
        writer.write(0, aligned(4096))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_failed_write_names_place_and_reason_and_poisons(code: int, writer: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(TargetError) as caught:
            writer.write(MiB, aligned(4096))
    assert caught.value.where == f"{writer.path}@0x100000"
    assert os.strerror(code) in caught.value.what
    for later in (
        lambda: writer.write(0, aligned(512)),
        lambda: writer.zero(0, 512),
        writer.flush,
        lambda: writer.read_back(0, 1),
    ):
        with pytest.raises(TargetError, match="writing failed"):
            later()


def test_a_failed_flush_is_never_retried(writer: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(TargetError, match="flushing failed"):
            writer.flush()
    assert len(calls) == 1
    with pytest.raises(TargetError, match="flushing failed"):
        writer.flush()
    assert len(calls) == 1


def test_a_full_filesystem_is_reported(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for a full disk without needing one: EFBIG from the kernel itself."""
    writer = open_target(TargetSpec(str(tmp_path / "disk.raw")), size=SIZE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MiB, hard))
    try:
        with pytest.raises(TargetError, match="writing failed"):
            writer.write(2 * MiB, aligned(MiB))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.close()


@pytest.mark.root
def test_a_full_tmpfs_is_reported(tmp_path: Path) -> None:
    point = tmp_path / "small"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(point)], check=True)
    try:
        writer = open_target(TargetSpec(str(point / "disk.raw")), size=8 * MiB)
        with pytest.raises(TargetError, match="No space left"):
            writer.write(0, aligned(4 * MiB))
        writer.close()
    finally:
        subprocess.run(["umount", str(point)], check=True)


def test_without_o_direct_everything_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def no_direct(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", no_direct)
    writer = open_target(TargetSpec(str(tmp_path / "disk.raw")), size=SIZE)
    writer.write(4096, aligned(MiB))
    writer.flush()
    assert bytes(writer.read_back(4000, MiB)) == bytes(96) + bytes(aligned(MiB))[: MiB - 96]
    writer.close()


def test_a_direct_write_the_medium_will_not_take_goes_through_the_cache(
    writer: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = os.pwrite, []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if fd != writer.fileno():
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    writer.write(0, aligned(MiB))
    assert refused == [0]
    assert bytes(writer.read_back(0, MiB)) == bytes(aligned(MiB))


def test_a_closed_target_says_so(writer: Target) -> None:
    writer.close()
    writer.close()
    with pytest.raises(TargetError, match="closed"):
        writer.write(0, aligned(512))


def test_racing_opens_one_wins(tmp_path: Path) -> None:
    path = str(tmp_path / "disk.raw")
    won: list[Target] = []
    lost: list[UnsafeTarget] = []

    def start() -> None:
        try:
            won.append(open_target(TargetSpec(path), size=SIZE))
        except UnsafeTarget as exc:
            lost.append(exc)

    threads = [threading.Thread(target=start) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 19)
    won[0].close()
