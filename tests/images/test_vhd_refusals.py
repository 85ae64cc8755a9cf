"""Hostile and damaged VHDs are refused with file, offset, field, the value read and the values allowed."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Any

import pytest

from tokvm.core.errors import ImageError
from tokvm.images.open import open_image
from tokvm.images.vhd.stream import VhdStream

SECTOR = 512
HEADER = 512
BAT = 1536
FIRST = 2048  # the first block's bitmap
END = 2048 + 3 * (512 + 4096)


def disk(kit: Any, **options: Any) -> Any:
    return kit.Vhd(16384, block_size=4096, sectors={0: bytes(512), 9: bytes(512), 30: bytes(512)}, **options)


def with_footer(**changes: Any) -> Callable[[Any], bytes]:
    """Both footers changed, checksums right."""
    return lambda kit: kit.patched(disk(kit).build(**changes), 0, disk(kit).footer(**changes))


def with_header(**changes: Any) -> Callable[[Any], bytes]:
    return lambda kit: kit.patched(disk(kit).build(), HEADER, disk(kit).header(**changes))


def with_bat(entry: int, sector: int) -> Callable[[Any], bytes]:
    return lambda kit: kit.patched(disk(kit).build(), BAT + 4 * entry, struct.pack(">I", sector))


def with_both_ends(cookie: bytes) -> Callable[[Any], bytes]:
    return lambda kit: kit.patched(kit.patched(disk(kit).build(), 0, cookie), END, cookie)


def encrypted(kit: Any) -> bytes:
    batmap = bytearray(1024)
    batmap[:8], batmap[29] = b"tdbatmap", 1
    return bytes(disk(kit, creator=b"tap\0", creator_version=0x10003, behind_bat=bytes(batmap)).build())


def own_parent(kit: Any) -> bytes:
    return bytes(kit.Vhd(16384, kind=4, block_size=4096, name="ouroboros", parent="ouroboros").build())


CASES: dict[str, tuple[Callable[[Any], bytes], int, str]] = {
    "empty": (lambda _: b"", 0, "file size is 0"),
    "shorter than a footer": (lambda _: b"conectix" + bytes(500), 0, "file size is 508"),
    "poisoned at both ends": (with_both_ends(b"v_poison"), END, "v_poison"),
    "poisoned at the end": (lambda kit: kit.patched(disk(kit).build(), END, b"v_poison"), END, "v_poison"),
    "poisoned copy": (lambda kit: kit.patched(disk(kit).build(), 0, b"v_poison"), 0, "v_poison"),
    "both footers damaged": (with_both_ends(b"conectix" + bytes(99)), END + 64, "footer checksum"),
    "file version": (with_footer(version=0x20000), END + 12, "file version is 0x20000"),
    "type 0": (with_footer(kind=0), END + 60, "disk type is 0"),
    "type 5": (with_footer(kind=5), END + 60, "disk type is 5"),
    "size 0": (with_footer(size=0), END + 48, "current size is 0"),
    "size not of sectors": (with_footer(size=16385), END + 48, "current size is 16385"),
    "size absurd": (with_footer(size=1 << 60), END + 48, f"current size is {1 << 60}"),
    "size over 2 TiB": (with_footer(size=(2 << 40) + 512), END + 48, "current size"),
    "tap 0.1": (with_footer(app=b"tap\0", app_version=1), END + 28, "tap 0.1"),
    "fixed larger than its file": (lambda kit: kit.Vhd(4096, kind=2).build(size=8192), 4096 + 48, "current size is 8192"),
    "data offset past the end": (with_footer(data_offset=1 << 62), END + 16, "data offset is 0x4000000000000000"),
    "data offset in the copy": (with_footer(data_offset=256), END + 16, "data offset is 0x100"),
    "header cookie": (with_header(cookie=b"cxsparsf"), HEADER, "header cookie"),
    "header checksum": (lambda kit: kit.patched(disk(kit).build(), HEADER + 900, b"x"), HEADER + 36, "header checksum"),
    "header version": (with_header(version=0), HEADER + 24, "header version is 0x0"),
    "block size 0": (with_header(block_size=0), HEADER + 32, "block size is 0"),
    "block size 3 MiB": (with_header(block_size=3 << 20), HEADER + 32, "block size is 3145728"),
    "block size 256": (with_header(block_size=256), HEADER + 32, "block size is 256"),
    "block size 2 GiB": (with_header(block_size=2 << 30), HEADER + 32, "block size is 2147483648"),
    "too few entries": (with_header(entries=3), HEADER + 28, "BAT entries is 3; allowed: at least 4"),
    "entries absurd": (with_header(entries=0xFFFFFFFF), HEADER + 28, "BAT entries is 4294967295"),
    "BAT past the end": (with_header(bat=1 << 60), HEADER + 16, "BAT offset is 0x1000000000000000"),
    "BAT over the header": (with_header(bat=1024), HEADER + 16, "BAT offset is 0x400"),
    "BAT over the copy": (with_header(bat=0), HEADER + 16, "BAT offset is 0x0"),
    "own parent": (own_parent, HEADER + 40, "parent unique id"),
    "block in the copy": (with_bat(0, 0), BAT, r"BAT\[0\] is sector 0x0.*footer's copy"),
    "block in the header": (with_bat(1, 2), BAT + 4, r"BAT\[1\] is sector 0x2.*header"),
    "block in the BAT": (with_bat(1, 3), BAT + 4, r"BAT\[1\] is sector 0x3.*BAT"),
    "block past the end": (with_bat(3, 0xFFFFFF), BAT + 12, r"BAT\[3\] is sector 0xffffff.*end at or before"),
    "block over the footer": (with_bat(3, END // 512 - 2), BAT + 12, r"BAT\[3\].*end at or before"),
    "two blocks in one place": (with_bat(1, FIRST // 512), BAT + 4, r"BAT\[1\].*do not overlap block 0"),
    "two blocks that overlap": (with_bat(2, FIRST // 512 + 1), BAT + 8, r"BAT\[2\].*do not overlap block 0"),
    "encrypted": (encrypted, 2048 + 29, "key hash cookie is 1"),
    "truncated": (lambda kit: disk(kit).build()[:5000], BAT, r"BAT\[0\]|BAT\[1\]|footer"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_with_place_and_field(kit: Any, case: str) -> None:
    build, offset, message = CASES[case]
    with pytest.raises(ImageError, match=message) as caught:
        open_image_or_vhd(kit.File(build(kit), "evil.vhd"))
    assert caught.value.where.startswith("evil.vhd@")
    if case != "truncated":
        assert caught.value.where == f"evil.vhd@{offset:#x}"
    assert caught.value.fix


def open_image_or_vhd(file: Any) -> None:
    """Too small for any magic is still a VHD's refusal here."""
    from tokvm.images.vhd.layer import open_vhd

    (open_image if file.size >= SECTOR else open_vhd)(file)


