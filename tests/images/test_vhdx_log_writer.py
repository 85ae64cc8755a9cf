"""VHDXs with writes in their logs: a plain replay, qemu-img and our reader find the clean file; in damaged ones nothing."""

from __future__ import annotations

import io
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.images.vhdx_witnesses import BASE, applied, by_libvhdi, by_qemu, replayed, write

from tokvm.core.errors import ImageError
from tokvm.core.units import MiB
from tokvm.images.open import open_image
from tokvm.images.reader import ChainReader
from tokvm.testing.vhdx_log_ring import Damage
from tokvm.testing.vhdx_log_writer import Part, make_dirty
from tokvm.testing.vhdx_writer import Layout

SECTOR = 512

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img (qemu-utils)")


def without_log(raw: bytes, layout: Layout) -> bytes:
    """All but the headers and the log itself."""
    start, length = layout.log
    return raw[192 << 10 : start] + raw[start + length :]


LOGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one entry": {"entries": 1},
    "six entries, empty head": {"entries": 6, "empty_head": True},
    "no noise": {"noise": False},
    "wrapped": {"wrap": True},
    "wrapped, empty head": {"wrap": True, "entries": 5, "empty_head": True},
    "crowded": {"crowded": True},
    "crowded, wrapped": {"crowded": True, "wrap": True},
    "before the tail": {"before_tail": True},
    "before the tail, wrapped": {"before_tail": True, "wrap": True, "empty_head": True},
}
BY_QEMU = ("plain", "one entry", "six entries, empty head", "no noise")
"""qemu-img 7.2 starts at the first entry of a sequence whatever its tail, does not go over the ring's end, and reads all
descriptor sectors of an entry to one place, so it is no second opinion about the others. Nor does it let a file grow to whole
MiB (hence shrink=False)."""


def dirty_disk(child: bool, seed: int) -> tuple[bytes, Layout, bytes]:
    """(clean file, its layout, content over nothing): blocks of 2 MiB, zeros at the file's end, which can be cut off."""
    size = 14 * MiB + 1536
    runs = [(SECTOR, b"a" * 3 * SECTOR), (4 * MiB, random.Random(seed).randbytes(2 * MiB)), (12 * MiB, b"z" * SECTOR)]
    out = io.BytesIO()
    kind = {"kind": "differencing", "parent_linkage": BASE, "zeros": [(8 * MiB, 2 * MiB)]} if child else {}
    layout = write(out, size=size, runs=runs, block_size=2 * MiB, **kind)
    return out.getvalue(), layout, applied(runs, bytes(size))


@pytest.mark.parametrize("child", [False, True])
@pytest.mark.parametrize("name", LOGS)
@pytest.mark.slow
def test_replay_gives_the_clean_file(name: str, child: bool) -> None:
    for seed in range(2):
        clean, layout, _ = dirty_disk(child, seed)
        out = io.BytesIO(clean)
        found = make_dirty(out, seed=seed, **LOGS[name])
        raw = out.getvalue()
        assert without_log(raw, layout) != without_log(clean, layout)[: len(without_log(raw, layout))]
        after = replayed(raw)
        assert after is not None
        assert without_log(after, layout) == without_log(clean, layout)
        assert found.pages
        assert found.cut == len(clean) - len(raw) > 0
        assert found.wrapped == LOGS[name].get("wrap", False)


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.slow
def test_our_reader_reads_it_as_after_replay(kit: Any, name: str) -> None:
    for seed in range(2):
        clean, _, content = dirty_disk(child=False, seed=seed)
        out = io.BytesIO(clean)
        make_dirty(out, seed=seed, **LOGS[name])
        chain = kit.chain(out.getvalue())
        assert kit.content(ChainReader(chain)) == content
        assert "log" in str(chain.layers[0].warnings)


