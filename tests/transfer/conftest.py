"""A reader over a byte model, which can stop, fail and be resumed at any chunk."""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.disk import BufferPool, Chunk
from tokvm.core.extents import ExtentKind, ExtentMap
from tokvm.core.units import KiB, MiB
from tokvm.targets.base import Target
from tokvm.targets.open import TargetSpec, open_target


class ModelReader:
    """A DiskReader over `content`, saying only what `extents` (offset, length, kind) say, in pieces of at most `piece`,
    in a shuffled order that is the same every time. position: pieces handed out."""

    fingerprint = "model"

    def __init__(
        self, content: bytes, extents: list[tuple[int, int, ExtentKind]], *, piece: int = 256 * KiB, buffers: int = 4
    ) -> None:
        self.content = content
        self.size = len(content)
        self.extents = extents
        self.pool = BufferPool(buffers, piece)
        self.sent = 0
        self.before: Callable[[int], None] = lambda _position: None
        self.pieces = [
            (at, min(piece, offset + length - at), kind)
            for offset, length, kind in extents
            for at in range(offset, offset + length, piece)
        ]
        random.Random(3).shuffle(self.pieces)
        self.total = sum(length for _, length, kind in self.pieces if kind is ExtentKind.DATA)

    def covered(self) -> Iterator[ExtentMap]:
        step = 1 * MiB
        rows = [list(column) for column in zip(*self.extents, strict=True)] or [[], [], []]
        for start in range(0, self.size, step):
            stop = min(self.size, start + step)
            yield (
                ExtentMap.build(start, stop, rows[0], rows[1], [int(k) for k in rows[2]])
                if rows[0]
                else ExtentMap.empty(start, stop)
            )

    def chunks(self, position: int = 0) -> Iterator[Chunk]:
        for number, (offset, length, kind) in enumerate(self.pieces):
            if number < position:
                continue
            self.before(number)
            if kind is ExtentKind.ZERO:
                yield Chunk(offset, length, kind, number + 1)
                continue
            buffer, release = self.pool.acquire()
            buffer[:length] = self.content[offset : offset + length]
            self.sent += length
            yield Chunk(offset, length, kind, number + 1, buffer[:length], release)

    def free_buffers(self) -> int:
        count = 0
        while self.pool.try_acquire() is not None:
            count += 1
        return count

    def close(self) -> None:
        """Nothing to give back."""


def make_model(
    size: int = 4 * MiB + 1536, *, seed: int = 1, grain: int = 4 * KiB
) -> tuple[bytes, list[tuple[int, int, ExtentKind]]]:
    """Content and extents that agree: about half DATA, some ZERO, the rest ABSENT; a few DATA runs hold zeros."""
    rng = random.Random(seed)
    content = bytearray(size)
    extents: list[tuple[int, int, ExtentKind]] = []
    at = 0
    while at < size:
        length = min(size - at, rng.choice([grain, grain, 3 * grain, 64 * KiB, 200 * KiB, 512 * KiB]))
        kind = rng.choice([ExtentKind.DATA, ExtentKind.DATA, ExtentKind.ZERO, ExtentKind.ABSENT])
        if kind is not ExtentKind.ABSENT:
            extents.append((at, length, kind))
        if kind is ExtentKind.DATA and rng.random() > 0.2:
            content[at : at + length] = rng.randbytes(length)
        at += length
    return bytes(content), extents


def make_delta(base: bytes, *, seed: int, count: int = 40, grain: int = 512) -> tuple[bytes, list[tuple[int, int, ExtentKind]]]:
    """A few small changes all over the disk: new content, and the extents that changed."""
    rng = random.Random(seed)
    content = bytearray(base)
    starts = sorted(rng.sample(range(len(base) // (8 * KiB)), count))
    extents = []
    for start in starts:
        offset = start * 8 * KiB
        length = min(len(base) - offset, rng.randrange(1, 8 * KiB // grain) * grain)
        kind = rng.choice([ExtentKind.DATA, ExtentKind.DATA, ExtentKind.ZERO])
        content[offset : offset + length] = rng.randbytes(length) if kind is ExtentKind.DATA else bytes(length)
        extents.append((offset, length, kind))
    return bytes(content), extents


@pytest.fixture
def model() -> tuple[bytes, list[tuple[int, int, ExtentKind]]]:
    return make_model()


@pytest.fixture
def delta() -> Callable[..., tuple[bytes, list[tuple[int, int, ExtentKind]]]]:
    return make_delta


@pytest.fixture
def reader_of() -> Callable[..., Any]:
    return ModelReader


@pytest.fixture
def dirty(tmp_path: Path) -> Callable[[int], Path]:
    """A file full of 0x53: a target that must not be trusted to be blank."""

    def make(size: int) -> Path:
        path = tmp_path / "target.raw"
        path.write_bytes(b"\x53" * size)
        return path

    return make


@pytest.fixture
def target() -> Iterator[Callable[..., Target]]:
    """Opens targets, with consent to lose what is there, and closes them."""
    opened: list[Target] = []

    def take(path: Path, size: int, *, expect: str | None = None) -> Target:
        found = open_target(TargetSpec(str(path), force=expect is None), size=size, expect=expect)
        opened.append(found)
        return found

    yield take
    for writer in opened:
        writer.close()


@pytest.fixture
def page() -> memoryview:
    return memoryview(mmap.mmap(-1, 4 * KiB))
