"""Hostile and damaged VHDXs are refused with file, offset, field, the value read and the values allowed."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.images.mutation import CPU_LIMIT_S
from tests.images.naive_vhdx import (
    BAT,
    CONTENT,
    ENTRY,
    GIB,
    HEADERS,
    ITEM_GUIDS,
    ITEMS,
    LOCATOR_GUID,
    METADATA,
    MIB,
    NULL,
    TABLES,
    NaiveVhdx,
    locator,
    patched,
)

from tokvm.core.errors import ImageError
from tokvm.images.open import open_image
from tokvm.images.vhdx.layer import open_vhdx

Build = Callable[[], bytes]
FIRST_REGION, SECOND_REGION = TABLES[0] + 16, TABLES[0] + 48  # metadata, BAT
GOOD = {"parent_linkage": "{" + "1" * 8 + "-1111-1111-1111-" + "1" * 12 + "}", "relative_path": "x"}


def disk(**options: Any) -> NaiveVhdx:
    return NaiveVhdx(4 * MIB, {0: 6, 1: 2, 3: 6}, **options)


def child(**options: Any) -> NaiveVhdx:
    return NaiveVhdx(4 * MIB, {0: 7, 1: 6, 2: 7}, {0: bytes(512), 4096: bytes(512)}, is_child=True, **options)


def with_header(**changes: Any) -> Build:
    """Both headers changed, so that the higher number has it, too."""
    return lambda: patched(disk().build(), *((at, disk().header(7 + place, **changes)) for place, at in enumerate(HEADERS)))


def with_tables(*changes: tuple[int, bytes]) -> Build:
    """In both region tables, at an offset from a table's start."""
    return lambda: patched(disk().build(), *((table + at, data) for table in TABLES for at, data in changes))


def with_region(*, number: int = 0, offset: int = METADATA, length: int = MIB, required: int = 1) -> Build:
    return with_tables((16 + 32 * number + 16, struct.pack("<QII", offset, length, required)))


def with_content(name: str, content: bytes) -> Build:
    return lambda: patched(disk().build(), (CONTENT[name], content))


def with_block_size(size: int) -> Build:
    return with_content("parameters", struct.pack("<I", size))


def with_item_guid(name: str, guid: bytes) -> Build:
    return lambda: patched(disk().build(), (ENTRY[name], guid))


def with_item(name: str, **changes: int) -> Build:
    values = {"at": CONTENT[name] - METADATA, "length": {"disk_id": 16, "logical": 4}.get(name, 8), "flags": 4} | changes
    return lambda: patched(disk().build(), (ENTRY[name] + 16, struct.pack("<III", *values.values())))


def with_entry(index: int, entry: int, made: Callable[[], NaiveVhdx] = disk) -> Build:
    return lambda: patched(made().build(), (BAT + 8 * index, struct.pack("<Q", entry)))


def with_locator(raw: bytes, length: int | None = None) -> Build:
    size = struct.pack("<I", len(raw) if length is None else length)
    return lambda: patched(child().build(), (CONTENT["locator"], raw), (ENTRY["locator"] + 20, size))


def with_damage(*places: int) -> Build:
    def build() -> bytes:
        raw = bytearray(disk().build())
        for at in places:
            raw[at] ^= 0xFF
        return bytes(raw)

    return build


def same_place(made: Callable[[], NaiveVhdx], of: int, at: Callable[[NaiveVhdx], int], state: int = 6) -> Build:
    def build() -> bytes:
        vhdx = made()
        raw = vhdx.build()
        return patched(raw, (vhdx.entry_at(of), struct.pack("<Q", at(vhdx) | state)))

    return build


def overlapping() -> bytes:
    """Blocks of 2 MiB that begin 1 MiB apart."""
    vhdx = NaiveVhdx(4 * MIB, {0: 6, 1: 6}, block_size=2 * MIB)
    raw = vhdx.build()
    return patched(raw, (vhdx.entry_at(1), struct.pack("<Q", vhdx.places[0] + MIB | 6)))


