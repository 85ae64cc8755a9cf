"""QEMU is the other reader: what qemu-img writes we read, and what our naive builders make it reads the same."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.images.naive_vmdk import SECTOR, Beside, NaiveCowd, NaiveSesparse, NaiveSparse, descriptor, some_grains

from tokvm.core.extents import ExtentKind
from tokvm.core.units import KiB, MiB
from tokvm.images.chain import Chain
from tokvm.images.files import open_file
from tokvm.images.open import open_image
from tokvm.images.reader import ChainReader
from tokvm.images.vmdk.stream import VmdkStream

SUBFORMATS = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized"]


def run(*command: str | Path) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def opened(path: Path) -> Any:
    return open_image(open_file(path), extents=Beside(path.parent, open_file))


def content(kit: Any, *paths: Path) -> bytes:
    layers = [opened(path) for path in paths]
    raw: bytes = kit.content(ChainReader(Chain.open(layers)))
    for layer in layers:
        layer.file.close()
    return raw


def some_disk(rng: random.Random, size: int) -> bytes:
    raw = bytearray(size)
    for _ in range(12):
        at, length = rng.randrange(size), rng.choice((1, 512, 4096, 65536, 200_000))
        raw[at : at + length] = rng.choice((rng.randbytes(length), b"text" * (length // 4 + 1)))[: min(length, size - at)]
    return bytes(raw[:size])


def qemu_io(path: Path, *commands: str) -> None:
    run("qemu-io", "-f", "vmdk", *(word for command in commands for word in ("-c", command)), path)


def qemu_map(path: Path) -> list[tuple[int, int, ExtentKind]]:
    """What QEMU says of this layer alone."""
    spec = {"driver": "vmdk", "backing": None, "file": {"driver": "file", "filename": str(path)}}
    found = json.loads(run("qemu-img", "map", "--output=json", f"json:{json.dumps(spec)}"))
    return merged([(e["start"], e["length"], kind_of(e)) for e in found])


def kind_of(entry: dict[str, Any]) -> ExtentKind:
    if not entry["present"]:
        return ExtentKind.ABSENT
    return ExtentKind.ZERO if entry["zero"] else ExtentKind.DATA


def merged(rows: list[tuple[int, int, ExtentKind]]) -> list[tuple[int, int, ExtentKind]]:
    found: list[tuple[int, int, ExtentKind]] = []
    for start, length, kind in rows:
        if found and found[-1][2] is kind:
            found[-1] = found[-1][0], found[-1][1] + length, kind
        else:
            found.append((start, length, kind))
    return found


def our_map(path: Path) -> list[tuple[int, int, ExtentKind]]:
    layer = opened(path)
    rows = [(e.offset, e.length, e.kind) for window in layer.windows() for e in window.explicit()]
    layer.file.close()
    return merged(rows)


@pytest.mark.parametrize("subformat", SUBFORMATS)
@pytest.mark.parametrize("size", [1 * MiB + 1536, 64 * KiB, 4 * MiB])
@pytest.mark.slow
def test_what_qemu_writes(kit: Any, tmp_path: Path, subformat: str, size: int) -> None:
    raw = some_disk(random.Random(size), size)
    (tmp_path / "disk.raw").write_bytes(raw)
    image = tmp_path / "disk.vmdk"
    run("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", tmp_path / "disk.raw", image)
    assert content(kit, image) == raw
    if subformat == "monolithicSparse":
        assert our_map(image) == qemu_map(image)
    if subformat == "streamOptimized":
        packed = image.read_bytes() + bytes(SECTOR)  # QEMU marks no end; a last grain may fill the file
        assert kit.content(VmdkStream(kit.Exporter(packed), name="export")) == raw


@pytest.mark.parametrize("zeroed", ["on", "off"])
@pytest.mark.slow
def test_chains_that_qemu_writes(kit: Any, tmp_path: Path, zeroed: str) -> None:
    rng = random.Random(zeroed)
    layers = [tmp_path / f"layer{number}.vmdk" for number in range(4)]
    for number, layer in enumerate(layers):
        parent = ("-b", layers[number - 1], "-F", "vmdk") if number else ()
        size = () if number else (str(3 * MiB + 512),)
        run("qemu-img", "create", "-q", "-f", "vmdk", "-o", f"zeroed_grain={zeroed}", *parent, layer, *size)
        writes = [
            f"write -P {rng.randrange(1, 255)} {rng.randrange(6000) * 512} {rng.choice((512, 4096, 70_144))}" for _ in range(6)
        ]
        zeros = [f"write -z {rng.randrange(40) * 65536} {rng.choice((65536, 131_072))}" for _ in range(3)]
        qemu_io(layer, *writes, *zeros)
        assert our_map(layer) == qemu_map(layer)
        run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", layer, tmp_path / "flat.raw")
        assert content(kit, *layers[: number + 1]) == (tmp_path / "flat.raw").read_bytes()


@pytest.mark.parametrize("kind", ["sparse", "front", "stream", "cowd", "sesparse"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.slow
def test_qemu_reads_what_the_naive_builders_make(kit: Any, tmp_path: Path, kind: str, seed: int) -> None:
    """But for compressed grains without markers: it takes the size before them for zlib."""
    rng = random.Random(seed)
    size = rng.randrange(1, 400) * SECTOR
    grains = some_grains(rng, size, 512 if kind == "cowd" else 4096, zeros=kind != "cowd")  # QEMU knows no zeroed grain there
    disk: Any
    match kind:
        case "cowd":
            disk = NaiveCowd(size, grains, seed)
        case "sesparse":
            disk = NaiveSesparse(size, grains, seed, first_index=rng.choice((0, 4090)))
        case _:
            disk = NaiveSparse(
                size, grains, seed if kind in ("sparse", "front") else None, kind=kind, version=3 if kind == "stream" else 1
            )
    image = tmp_path / "disk.vmdk"
    if kind in ("cowd", "sesparse"):
        (tmp_path / "extent.vmdk").write_bytes(disk.build())
        line = "VMFSSPARSE" if kind == "cowd" else "SESPARSE"
        image.write_bytes(
            descriptor(f'RW {disk.sectors} {line} "extent.vmdk"', kind="vmfsSparse" if kind == "cowd" else "seSparse")
        )
    else:
        image.write_bytes(disk.build())
    run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", image, tmp_path / "flat.raw")
    assert (tmp_path / "flat.raw").read_bytes() == disk.over() == content(kit, image)
    if kind not in ("front", "stream"):
        assert our_map(image) == qemu_map(image)
