"""Structured mutants of small VHDs, checksums repaired: refused with a place, or read within the disk, never worse."""

from __future__ import annotations

import random
import resource
import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.images.mutation import CPU_LIMIT_S, MEMORY_LIMIT, drain, poke, refusal, run_mutants

from tokvm.core.errors import ImageError
from tokvm.images.chain import Chain
from tokvm.images.open import open_image
from tokvm.images.reader import ChainReader
from tokvm.images.vhd.stream import StreamKind, VhdStream

FOOTER_FIELDS = [
    (0, 8),
    (8, 4),
    (12, 4),
    (16, 8),
    (28, 4),
    (32, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 4),
    (68, 8),
    (84, 2),
]
HEADER_FIELDS = [(0, 8), (16, 8), (24, 4), (28, 4), (32, 4), (36, 4), (40, 8), (576, 4), (584, 4), (592, 8)]


def seeds(kit: Any) -> list[bytes]:
    rng = random.Random(5)
    made = []
    for kind, block_size in ((3, 4096), (4, 4096), (3, 65536), (4, 512), (2, 4096)):
        vhd = kit.Vhd(100 * 512, kind=kind, block_size=block_size, seed=rng.random(), parent="p" if kind == 4 else None)
        vhd.sectors = kit.random_sectors(rng, vhd.size, 5)
        made.append(vhd.build())
    return made


def mutate(rng: random.Random, seed: bytes, kit: Any) -> bytes:
    raw = bytearray(seed)
    for _ in range(rng.randint(1, 3)):
        match rng.randrange(6):
            case 0 | 1:
                field, width = rng.choice(FOOTER_FIELDS)
                for base in rng.choice(((0,), (len(raw) - 512,), (0, len(raw) - 512))):
                    state = rng.getstate()
                    poke(rng, raw, base + field, width)
                    rng.setstate(state)  # the same change in both footers
                rng.random()
            case 2:
                field, width = rng.choice(HEADER_FIELDS)
                poke(rng, raw, 512 + field, width)
            case 3:
                poke(rng, raw, 1536 + 4 * rng.randrange(16), 4)
            case 4:
                one, other = (1536 + 4 * rng.randrange(16) for _ in range(2))
                raw[one : one + 4] = raw[other : other + 4]
            case _:
                poke(rng, raw, rng.randrange(len(raw) - 8), 8)
    if rng.random() < 0.8 and len(raw) > 2048:
        raw[-512:] = kit.sealed_footer(bytes(raw[-512:]))
        raw[:512] = kit.sealed_footer(bytes(raw[:512]))
        raw[512:1536] = kit.sealed_header(bytes(raw[512:1536]))
    match rng.randrange(10):
        case 0:
            del raw[rng.randrange(len(raw)) :]
        case 1:
            raw += rng.randbytes(rng.randrange(1, 2000))
    return bytes(raw)


def try_both_ways(kit: Any, raw: bytes) -> str:
    """Read it as a file and as a stream. The answer of the file; anything but an ImageError is a failure."""
    file = refusal(lambda: drain(ChainReader(Chain.open([open_image(kit.File(raw, "mutant.vhd"))]), pool=kit.pool)))
    export = kit.Exporter(raw, step=10_000)

    def stream(kind: StreamKind | None) -> Callable[[], None]:
        return lambda: drain(VhdStream(export, name="mutant", pool=kit.pool, expect_size=51200, expect_parent=kind))

    streams = [refusal(stream(kind)) for kind in (None, *StreamKind)]
    for refused in (file, *streams):
        if refused is not None:
            assert refused.where.startswith("mutant"), refused
            assert refused.fix, refused
    return "read" if file is None else "refused"


def search(kit: Any, *, seed: int, count: int) -> dict[str, int]:
    return run_mutants(
        seeds(kit), lambda rng, raw: mutate(rng, raw, kit), lambda raw: try_both_ways(kit, raw), seed=seed, count=count
    )


@pytest.fixture
def kit_with_pool(kit: Any) -> Any:
    from tokvm.core.disk import BufferPool

    class Pooled:
        pool = BufferPool(6, 65536)

        def __getattr__(self, name: str) -> Any:
            return getattr(kit, name)

    return Pooled()


@pytest.mark.slow
def test_some_hundred_mutants(kit_with_pool: Any) -> None:
    outcomes = search(kit_with_pool, seed=1, count=500)
    assert outcomes["refused"] > 100  # the mutator reaches the checks
    assert outcomes["read"] > 30  # and does not only make rubbish
    assert kit_with_pool.free_buffers(kit_with_pool.pool) == 6


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(2, 12))
def test_many_thousand_mutants(kit_with_pool: Any, seed: int) -> None:
    outcomes = search(kit_with_pool, seed=seed, count=2500)
    assert sum(outcomes.values()) == 2500
    assert kit_with_pool.free_buffers(kit_with_pool.pool) == 6


def test_every_single_bit_of_the_structures(kit_with_pool: Any) -> None:
    """Flipped without repair: the checksums find it, or it is outside of them and the map still lies within the disk."""
    raw = kit_with_pool.Vhd(20 * 512, kind=3, block_size=4096, sectors={0: bytes(512), 9: bytes(512)}).build()
    for place in [*range(0, 600, 7), *range(1536, 1556), *range(len(raw) - 512, len(raw), 7)]:
        flipped = bytearray(raw)
        flipped[place] ^= 1 << place % 8
        assert try_both_ways(kit_with_pool, bytes(flipped)) in ("read", "refused")


def test_a_huge_table_of_tiny_blocks_is_bounded(kit: Any) -> None:
    """The largest table that is accepted: 2^22 blocks; checked within the limits."""
    entries = 1 << 22
    size = entries * 512
    vhd = kit.Vhd(size, block_size=512, bat_offset=1536)
    bat = struct.pack(">I", 0xFFFFFFFF) * (entries - 2) + struct.pack(">2I", 3 + entries * 4 // 512, 3 + entries * 4 // 512)
    raw = vhd.footer() + vhd.header() + bat + bytes(4096) + vhd.footer()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(ImageError, match="overlap"):
        open_image(kit.File(raw))
    assert time.process_time() - start <= CPU_LIMIT_S
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 <= MEMORY_LIMIT
