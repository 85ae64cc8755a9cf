"""VMDKs of every kind read back to what was put into them: any order in the file, any size, any window."""

from __future__ import annotations

import json
import os
import random
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.images.naive_vmdk import (
    SECTOR,
    ZERO,
    Beside,
    Listed,
    NaiveCowd,
    NaiveSesparse,
    NaiveSparse,
    descriptor,
    some_grains,
)

from tokvm.core.disk import BufferPool
from tokvm.core.errors import ImageError
from tokvm.core.extents import Extent, ExtentKind, ExtentMap
from tokvm.core.units import KiB, TiB
from tokvm.images.base import UNKNOWN_PARENT, Layer, Linkage
from tokvm.images.chain import Chain
from tokvm.images.files import open_file
from tokvm.images.open import open_image
from tokvm.images.reader import ChainReader
from tokvm.images.vmdk.descriptor import extent_names, parse_descriptor
from tokvm.images.vmdk.inflate import InflatedFile

SOME = {"max_examples": 30, "deadline": None, "suppress_health_check": list(HealthCheck)}
SPARSE_KINDS = ("sparse", "compressed", "front", "stream")
KINDS = (*SPARSE_KINDS, "cowd", "sesparse")
GRAIN = {"cowd": 512, "sesparse": 4096}


def naive(kind: str, size: int, seed: int | None = None, *, share: float = 0.5, zeros: bool = True) -> Any:
    """A disk of this kind with random grains."""
    grains = some_grains(random.Random(seed), size, GRAIN.get(kind, 4096), share=share, zeros=zeros)
    match kind:
        case "cowd":
            return NaiveCowd(size, grains, seed)
        case "sesparse":
            return NaiveSesparse(size, grains, seed, first_index=random.Random(seed).choice((0, 4090)))
        case _:
            return NaiveSparse(size, grains, seed, kind=kind)


def extent_line(disk: Any, name: str) -> str:
    kind = {NaiveCowd: "VMFSSPARSE", NaiveSesparse: "SESPARSE", NaiveSparse: "SPARSE"}[type(disk)]
    return f'RW {disk.sectors} {kind} "{name}"'


def layer(kit: Any, disk: Any, **options: Any) -> Layer:
    """With a descriptor of its own, whatever the kind."""
    text = descriptor(extent_line(disk, "extent.vmdk"), **options)
    return open_image(kit.File(text, "disk.vmdk"), extents=Listed({"extent.vmdk": kit.File(disk.build(), "extent.vmdk")}))


def read(kit: Any, *layers: Layer, under: bytes = b"", pool: BufferPool | None = None) -> bytes:
    return bytes(kit.content(ChainReader(Chain.open(layers), pool=pool), under=under))


@settings(**SOME)  # type: ignore[arg-type]
@given(
    kind=st.sampled_from(KINDS),
    sectors=st.integers(1, 200),
    seed=st.integers(0, 2**32),
    share=st.sampled_from([0, 0.1, 0.6, 1]),
    pool_size=st.sampled_from([512, 4096, 20480, 65536]),
)
def test_content_is_what_was_written(kit: Any, kind: str, sectors: int, seed: int, share: float, pool_size: int) -> None:
    disk = naive(kind, sectors * SECTOR, seed, share=share)
    pool = BufferPool(3, pool_size)
    assert read(kit, layer(kit, disk), pool=pool) == disk.over()
    assert kit.free_buffers(pool) == 3


@settings(**SOME)  # type: ignore[arg-type]
@given(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), seed=st.integers(0, 2**32), grow=st.booleans())
@pytest.mark.slow
def test_chains_of_any_kinds(kit: Any, kinds: list[str], seed: int, grow: bool) -> None:
    rng = random.Random(seed)
    size, content, layers, parent = rng.randrange(1, 80) * SECTOR, b"", [], "ffffffff"
    for number, kind in enumerate(kinds):
        disk = naive(kind, size, rng.randrange(2**32))
        content = disk.over(content)
        layers.append(layer(kit, disk, cid=f"{number:x}", parent=parent))
        parent = f"{number:08X}"
        size += rng.randrange(20) * SECTOR if grow else 0
    assert read(kit, *layers, under=rng.randbytes(len(content))) == content or not all_covered(layers)
    assert read(kit, *layers) == content


def all_covered(layers: list[Layer]) -> bool:
    """Does the chain say something about every byte?"""
    return all(not window.bytes_of(ExtentKind.ABSENT) for window in Chain.open(layers).windows())