PARAMETERS, LOCATOR = CONTENT["parameters"], CONTENT["locator"]
SIZE_RAW, LOCATOR_RAW = ITEM_GUIDS["size"].bytes_le, LOCATOR_GUID.bytes_le
NO_OTHER = "a place that no other block or bitmap has"
END = 6 * MIB  # of disk()
BITMAP = (1 << 12) * 8 + BAT  # child()'s entry for it

CASES: dict[str, tuple[Build, int, str]] = {
    "empty": (lambda: b"", 0, "file size is 0"),
    "no more than headers": (lambda: disk().build()[: MIB - 1], 0, "file size is 1048575; allowed: 1048576"),
    "file signature": (lambda: patched(disk().build(), (0, b"vhdxfilf")), 0, "file signature"),
    "both header signatures": (with_damage(*HEADERS), HEADERS[0], "header signature"),
    "both header checksums": (with_damage(*(at + 9 for at in HEADERS)), HEADERS[0] + 4, "header checksum"),
    "header version": (with_header(version=2), HEADERS[0] + 66, "header version is 2"),
    "log version": (with_header(log=b"x" * 16, log_version=1), HEADERS[0] + 64, "header log version is 1"),
    "log not at a whole MiB": (with_header(log_offset=MIB + 4096), HEADERS[1] + 72, "log offset is 0x101000"),
    "log in the headers": (with_header(log_offset=0), HEADERS[1] + 72, "log offset is 0x0"),
    "log past the end": (with_header(log_offset=1 << 60), HEADERS[1] + 72, "log offset is 0x1000000000000000"),
    "log reaches past the end": (with_header(log_length=64 * MIB), HEADERS[1] + 68, "log length is 0x4000000"),
    "log length odd": (with_header(log_length=5), HEADERS[1] + 68, "log length is 0x5"),
    "dirty log of length 0": (with_header(log=b"x" * 16, log_length=0), HEADERS[1] + 68, "log length is 0x0"),
    "both region tables damaged": (with_damage(*(at + 99 for at in TABLES)), TABLES[0] + 4, "region table checksum"),
    "region signature": (with_tables((0, b"rege")), TABLES[0], "region table signature"),
    "regions absurd": (with_tables((8, struct.pack("<I", 2048))), TABLES[0] + 8, "region table entries is 2048"),
    "no regions": (with_tables((8, bytes(4))), TABLES[0] + 8, "region table is without a BAT"),
    "no metadata region": (with_tables((16, b"x" * 16), (44, bytes(4))), TABLES[0] + 8, "without a metadata region"),
    "unknown region required": (with_tables((16, b"x" * 16)), FIRST_REGION, "required region is 78787878"),
    "region twice": (with_tables((16, BAT_RAW := b"\x66\x77\xc2\x2d\x23\xf6\x00\x42\x9d\x64\x11\x5e\x9b\xfd\x4a\x08")),
                     SECOND_REGION, "region is 2dc27766.*each region once"),
    "region flags": (with_region(required=3), FIRST_REGION + 28, "region flags is 0x3"),
    "region in the headers": (with_region(offset=0), FIRST_REGION + 16, "metadata region offset is 0x0"),
    "region not at a whole MiB": (with_region(offset=METADATA + 512), FIRST_REGION + 16, "metadata region offset"),
    "region past the end": (with_region(offset=1 << 50), FIRST_REGION + 16, "metadata region offset is 0x4000000000000"),
    "region reaches past the end": (with_region(length=5 * MIB), FIRST_REGION + 24, "metadata region length is 0x500000"),
    "region of no length": (with_region(length=0), FIRST_REGION + 24, "metadata region length is 0x0"),
    "region length odd": (with_region(length=MIB + 1), FIRST_REGION + 24, "metadata region length is 0x100001"),
    "region over the log": (with_region(offset=MIB), MIB, "outside the (log|metadata region)"),
    "region over another": (with_region(offset=BAT), BAT, "outside the (BAT|metadata region)"),
    "metadata signature": (lambda: patched(disk().build(), (METADATA, b"metadatb")), METADATA, "metadata signature"),
    "items absurd": (lambda: patched(disk().build(), (METADATA + 10, b"\xff\xff")), METADATA + 10, "metadata items is 65535"),
    "no items": (lambda: patched(disk().build(), (METADATA + 10, bytes(2))), METADATA + 10, "without a file parameters"),
    "item in the table": (with_item("size", at=32), ENTRY["size"] + 16, "virtual disk size's offset is 0x20"),
    "item past the region": (with_item("size", at=MIB - 4), ENTRY["size"] + 16, "virtual disk size's offset is 0xffffc"),
    "item absurdly far": (with_item("size", at=0xFFFFFFFF), ENTRY["size"] + 16, "offset is 0xffffffff"),
    "item length": (with_item("size", length=16), ENTRY["size"] + 20, "virtual disk size's length is 16; allowed: 8"),
    "item without length": (with_item("logical", length=0), ENTRY["logical"] + 20, "logical sector size's length is 0"),
    "item flags": (with_item("size", flags=12), ENTRY["size"] + 24, "flags is 0xc"),
    "items over one another": (with_item("size", at=ITEMS - METADATA + 4), ENTRY["size"] + 16, "metadata item's offset"),
    "item that should be shorter": (with_item_guid("disk_id", SIZE_RAW), ENTRY["disk_id"] + 20, "length is 16; allowed: 8"),
    "required item unknown": (with_item_guid("disk_id", b"x" * 16), ENTRY["disk_id"], "required metadata item"),
    "block size 0": (with_content("parameters", bytes(8)), PARAMETERS, "block size is 0"),
    "block size 3 MiB": (with_block_size(3 * MIB), PARAMETERS, "block size is 3145728"),
    "block size 512 KiB": (with_block_size(MIB // 2), PARAMETERS, "block size is 524288"),
    "block size 512 MiB": (with_block_size(512 * MIB), PARAMETERS, "block size"),
    "parameter flags": (with_content("parameters", struct.pack("<II", MIB, 4)), PARAMETERS + 4, "flags is 0x4"),
    "size 0": (with_content("size", bytes(8)), CONTENT["size"], "virtual disk size is 0"),
    "size not of sectors": (with_content("size", struct.pack("<Q", 513)), CONTENT["size"], "virtual disk size is 513"),
    "size over 64 TiB": (with_content("size", struct.pack("<Q", (64 << 40) + 512)), CONTENT["size"], "virtual disk size"),
    "size over the table": (with_content("size", struct.pack("<Q", 130 * GIB)), BAT, "BAT region's length is 1048576"),
    "logical sector 520": (with_content("logical", struct.pack("<I", 520)), CONTENT["logical"], "logical sector size is 520"),
    "physical sector 0": (with_content("physical", bytes(4)), CONTENT["physical"], "physical sector size is 0"),
    "size not of 4 KiB sectors": (
        lambda: patched(disk().build(), (CONTENT["logical"], b"\0\x10"), (CONTENT["size"], b"\0\2")),
        CONTENT["size"], "whole sectors of 4096",
    ),
    "parent without locator": (with_content("parameters", struct.pack("<II", MIB, 2)), PARAMETERS + 4, "no parent locator"),
    "locator without parent": (lambda: patched(child().build(), (PARAMETERS + 4, b"\0")), PARAMETERS + 4,
                               "there is a parent locator"),
    "locator too short": (with_locator(bytes(19)), ENTRY["locator"] + 20, "parent locator's length is 19"),
    "locator type": (with_locator(locator(GOOD, kind=NULL)), LOCATOR, "parent locator type is 00000000"),
    "locator entries": (with_locator(struct.pack("<16sHH", LOCATOR_RAW, 0, 65535)), LOCATOR + 18, "is 65535"),
    "no linkage": (with_locator(locator({"relative_path": "x"})), LOCATOR, "parent_linkage is absent"),
    "null linkage": (with_locator(locator(GOOD | {"parent_linkage": str(NULL)})), LOCATOR, "parent_linkage is 0000"),
    "linkage no guid": (with_locator(locator(GOOD | {"parent_linkage": "x\x1b"})), LOCATOR, r"is 'x\\x1b'"),
    "second linkage no guid": (with_locator(locator(GOOD | {"parent_linkage2": ""})), LOCATOR, "parent_linkage2 is ''"),
    "no path": (with_locator(locator({"parent_linkage": GOOD["parent_linkage"]})), LOCATOR, "without a path"),
    "locator key of odd length": (
        with_locator(struct.pack("<16sHHIIHH", LOCATOR_RAW, 0, 1, 32, 34, 1, 2) + bytes(4)),
        LOCATOR + 20, "parent locator key is 1 bytes",
    ),
    "locator value outside": (
        with_locator(struct.pack("<16sHHIIHH", LOCATOR_RAW, 0, 1, 32, 1 << 31, 2, 2) + b"a\0b\0"),
        LOCATOR + 20, "parent locator value is 2 bytes at 0x80000000",
    ),
    "locator value in the table": (
        with_locator(struct.pack("<16sHHIIHH", LOCATOR_RAW, 0, 1, 32, 0, 2, 2) + b"a\0b\0"),
        LOCATOR + 20, "parent locator value is 2 bytes at 0x0",
    ),
    "locator key twice": (
        with_locator(struct.pack("<16sHH", LOCATOR_RAW, 0, 2) + struct.pack("<IIHH", 44, 46, 2, 2) * 2 + bytes(9)),
        LOCATOR + 32, "parent locator key is '",
    ),
    "locator entries over one another": (
        with_locator(struct.pack("<16sHHIIHH", LOCATOR_RAW, 0, 1, 32, 32, 2, 2) + b"a\0"),
        LOCATOR + 20, "parent locator entry is over another",
    ),
    "state 4": (with_entry(2, 4), BAT + 16, r"BAT\[2\] \(block 2\) is state 4"),
    "state 5": (with_entry(2, 5), BAT + 16, r"BAT\[2\] \(block 2\) is state 5"),
    "state 5 in a child": (with_entry(3, 5, child), BAT + 24, r"is state 5.*allowed: states 0, 1, 2, 3, 6, 7"),
    "partial block in a base": (with_entry(2, 6 * MIB | 7), BAT + 16, r"is state 7.*allowed: states 0, 1, 2, 3, 6"),
    "reserved bits": (with_entry(2, 1 << 19 | 2), BAT + 16, r"with bits 0x80000; allowed: 0 in bits 3 to 19"),
    "block past the end": (with_entry(2, END | 6), BAT + 16, r"state 6 at 0x600000.*end at or before 0x600000"),
    "block absurdly far": (with_entry(2, (1 << 64) - MIB | 6), BAT + 16, r"state 6 at 0xfffffffffff00000"),
    "last block past the end": (with_entry(3, END | 6), BAT + 24, r"BAT\[3\] \(block 3\) is state 6"),
    "block at 0": (with_entry(2, 6), BAT + 16, r"a place outside the headers at 0x0"),
    "block in the log": (with_entry(2, MIB | 6), BAT + 16, "a place outside the log"),
    "block in the metadata": (with_entry(2, METADATA | 6), BAT + 16, "a place outside the metadata region"),
    "block in the BAT": (with_entry(2, BAT | 6), BAT + 16, "a place outside the BAT"),
    "two blocks in one place": (same_place(disk, 2, lambda vhdx: vhdx.places[0]), BAT + 16, NO_OTHER),
    "last block over another": (same_place(disk, 3, lambda vhdx: vhdx.places[0]), BAT + 24, NO_OTHER),
    "two blocks that overlap": (overlapping, BAT + 8, NO_OTHER),
    "bitmap missing": (with_entry(4096, 0, child), BITMAP, r"BAT\[4096\] \(bitmap\).*a block of its chunk has state 7"),
    "bitmap state": (with_entry(4096, 6 * MIB | 2, child), BITMAP, r"BAT\[4096\] \(bitmap\) is state 2.*states 0 and 6"),
    "bitmap reserved bits": (with_entry(4096, 6 * MIB | 8 | 6, child), BITMAP, r"with bits 0x8"),
    "bitmap past the end": (with_entry(4096, 8 * MIB | 6, child), BITMAP, "bitmaps that end at or before 0x800000"),
    "bitmap in the log": (with_entry(4096, MIB | 6, child), BITMAP, "a place outside the log"),
    "bitmap over a block": (same_place(child, 4096, lambda vhdx: vhdx.places[0]), BITMAP, NO_OTHER),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_refused_with_place_and_field(kit: Any, case: str) -> None:
    build, offset, message = CASES[case]
    with pytest.raises(ImageError, match=message) as caught:
        open_vhdx(kit.File(build(), "evil.vhdx"))
    assert caught.value.where == f"evil.vhdx@{offset:#x}"
    assert caught.value.fix


def test_equal_numbers_of_headers_that_differ_are_refused(kit: Any) -> None:
    raw = patched(disk().build(), (HEADERS[0], disk().header(5)), (HEADERS[1], disk(name="other").header(5)))
    with pytest.raises(ImageError, match="header sequence number is 5 in both headers, which differ"):
        open_vhdx(kit.File(raw))


def test_a_duplicate_item_is_refused(kit: Any) -> None:
    raw = disk().build()
    entry = raw[ENTRY["size"] : ENTRY["size"] + 32]
    with pytest.raises(ImageError, match=r"metadata item is 2fa54224.*each item once"):
        open_vhdx(kit.File(patched(raw, (ENTRY["locator"], entry), (METADATA + 10, b"\x06"))))


def test_an_intact_header_of_another_version_is_not_read_around(kit: Any) -> None:
    """Its writer meant it, even if the other header is of ours."""
    raw = patched(disk().build(), (HEADERS[0], disk().header(1, version=2)))
    with pytest.raises(ImageError, match="header version is 2"):
        open_vhdx(kit.File(raw))


def test_every_truncation_is_refused(kit: Any) -> None:
    """The last block is whole here, so each byte of the file is needed; but for what no structure is in."""
    raw = disk().build()
    for length in [*range(0, len(raw), 64 << 10), len(raw) - 1]:
        with pytest.raises(ImageError) as caught:
            open_vhdx(kit.File(raw[:length], "short.vhdx"))
        assert caught.value.where.startswith("short.vhdx@")


@pytest.mark.slow
def test_a_locator_full_of_entries_costs_little(kit: Any) -> None:
    """About the most that an item may hold, half of it control characters: all shown, escaped."""
    entries = {f"k{number}": "\x1b" * 4 for number in range(28_000)} | GOOD
    item = locator(entries)
    raw = patched(child().build(), (LOCATOR, item), (ENTRY["locator"] + 20, struct.pack("<I", len(item))))
    begin = time.process_time()
    found = open_vhdx(kit.File(raw)).describe()["parent_locator"]
    assert time.process_time() - begin < CPU_LIMIT_S
    assert found == {key: value.replace("\x1b", "\\x1b") for key, value in entries.items()}


def test_the_guess_finds_it_by_its_first_bytes(kit: Any) -> None:
    assert open_image(kit.File(disk().build())).format == "vhdx"
