"""Structured mutants of small VMDKs of every kind: refused with a place, or read within the disk, never worse."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from tests.images.mutation import drain, poke, refusal, run_mutants
from tests.images.naive_vmdk import SECTOR, ZERO, Listed, NaiveCowd, NaiveSesparse, NaiveSparse, descriptor, some_grains

from tokvm.core.disk import BufferPool
from tokvm.images.chain import Chain
from tokvm.images.open import open_image
from tokvm.images.reader import ChainReader
from tokvm.images.vmdk.descriptor import extent_names
from tokvm.images.vmdk.layer import open_vmdk
from tokvm.images.vmdk.stream import VmdkStream

Mutate = Callable[[random.Random, bytes], bytes]
Field = tuple[int, int]

KDMV = [
    (0, 4),
    (4, 4),
    (8, 4),
    (12, 8),
    (20, 8),
    (28, 8),
    (36, 8),
    (44, 4),
    (48, 8),
    (56, 8),
    (64, 8),
    (72, 1),
    (73, 4),
    (77, 2),
]
COWD = [(0, 4), (4, 4), (8, 4), (12, 4), (16, 4), (20, 4), (24, 4), (28, 4), (1648, 1)]
SESPARSE = [*((8 * word, 8) for word in range(27)), (512, 8), (536, 8), (16, 4), (132, 4)]


def disks(kind: str) -> list[Any]:
    rng = random.Random(kind)
    made: list[Any] = []
    for sectors in (100, 1, 9000):
        size = sectors * SECTOR
        grains = some_grains(rng, min(size, 100 * SECTOR), 512 if kind == "cowd" else 4096)
        last = (size - 1) // (512 if kind == "cowd" else 4096)
        grains |= {last: b"z" * (512 if kind == "cowd" else 4096)}
        match kind:
            case "cowd":
                made.append(NaiveCowd(size, grains, rng.choice((None, 3))))
            case "sesparse":
                made.append(NaiveSesparse(size, grains, 3, first_index=rng.choice((0, 4))))
            case _:
                made.append(NaiveSparse(size, grains | {0: ZERO}, kind=kind, tail=bytes(512 if kind == "front" else 0)))
    return made


def places_of(kind: str) -> dict[bytes, tuple[list[Field], list[int]]]:
    """By the image: its header's fields, and where its tables, directories and grains are."""
    found = {}
    for disk in disks(kind):
        raw = disk.build()
        fields = {"cowd": COWD, "sesparse": SESPARSE}.get(kind, KDMV)
        if "footer" in disk.places:
            fields = fields + [(disk.places["footer"] + at, width) for at, width in KDMV]
        tables = [at for name, at in disk.places.items() if name.startswith(("gt", "gd", "rg")) and at]
        found[raw] = fields, [*tables, *tables, *disk.places.values(), *((2048,) if kind == "cowd" else ())]
    return found


def mutator(kind: str, places: dict[bytes, tuple[list[Field], list[int]]]) -> Mutate:
    width = 8 if kind == "sesparse" else 4

    def mutate(rng: random.Random, seed: bytes) -> bytes:
        raw, (fields, starts) = bytearray(seed), places[seed]
        for _ in range(rng.randint(1, 3)):
            at = rng.choice(starts) + width * rng.choice((0, 1, 2, rng.randrange(30)))
            match rng.randrange(6):
                case 0 | 1:
                    poke(rng, raw, *rng.choice(fields), "little")
                case 2:
                    poke(
                        rng, raw, at, width, "little", values=[*range(8), len(raw) // SECTOR, len(raw) // SECTOR - 1, 2**64 - 1]
                    )
                case 3:
                    other = rng.choice(starts) + width * rng.randrange(30)
                    raw[at : at + width] = raw[other : other + width]
                case 4:
                    poke(rng, raw, rng.choice(starts) + rng.choice((-512, -504, -500, 0, 4, 8, 12)), 4, "little")
                case _:
                    poke(rng, raw, rng.randrange(len(raw) - 8), 8, "little")
        match rng.randrange(10):
            case 0:
                del raw[rng.randrange(len(raw)) :]
            case 1:
                raw += rng.randbytes(rng.randrange(1, 2000))
        return bytes(raw)

    return mutate


def attempt(kit: Any, pool: BufferPool, kind: str) -> Callable[[bytes], str]:
    """Alone, as the extent of a descriptor, and as a stream: anything but an ImageError is a failure."""
    line = {"cowd": "VMFSSPARSE", "sesparse": "SESPARSE"}.get(kind, "SPARSE")
    text = descriptor(f'RW 90 {line} "mutant"')

    def tried(raw: bytes) -> str:
        def read(image: bytes) -> None:
            extents = Listed({"mutant": kit.File(raw, "mutant")})
            reader = ChainReader(Chain.open([open_image(kit.File(image, "mutant"), extents=extents)]), pool=pool)
            assert 0 < reader.size <= 62 << 40
            if reader.total <= 64 << 20:
                drain(reader)

        found = [refusal(lambda: read(raw)), refusal(lambda: read(text))]
        if kind in ("stream", "front"):
            found.append(refusal(lambda: drain(VmdkStream(kit.Exporter(raw, 10_000), name="mutant", pool=pool))))
        for refused in found:
            assert refused is None or (refused.where.startswith("mutant") and refused.fix), refused
        return "read" if None in found else "refused"

    return tried


KINDS = ("sparse", "compressed", "front", "stream", "cowd", "sesparse")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_some_hundred_mutants(kit: Any, kind: str) -> None:
    pool, places = BufferPool(6, 65536), places_of(kind)
    outcomes = run_mutants(list(places), mutator(kind, places), attempt(kit, pool, kind), seed=1, count=200)
    assert outcomes["refused"] > 50  # the mutator reaches the checks
    assert outcomes["read"] > 10  # and does not only make rubbish
    assert kit.free_buffers(pool) == 6


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2, 10))
def test_many_thousand_mutants(kit: Any, kind: str, seed: int) -> None:
    pool, places = BufferPool(6, 65536), places_of(kind)
    outcomes = run_mutants(list(places), mutator(kind, places), attempt(kit, pool, kind), seed=seed, count=2500)
    assert sum(outcomes.values()) == 2500
    assert kit.free_buffers(pool) == 6


