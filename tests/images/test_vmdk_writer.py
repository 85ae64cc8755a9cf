"""Our hosted sparse and flat VMDKs as others read them: qemu-img, dissect, and VMware's own files."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.images.vmdk_cases import (
    Case,
    dissect_content,
    needs_qemu,
    qemu_content,
    qemu_kinds,
    qemu_refusal,
    random_case,
    reader_of,
)

from tokvm.core.units import KiB, MiB
from tokvm.testing.cowd_writer import CowdOptions, write_cowd
from tokvm.testing.sesparse_writer import SesparseOptions, write_sesparse
from tokvm.testing.vmdk_descriptor import Dialect, ExtentLine, Identity, write_descriptor
from tokvm.testing.vmdk_flat_writer import FlatExtent, write_flat
from tokvm.testing.vmdk_writer import GRAIN_SIZE, SparseOptions, write_sparse, write_sparse_extent

SECTOR = 512
SMALL = 8 * KiB
TABLE = 4 * MiB  # what one table of small grains covers
EDGES = [SECTOR, SMALL - SECTOR, SMALL, SMALL + SECTOR, TABLE - SECTOR, TABLE, TABLE + SECTOR, 2 * TABLE + 1536]


@needs_qemu
@pytest.mark.parametrize(("size", "seed"), list(zip(EDGES, [None, 7] * 4, strict=True)))
def test_qemu_reads_it(tmp_path: Path, size: int, seed: int | None) -> None:
    case = random_case(size, size, longest=1000)
    (path,) = write_sparse(
        tmp_path / "disk.vmdk", size=size, runs=case.runs, zeros=case.zeros, options=SparseOptions(SMALL, seed=seed)
    )
    assert qemu_content(path) == case.over()
    assert qemu_kinds(path, size, SMALL) == case.kinds(SMALL, explicit_zeros=False)


@needs_qemu
@pytest.mark.parametrize(
    ("grain_size", "redundant", "all_tables"),
    [(8 * KiB, False, False), (8 * KiB, True, True), (64 * KiB, False, True), (MiB, True, False)],
)
def test_qemu_reads_zeroed_grains(tmp_path: Path, grain_size: int, redundant: bool, all_tables: bool) -> None:
    size = 9 * MiB + 1536
    case = random_case(grain_size, size, longest=6000)
    options = SparseOptions(grain_size, redundant, zeroed_grains=True, all_tables=all_tables, seed=3)
    (path,) = write_sparse(tmp_path / "disk.vmdk", size=size, runs=case.runs, zeros=case.zeros, options=options)
    assert qemu_content(path) == case.over()
    assert qemu_kinds(path, size, grain_size) == case.kinds(grain_size, explicit_zeros=True)


@needs_qemu
@pytest.mark.parametrize(("zeroed_grains", "split"), [(False, 4 * MiB), (True, None)])
def test_qemu_reads_a_chain(tmp_path: Path, zeroed_grains: bool, split: int | None) -> None:
    size = 9 * MiB + 1536
    content, below = bytes(size), Identity(1)
    for number in range(3):
        case = random_case(100 + number, size, longest=2000)
        identity = below if number == 0 else Identity(below.cid + 1, below.cid, f"disk-{number - 1}.vmdk")
        write_sparse(
            tmp_path / f"disk-{number}.vmdk", size=size, runs=case.runs, zeros=case.zeros, identity=identity, split=split,
            read_parent=reader_of(content), options=SparseOptions(zeroed_grains=zeroed_grains, seed=number),
        )  # fmt: skip
        content, below = case.over(content), identity
        assert qemu_content(tmp_path / f"disk-{number}.vmdk") == content
        assert qemu_kinds(tmp_path / f"disk-{number}.vmdk", size, GRAIN_SIZE) == case.kinds(
            GRAIN_SIZE, explicit_zeros=zeroed_grains
        )


@needs_qemu
def test_qemu_refuses_a_chain_whose_parent_is_another(tmp_path: Path) -> None:
    write_sparse(tmp_path / "base.vmdk", size=MiB, runs=[(0, b"a" * SECTOR)], identity=Identity(1))
    (child,) = write_sparse(tmp_path / "child.vmdk", size=MiB, runs=[], identity=Identity(3, 2, "base.vmdk"))
    assert "error while reading" in qemu_refusal(child)


@needs_qemu
@pytest.mark.parametrize("split", [GRAIN_SIZE, 3 * GRAIN_SIZE, 4 * MiB, 64 * MiB])
def test_qemu_reads_split_disks(tmp_path: Path, split: int) -> None:
    size = 9 * MiB + 1536
    case = random_case(split, size, longest=2000)
    names = write_sparse(tmp_path / "a disk.vmdk", size=size, runs=case.runs, split=split)
    assert names[1].name == "a disk-s001.vmdk"
    assert len(names) == 1 + -(-size // split)
    assert qemu_content(names[0]) == Case(size, case.runs, [], []).over()


@pytest.mark.parametrize("split", [4 * MiB + SECTOR, 3 * SECTOR + GRAIN_SIZE])
@pytest.mark.parametrize("zeroed_grains", [False, True])
@pytest.mark.slow
def test_dissect_reads_extents_that_end_inside_a_grain(tmp_path: Path, split: int, zeroed_grains: bool) -> None:
    """QEMU 7.2 is no help here: it reads on in the grain, behind the extent's end."""
    size = 9 * MiB + 1536
    case = random_case(split, size, longest=2000)
    _, *extents = write_sparse(
        tmp_path / "disk.vmdk", size=size, runs=case.runs, zeros=case.zeros, split=split,
        options=SparseOptions(zeroed_grains=zeroed_grains, seed=1),
    )  # fmt: skip
    assert dissect_content(extents) == case.over()


