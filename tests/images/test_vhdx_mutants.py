"""Structured mutants of small VHDXs, CRCs repaired: refused with a place, or read within the disk, never worse."""

from __future__ import annotations

import random
from typing import Any
from uuid import UUID

import pytest
from tests.images.mutation import WIDE, drain, poke, refusal, run_mutants
from tests.images.naive_vhdx import (
    BAT,
    CONTENT,
    ENTRY,
    HEADERS,
    LOG,
    METADATA,
    MIB,
    PAGE,
    TABLES,
    NaiveVhdx,
    log_entry,
    random_layer,
    reseal,
    sealed,
)

from tokvm.core.disk import BufferPool
from tokvm.images.chain import Chain
from tokvm.images.open import open_image
from tokvm.images.reader import ChainReader

GUID = UUID(int=77)
VALUES = [*range(9), 0x200, 0x7FF, 0xFFFF, PAGE, 64 * 1024, MIB, 2 * MIB, 4 * MIB, 16 * MIB, 256 * MIB, 0xFFFFFFFF, *WIDE]
HEADER_FIELDS = [(0, 4), (8, 8), (32, 8), (48, 8), (64, 2), (66, 2), (68, 4), (72, 8)]
REGION_FIELDS = [(0, 8), (16, 8), (24, 4), (28, 4)]
TABLE_FIELDS = [(0, 4), (8, 4), *((16 + 32 * entry + at, width) for entry in range(3) for at, width in REGION_FIELDS)]
ITEM_FIELDS = [(0, 8), (16, 4), (20, 4), (24, 4)]
LOG_FIELDS = [(0, 4), (8, 4), (12, 4), (16, 8), (24, 4), (32, 8), (48, 8), (56, 8)]
DESCRIPTOR_FIELDS = [(0, 4), (4, 4), (8, 8), (16, 8), (24, 8)]


def with_log(rng: random.Random) -> NaiveVhdx:
    vhdx = NaiveVhdx(3 * MIB, {0: 6, 2: 6}, log_guid=GUID)
    place = 0
    for sequence in (5, 6):
        entry = log_entry(
            [(BAT, bytes(PAGE)), (4 * MIB, rng.randbytes(PAGE)), (5 * MIB, PAGE), (TABLES[1], 2 * PAGE)],
            guid=GUID, sequence=sequence, tail=0, last=7 * MIB,
        )  # fmt: skip
        vhdx.log.append((place, entry))
        place += len(entry)
    return vhdx


def seeds() -> list[bytes]:
    rng = random.Random(5)
    made = [
        random_layer(rng, 3 * MIB + 512, is_child=False),
        random_layer(rng, 3 * MIB, is_child=True),
        random_layer(rng, 3 * MIB, is_child=True, sector_size=4096),
        with_log(rng),
    ]
    return [vhdx.build() for vhdx in made]


def mutate(rng: random.Random, seed: bytes) -> bytes:
    raw = bytearray(seed)
    for _ in range(rng.randint(1, 3)):
        _put_wrong(rng, raw, rng.randrange(10))
    if rng.random() < 0.9:
        reseal(raw)
    match rng.randrange(12):
        case 0:
            del raw[rng.randrange(len(raw)) :]
        case 1:
            raw += bytes(rng.randrange(1, 3 * MIB))
    return bytes(raw)


def _put_wrong(rng: random.Random, raw: bytearray, what: int) -> None:
    match what:
        case 0:
            at, width = rng.choice(HEADER_FIELDS)
            _in_each(rng, raw, [base + at for base in HEADERS], width)
        case 1:
            at, width = rng.choice(TABLE_FIELDS)
            _in_each(rng, raw, [base + at for base in TABLES], width)
        case 2:
            at, width = rng.choice(ITEM_FIELDS)
            poke(rng, raw, rng.choice(list(ENTRY.values())) + at, width, "little", VALUES)
        case 3:
            poke(rng, raw, rng.choice((METADATA, METADATA + 10)), 2, "little", VALUES)
        case 4:
            poke(rng, raw, rng.choice(list(CONTENT.values())) + 4 * rng.randrange(4), rng.choice((2, 4, 8)), "little", VALUES)
        case 5:
            poke(rng, raw, CONTENT["locator"] + 2 * rng.randrange(200), 2, "little", VALUES)
        case 6:
            _entry_wrong(rng, raw)
        case 7:
            one, other = (BAT + 8 * rng.choice((0, 1, 2, 3, 4096, 32768)) for _ in range(2))
            raw[one : one + 8] = raw[other : other + 8]
        case 8:
            _log_wrong(rng, raw)
        case _:
            poke(rng, raw, rng.randrange(len(raw) - 8), 8, "little", VALUES)


def _in_each(rng: random.Random, raw: bytearray, places: list[int], width: int) -> None:
    """The same change in both copies, or in one."""
    changed = places if rng.random() < 0.75 else [rng.choice(places)]
    state = rng.getstate()
    for at in changed:
        rng.setstate(state)
        poke(rng, raw, at, width, "little", VALUES)


def _entry_wrong(rng: random.Random, raw: bytearray) -> None:
    """A state with a place that is likely to be odd but possible."""
    at = BAT + 8 * rng.choice((0, 1, 2, 3, 4096, 32768))
    place = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 9, 1 << 20, 1 << 43))
    raw[at : at + 8] = (place << 20 | rng.choice((0, 0, 0, 8)) | rng.randrange(8)).to_bytes(8, "little")


def _log_wrong(rng: random.Random, raw: bytearray) -> None:
    """A field of an entry, its checksum repaired as long as its length is."""
    at = LOG + rng.choice((0, 3 * PAGE))
    if rng.random() < 0.5:
        field, width = rng.choice(LOG_FIELDS)
    else:
        field, width = rng.choice(DESCRIPTOR_FIELDS)
        field += 64 + 32 * rng.randrange(4)
    poke(rng, raw, at + field, width, "little", VALUES)
    length = int.from_bytes(raw[at + 8 : at + 12], "little")
    if raw[at : at + 4] == b"loge" and PAGE <= length <= 8 * PAGE:
        raw[at : at + length] = sealed(raw[at : at + length])


POOL = BufferPool(6, 65536)


def attempt(kit: Any, raw: bytes) -> str:
    def read() -> None:
        layer = open_image(kit.File(raw, "mutant.vhdx"), expect="vhdx")
        if layer.size > 64 * MIB:  # its map is enough: what is absent costs nothing, but ZERO chunks are many
            assert sum(len(window) for window in layer.windows()) >= 0
            return
        drain(ChainReader(Chain.open([layer]), pool=POOL))
        layer.describe()

    refused = refusal(read)
    if refused is None:
        return "read"
    assert refused.where.startswith("mutant"), refused
    assert refused.fix, refused
    return "refused"


def search(kit: Any, *, seed: int, count: int) -> dict[str, int]:
    outcomes = run_mutants(seeds(), mutate, lambda raw: attempt(kit, raw), seed=seed, count=count)
    assert kit.free_buffers(POOL) == 6
    return outcomes


@pytest.mark.slow
def test_some_hundred_mutants(kit: Any) -> None:
    outcomes = search(kit, seed=1, count=250)
    assert outcomes["refused"] > 100  # the mutator reaches the checks
    assert outcomes["read"] > 40  # and does not only make rubbish


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(2, 12))
def test_many_thousand_mutants(kit: Any, seed: int) -> None:
    assert sum(search(kit, seed=seed, count=2500).values()) == 2500
