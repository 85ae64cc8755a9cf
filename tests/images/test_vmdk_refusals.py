"""Hostile and damaged VMDKs are refused with file, offset, field, the value read and the values allowed."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.images.naive_vmdk import (
    AT_END,
    SECTOR,
    ZERO,
    Listed,
    NaiveCowd,
    NaiveSesparse,
    NaiveSparse,
    descriptor,
    padded,
)

from tokvm.core.errors import ImageError
from tokvm.core.units import KiB, MiB
from tokvm.images.open import open_image
from tokvm.images.vmdk.descriptor import extent_names, parse_descriptor
from tokvm.images.vmdk.layer import open_vmdk

FLAT = 'RW 9 FLAT "a-flat.vmdk" 0'


def refused(call: Callable[[], object], match: str, at: int | None = None, name: str = "disk.vmdk") -> ImageError:
    with pytest.raises(ImageError, match=match) as caught:
        call()
    error = caught.value
    assert error.where == name if at is None else error.where == f"{name}@{at:#x}", error.where
    assert error.fix
    return error


def opening(kit: Any, raw: bytes, extents: Any = None) -> Callable[[], object]:
    return lambda: open_image(kit.File(raw, "disk.vmdk"), extents=extents)


def walking(kit: Any, raw: bytes) -> Callable[[], object]:
    return lambda: list(open_image(kit.File(raw, "disk.vmdk")).windows())


def vmdk_opening(kit: Any, raw: bytes) -> Callable[[], object]:
    return lambda: open_vmdk(kit.File(raw, "disk.vmdk"))


def reading(file: Any, buffer: memoryview) -> Callable[[], object]:
    return lambda: file.read_into(0, buffer)


DESCRIPTORS: dict[str, tuple[bytes, str]] = {
    "too long": (descriptor(FLAT) + b"#" * (1 << 20), "descriptor size is"),
    "a line too long": (descriptor(FLAT, more=("x=" + "y" * 5000,)), "line 6: length is 5002"),
    "a control character": (descriptor(FLAT, more=("x=\x1b[2J",)), "no control characters"),
    "a lone carriage return": (descriptor(FLAT, more=("x=1\rRW 1 ZERO",)), "no control characters"),
    "a line that is nothing": (descriptor(FLAT, more=("hello world",)), "line 6: text is 'hello world'"),
    "no extents": (descriptor(), "number of extents is 0"),
    "too many extents": (descriptor(*["RW 1 ZERO"] * 4097), "number of extents is more than 4096"),
    "no CID": (descriptor(FLAT).replace(b"\nCID=11111111", b""), "CID is missing"),
    "no parentCID": (descriptor(FLAT).replace(b"parentCID=ffffffff", b""), "parentCID is missing"),
    "a CID of nine digits": (descriptor(FLAT, cid="123456789"), "CID is '123456789'"),
    "a signed CID": (descriptor(FLAT, cid="-1"), "CID is '-1'"),
    "two CIDs": (descriptor(FLAT, more=("CID=2",)), "cid is '2'"),
    "two parents": (descriptor(FLAT, more=("PARENTCID=2",)), "parentcid is '2'"),
    "two hints": (descriptor(FLAT, more=('parentFileNameHint="a"', 'parentFileNameHint="b"')), "parentfilenamehint is"),
    "a version that is none": (descriptor(FLAT).replace(b"version=1", b"version=x"), "version is 'x'"),
    "a parent uuid that is none": (descriptor(FLAT, more=('ddb.uuid.parent="{urn:uuid:1}"',)), "ddb.uuid.parent is"),
    "encrypted": (descriptor(FLAT, more=('encryption.keySafe="vmware:key/list"',)), "encryption.keysafe is set"),
    "encrypted, in the data base": (descriptor(FLAT, more=('ddb.encryption.data="x"',)), "the disk is encrypted"),
    "encrypted by a filter": (descriptor(FLAT, more=('ddb.iofilters="vmwarevmcrypt"',)), "ddb.iofilters is set"),
    "no access": (descriptor('NOACCESS 1 VMFS "a"'), "extent access is NOACCESS"),
    "no sectors": (descriptor('RW 0 VMFS "a"'), "extent sectors is 0"),
    "negative sectors": (descriptor('RW -1 VMFS "a"'), "text is"),
    "twenty digits": (descriptor(f'RW {10**19} VMFS "a"'), "text is"),
    "larger than any disk": (descriptor(f'RW {(62 << 31) + 1} VMFS "a"'), "sum of the extents' sectors"),
    "together larger than any disk": (descriptor(*[f"RW {31 << 31} ZERO"] * 2, "RW 1 ZERO"), "sum of the extents' sectors"),
    "a raw device mapping": (descriptor('RW 1 VMFSRDM "a-rdm.vmdk"'), "VMFSRDM, a raw device mapping"),
    "a raw device": (descriptor('RW 1 VMFSRAW "vml.1"'), "VMFSRAW, a raw device mapping"),
    "a vSAN sparse disk": (descriptor('RW 1 VSANSPARSE "a"'), "VSANSPARSE, a vSAN object"),
    "an unknown type": (descriptor('RW 1 QCOW "a"'), "extent type is QCOW"),
    "flat without an offset": (descriptor('RW 1 FLAT "a"'), "offset of the FLAT extent is missing"),
    "flat far behind everything": (descriptor(f'RW 1 FLAT "a" {10**19 - 1}'), "offset of the FLAT extent"),
    "vmfs with an offset": (descriptor('RW 1 VMFS "a" 8'), "offset of the VMFS extent is 8"),
    "sparse without a file": (descriptor("RW 1 SPARSE"), "file of the SPARSE extent is missing"),
    "zero with a file": (descriptor('RW 1 ZERO "a"'), "file of a ZERO extent"),
    "a device behind the offset": (descriptor('RW 1 FLAT "a" 0 part-uuid /dev/sda'), "text behind the extent"),
    "one sparse file twice": (descriptor('RW 1 SPARSE "a"', 'RW 1 SPARSE "a"'), "extent file is 'a'"),
    "the same bytes twice": (descriptor('RW 9 FLAT "a" 0', 'RW 1 FLAT "a" 8'), "extent file is 'a'"),
}  # fmt: skip

HOSTILE_NAMES = [
    "/etc/shadow", "../secret", "..", ".", "a/b", "a\\b", "..\\b", "C:\\disk.vmdk", "C:disk.vmdk", "nbd://127.0.0.1:10809/x",
    'json:{"driver":"nbd"}', "file:x", "http://host/x", "fat:rw:.", "a\tb", "x" * 256, "é" * 128, "//host/share",
]  # fmt: skip


@pytest.mark.parametrize("case", DESCRIPTORS)
def test_descriptors(case: str, kit: Any) -> None:
    raw, match = DESCRIPTORS[case]
    listed = Listed({name: kit.File(bytes(9 * SECTOR), name) for name in ("a", "a-flat.vmdk")})
    refused(lambda: open_vmdk(kit.File(raw, "disk.vmdk"), listed), re.escape(match), 0)
    assert listed.asked == []


@pytest.mark.parametrize("kind", ["FLAT", "VMFS", "SPARSE", "VMFSSPARSE", "SESPARSE"])
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_that_lead_elsewhere_are_refused_before_anything_is_opened(kit: Any, kind: str, name: str) -> None:
    raw = descriptor(f'RW 1 {kind} "{name}"' + (" 0" if kind == "FLAT" else ""))
    listed = Listed({name: kit.File(bytes(SECTOR), name)})
    refused(lambda: open_image(kit.File(raw, "disk.vmdk"), extents=listed), "extent file name is", 0)
    refused(lambda: extent_names(kit.File(raw, "disk.vmdk")), "extent file name is", 0)
    assert listed.asked == []


def test_an_extent_that_was_not_listed_is_named(kit: Any) -> None:
    for extents in (None, Listed({})):
        error = refused(opening(kit, descriptor(FLAT), extents), "line 8 names")
        assert "'a-flat.vmdk', which was not given" in error.what
        assert "list a-flat.vmdk beside the descriptor" in error.fix


def test_only_the_listed_files_are_opened_by_the_process(tmp_path: Path) -> None:
    """Seen from outside: what a descriptor names is no path to anybody."""
    secret = tmp_path / "secret" / "key.raw"
    secret.parent.mkdir()
    secret.write_bytes(b"k" * SECTOR)
    images = tmp_path / "images"
    images.mkdir()
    names = [str(secret), "../secret/key.raw", "link.vmdk", "beside.vmdk"]
    (images / "link.vmdk").symlink_to(secret)
    (images / "beside.vmdk").write_bytes(b"b" * SECTOR)
    for number, name in enumerate(names):
        (images / f"{number}.vmdk").write_bytes(descriptor(f'RW 1 FLAT "{name}" 0', more=(f'parentFileNameHint="{secret}"',)))
    probe = """