def test_the_redundant_tables_say_the_same() -> None:
    """Readers prefer one or the other, so none of them compares."""
    out = io.BytesIO()
    write_sparse_extent(out, size=40 * MiB, runs=[(0, b"a" * 512), (33 * MiB, b"b" * 512)])
    raw = out.getvalue()
    redundant, directory, overhead = struct.unpack_from("<QQQ", raw, 48)
    ours = [struct.unpack_from("<2I", raw, at * SECTOR) for at in (redundant, directory)]
    tables = [[raw[table * SECTOR : (table + 4) * SECTOR] for table in entries] for entries in ours]
    assert ours[0] != ours[1]
    assert tables[0] == tables[1]
    assert [struct.unpack_from("<I", tables[0][0])[0], struct.unpack_from("<I", tables[0][1], 64)[0]] == [
        overhead, overhead + 128
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["monolithicSparse.vmdk", "twoGbMaxExtentSparse-s001.vmdk"])
def test_it_is_byte_for_byte_what_vmware_writes(expand: Callable[[str], Path], name: str) -> None:
    """vmware-vdiskmanager's file, taken apart by dissect and written again: same header, tables and grains."""
    vmdk = pytest.importorskip("dissect.hypervisor.disk.vmdk")
    try:
        path = expand(f"vmdk-rs/{name}")
    except FileNotFoundError:
        pytest.skip("no external fixtures (TOKVM_FIXTURES)")
    theirs, size = path.read_bytes(), 10 * MiB
    with path.open("rb") as file:
        disk = vmdk.SparseDisk(file)
        runs = [
            (grain * GRAIN_SIZE, disk.read_sectors(grain * 128, 128)) for grain in range(size // GRAIN_SIZE)
            if disk._lookup_grain(grain)
        ]  # fmt: skip
    out = io.BytesIO()
    text = theirs[SECTOR : 21 * SECTOR].rstrip(b"\0") if name == "monolithicSparse.vmdk" else b""
    write_sparse_extent(out, size=size, runs=runs, descriptor=text)
    assert len(runs) > 40
    assert out.getvalue() == theirs


def test_an_unclean_disk_says_so() -> None:
    out = io.BytesIO()
    write_sparse_extent(out, size=MiB, runs=[], options=SparseOptions(unclean=True))
    assert out.getvalue()[72] == 1


@pytest.mark.parametrize("grain_size", [0, 512, 2048, 12 * KiB])
def test_grain_sizes_that_the_format_forbids_are_refused(grain_size: int) -> None:
    with pytest.raises(ValueError, match="not a power of two"):
        write_sparse_extent(io.BytesIO(), size=MiB, runs=[], options=SparseOptions(grain_size))


def test_a_childs_partial_grain_needs_its_parent(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only in part"):
        write_sparse(tmp_path / "d.vmdk", size=MiB, runs=[(0, bytes(512))], identity=Identity(2, 1, "base.vmdk"))


@needs_qemu
@pytest.mark.parametrize(
    ("create_type", "split"),
    [("vmfs", None), ("vmfs", 5 * MiB + 512), ("monolithicFlat", None), ("twoGbMaxExtentFlat", 512 * KiB)],
)
def test_qemu_reads_flat_disks(tmp_path: Path, create_type: str, split: int | None) -> None:
    size = 9 * MiB + 1536
    case = random_case(8, size, longest=2000)
    names = write_flat(
        tmp_path / "disk.vmdk", size=size, runs=case.runs, zeros=case.zeros, create_type=create_type, split=split
    )
    assert qemu_content(names[0]) == case.over()
    assert sum(name.stat().st_size for name in names[1:]) == size


@needs_qemu
def test_qemu_reads_flat_extents_at_offsets_in_shared_files(tmp_path: Path) -> None:
    size = 2 * MiB
    case = random_case(9, size, longest=500)
    extents = [
        FlatExtent(MiB + 512, "one.bin", 3 * SECTOR), FlatExtent(512, "two file.bin"),
        FlatExtent(MiB - 1024, "one.bin", 4 * MiB),
    ]  # fmt: skip
    names = write_flat(tmp_path / "disk.vmdk", size=size, runs=case.runs, create_type="monolithicFlat", extents=extents)
    assert [name.name for name in names] == ["disk.vmdk", "one.bin", "two file.bin"]
    assert names[1].stat().st_size == 5 * MiB - 1024
    assert qemu_content(names[0]) == Case(size, case.runs, [], []).over()


def test_an_extent_without_a_file_is_a_line_only(tmp_path: Path) -> None:
    """Not shown to QEMU: 7.2 skips ZERO lines, and the disk gets smaller."""
    extents = [FlatExtent(MiB, "one.bin"), FlatExtent(MiB)]
    names = write_flat(tmp_path / "d.vmdk", size=2 * MiB, runs=[], zeros=[(0, 2 * MiB)], create_type="custom", extents=extents)
    assert [name.name for name in names] == ["d.vmdk", "one.bin"]
    assert b'RW 2048 FLAT "one.bin" 0\nRW 2048 ZERO\n' in names[0].read_bytes()


@pytest.mark.parametrize(
    ("extents", "create_type", "message"),
    [
        ([FlatExtent(MiB, "f")], "vmfs", "do not add up"),
        ([FlatExtent(2 * MiB, "f", 512)], "vmfs", "no offset"),
        ([FlatExtent(2 * MiB - 100, "f"), FlatExtent(100, "g")], "monolithicFlat", "whole sectors"),
        ([FlatExtent(2 * MiB)], "monolithicFlat", "touches a ZERO extent"),
    ],
)
def test_flat_extents_that_make_no_sense_are_refused(
    tmp_path: Path, extents: list[FlatExtent], create_type: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_flat(tmp_path / "d.vmdk", size=2 * MiB, runs=[(0, bytes(512))], extents=extents, create_type=create_type)


def test_a_childs_descriptor_is_what_esxi_writes() -> None:
    """The text of a snapshot that ESXi made, but for its content id."""
    text = write_descriptor(
        "vmfsSparse", [ExtentLine(2 * MiB, "VMFSSPARSE", "vmfs_thick-000001-delta.vmdk")],
        identity=Identity(0x8F67CA74, 0x0172E8A4, "vmfs_thick.vmdk"),
        dialect=Dialect(ddb={"ddb.longContentID": "4b98b55ba6a6bc2e8fd6eb368f67ca74"}),
    )  # fmt: skip
    assert text.decode() == (
        '# Disk DescriptorFile\nversion=1\nencoding="UTF-8"\nCID=8f67ca74\nparentCID=0172e8a4\ncreateType="vmfsSparse"\n'
        'parentFileNameHint="vmfs_thick.vmdk"\n# Extent description\n'
        'RW 4096 VMFSSPARSE "vmfs_thick-000001-delta.vmdk"\n\n# The Disk Data Base \n#DDB\n\n'
        'ddb.longContentID = "4b98b55ba6a6bc2e8fd6eb368f67ca74"\n'
    )


def test_a_bases_descriptor_has_a_geometry_and_stable_ids() -> None:
    text = write_descriptor("vmfs", [ExtentLine(2 * MiB, "VMFS", "d-flat.vmdk")], identity=Identity(0xABCDEF)).decode()
    assert text == write_descriptor("vmfs", [ExtentLine(2 * MiB, "VMFS", "d-flat.vmdk")], identity=Identity(0xABCDEF)).decode()
    assert 'ddb.geometry.cylinders = "2"\nddb.geometry.heads = "64"\nddb.geometry.sectors = "32"\n' in text
    assert "CID=00abcdef\nparentCID=ffffffff\n" in text
    assert "parentFileNameHint" not in text
    (content_id,) = [line for line in text.splitlines() if "longContentID" in line]
    assert content_id.endswith('00abcdef"')


def test_a_dialect_changes_the_text() -> None:
    dialect = Dialect(ddb={}, encoding="windows-1252", newline="\r\n", header_lines=['changeTrackPath="d-ctk.vmdk"'])
    text = write_descriptor("monolithicFlat", [ExtentLine(512, "FLAT", "Größe.vmdk", 1024, "RDONLY")], dialect=dialect)
    lines = text.split(b"\r\n")
    assert lines[2] == b'encoding="windows-1252"'
    assert b'changeTrackPath="d-ctk.vmdk"' in lines
    assert b'RDONLY 1 FLAT "Gr\xf6\xdfe.vmdk" 2' in lines
    assert not any(line.startswith(b"ddb.") for line in lines)


@needs_qemu
@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(300))
def test_random_chains_of_mixed_formats(tmp_path: Path, seed: int) -> None:
    """A flat or sparse base and up to four children of any kind, placed and shuffled at random, as QEMU reads them."""
    rng = random.Random(seed)
    size = SECTOR * rng.choice([1, 7, 8, 9, 4095, 4096, 4097, 32768, 32769, rng.randrange(1, 50000)])
    content, hint = bytes(size), ""
    for number in range(1, rng.randrange(2, 7)):
        case = random_case(rng.randrange(2**32), size, longest=rng.choice([9, 100, 9000]))
        path = tmp_path / f"disk-{number}.vmdk"
        identity = Identity(number, number - 1, hint) if hint else Identity(number)
        kind = rng.choice(["sparse", "cowd", "sesparse"] if hint else ["flat", "sparse"])
        write_any(kind, path, case, identity, reader_of(content), rng)
        content, hint = case.over(content), path.name
        assert qemu_content(path) == content, (kind, number)


def write_any(
    kind: str, path: Path, case: Case, identity: Identity, below: Callable[[int, int], bytes], rng: random.Random
) -> None:
    shuffle = rng.choice([None, rng.randrange(2**32)])
    if kind == "flat":
        write_flat(path, size=case.size, runs=case.runs, identity=identity)
        return
    zero_entries = CowdOptions(zero_grains=True, seed=shuffle)  # larger ones QEMU reads from the directory
    writers: dict[str, tuple[Callable[..., list[Path]], object]] = {
        "cowd": (write_cowd, rng.choice([CowdOptions(SECTOR << rng.randrange(8), seed=shuffle), zero_entries])),
        "sesparse": (write_sesparse, SesparseOptions(rng.randrange(10000), shuffle)),
        "sparse": (
            write_sparse,
            SparseOptions(
                4096 << rng.randrange(8), redundant=rng.random() < 0.5, zeroed_grains=rng.random() < 0.5,
                all_tables=rng.random() < 0.5, seed=shuffle,
            ),
        ),
    }  # fmt: skip
    write, options = writers[kind]
    write(path, size=case.size, runs=case.runs, zeros=case.zeros, read_parent=below, identity=identity, options=options)
