"""Hostile VHDXs. Layout of the originals: log at 1 MiB, metadata at 2, BAT at 3, bitmap or blocks from 4 on."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from uuid import UUID

from tests.hostile.case import Hostile, Outcome, files, patched, table, write_sparsely
from tests.hostile.vhd_images import ESCAPES

from tokvm.core.units import GiB, KiB, MiB, TiB
from tokvm.testing.vhdx_log_ring import Damage
from tokvm.testing.vhdx_log_writer import make_dirty
from tokvm.testing.vhdx_structs import NULL_GUID, sealed
from tokvm.testing.vhdx_writer import write_vhdx

ID, PARENT, LOG_ID = UUID(int=0xD15C), UUID(int=0xFA7E), UUID(int=0x106)
HEADERS, TABLES = (64 * KiB, 128 * KiB), (192 * KiB, 256 * KiB)
LOG, METADATA, BAT = MiB, 2 * MiB, 3 * MiB
ITEMS = METADATA + 64 * KiB  # file parameters 8, size 8, id 16, logical sector 4 (+4), physical sector 4 (+4), parent locator
PARAMETERS, SIZE, LOGICAL, LOCATOR = ITEMS, ITEMS + 8, ITEMS + 32, ITEMS + 48


@cache
def vhdx(kind: str = "dynamic", path: str = ".\\parent.vhdx", linkage: UUID | None = PARENT, *, size: int = 3 * MiB) -> bytes:
    """Blocks 0 and 2 are in the file; in a child block 0 whole, block 2 partly."""
    out = io.BytesIO()
    runs = [(0, b"a" * MiB), (2 * MiB, b"c" * 512)]
    child = {"parent_linkage": linkage, "locator": {"relative_path": path}} if kind == "differencing" else {}
    write_vhdx(out, size=size, kind=kind, data_write_guid=ID, runs=runs, block_size=MiB, **child)  # type: ignore[arg-type]
    return out.getvalue()


def field(offset: int, value: bytes, *, kind: str = "dynamic") -> Callable[[], bytes]:
    """A field outside of what has a checksum."""
    return lambda: patched(vhdx(kind), (offset, value))


def in_headers(raw: bytes, *changes: tuple[int, bytes]) -> bytes:
    return patched(raw, *((at, sealed(patched(raw[at : at + 4 * KiB], *changes))) for at in HEADERS))


def in_tables(raw: bytes, *changes: tuple[int, bytes]) -> bytes:
    return patched(raw, *((at, sealed(patched(raw[at : at + 64 * KiB], *changes))) for at in TABLES))


def header(*changes: tuple[int, bytes]) -> Callable[[], bytes]:
    return lambda: in_headers(vhdx(), *changes)


def regions(*changes: tuple[int, bytes]) -> Callable[[], bytes]:
    return lambda: in_tables(vhdx(), *changes)


def u16(value: int) -> bytes:
    return struct.pack("<H", value)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def bat(block: int, state: int, place: int, **more: str) -> Callable[[], bytes]:
    """An entry of the BAT. place: MiB of the file."""
    return field(BAT + 8 * block, u64(place << 20 | state), **more)


def place_of(block: int) -> int:
    return int(struct.unpack_from("<Q", vhdx(), BAT + 8 * block)[0]) >> 20


def log_entry(descriptors: Sequence[bytes], *, count: int | None = None, length: int = 4096, flushed: int = 0) -> bytes:
    """An entry without data sectors, its checksum right; tail and head of its sequence."""
    number = len(descriptors) if count is None else count
    head = struct.pack("<4sIIIQII16sQQ", b"loge", 0, length, 0, 7, number, 0, LOG_ID.bytes_le, flushed, 0)
    return sealed((head + b"".join(descriptors)).ljust(4096, b"\0"))


def zero(offset: int, length: int) -> bytes:
    return struct.pack("<4sIQQQ", b"zero", 0, length, offset, 7)


def logged(entry: bytes) -> Callable[[], bytes]:
    return lambda: patched(in_headers(vhdx(), (48, LOG_ID.bytes_le)), (LOG, entry))


def damaged_log(damage: Damage) -> Callable[[], bytes]:
    def make() -> bytes:
        out = io.BytesIO(vhdx())
        make_dirty(out, entries=2, damage=damage)
        return out.getvalue()

    return make


def sparse(size: int, raw: Callable[[], bytes], *more: tuple[int, bytes]) -> Callable[[Path], Sequence[str]]:
    """A file of this size, nearly all holes."""

    def build(folder: Path) -> Sequence[str]:
        path = folder / "disk.vhdx"
        write_sparsely(path, raw(), size)
        with path.open("r+b") as out:
            for at, data in more:
                out.seek(at)
                out.write(data)
        return [path.name]

    return build


def locator(**changes: bytes | int) -> Callable[[], bytes]:
    """A child's parent locator: its count, or its whole text of entries."""

    def make() -> bytes:
        raw = vhdx("differencing")
        if "count" in changes:
            return patched(raw, (LOCATOR + 18, u16(int(changes["count"]))))
        return raw.replace(bytes(changes["old"]), bytes(changes["new"]))

    return make