@settings(**SOME)  # type: ignore[arg-type]
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32), max_rows=st.integers(1, 9))
@pytest.mark.slow
def test_small_windows_say_the_same_as_one_large_one(kit: Any, kind: str, seed: int, max_rows: int) -> None:
    found = layer(kit, naive(kind, 300 * SECTOR, seed))
    whole = found.window(0, found.size)
    windows = list(found.windows(max_rows=max_rows))
    assert windows[0].start == 0
    assert windows[-1].stop == found.size
    assert all(one.stop == other.start for one, other in pairwise(windows))
    assert all(len(window) <= max_rows for window in windows)
    assert joined(windows) == whole
    assert windows == list(found.windows(max_rows=max_rows))  # and again


def joined(windows: list[ExtentMap]) -> ExtentMap:
    columns = zip(*((w.offset, w.length, w.kind, w.file_offset) for w in windows), strict=True)
    return ExtentMap.build(windows[0].start, windows[-1].stop, *(np.concatenate(column) for column in columns))


@settings(**SOME)  # type: ignore[arg-type]
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32), start=st.integers(0, 150_000), length=st.integers(1, 150_000))
@pytest.mark.slow
def test_any_window_is_a_part_of_the_whole(kit: Any, kind: str, seed: int, start: int, length: int) -> None:
    found = layer(kit, naive(kind, 293 * SECTOR, seed))
    stop = min(start + length, found.size)
    assert found.window(start, start + length) == found.window(0, found.size).clip(start, stop)


