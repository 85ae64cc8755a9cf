"""Disks by QEMU and by the naive builder, read by us and by independent readers where these are right.

qemu-img is right on disks without a parent, and replays a log with `check -r all` on a copy. dissect.hypervisor is right on
children; libvhdi is on those with nothing but partial blocks: it looks into the bitmap whatever the state.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from tests.images.naive_vhdx import BAT, MIB, PAGE, NaiveVhdx, log_entry, random_layer

from tokvm.images.chain import Chain
from tokvm.images.files import open_file
from tokvm.images.reader import ChainReader
from tokvm.images.vhdx.layer import open_vhdx

GUID = UUID(int=99)
pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


def run(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def ours(kit: Any, *paths: Path) -> bytes:
    reader = ChainReader(Chain.open([open_vhdx(open_file(path)) for path in paths]))
    found: bytes = kit.content(reader)
    reader.close()
    return found


def by_qemu(path: Path) -> bytes:
    raw = path.with_suffix(".raw")
    run("qemu-img", "convert", "-f", "vhdx", "-O", "raw", path, raw)
    return raw.read_bytes()


def by_libvhdi(path: Path, parent: Path | None = None) -> bytes:
    pyvhdi = pytest.importorskip("pyvhdi")
    file, below = pyvhdi.file(), pyvhdi.file()
    file.open(str(path))
    if parent is not None:
        below.open(str(parent))
        file.set_parent(below)
    found: bytes = file.read_buffer(file.get_media_size())
    file.close()
    return found


def by_dissect(path: Path, block_size: int = MIB) -> bytes:
    """A block at a time: reads over a block's end are wrong there."""
    vhdx = pytest.importorskip("dissect.hypervisor.disk.vhdx")
    with path.open("rb") as file:
        disk = vhdx.VHDX(file)
        disk.seek(0)
        found = b"".join(disk.read(min(block_size, disk.size - at)) for at in range(0, disk.size, block_size))
        if disk.parent is not None:
            disk.parent.fh.close()
        return found


CONFIGS = [
    ("dynamic", 1, "on", 9 * MIB + 1536), ("dynamic", 8, "on", 20 * MIB), ("dynamic", 2, "off", 5 * MIB + 512),
    ("fixed", 1, "on", 5 * MIB + 512), ("fixed", 16, "on", 3 * MIB), ("dynamic", 256, "on", 4 * MIB),
]  # fmt: skip


@pytest.mark.parametrize(("subformat", "block_mib", "zeroes", "size"), CONFIGS)
@pytest.mark.slow
def test_disks_by_qemu(kit: Any, tmp_path: Path, subformat: str, block_mib: int, zeroes: str, size: int) -> None:
    path = tmp_path / "disk.vhdx"
    options = f"subformat={subformat},block_size={block_mib}M,block_state_zero={zeroes}"
    run("qemu-img", "create", "-f", "vhdx", "-o", options, path, size)
    rng = random.Random(f"{subformat} {size}")
    commands: list[str] = []
    for _ in range(8):
        offset = 512 * rng.randrange(size // 512)
        length = min(size - offset, 512 * rng.choice((1, 7, 300, 3000)))
        verb = rng.choice((f"write -P {rng.randrange(1, 255)}",) * 3 + (f"write -P {rng.randrange(255)}",))
        commands += ["-c", f"{verb} {offset} {length}"]
    run("qemu-io", "-f", "vhdx", *commands, path)
    expected = by_qemu(path)
    assert ours(kit, path) == expected[:size]
    assert len(expected) == size
    assert by_libvhdi(path) == expected


@pytest.mark.parametrize("seed", range(4))
def test_naive_disks_without_parent(kit: Any, tmp_path: Path, seed: int) -> None:
    """QEMU agrees on what every state means in a base, and that the blocks may lie in any order."""
    rng = random.Random(seed)
    vhdx = random_layer(rng, rng.choice((5 * MIB, 7 * MIB + 512)), is_child=False)
    path = tmp_path / "naive.vhdx"
    path.write_bytes(vhdx.build())
    assert ours(kit, path) == by_qemu(path) == vhdx.over()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.slow
def test_naive_children(kit: Any, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    size = 6 * MIB
    base = random_layer(rng, size, is_child=False, name="base")
    child = random_layer(rng, size, is_child=True, name="child", parent="base")
    child.states = {block: rng.choice((0, 2, 6, 7)) for block in range(child.blocks)}
    base_path, path = tmp_path / "parent.vhdx", tmp_path / "child.avhdx"
    base_path.write_bytes(base.build())
    path.write_bytes(child.build())
    found = ours(kit, base_path, path)
    assert found == child.over(base.over())
    assert by_dissect(path) == found
    child.states = {block: 7 for block, state in child.states.items() if state}
    path.write_bytes(child.build())
    assert ours(kit, base_path, path) == by_libvhdi(path, base_path)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.slow
def test_dirty_logs_as_qemu_repairs_them(kit: Any, tmp_path: Path, seed: int) -> None:
    """Pages and zeros into blocks and the BAT; QEMU replays them into a copy."""
    rng = random.Random(seed)
    vhdx = NaiveVhdx(4 * MIB, {0: 6, 1: 6}, log_guid=GUID)
    vhdx.build()
    place = rng.choice((0, PAGE * 40, MIB - PAGE))
    tail, size = place, len(NaiveVhdx(4 * MIB, {0: 6, 1: 6}).build())
    for sequence in range(3, 6):
        writes: list[tuple[int, bytes | int]] = [
            (vhdx.places[rng.randrange(2)] + PAGE * rng.randrange(200), rng.choice((rng.randbytes(PAGE), 2 * PAGE)))
            for _ in range(rng.randint(1, 9))
        ]
        if sequence == 5:
            entries = [vhdx.places[0] | 6, 2, size | 6, vhdx.places[1] | 6]
            writes.append((BAT, b"".join(entry.to_bytes(8, "little") for entry in entries).ljust(PAGE, b"\0")))
            writes.append((size + PAGE, rng.randbytes(PAGE)))
        entry = log_entry(writes, guid=GUID, sequence=sequence, tail=tail, flushed=size, last=size + MIB - PAGE)
        vhdx.log.append((place, entry))
        place = (place + len(entry)) % MIB
    path, copy = tmp_path / "dirty.vhdx", tmp_path / "repaired.vhdx"
    path.write_bytes(vhdx.build())
    shutil.copy(path, copy)
    before = path.read_bytes()
    found = ours(kit, path)
    assert path.read_bytes() == before
    run("qemu-img", "check", "-r", "all", "-f", "vhdx", copy)
    assert by_qemu(copy) == found == ours(kit, copy)
