"""verify: every byte the passes wrote, past the page cache; and what a re-sealed cell is worth."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.loops import attach, detach

from tokvm.core.errors import TargetError
from tokvm.core.extents import ExtentKind
from tokvm.core.units import KiB, MiB
from tokvm.targets.open import TargetSpec, open_target
from tokvm.targets.readback import ReadBack
from tokvm.transfer.manifest import CELL, ManifestWriter
from tokvm.transfer.passes import PassLimits, PassResult, TargetState, run_pass
from tokvm.transfer.reseal import reseal
from tokvm.transfer.verify import verify

Model = tuple[bytes, list[tuple[int, int, ExtentKind]]]


def ignore(_: object) -> None:
    """For callbacks that a test does not look at."""


def copy(reader: Any, writer: Any, path: Path, number: int, **options: Any) -> PassResult:
    """Pass `number` (0: the base) with its manifest."""
    state = TargetState.PREVIOUS_PASS if number else TargetState.UNKNOWN
    manifest = ManifestWriter.open(path, number=number, disk=0, size=reader.size)
    try:
        return run_pass(reader, writer, state=state, resume=None, record=ignore, progress=ignore, manifest=manifest, **options)
    finally:
        manifest.close()


def test_base_and_deltas_are_verifiable_to_the_last_byte(
    model: Model, delta: Any, reader_of: Any, dirty: Any, target: Any, tmp_path: Path
) -> None:
    content, extents = model
    writer = target(dirty(len(content)), len(content))
    paths = [tmp_path / f"m{number}" for number in range(4)]
    copy(reader_of(content, extents), writer, paths[0], 0)
    for number in (1, 2, 3):
        content, changed = delta(content, seed=number)
        assert copy(reader_of(content, changed, piece=4 * KiB), writer, paths[number], number).unsealed_cells == 0
        seen: list[int] = []
        report = verify(writer, paths[: number + 1], progress=seen.append)
        assert (report.verified_bytes, report.unverifiable_bytes, report.bad) == (len(content), 0, [])
        assert sum(seen) == len(content)
    assert bytes(writer.read_back(0, len(content))) == content


def test_without_time_to_seal_new_bytes_are_verifiable_and_old_ones_are_counted(
    model: Model, delta: Any, reader_of: Any, dirty: Any, target: Any, tmp_path: Path
) -> None:
    content, extents = model
    writer = target(dirty(len(content)), len(content))
    copy(reader_of(content, extents), writer, tmp_path / "m0", 0)
    after, changed = delta(content, seed=1)
    limits = PassLimits(reseal_s=0)
    copy(reader_of(after, changed), writer, tmp_path / "m1", 1, limits=limits)
    report = verify(writer, [tmp_path / "m0", tmp_path / "m1"], progress=ignore)
    assert report.good
    assert report.verified_bytes >= sum(length for _, length, _ in changed)
    assert report.unverifiable_bytes > 0
    assert report.verified_bytes + report.unverifiable_bytes == len(content)


def test_a_passed_deadline_leaves_cells_unsealed_and_the_pass_whole(
    model: Model, delta: Any, reader_of: Any, dirty: Any, target: Any, tmp_path: Path
) -> None:
    content, extents = model
    writer = target(dirty(len(content)), len(content))
    copy(reader_of(content, extents), writer, tmp_path / "m0", 0)
    after, changed = delta(content, seed=1)
    copy(reader_of(after, changed), writer, tmp_path / "m1", 1, limits=PassLimits(reseal_s=0))
    manifest = ManifestWriter.open(tmp_path / "m1", number=1, disk=0, size=len(content))
    assert reseal(writer, manifest, until=time.monotonic() - 1, workers=1) > 0
    assert reseal(writer, manifest, until=time.monotonic() + 60, workers=1) == 0
    manifest.close()
    assert verify(writer, [tmp_path / "m0", tmp_path / "m1"], progress=ignore).unverifiable_bytes == 0


def test_sealing_refuses_a_medium_that_does_not_hold_what_was_written(
    model: Model, delta: Any, reader_of: Any, dirty: Any, target: Any, tmp_path: Path
) -> None:
    content, extents = model
    path = dirty(len(content))
    writer = target(path, len(content))
    copy(reader_of(content, extents), writer, tmp_path / "m0", 0)
    after, changed = delta(content, seed=1)
    copy(reader_of(after, changed), writer, tmp_path / "m1", 1, limits=PassLimits(reseal_s=0))
    offset = next(at for at, _, kind in changed if kind is ExtentKind.DATA)
    writer.write(offset, memoryview(bytes([after[offset] ^ 1])))
    manifest = ManifestWriter.open(tmp_path / "m1", number=1, disk=0, size=len(content))
    with pytest.raises(TargetError, match="differ from what was written"):
        reseal(writer, manifest, until=time.monotonic() + 60, workers=1)
    manifest.close()


def test_every_flipped_bit_is_found_and_named(
    model: Model, delta: Any, reader_of: Any, dirty: Any, target: Any, tmp_path: Path
) -> None:
    content, extents = model
    path = dirty(len(content))
    writer = target(path, len(content))
    copy(reader_of(content, extents), writer, tmp_path / "m0", 0)
    after, changed = delta(content, seed=1)
    copy(reader_of(after, changed), writer, tmp_path / "m1", 1)
    writer.close()
    rng = random.Random(2)
    reader = ReadBack.open(path)
    for at in [0, 511, CELL - 1, CELL, len(content) - 1, *(rng.randrange(len(content)) for _ in range(40))]:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([after[at] ^ 1 << rng.randrange(8)]))
        report = verify(reader, [tmp_path / "m0", tmp_path / "m1"], progress=ignore)
        assert len(report.bad) == 1
        offset, length = report.bad[0]
        assert offset <= at < offset + length
        with path.open("r+b") as file:
            file.seek(at)
            file.write(after[at : at + 1])
    assert verify(reader, [tmp_path / "m0", tmp_path / "m1"], progress=ignore).good
    reader.close()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A loop device that reads and writes its backing file past the cache, and that file."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    backing = tmp_path / "backing.img"
    backing.write_bytes(b"\x53" * 8 * MiB)
    made = attach(backing)
    yield made, backing
    detach(made)


@pytest.mark.root
def test_a_bit_flipped_below_the_page_cache_of_a_device_is_found(
    device: tuple[str, Path], reader_of: Any, tmp_path: Path
) -> None:
    """The device's own cache still holds the right byte: only a read past it can tell."""
    path, backing = device
    content = random.Random(4).randbytes(8 * MiB)
    writer = open_target(TargetSpec(path), size=len(content))
    copy(reader_of(content, [(0, len(content), ExtentKind.DATA)]), writer, tmp_path / "m0", 0)
    try:
        with open(path, "rb") as cached:
            assert cached.read() == content
            with backing.open("r+b") as below:
                below.seek(5 * MiB + 77)
                below.write(bytes([content[5 * MiB + 77] ^ 4]))
                os.fsync(below.fileno())
            cached.seek(0)
            assert cached.read() == content  # the page cache knows nothing of it
            assert verify(writer, [tmp_path / "m0"], progress=ignore).bad == [(5 * MiB, CELL)]
    finally:
        writer.close()