@settings(**SOME)  # type: ignore[arg-type]
@given(seed=st.integers(0, 2**32), max_rows=st.sampled_from([1, 2, 5, 1000]))
@pytest.mark.slow
def test_extents_lie_side_by_side(kit: Any, seed: int, max_rows: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    rng = random.Random(seed)
    lines, files, content = [], {}, b""
    for number in range(rng.randint(1, 6)):
        size, name = rng.randrange(1, 90) * SECTOR, f"disk-{number}.vmdk"
        kind = rng.choice((*SPARSE_KINDS[:2], "cowd", "sesparse", "zero", "flat", "vmfs"))
        if kind == "zero":
            lines.append(f"RW {size // SECTOR} ZERO")
            content += bytes(size)
        elif kind in ("flat", "vmfs"):
            before = rng.randrange(4) if kind == "flat" else 0
            data = rng.randbytes(size)
            lines.append(f'RW {size // SECTOR} {kind.upper()} "{name}"' + (f" {before}" if kind == "flat" else ""))
            files[name] = kit.File(rng.randbytes(before * SECTOR) + data + rng.randbytes(rng.choice((0, 99))), name)
            content += data
        else:
            disk = naive(kind, size, rng.randrange(2**32))
            lines.append(extent_line(disk, name))
            files[name] = kit.File(disk.build(), name)
            content += disk.over()
    listed = Listed(files)
    text = kit.File(descriptor(*lines, kind="custom"), "disk.vmdk")
    assert set(extent_names(text)) == set(files)
    found = open_image(text, extents=listed)
    assert sorted(listed.asked) == sorted(files)
    windows = list(found.windows(max_rows=max_rows))
    assert joined(windows) == found.window(0, found.size)
    assert all(len(window) <= max_rows for window in windows)
    assert read(kit, found) == content
    json.dumps(found.describe())
    found.file.close()
    assert all(file.closed for file in (text, *files.values()))


def test_two_flat_extents_may_be_parts_of_one_file(kit: Any) -> None:
    raw = random.Random(1).randbytes(10 * SECTOR)
    text = descriptor('RW 3 FLAT "a.raw" 6', 'RW 4 FLAT "a.raw" 1')
    found = open_image(kit.File(text, "disk.vmdk"), extents=Listed({"a.raw": kit.File(raw, "a.raw")}))
    assert read(kit, found) == raw[6 * 512 : 9 * 512] + raw[512 : 5 * 512]


def test_holes_of_flat_extents_are_zeros(kit: Any, tmp_path: Path) -> None:
    size = 1024 * KiB
    for name in ("a-f001.vmdk", "a-f002.vmdk"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
            file.seek(512 * KiB)
            file.write(b"x" * 4096)
    lines = [f'RW {size // SECTOR} FLAT "{name}" 0' for name in ("a-f001.vmdk", "a-f002.vmdk")]
    (tmp_path / "a.vmdk").write_bytes(descriptor(*lines, kind="twoGbMaxExtentFlat"))
    found = open_image(open_file(tmp_path / "a.vmdk"), extents=Beside(tmp_path, open_file))
    kinds = [(extent.offset, extent.kind) for extent in found.window(0, found.size)]
    assert (0, ExtentKind.ZERO) in kinds
    assert (512 * KiB, ExtentKind.DATA) in kinds
    assert (size + 512 * KiB, ExtentKind.DATA) in kinds
    inodes = {path.stat().st_ino for path in tmp_path.iterdir()}
    assert {inode for _, inode in found.file.inodes} == inodes  # type: ignore[attr-defined]
    found.file.close()


def test_zero_hides_the_parent_and_absent_does_not(kit: Any) -> None:
    for kind in KINDS:
        grain = GRAIN.get(kind, 4096)
        disk = naive(kind, 4 * grain, None, share=0)
        disk.grains = {1: ZERO, 2: b"d" * grain, 3: bytes(grain)}
        found = layer(kit, disk, parent="1")
        extents = [(e.offset // grain, e.length // grain, e.kind) for e in found.window(0, found.size)]
        assert extents == [(1, 1, ExtentKind.ZERO), (2, 2, ExtentKind.DATA)], kind
        assert read(kit, found, under=b"p" * 4 * grain) == b"p" * grain + bytes(grain) + b"d" * grain + bytes(grain)


def test_the_last_grain_may_be_cut_where_the_disk_ends(kit: Any) -> None:
    """The file of some writers ends there, too."""
    for kind in KINDS:
        grain = GRAIN.get(kind, 4096)
        disk = naive(kind, 3 * grain - 512, None, share=0)
        disk.grains = {2: os.urandom(grain)}
        raw = disk.build()
        for cut in (0, 512) if kind not in ("stream", "compressed", "front") else (0,):
            text = descriptor(extent_line(disk, "extent"))
            extents = Listed({"extent": kit.File(raw[: len(raw) - cut], "extent")})
            assert read(kit, open_image(kit.File(text), extents=extents)) == disk.over()


def test_monolithic_disks_open_alone(kit: Any) -> None:
    for kind in SPARSE_KINDS:
        disk = naive(kind, 99 * SECTOR, 5)
        found = open_image(kit.File(disk.build(), "disk.vmdk"))
        assert read(kit, found) == disk.over()
        assert found.linkage == Linkage(("cid-11111111",), (), unique=False)
        assert found.format == "vmdk"
        assert not found.warnings


def test_bare_deltas_open_as_children_of_nobody_known(kit: Any) -> None:
    for kind in ("cowd", "sesparse"):
        disk = naive(kind, 99 * SECTOR, 5)
        found = open_image(kit.File(disk.build(), "delta.vmdk"))
        assert found.linkage == Linkage((), (UNKNOWN_PARENT,), unique=False)
        assert (found.identity, found.parent_identity) == ("", UNKNOWN_PARENT)
        base = kit.File(bytes(99 * SECTOR))
        with pytest.raises(ImageError, match="does not say over which disk"):
            Chain.open([Chain.raw(base), found])
        assert kit.content(ChainReader(Chain.open([Chain.raw(base), found], force_linkage=True))) == disk.over()
        assert "without its descriptor" in found.warnings[0]


def test_the_virtual_size_is_the_descriptors(kit: Any) -> None:
    """VirtualBox rounds the header's up to a grain."""
    for kind in ("sparse", "compressed", "cowd", "sesparse"):
        disk = naive(kind, 32 * SECTOR, 3, share=1)
        text = descriptor(extent_line(disk, "e").replace(f"RW {disk.sectors}", "RW 27"))
        found = open_image(kit.File(text), extents=Listed({"e": kit.File(disk.build(), "e")}))
        assert found.size == 27 * SECTOR
        assert read(kit, found) == disk.over()[: 27 * SECTOR]


def test_a_damaged_directory_is_replaced_by_its_copy(kit: Any) -> None:
    disk = naive("sparse", 99 * SECTOR, 6)
    raw = disk.build()
    broken = kit.patched(raw, disk.places["gd"], b"\xff" * 4)
    found = open_image(kit.File(broken))
    assert read(kit, found) == disk.over()
    assert "its redundant copy is used" in found.warnings[0]
    other = open_image(kit.File(kit.patched(raw, disk.places["rgd"], b"\xff" * 4)))
    assert read(kit, other) == disk.over()
    assert "redundant grain directory is damaged" in other.warnings[0]
    with pytest.raises(ImageError, match="grain directory entry 0"):
        open_image(kit.File(kit.patched(broken, disk.places["rgd"], b"\xff" * 4)))


def test_an_unclean_file_is_read_with_a_warning(kit: Any) -> None:
    sparse, cowd = naive("sparse", 99 * SECTOR, 6), naive("cowd", 99 * SECTOR, 6)
    sparse.fields = {"unclean": 1}
    cowd.fields = {"unclean": 1}
    for disk in (sparse, cowd):
        found = open_image(kit.File(disk.build(), "disk.vmdk"))
        assert any("not closed cleanly" in warning for warning in found.warnings)
        assert found.describe()["extents"][0]["unclean"]  # type: ignore[index]


def test_neighbouring_compressed_grains_are_one_row_and_one_read(kit: Any) -> None:
    rng = random.Random(4)
    disk = NaiveSparse(600 * 4096, {n: rng.randbytes(2000).ljust(4096) for n in range(600)}, kind="stream")
    packed = CountingFile(kit.File(disk.build(), "stream.vmdk"))
    found = open_image(packed)
    whole = found.window(0, found.size)
    assert [(e.offset, e.length, e.file_offset) for e in whole] == [(0, found.size, 0)]
    assert isinstance(found.file, InflatedFile)
    packed.reads.clear()
    buffer = bytearray(512 * 4096)
    found.file.read_into(4096, memoryview(buffer))
    assert buffer == disk.over()[4096 : 513 * 4096]
    assert len(packed.reads) == 1
    assert found.file.locate(0) == ("stream.vmdk", None)


@pytest.mark.slow
def test_opening_a_compressed_disk_reads_no_grain(kit: Any) -> None:
    disk = NaiveSparse(3000 * 4096, {n: os.urandom(4096) for n in range(3000)}, kind="stream")
    packed = CountingFile(kit.File(disk.build(), "stream.vmdk"))
    open_image(packed).window(0, disk.size)
    assert sum(length for _, length in packed.reads) < 100 * KiB


def test_reads_of_compressed_grains_may_begin_and_end_anywhere(kit: Any) -> None:
    disk = naive("front", 50 * 4096 - 512, 8, share=1, zeros=False)
    found = open_image(kit.File(disk.build()))
    slots = found.window(0, found.size)
    content = disk.over()
    for extent in slots:
        for head, tail in ((0, 1), (1, 511), (4095, 0), (100, 100)):
            if extent.length > head + tail:
                buffer = bytearray(extent.length - head - tail)
                found.file.read_into(extent.file_offset + head, memoryview(buffer))
                assert buffer == content[extent.offset + head : extent.end - tail]
    with pytest.raises(ImageError, match="a read of grains"):
        found.file.read_into(found.file.size - 10, memoryview(bytearray(11)))


class CountingFile:
    def __init__(self, file: Any) -> None:
        self.file = file
        self.name = file.name
        self.size = file.size
        self.reads: list[tuple[int, int]] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads.append((offset, len(buffer)))
        self.file.read_into(offset, buffer)

    def close(self) -> None:
        self.file.close()


def test_tables_that_are_neighbours_are_read_at_once(kit: Any) -> None:
    disk = NaiveSesparse(64 * 4096 * 4096, {n * 4096: b"g" * 4096 for n in range(64)})
    file = CountingFile(kit.File(disk.build(), "delta.vmdk"))
    found = open_image(file)
    file.reads.clear()
    assert len(found.window(0, found.size)) == 64
    assert len(file.reads) == 1


def test_a_window_costs_what_is_in_it(kit: Any) -> None:
    """62 TiB of nothing, and one grain at each end."""
    size = 62 * TiB
    last = size // 4096 - 1
    disk = NaiveSesparse(size, {0: b"a" * 4096, last: b"z" * 4096})
    found = open_image(kit.File(disk.build(), "delta.vmdk"))
    extents = [extent for window in found.windows() for extent in window]
    assert [extent.offset for extent in extents] == [0, last * 4096]
    assert list(found.window(size - 8192, size)) == [Extent(size - 4096, 4096, ExtentKind.DATA, extents[1].file_offset)]


LINKS = {
    "a base": ({}, (), ()),
    "a child by CID": ({"parent": "ABC"}, ("cid-00000abc",), ()),
    "a parent that was never written to": ({"parent": "fffffffe"}, ("cid-fffffffe",), ()),
    "a VirtualBox base": (
        {"more": ('ddb.uuid.image="A9C614D1-7ecd-47df-8e2e-f3db36cf0286"', f'ddb.uuid.parent="{UUID(int=0)}"')},
        (),
        ("uuid-a9c614d1-7ecd-47df-8e2e-f3db36cf0286",),
    ),
    "a VirtualBox child": (
        {"more": ('ddb.uuid.parent="A9C614D1-7ecd-47df-8e2e-f3db36cf0286"',)},
        ("uuid-a9c614d1-7ecd-47df-8e2e-f3db36cf0286",),
        (),
    ),
    "a hint and no id": ({"more": ('parentFileNameHint="/vmfs/base.vmdk"',)}, (UNKNOWN_PARENT,), ()),
    "a hint and an id": ({"parent": "1", "more": ('parentFileNameHint="nbd://host/x"',)}, ("cid-00000001",), ()),
}  # fmt: skip


@pytest.mark.parametrize("case", LINKS)
def test_linkage(case: str) -> None:
    options, parents, more_ids = LINKS[case]
    found = parse_descriptor(descriptor('RW 1 FLAT "a" 0', cid="9", **options), "disk.vmdk")  # type: ignore[arg-type]
    parent_file = "x" if case == "a hint and an id" else ""  # without an id there is nothing that it could be checked with
    assert found.linkage == Linkage(("cid-00000009", *more_ids), parents, unique=False, parent_file=parent_file)
    assert bool(found.warnings) == (case == "a hint and no id")


def test_a_child_and_its_parent_may_have_one_cid(kit: Any) -> None:
    """Until the first write a snapshot has its parent's."""
    disks = [naive("sparse", 80 * SECTOR, seed) for seed in (1, 2)]
    layers = [layer(kit, disks[0], cid="7"), layer(kit, disks[1], cid="7", parent="7")]
    assert read(kit, *layers) == disks[1].over(disks[0].over())
    with pytest.raises(ImageError, match="made over parent cid-00000008"):
        Chain.open([layers[0], layer(kit, disks[1], parent="8")])


NAMES = {
    "plain": ("disk-flat.vmdk", "utf-8", ()),
    "spaces": ("my disk (1).vmdk", "utf-8", ()),
    "quotes": ('a "b" c.vmdk', "utf-8", ()),
    "equals and commas": ("a=b,c;d#e.vmdk", "utf-8", ()),
    "UTF-8": ("диск-ディスク.vmdk", "utf-8", ('encoding="UTF-8"',)),
    "UTF-8, unsaid": ("größe.vmdk", "utf-8", ()),
    "windows-1252": ("größe.vmdk", "cp1252", ('encoding="windows-1252"',)),
    "Shift JIS, where a second byte is a backslash": ("ソース.vmdk", "cp932", ('encoding="Shift_JIS"',)),
    "GBK": ("磁盘.vmdk", "gbk", ('encoding="GBK"',)),
}


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("eol", ["\n", "\r\n", " \n"])
def test_extent_names_of_all_kinds(case: str, eol: str) -> None:
    name, encoding, more = NAMES[case]
    raw = descriptor(f'RW 1 VMFS "{name}"', more=more, eol=eol).decode().encode(encoding)
    found = parse_descriptor(raw + bytes(99), "disk.vmdk")
    assert found.extent_names == (name,)
    assert not found.warnings


def test_a_descriptor_in_an_unknown_encoding_is_read_with_a_warning() -> None:
    text = descriptor('RW 1 VMFS "größe.vmdk"').decode()
    for raw in (text.encode("latin-1"), text.replace("version=1", 'encoding="klingon"').encode()):
        found = parse_descriptor(raw, "disk.vmdk")
        assert found.extent_names == ("größe.vmdk",)
        assert "encoding" in found.warnings[0]


def test_what_a_descriptor_says_besides_is_let_be() -> None:
    more = ('changeTrackPath="disk-ctk.vmdk"', 'isNativeSnapshot="no"', "# a comment", 'ddb.comment = ""', "ddb.toolsVersion=1")
    found = parse_descriptor(descriptor('RDONLY 7 VMFS "a.vmdk" 0', "  RW\t9   ZERO  ", more=more), "disk.vmdk")
    assert found.size == 16 * SECTOR
    assert found.values["changetrackpath"] == "disk-ctk.vmdk"


def test_extent_names_of_what_is_no_descriptor(kit: Any) -> None:
    for raw in (b"", b"# Disk", naive("sparse", 4096, 1).build(), naive("cowd", 4096, 1).build()):
        assert extent_names(kit.File(raw)) == ()


def test_describe_escapes_what_an_image_says(kit: Any) -> None:
    disk = naive("sparse", 4096, 1)
    disk.text = descriptor('RW 8 SPARSE "a"', parent="1", more=('parentFileNameHint="\u202e\u2066x"',))
    found = open_image(kit.File(disk.build())).describe()
    assert found["parent_name"] == "\\u202e\\u2066x"