@needs_qemu
@pytest.mark.parametrize("name", BY_QEMU)
@pytest.mark.slow
def test_qemu_repairs_it_to_the_same(tmp_path: Path, name: str) -> None:
    path = tmp_path / "disk.vhdx"
    for seed in range(2):
        clean, _, content = dirty_disk(child=False, seed=seed)
        path.write_bytes(clean)
        make_dirty(path, seed=seed, shrink=False, **LOGS[name])
        check = ["qemu-img", "check", "-r", "all", "-f", "vhdx", str(path)]
        subprocess.run(check, check=True, capture_output=True)
        assert by_qemu(path) == content


def test_without_replay_the_content_is_wrong(tmp_path: Path) -> None:
    """libvhdi ignores the log: with the metadata left alone it reads, and reads something else."""
    path = tmp_path / "disk.vhdx"
    for part in (Part.BAT, Part.PAYLOAD):
        clean, _, content = dirty_disk(child=False, seed=1)
        path.write_bytes(clean)
        assert by_libvhdi(path) == content
        make_dirty(path, parts=frozenset({Part.BAT, part}), shrink=False)
        assert by_libvhdi(path) != content


@pytest.mark.parametrize("damage", Damage)
@pytest.mark.slow
def test_after_damage_nothing_can_be_replayed(kit: Any, tmp_path: Path, damage: Damage) -> None:
    clean, _, _ = dirty_disk(child=False, seed=2)
    for entries in (1, 3):
        out = io.BytesIO(clean)
        make_dirty(out, entries=entries, damage=damage)
        assert replayed(out.getvalue()) is None
        with pytest.raises(ImageError):
            open_image(kit.File(out.getvalue()))
        if shutil.which("qemu-img") and (entries == 1 or damage is not Damage.CHECKSUM):  # qemu goes on behind the tail
            path = tmp_path / "disk.vhdx"
            path.write_bytes(out.getvalue())
            done = subprocess.run(["qemu-img", "check", "-r", "all", "-f", "vhdx", str(path)], capture_output=True)
            assert done.returncode != 0


def test_the_older_header_still_says_that_the_log_is_empty() -> None:
    clean, layout, _ = dirty_disk(child=False, seed=3)
    out = io.BytesIO(clean)
    found = make_dirty(out)
    raw = out.getvalue()
    guids = {struct.unpack_from("<Q", raw, at + 8)[0]: raw[at + 48 : at + 64] for at in (64 << 10, 128 << 10)}
    assert guids == {7: bytes(16), 8: found.log_guid.bytes_le}
    assert all(raw[at : at + 4] == b"loge" for at in found.entries)
    assert layout.log[0] <= found.entries[0] < sum(layout.log)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entries": 0}, "at least one entry"),
        ({"before_tail": True, "damage": Damage.TORN}, "sequence of their own"),
        ({"parts": frozenset({Part.BITMAPS})}, "nothing to move"),
        ({"entries": 300}, "do not fit"),
    ],
)
def test_logs_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    clean, _, _ = dirty_disk(child=False, seed=3)
    with pytest.raises(ValueError, match=message):
        make_dirty(io.BytesIO(clean), **options)


@needs_qemu
@pytest.mark.parametrize("name", ["dfvfs/ntfs-dynamic.vhdx", "dfvfs/fat-parent.vhdx"])
@pytest.mark.slow
def test_a_real_image_becomes_dirty_and_is_repaired(expand: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    try:
        real = expand(name)
    except FileNotFoundError:
        pytest.skip("no external fixtures (TOKVM_FIXTURES)")
    path = tmp_path / "disk.vhdx"
    shutil.copyfile(real, path)
    content = by_qemu(path)
    make_dirty(path, seed=4, shrink=False)
    subprocess.run(["qemu-img", "check", "-r", "all", "-f", "vhdx", str(path)], check=True, capture_output=True)
    assert by_qemu(path) == content


def test_it_starts_fast(tmp_path: Path) -> None:
    program = "import sys, tokvm.testing.vhdx_log_writer; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path).returncode == 0