TEXTS = [
    descriptor('RW 9 FLAT "a.vmdk" 0', 'RW 9 VMFS "b.vmdk"', "RW 3 ZERO", kind="custom"),
    descriptor('RW 9 FLAT "a.vmdk" 0', parent="7", more=('encoding="windows-1252"', 'parentFileNameHint="größe"'), eol="\r\n"),
    descriptor('RDONLY 4 FLAT "b.vmdk" 5', more=('ddb.uuid.image="a9c614d1-7ecd-47df-8e2e-f3db36cf0286"',)),
]
WORDS = [
    b'"', b"\n", b"\r", b"\0", b"=", b" ", b"../", b"/", b"\\", b"nbd:", b"-", b"0", b"9" * 19, b"FLAT", b"VMFS", b"SPARSE",
    b"ZERO", b"RW ", b"\xff", b"\xed\xa0\x80", b"#", b"CID=", b"parentCID=", b"ddb.uuid.parent=", b'RW 9 FLAT "c.vmdk" 1\n',
    b"encryption.x=1\n", b"\xe2\x80\xa8", b"\x1b[0m", "٣".encode(), b"x" * 5000,
]  # fmt: skip


def mutate_text(rng: random.Random, seed: bytes) -> bytes:
    raw = bytearray(seed)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw) + 1)
        match rng.randrange(5):
            case 0:
                raw[at:at] = rng.choice(WORDS)
            case 1:
                raw[at : at + rng.choice((1, 2, 7, 40))] = rng.choice(WORDS)
            case 2:
                del raw[at : at + rng.choice((1, 2, 9, 60))]
            case 3:
                lines = bytes(raw).split(b"\n")
                rng.shuffle(lines)
                raw = bytearray(lines[0] + b"\n" + b"\n".join(lines[1:])) if rng.random() < 0.2 else raw
            case _:
                poke(rng, raw, at, 1)
    return bytes(raw)


def attempt_text(kit: Any) -> Callable[[bytes], str]:
    """Whatever it says, only the listed names are asked for."""

    def tried(raw: bytes) -> str:
        listed = Listed({name: kit.File(bytes(9 * SECTOR), name) for name in ("a.vmdk", "b.vmdk")})

        def read() -> None:
            layer = open_vmdk(kit.File(raw, "mutant"), listed)
            layer.window(0, layer.size)
            layer.describe()

        def names() -> None:
            extent_names(kit.File(raw, "mutant"))

        found = [refusal(read), refusal(names)]
        for name in listed.asked:
            assert not set(name) & set("/\\\0\n\r"), name
            assert name not in (".", "..")
        for refused in found:
            assert refused is None or (refused.where.split("@")[0] in ("mutant", "a.vmdk", "b.vmdk") and refused.fix), refused
            assert refused is None or (refused.what.isprintable() and refused.fix.isprintable()), refused
        return "read" if found[0] is None else "refused"

    return tried


@pytest.mark.slow
def test_some_hundred_mutants_of_descriptors(kit: Any) -> None:
    outcomes = run_mutants(TEXTS, mutate_text, attempt_text(kit), seed=1, count=1000)
    assert outcomes["refused"] > 200
    assert outcomes["read"] > 100


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(2, 4))
def test_many_thousand_mutants_of_descriptors(kit: Any, seed: int) -> None:
    assert sum(run_mutants(TEXTS, mutate_text, attempt_text(kit), seed=seed, count=20_000).values()) == 20_000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_every_bit_of_the_headers(kit: Any, kind: str) -> None:
    disk = disks(kind)[1]
    raw, tried = disk.build(), attempt(kit, BufferPool(6, 65536), kind)
    ends = disk.places.get("footer", 0)
    for place in [*range(0, 210, 3), *range(512, 550, 3), *(range(ends, ends + 80, 3) if ends else ())]:
        flipped = bytearray(raw)
        flipped[place] ^= 1 << place % 8
        assert tried(bytes(flipped)) in ("read", "refused")