@pytest.mark.parametrize(
    "case", [case for case in CASES if "fixed" not in case and "end" not in case and "over the footer" not in case]
)
def test_the_same_as_a_stream_is_refused(kit: Any, case: str) -> None:
    raw = CASES[case][0](kit)
    with pytest.raises(ImageError) as caught:
        kit.content(VhdStream(kit.Exporter(raw), name="evil-stream"))
    assert caught.value.where.startswith("evil-stream@")


def test_every_truncation_is_refused_or_warned_about(kit: Any) -> None:
    vhd = disk(kit)
    raw = vhd.build()
    whole = len(raw)
    for length in range(0, whole, 256):
        try:
            layer = open_image(kit.File(raw[:length]))
        except ImageError:
            continue
        assert length >= whole - 512 - (4096 - 512)  # the last block's unused tail and the footer are all that may be missing
        assert layer.describe()["warnings"]


def test_a_table_that_only_a_sparse_file_could_hold_is_refused_before_it_is_read(kit: Any, tmp_path: Any) -> None:
    vhd = kit.Vhd(1 << 40, block_size=512)
    path = tmp_path / "huge.vhd"
    with path.open("wb") as file:
        file.write(vhd.footer() + vhd.header())
        file.truncate(40 << 30)
        file.seek(0, os.SEEK_END)
        file.write(vhd.footer())
    from tokvm.images.files import open_file

    with pytest.raises(ImageError, match="block size is 512; allowed: at least"):
        open_image(open_file(path))


@pytest.mark.parametrize(
    ("magic", "title"),
    [
        (b"vhdxfile", "VHDX"),
        (b"KDMV", "KDMV"),
        (b"COWD", "COWD"),
        (b"QFI\xfb", "qcow2"),
        (b"# Disk DescriptorFile", "descriptor"),
    ],
)
def test_other_formats_are_named_and_never_taken_for_raw(kit: Any, magic: bytes, title: str) -> None:
    with pytest.raises(ImageError, match=title):
        open_image(kit.File(magic.ljust(4096, b"\0"), "disk.vhd"))


def test_a_file_without_magic_is_not_guessed_to_be_raw(kit: Any) -> None:
    for raw in (b"", b"x", bytes(511), bytes(4096)):
        with pytest.raises(ImageError, match="no image format was recognised"):
            open_image(kit.File(raw, "disk.vhd"))