def test_a_sample_looks_at_about_that_much(reader_of: Any, target: Any, tmp_path: Path) -> None:
    content = random.Random(1).randbytes(16 * MiB)
    writer = target(tmp_path / "disk.raw", len(content))
    copy(reader_of(content, [(0, len(content), ExtentKind.DATA)]), writer, tmp_path / "m0", 0)
    half = verify(writer, [tmp_path / "m0"], progress=ignore, sample=0.5, seed=1)
    assert 0.35 < half.verified_bytes / len(content) < 0.65
    assert half.verified_bytes + half.skipped_bytes == len(content)
    none = verify(writer, [tmp_path / "m0"], progress=ignore, sample=0.0)
    assert (none.verified_bytes, none.good) == (0, True)


def test_no_manifest_proves_nothing(dirty: Any, target: Any) -> None:
    report = verify(target(dirty(MiB), MiB), [], progress=ignore)
    assert (report.verified_bytes, report.unverifiable_bytes) == (0, MiB)


def test_a_large_hole_is_not_read(reader_of: Any, target: Any, tmp_path: Path) -> None:
    """64 GiB of zeros in a sparse file take no time: the filesystem itself says that nothing is there."""
    writer = target(tmp_path / "big.raw", 64 * 1024 * MiB)
    manifest = ManifestWriter.open(tmp_path / "m", number=0, disk=0, size=writer.size)
    manifest.zero(0, writer.size)
    manifest.flush()
    manifest.close()
    began = time.monotonic()
    assert verify(writer, [tmp_path / "m"], progress=ignore).verified_bytes == writer.size
    assert time.monotonic() - began < 5