import sys
seen = []
sys.addaudithook(lambda event, args: seen.append(str(args[0])) if event == "open" else None)
from tokvm.core.errors import ImageError
from tokvm.images.files import open_file
from tokvm.images.open import open_image
for path in sys.argv[1:]:
    try:
        open_image(open_file(path))
        print("opened", path)
    except ImageError:
        pass
import json
print(json.dumps(seen))
"""
    done = subprocess.run(
        [sys.executable, "-c", probe, *(str(images / f"{n}.vmdk") for n in range(len(names)))],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    opened = json.loads(done.stdout)
    assert [path for path in opened if str(images) in path] == [str(images / f"{n}.vmdk") for n in range(len(names))]
    assert not [path for path in opened if "secret" in path or "beside" in path]


def test_extents_are_closed_when_the_disk_is_refused(kit: Any) -> None:
    files = {"a": kit.File(bytes(SECTOR), "a"), "b": kit.File(bytes(SECTOR), "b")}
    raw = descriptor('RW 1 VMFS "a"', 'RW 2 VMFS "b"', 'RW 2 VMFS "c"')
    file = kit.File(raw, "disk.vmdk")
    assert "size of the VMFS extent" in refused_anywhere(lambda: open_image(file, extents=Listed(files))).what
    assert all(one.closed for one in files.values())
    assert not file.closed  # its opener still has it


def test_flat_extents_that_are_too_short_are_refused(kit: Any) -> None:
    for line, size, needed in ((FLAT, 9 * 512 - 1, 9 * 512), ('RW 2 FLAT "a-flat.vmdk" 8', 9 * 512, 10 * 512)):
        listed = Listed({"a-flat.vmdk": kit.File(bytes(size), "a-flat.vmdk")})
        match = f"size of the FLAT extent is {size}; allowed: at least {needed}"
        refused(opening(kit, descriptor(line), listed), match, 0, "a-flat.vmdk")


# --- KDMV ---

HEADER: dict[str, tuple[dict[str, Any], int, str]] = {
    "version 0": ({"version": 0}, 4, "KDMV version is 0"),
    "version 4": ({"version": 4}, 4, "KDMV version is 4"),
    "unknown flags": ({"flags": 0x47}, 8, "KDMV flags is 0x47"),
    "compression without the flag": ({"compression": 1}, 77, "KDMV compression is 1"),
    "the flag without compression": ({"flags": 0x10003}, 77, "KDMV compression is 0"),
    "markers without compression": ({"flags": 0x20003}, 8, "markers only with compression"),
    "an unknown compression": ({"compression": 2}, 77, "KDMV compression is 2"),
    "no capacity": ({"capacity": 0}, 12, "KDMV capacity is 0"),
    "more than any disk": ({"capacity": (62 << 31) + 1}, 12, "KDMV capacity is"),
    "a capacity below the descriptor's": ({"capacity": 98}, 12, "header capacity is 98; allowed: at least 99"),
    "no grain": ({"grain": 0}, 20, "KDMV grain size is 0"),
    "a grain that is no power of two": ({"grain": 96}, 20, "KDMV grain size is 96"),
    "a huge grain": ({"grain": 1 << 40}, 20, "KDMV grain size"),
    "a huge compressed grain": ({"grain": 8192, "flags": 0x30003, "compression": 1}, 20, "8 to 4096 sectors"),
    "tables of another size": ({"gtes": 506}, 44, "entries of a grain table is 506"),
    "tables of nothing": ({"gtes": 0}, 44, "entries of a grain table is 0"),
    "a descriptor far away": ({"descriptor": 1 << 60}, 28, "KDMV descriptor sector"),
    "a descriptor of nothing": ({"descriptor_size": 0}, 36, "KDMV descriptor size is 0"),
    "a huge descriptor": ({"descriptor_size": 2049}, 36, "KDMV descriptor size is 2049"),
    "a directory at 0": ({"gd": 0}, 56, "KDMV grain directory is 0"),
    "a directory far away": ({"gd": 1 << 62}, 56, "KDMV grain directory"),
    "a copy of it far away": ({"rgd": 1 << 62}, 48, "KDMV redundant grain directory"),
    "a huge overhead": ({"overhead": 1 << 63}, 64, "KDMV overhead"),
    "copied as text": ({"newlines": b"\n \n\n"}, 73, "copied as text"),
}  # fmt: skip


def sparse(kind: str = "sparse", **options: Any) -> NaiveSparse:
    rng = random.Random(1)
    grains = {number: rng.randbytes(4096) for number in (0, 1, 5, 11)} | {7: ZERO}
    return NaiveSparse(99 * SECTOR, grains, kind=kind, **options)


@pytest.mark.parametrize("case", HEADER)
def test_headers(case: str, kit: Any) -> None:
    changes, at, match = HEADER[case]
    disk = sparse()
    raw = disk.build()
    refused(lambda: open_image(kit.File(kit.patched(raw, 0, disk.header(**changes)), "disk.vmdk")), re.escape(match), at)


def test_an_old_header_without_the_newline_test_may_have_anything_there(kit: Any) -> None:
    disk = sparse()
    raw = disk.build()
    open_image(kit.File(kit.patched(raw, 0, disk.header(flags=disk.flags & ~1, newlines=b"\0\0\0\0"))))


def entry(disk: NaiveSparse, number: int) -> int:
    return disk.places[f"gt{number // 512}"] + 4 * (number % 512)


@pytest.mark.parametrize("kind", ["sparse", "compressed", "front"])
def test_grain_entries(kit: Any, kind: str) -> None:
    disk = sparse(kind)
    raw, at = disk.build(), entry(disk, 5)
    end = -(-len(raw) // SECTOR)
    table = disk.places["gt0"] // SECTOR
    copy, directory = disk.places["rgt0"] // SECTOR, disk.places["gd"] // SECTOR
    same = disk.places["grain1"] // SECTOR
    for value in (end, 2**32 - 1, 2, table, table + 3, copy, directory, same):
        broken = kit.patched(raw, at, struct.pack("<I", value))
        refused(walking(kit, broken), r"of grain table 0 is 0x", at)
    zero = kit.patched(raw, 8, struct.pack("<I", disk.flags & ~4))
    refused(walking(kit, zero), "entry 7 of grain table 0 is 0x1; allowed: 0, or a grain's sector", entry(disk, 7))


def test_a_grain_that_reaches_into_another_is_refused(kit: Any) -> None:
    disk = sparse()
    raw = disk.build()
    broken = kit.patched(raw, entry(disk, 5), struct.pack("<I", disk.places["grain1"] // SECTOR + 3))
    refused(walking(kit, broken), "a place of the file that no other grain takes", entry(disk, 5))


def test_two_grains_at_one_place_are_found_across_tables(kit: Any) -> None:
    disk = NaiveSparse(5000 * 4096, {0: b"a" * 4096, 4000: b"b" * 4096})
    raw = disk.build()
    broken = kit.patched(raw, entry(disk, 4000), struct.pack("<I", disk.places["grain0"] // SECTOR))
    layer = open_image(kit.File(broken, "disk.vmdk"))
    refused(lambda: list(layer.windows(max_rows=1)), "no other grain takes", entry(disk, 4000))


@pytest.mark.parametrize("wrong", ["behind the end", "far", "descriptor", "itself", "the next table"])
def test_directories(kit: Any, wrong: str) -> None:
    """Both are damaged: the first is what is complained about. One alone is a warning."""
    disk = NaiveSparse(1024 * 4096, {0: b"a" * 4096, 600: b"b" * 4096})
    raw = disk.build()

    def damaged(raw: bytes, name: str) -> bytes:
        next_table = disk.places[f"{name[:-1]}t1"] // SECTOR + 1
        itself = disk.places[name] // SECTOR
        places = {"behind the end": len(raw) // SECTOR - 3, "far": 0xFFFFFFFF, "descriptor": 1, "itself": itself}
        place = places.get(wrong, next_table)
        return bytes(kit.patched(raw, disk.places[name], struct.pack("<I", place)))

    for name in ("gd", "rgd"):
        layer = open_image(kit.File(damaged(raw, name), "disk.vmdk"))
        assert len(layer.warnings) == 1
        assert len(layer.window(0, layer.size)) == 2
    number = int(wrong == "the next table")
    both = damaged(damaged(raw, "gd"), "rgd")
    refused(opening(kit, both), f"grain directory entry {number}", disk.places["gd"] + 4 * number)


def test_directories_outside_the_file_or_over_structures(kit: Any) -> None:
    disk = sparse(redundant=False)
    raw = disk.build()
    for sector in (len(raw) // SECTOR, 1 << 40, 1):
        broken = kit.patched(raw, 0, disk.header(gd=sector))
        refused(opening(kit, broken), "KDMV grain directory is sector", 56)


def test_a_descriptor_over_the_header_or_behind_the_end(kit: Any) -> None:
    disk = sparse()
    raw = disk.build()
    refused(
        lambda: open_image(kit.File(kit.patched(raw, 0, disk.header(descriptor=1 << 30)), "disk.vmdk")),
        "a structure is",
        1 << 39,
    )


def test_embedded_descriptors_are_of_one_sparse_file(kit: Any) -> None:
    for lines in (
        (FLAT,),
        ('RW 9 SPARSE "a"', 'RW 90 SPARSE "b"'),
        ('RW 99 SPARSE "a"', "RW 1 ZERO"),
        ('RW 99 VMFSSPARSE "a"',),
    ):
        raw = sparse(text=descriptor(*lines)).build()
        refused(opening(kit, raw), "extents of the embedded descriptor is", 512)


def test_a_part_of_a_split_disk_is_no_disk(kit: Any) -> None:
    for text in (b"", bytes(1024)):
        raw = sparse(text=text).build()
        refused(opening(kit, raw), "only the disk's descriptor", 28)


# --- compressed grains ---


def test_a_cut_stream_is_refused(kit: Any) -> None:
    disk = sparse("stream")
    raw = disk.build()
    for cut in (1, 512, 1024, 1536, 4096, len(raw) - 1024):
        error = refused_anywhere(opening(kit, raw[:-cut]))
        assert "disk.vmdk@" in error.where
    footer = disk.places["footer"]
    for at, field, match in (
        (footer - 512 + 12, struct.pack("<I", 2), "marker near the end"),
        (footer - 512 + 8, b"\1", "marker near the end"),
        (footer + 512, b"\1", "marker near the end"),
        (footer, b"KDMW", "KDMV magic"),
        (footer + 12, struct.pack("<Q", 98), "the footer is another disk's"),
        (footer + 56, struct.pack("<Q", AT_END), "KDMV grain directory is in a footer"),
        (footer + 56, struct.pack("<Q", footer // SECTOR), "KDMV grain directory is sector"),
    ):
        assert match in str(refused_anywhere(opening(kit, kit.patched(raw, at, field))))


def refused_anywhere(call: Callable[[], object]) -> ImageError:
    with pytest.raises(ImageError) as caught:
        call()
    assert caught.value.fix
    return caught.value


GRAINS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a zlib bomb": (lambda _: zlib.compress(bytes(8 << 20)), "more than 4096 bytes"),
    "one byte too many": (lambda data: zlib.compress(data + b"x"), "more than 4096 bytes"),
    "too short": (lambda data: zlib.compress(data[:-1]), "4095 bytes"),
    "raw deflate": (lambda data: zlib.compress(data)[2:-4], "no zlib stream"),
    "without its end": (lambda data: zlib.compress(data)[:-5], "without its end"),
    "a wrong checksum": (lambda data: zlib.compress(data)[:-1] + b"\0", "no zlib stream"),
    "nothing": (lambda _: b"", "size of a compressed grain is 0"),
}


@pytest.mark.parametrize("kind", ["compressed", "front", "stream"])
@pytest.mark.parametrize("case", GRAINS)
def test_compressed_grains(case: str, kind: str, kit: Any) -> None:
    change, match = GRAINS[case]
    data = (b"some text " * 500)[:4096]
    disk = NaiveSparse(8 * 4096, {3: data}, kind=kind)
    disk.packed[3] = padded(head(disk, 3, change(data)) + change(data))
    layer = open_image(kit.File(disk.build(), "disk.vmdk"))
    (extent,) = layer.window(0, layer.size)
    error = refused_anywhere(lambda: layer.file.read_into(extent.file_offset, memoryview(bytearray(4096))))
    assert match in error.what
    assert error.where.startswith("disk.vmdk@")


def head(disk: NaiveSparse, number: int, packed: bytes) -> bytes:
    lba = struct.pack("<Q", number * disk.grain_sectors) if disk.marked else b""
    return lba + struct.pack("<I", len(packed))


def test_a_grain_of_another_place_or_over_the_next_one_is_refused(kit: Any) -> None:
    disk = sparse("front")
    raw, at = disk.build(), disk.places["grain1"]
    for place, value, match in ((at, struct.pack("<Q", 16), "lba of a compressed grain is 16"),
                                (at + 8, struct.pack("<I", 5000), "size of a compressed grain is 5000"),
                                (at + 8, b"\xff" * 4, "size of a compressed grain is 4294967295")):  # fmt: skip
        layer = open_image(kit.File(kit.patched(raw, place, value), "disk.vmdk"))
        whole = memoryview(bytearray(layer.file.size))
        assert match in refused_anywhere(reading(layer.file, whole)).what


def test_more_grains_than_sectors_cost_nothing(kit: Any) -> None:
    """A table that lists one sector again and again, in a file of few sectors."""
    disk = NaiveSparse(512 * 4096, {0: b"x"}, kind="compressed", redundant=False)
    raw = bytearray(disk.build())
    struct.pack_into("<512I", raw, disk.places["gt0"], *[disk.places["grain0"] // SECTOR] * 512)
    error = refused_anywhere(lambda: open_image(kit.File(bytes(raw), "disk.vmdk")))
    assert "no more grains than the file has sectors" in error.what


# --- COWD ---

COWD: dict[str, tuple[dict[str, int], int, str]] = {
    "version": ({"version": 2}, 4, "COWD version is 2"),
    "flags": ({"flags": 7}, 8, "COWD flags is 0x7"),
    "no capacity": ({"capacity": 0}, 12, "COWD capacity is 0"),
    "no grain": ({"grain": 0}, 16, "COWD grain size is 0"),
    "a grain that is no power of two": ({"grain": 3}, 16, "COWD grain size is 3"),
    "a huge grain": ({"grain": 1 << 31}, 16, "COWD grain size"),
    "a directory in the header": ({"gd": 3}, 20, "COWD grain directory sector is 3"),
    "a directory behind the end": ({"gd": 1 << 30}, 20, "COWD grain directory sector"),
    "too few entries": ({"entries": 1}, 24, "COWD grain directory entries is 1"),
    "too many entries": ({"entries": 1 << 31}, 20, "a directory of 2147483648 entries"),
}


def cowd() -> NaiveCowd:
    return NaiveCowd(5000 * SECTOR, {0: b"a" * 512, 1: b"b" * 512, 2: ZERO, 4999: b"c" * 512})


@pytest.mark.parametrize("case", COWD)
def test_cowd_headers(case: str, kit: Any) -> None:
    changes, at, match = COWD[case]
    disk = cowd()
    raw = kit.patched(disk.build(), 0, disk.header(**changes))
    refused(lambda: open_image(kit.File(raw, "disk.vmdk")), re.escape(match), at)


def test_cowd_entries(kit: Any) -> None:
    disk = cowd()
    raw, table = disk.build(), disk.places["gt0"]
    end = len(raw) // SECTOR
    for value in (2, 3, 4, end, 2**32 - 1, table // SECTOR, table // SECTOR + 31, disk.places["gt1"] // SECTOR):
        broken = kit.patched(raw, table + 4, struct.pack("<I", value))
        refused(walking(kit, broken), "entry 1 of grain table 0 is", table + 4)
    again = kit.patched(raw, disk.places["gt1"] + 4 * 903, struct.pack("<I", disk.places["grain0"] // SECTOR))
    refused(walking(kit, again), "entry 903 of grain table 1", disk.places["gt1"] + 4 * 903)
    for value in (1, 3, 4, end - 31, 2**32 - 1, disk.places["gt1"] // SECTOR, disk.places["gt1"] // SECTOR + 31):
        broken = kit.patched(raw, 2048, struct.pack("<I", value))
        refused_anywhere(opening(kit, broken))


# --- seSparse ---

SESPARSE: dict[str, tuple[dict[int, int], int, str]] = {
    "version": ({1: 0x200000002}, 8, "seSparse version is 0x200000002"),
    "no capacity": ({2: 0}, 16, "seSparse capacity is 0"),
    "more than any disk": ({2: (62 << 31) + 1}, 16, "seSparse capacity"),
    "grain": ({3: 16}, 24, "seSparse grain size is 0x10"),
    "table": ({4: 128}, 32, "seSparse grain table size is 0x80"),
    "flags": ({5: 1}, 40, "seSparse flags is 0x1"),
    "reserved": ({8: 1}, 64, "seSparse reserved 3 is 0x1"),
    "volatile header at 0": ({10: 0}, 80, "seSparse volatile header"),
    "tables far away": ({18: 1 << 60}, 144, "seSparse grain tables"),
    "a directory of far too many sectors": ({17: 1 << 60}, 128, "seSparse grain directory"),
    "a small directory": ({2: 1 << 31}, 136, "seSparse grain directory size is 512"),
}


def sesparse(**options: Any) -> NaiveSesparse:
    return NaiveSesparse(5000 * 4096, {0: b"a" * 4096, 1: b"b" * 4096, 2: ZERO, 4999: b"c" * 4096}, **options)


@pytest.mark.parametrize("word", [6, 7, 8, 9])
def test_a_reserved_word_that_newer_esxi_writes_is_accepted(kit: Any, word: int) -> None:
    plain = open_vmdk(kit.File(sesparse().build(), "disk.vmdk"))
    marked = open_vmdk(kit.File(sesparse(words={word: 0x200}).build(), "disk.vmdk"))
    assert list(marked.window(0, marked.size)) == list(plain.window(0, plain.size))


@pytest.mark.parametrize("case", SESPARSE)
def test_sesparse_headers(case: str, kit: Any) -> None:
    words, at, match = SESPARSE[case]
    raw = sesparse(words=words).build()
    refused(lambda: open_vmdk(kit.File(raw, "disk.vmdk")), re.escape(match), at)


@pytest.mark.parametrize("words", [{16: 1}, {18: 4}, {20: 5}, {24: 4}, {24: 1}, {14: 1 << 40}, {21: 1 << 40}])
def test_sesparse_structures_apart_and_inside(kit: Any, words: dict[int, int]) -> None:
    raw = sesparse(words=words).build()
    assert "allowed: " in str(refused_anywhere(lambda: open_image(kit.File(raw, "disk.vmdk"))))


def test_sesparse_padding_and_volatile_header(kit: Any) -> None:
    disk = sesparse()
    raw = disk.build()
    refused(lambda: open_image(kit.File(kit.patched(raw, 500, b"x"), "disk.vmdk")), "seSparse padding", 208)
    refused(lambda: open_image(kit.File(kit.patched(raw, 512, b"x"), "disk.vmdk")), "seSparse volatile magic", 512)
    error = refused(lambda: open_image(kit.File(kit.patched(raw, 536, b"\1"), "disk.vmdk")), "replay_journal is 1", 536)
    assert "power the VM off, or take a snapshot" in error.fix


def test_sesparse_entries(kit: Any) -> None:
    disk = sesparse()
    raw, table = disk.build(), disk.places["gt0"]
    for value in (
        1,
        0xFFF << 48,
        4 << 60,
        5 << 60,
        15 << 60,
        2**64 - 1,
        3 << 60 | 3 << 48,
        3 << 60 | 1,
        3 << 60 | (1 << 48) - 1,
    ):
        broken = kit.patched(raw, table + 8, struct.pack("<Q", value))
        refused(walking(kit, broken), "entry 1 of grain table 0 is 0x", table + 8)
    again = kit.patched(raw, disk.places["gt1"] + 8 * 903, struct.pack("<Q", 3 << 60))
    refused(walking(kit, again), "entry 903 of grain table 1", disk.places["gt1"] + 8 * 903)
    for value in (1, 1 << 60 | 2, 1 << 60 | 0xFFFFFFFF, 2 << 60, 1 << 60 | 1 << 32, 1 << 60 | 1 << 59, 3 << 60):
        broken = kit.patched(raw, disk.places["gd"], struct.pack("<Q", value))
        refused(opening(kit, broken), "grain directory entry 0", disk.places["gd"])
    twice = kit.patched(raw, disk.places["gd"] + 8, struct.pack("<Q", 1 << 60))
    refused_anywhere(lambda: open_image(kit.File(twice, "disk.vmdk")))


def test_truncated_files_of_every_kind(kit: Any) -> None:
    for disk in (sparse(), sparse("compressed"), sparse("front"), sparse("stream"), cowd(), sesparse()):
        raw = disk.build()
        for length in {*range(0, 4096, 97), *range(4096, len(raw), 1031), *(len(raw) - cut for cut in (1, 511, 512, 513))}:
            file = kit.File(raw[: max(length, 0)], "disk.vmdk")
            whole = (
                len(raw) - length < SECTOR and isinstance(disk, NaiveSparse) and disk.compressed
            )  # padding of the last grain
            if whole:
                continue

            def read(file: Any = file) -> None:
                layer = open_vmdk(file)
                for window in layer.windows():
                    for extent in window:
                        layer.file.read_into(extent.file_offset, memoryview(bytearray(extent.length)))

            refused_anywhere(read)


def test_something_else_is_no_vmdk(kit: Any) -> None:
    for raw in (b"", b"KDM", b"\xbe\xba\xfe\xca", os.urandom(999), b"conectix" + bytes(999)):
        assert "disk.vmdk@" in refused_anywhere(vmdk_opening(kit, raw)).where


def test_a_million_extents_are_refused_at_once() -> None:
    raw = descriptor(*["RW 1 ZERO"] * 100_000)
    refused(lambda: parse_descriptor(raw, "disk.vmdk"), "number of extents is more than 4096|descriptor size", 0)
    refused(
        lambda: parse_descriptor(descriptor('RW 1 VMFS "' + '" 1' * (340 * KiB) + '"'), "disk.vmdk"), "length is|size is", 0
    )
    refused(lambda: parse_descriptor(descriptor(FLAT) + bytes(2 * MiB), "disk.vmdk"), "descriptor size is", 0)