def text(value: str) -> bytes:
    return value.encode("utf-16-le")


def child_named(path: str) -> Callable[[], bytes]:
    return lambda: vhdx("differencing", path)


def far_table() -> bytes:
    """A disk of 64 TiB in blocks of 1 MiB: a BAT of 513 MiB, which lies at 1 GiB."""
    raw = patched(vhdx(), (SIZE, u64(64 * TiB)))
    at = raw.index(u64(BAT), TABLES[0])
    return in_tables(raw, (at - TABLES[0], u64(GiB) + u32(513 * MiB)))


_LAST = 64 * MiB + 64 * MiB // 4096 - 2  # the last entry of a disk of 64 TiB
_RESERVED = "BAT\\[0\\].*state"
IMAGES: dict[str, Hostile] = {
    **table("vhdx", "bit rot", {
        "both headers' checksums wrong": (lambda: patched(vhdx(), *((at + 20, b"!!") for at in HEADERS)), "header checksum"),
        "both region tables' checksums wrong": (
            lambda: patched(vhdx(), *((at + 40, b"!!") for at in TABLES)), "region table checksum"),
        "two headers of one number that differ": (
            lambda: patched(vhdx(), *((at, sealed(patched(vhdx()[at : at + 4096], (8, u64(9))))) for at in HEADERS),
                            (HEADERS[1], sealed(patched(vhdx()[HEADERS[1] : HEADERS[1] + 4096], (8, u64(9)), (32, b"x"))))),
            "sequence number"),
        "a log entry's checksum wrong": (damaged_log(Damage.CHECKSUM), "log cannot be replayed"),
        "a torn log": (damaged_log(Damage.TORN), "log cannot be replayed"),
        "shorter than its log says": (damaged_log(Damage.TRUNCATED), "flushed file offset"),
    }),
    **table("vhdx", "CVE-2014-0223: table sizes", {
        "2048 regions": (regions((8, u32(2048))), "region table entries is 2048"),
        "2^32-1 regions": (regions((8, u32(2**32 - 1))), "region table entries"),
        "65535 metadata items": (field(METADATA + 10, u16(65535)), "metadata items is 65535"),
        "a metadata item of 4 GiB": (field(METADATA + 32 + 20, u32(2**32 - 1)), "length is 4294967295"),
        "a metadata item outside of its region": (field(METADATA + 32 + 16, u32(MiB - 4)), "offset is"),
        "65535 locator entries": (locator(count=65535), "parent locator entries is 65535"),
        "block size 0": (field(PARAMETERS, u32(0)), "block size is 0"),
        "block size 3 MiB": (field(PARAMETERS, u32(3 * MiB)), "block size is 3145728"),
        "block size 512 MiB": (field(PARAMETERS, u32(512 * MiB)), "block size is 536870912"),
        "size 0": (field(SIZE, u64(0)), "virtual disk size is 0"),
        "size 2^63": (field(SIZE, u64(2**63)), "virtual disk size"),
        "size of half a sector": (field(SIZE, u64(256)), "virtual disk size is 256"),
        "2^40 bytes in a BAT of one mebibyte": (field(SIZE, u64(2**40 * 16)), "BAT region's length"),
        "sectors of 520 bytes": (field(LOGICAL, u32(520)), "logical sector size is 520"),
    }),
    **table("vhdx", "overlapping structures", {
        "a region over the log": (regions((16 + 16, u64(LOG))), "offset"),
        "both regions at one place": (regions((16 + 16, u64(METADATA))), "offset"),
        "a region behind the end": (regions((16 + 16, u64(2**40))), "offset is 0x10000000000"),
        "a region over the headers": (regions((16 + 16, u64(0))), "offset is 0x0"),
        "a region of 4 GiB": (regions((16 + 24, u32(2**32 - MiB))), "length"),
        "a log behind the end": (header((72, u64(2**50))), "log offset"),
        "two blocks at one place": (lambda: patched(vhdx(), (BAT + 8, u64(place_of(0) << 20 | 6))), "BAT\\["),
        "a block over the metadata": (bat(0, 6, METADATA // MiB), "outside the metadata region"),
        "a block over the log": (bat(0, 6, LOG // MiB), "outside the log"),
        "a block over the BAT": (bat(0, 6, BAT // MiB), "outside the BAT"),
        "a block over the headers": (bat(0, 6, 0), "outside the headers"),
        "a block behind the end": (bat(0, 6, 2**30), "BAT\\[0\\].*end at or before"),
        "a block far behind everything": (bat(0, 6, 2**44 - 1), "BAT\\[0\\]"),
        "a bitmap over a block": (bat(4096, 6, 4, kind="differencing"), "BAT\\["),
    }),
    **table("vhdx", "reserved values", {
        "block state 4": (bat(0, 4, 4), _RESERVED),
        "block state 5": (bat(0, 5, 4), _RESERVED),
        "a partial block in a base": (bat(0, 7, 4), _RESERVED),
        "a partial block without a bitmap": (bat(4096, 0, 0, kind="differencing"), "bitmap.*state 0"),
        "bitmap state 7": (bat(4096, 7, 4, kind="differencing"), "bitmap.*state 7"),
        "reserved bits of an entry": (field(BAT, u64(4 << 20 | 6 | 8)), "BAT\\[0\\].*bits 0x8"),
        "an unknown region that is required": (regions((16, b"\x11" * 16)), "required region"),
        "an unknown metadata item that is required": (field(METADATA + 32, b"\x11" * 16), "required metadata item"),
        "header version 2": (header((66, u16(2))), "header version is 2"),
    }),
    **table("vhdx", "hostile logs", {
        "a log that must be replayed and holds nothing": (header((48, LOG_ID.bytes_le)), "no active sequence"),
        "zeros over 2^60 bytes from a log": (logged(log_entry([zero(4 * MiB, 1 << 60)])), "target of log descriptor"),
        "zeros over the headers from a log": (logged(log_entry([zero(64 * KiB, 64 * KiB)])), "target of log descriptor"),
        "zeros over the log from the log": (logged(log_entry([zero(LOG, MiB)])), "target of log descriptor"),
        "2^32-1 log descriptors": (logged(log_entry([], count=2**32 - 1)), "no active sequence.*4294967295 descriptors"),
        "a log entry of 4 GiB": (logged(log_entry([], length=2**32 - 4096)), "no active sequence.*length"),
        "a log entry without a length": (logged(log_entry([], length=0)), "no active sequence.*length"),
        "flushed 2^63 bytes": (logged(log_entry([], flushed=2**63)), "flushed file offset"),
    }),
    "vhdx: a log of nearly 4 GiB in a sparse file": Hostile(
        "CVE-2015-5162",
        sparse(8 * GiB, lambda: in_headers(vhdx(), (48, LOG_ID.bytes_le), (68, u32(4095 * MiB)), (72, u64(4 * GiB)))),
        "length of a log",
    ),
    "vhdx: the largest log that is looked at, empty": Hostile(
        "CVE-2015-5162",
        sparse(GiB, lambda: in_headers(vhdx(), (48, LOG_ID.bytes_le), (68, u32(256 * MiB)), (72, u64(512 * MiB)))),
        "no active sequence",
    ),
    "vhdx: the last of 2^26 entries is bad": Hostile(
        "CVE-2015-5162", sparse(2 * GiB, far_table, (GiB + 8 * _LAST, u64(5))), "BAT\\[67125246\\].*state 5"
    ),
    "vhdx: no linkage in the parent locator": Hostile(
        "mixed-up layers", files(disk_vhdx=locator(old=text("parent_linkage"), new=text("parent_linkagX"))), "parent_linkage"
    ),
    "vhdx: a linkage that is no guid": Hostile(
        "mixed-up layers", files(disk_vhdx=locator(old=text(str(PARENT)), new=text(ESCAPES.ljust(36, "x")))), "parent_linkage"
    ),
    **table("vhdx", "mixed-up layers", {
        "a null linkage": (lambda: vhdx("differencing", linkage=NULL_GUID), "parent_linkage"),
    }),
    "vhdx: its own parent": Hostile("a loop", files(disk_vhdx=lambda: vhdx("differencing", linkage=ID)), "loop", Outcome.WALK),
    **table("vhdx", "truncation", {
        "cut within the metadata": (lambda: vhdx()[: METADATA + 65 * KiB], "offset|length"),
        "cut within the first block": (lambda: vhdx()[: 4 * MiB + KiB], "BAT\\["),
        "cut within the headers": (lambda: vhdx()[: 70 * KiB], "file size"),
    }),
    **{
        f"vhdx: parent at {title}": Hostile(
            "CVE-2015-5163", files(disk_vhdx=child_named(path)), "not listed|made over", Outcome.CHILD
        )
        for title, path in {
            "an absolute path": "/etc/shadow",
            "a UNC path": "\\\\evil\\share\\p.vhdx",
            "a URL": "file:///etc/shadow",
            "a path of terminal escapes": ESCAPES,
            "a path out of its folder": "..\\..\\..\\etc\\shadow",
        }.items()
    },
}  # fmt: skip
