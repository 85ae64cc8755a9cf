"""Hostile VHDs."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from uuid import UUID

from tests.hostile.case import Hostile, Outcome, files, patched, table, write_sparsely

from tokvm.testing.vhd_writer import Kind, write_vhd

ID, PARENT = UUID(int=0xD15C), UUID(int=0xFA7E)
BLOCK = 4096
SIZE = 4 * BLOCK
BAT = 1536
HEADER = 512
ESCAPES = "\x1b]0;owned\x07\x1b[2J\nFORGED line\r\x9b1A\u202e"


@cache
def vhd(kind: Kind = "dynamic", *, unique_id: UUID = ID, size: int = SIZE, parent: str = "") -> bytes:
    """Blocks 0 to 2 are in the file, one behind the other; BAT at 1536 (in a child with a parent's name, at 2048)."""
    out = io.BytesIO()
    runs = [(at, bytes([65 + at // BLOCK]) * 512) for at in range(0, min(3 * BLOCK, size), BLOCK)]
    is_child = kind == "differencing"
    write_vhd(
        out, size=size, kind=kind, runs=runs, unique_id=unique_id, block_size=BLOCK, batmap=not is_child,
        parent_id=PARENT if is_child else None, parent_name=parent,
    )  # fmt: skip
    return out.getvalue()


def summed(raw: bytes, at: int) -> bytes:
    rest = sum(raw) - sum(raw[at : at + 4])
    return patched(raw, (at, struct.pack(">I", ~rest & 0xFFFFFFFF)))


def footed(raw: bytes, offset: int, value: bytes) -> bytes:
    """The same field in both footers, checksums right."""
    for base in (0, len(raw) - 512) if raw[:8] == b"conectix" else (len(raw) - 512,):
        footer = summed(patched(raw[base : base + 512], (offset, value)), 64)
        raw = patched(raw, (base, footer))
    return raw


def headed(raw: bytes, *changes: tuple[int, bytes]) -> bytes:
    """Fields of the header, its checksum right."""
    return patched(raw, (HEADER, summed(patched(raw[HEADER : HEADER + 1024], *changes), 36)))


def entry(raw: bytes, block: int, sector: int) -> bytes:
    return patched(raw, (BAT + 4 * block, struct.pack(">I", sector)))


def first_block(raw: bytes) -> int:
    return int(struct.unpack_from(">I", raw, BAT)[0])


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def located(code: bytes, text: bytes, *, length: int | None = None, offset: int = 1536) -> Callable[[], bytes]:
    """A child whose first parent locator says this."""

    def make() -> bytes:
        raw = vhd("differencing", parent="x" * 200)  # one sector of locator data at 1536
        where = code + u32(512) + u32(len(text) if length is None else length) + u32(0) + u64(offset)
        return headed(patched(raw, (1536, text.ljust(512, b"\0"))), (576, where))

    return make


def table_of(entries: int, file_size: int) -> Callable[[Path], Sequence[str]]:
    """A file of this size that claims so many entries."""

    def build(folder: Path) -> Sequence[str]:
        raw = headed(footed(vhd(), 48, u64(entries * BLOCK // 4096 * 512)), (28, u32(entries)), (32, u32(512)))
        write_sparsely(folder / "disk.vhd", raw[:-512], file_size)
        with (folder / "disk.vhd").open("r+b") as out:
            out.seek(file_size - 512)
            out.write(raw[-512:])
        return ["disk.vhd"]

    return build


def loop() -> dict[str, bytes]:
    """Two children, each the other's parent."""
    one, other = UUID(int=1), UUID(int=2)
    first, second = (vhd("differencing", unique_id=own) for own in (one, other))
    return {"a_vhd": headed(first, (40, other.bytes)), "b_vhd": headed(second, (40, one.bytes))}


def twice(folder: Path) -> Sequence[str]:
    write_sparsely(folder / "a.vhd", vhd())
    write_sparsely(folder / "b.vhd", headed(vhd("differencing", unique_id=UUID(int=7)), (40, ID.bytes)))
    return ["a.vhd", "b.vhd", "b.vhd"]


def encrypted() -> bytes:
    raw = vhd()
    at = 2048  # the batmap's header: behind the BAT
    assert raw[at : at + 8] == b"tdbatmap"
    return patched(raw, (at + 29, b"\1"))


def foot(offset: int, value: bytes) -> Callable[[], bytes]:
    return lambda: footed(vhd(), offset, value)


def head(*changes: tuple[int, bytes]) -> Callable[[], bytes]:
    return lambda: headed(vhd(), *changes)


def block(number: int, sector: int) -> Callable[[], bytes]:
    return lambda: entry(vhd(), number, sector)


def beside_first(sectors: int) -> Callable[[], bytes]:
    """Block 1 so many sectors behind the place of block 0."""
    return lambda: entry(vhd(), 1, first_block(vhd()) + sectors)


def cut(length: int) -> Callable[[], bytes]:
    return lambda: vhd()[:length]


def child_of(parent: UUID, *, size: int = SIZE) -> Callable[[], bytes]:
    return lambda: headed(vhd("differencing", unique_id=UUID(int=3), size=size), (40, parent.bytes))


def rotten() -> bytes:
    return patched(vhd(), (70, b"!"), (len(vhd()) - 442, b"!"))


_UNC = "\\\\evil\\share\\p.vhd".encode("utf-16-le")
_PARENT = "not listed|made over|nothing is noted"
IMAGES: dict[str, Hostile] = {
    **table("vhd", "payload that is none", {
        "being changed by XenServer": (foot(0, b"v_poison"), "v_poison"),
        "encrypted by XenServer": (encrypted, "encrypted"),
        "sector bitmaps of another bit order": (foot(28, b"tap\0\0\0\0\1"), "tap 0.1"),
    }),
    **table("vhd", "bit rot", {
        "both footers' checksums wrong": (rotten, "footer checksum"),
        "header's checksum wrong": (lambda: patched(vhd(), (HEADER + 60, b"!")), "header checksum"),
    }),
    **table("vhd", "CVE-2014-0223 and its family: sizes and counts", {
        "type 0": (foot(60, u32(0)), "footer disk type is 0"),
        "type 2^32-1": (foot(60, u32(2**32 - 1)), "footer disk type"),
        "size 0": (foot(48, u64(0)), "footer current size is 0"),
        "size 2^63": (foot(48, u64(2**63)), "footer current size"),
        "size of half a sector": (foot(48, u64(256)), "footer current size is 256"),
        "2^40 bytes in five kilobytes": (foot(48, u64(2**40)), "BAT entries|block size"),
        "fixed, larger than its file": (lambda: footed(vhd("fixed"), 48, u64(2**40)), "footer current size"),
        "header far behind the end": (foot(16, u64(2**62)), "footer data offset"),
        "block size 0": (head((32, u32(0))), "block size is 0"),
        "block size 3 MiB": (head((32, u32(3 << 20))), "block size is 3145728"),
        "block size 2 GiB": (head((32, u32(1 << 31))), "block size is 2147483648"),
        "2^32-1 entries": (head((28, u32(2**32 - 1))), "BAT entries is 4294967295"),
        "BAT behind the end": (head((16, u64(2**63))), "BAT offset"),
        "a block behind the end": (block(1, 0x7FFFFFFF), "BAT\\[1\\]"),
    }),
    **table("vhd", "overlapping structures", {
        "header over the footer's copy": (foot(16, u64(0)), "footer data offset"),
        "BAT over the header": (head((16, u64(1024))), "BAT offset"),
        "two blocks at one place": (beside_first(0), "BAT\\[1\\].*overlap"),
        "a block over half of another": (beside_first(4), "BAT\\[[01]\\].*overlap"),
        "a block over the footer's copy": (block(1, 0), "footer's copy"),
        "a block over the BAT": (block(1, BAT // 512), "outside the BAT"),
    }),
    **table("vhd", "truncation", {
        f"cut at {length}": (cut(length), "BAT\\[|footer|format|file size")
        for length in (1, 511, 512, 1023, 1024, 1536, 1540, 2048, 3072, len(vhd()) - 513)
    }),
    **table("vhd", "a path of the image's", {
        "parent locator with a file URL": (located(b"MacX", b"file:///etc/shadow"), _PARENT),
        "parent locator with a UNC path": (located(b"W2ku", _UNC), _PARENT),
        "parent locator of 4 GiB": (located(b"W2ru", b"x", length=2**32 - 1), _PARENT),
        "parent locator behind the end": (located(b"W2ru", b"x", offset=2**63), _PARENT),
    }, Outcome.CHILD),
    **table("vhd", "terminal injection", {
        "parent locator with terminal escapes": (located(b"W2ru", ESCAPES.encode("utf-16-le")), _PARENT),
        "parent locator code with terminal escapes": (located(b"\x1b[2J", b"x"), _PARENT),
        "parent name with terminal escapes": (
            lambda: headed(vhd("differencing"), (64, ESCAPES.encode("utf-16-be"))), _PARENT),
    }, Outcome.CHILD),
    **table("vhd", "terminal injection", {"creator with terminal escapes": (foot(28, b"\x1b[2J"), "")}, Outcome.HARMLESS),
    "vhd: 2^26 entries in one mebibyte": Hostile("CVE-2015-5162", table_of(1 << 26, 1 << 20), "BAT entries|block size"),
    "vhd: 2^22 entries, all in one place": Hostile("CVE-2015-5162", table_of(1 << 22, 32 << 20), "BAT\\["),
    **table("vhd", "a loop", {"its own parent": (lambda: headed(vhd("differencing"), (40, ID.bytes)), "parent unique id")}),
    "vhd: two that are each other's parent": Hostile("a loop", files(**loop()), "loop", Outcome.WALK),
    "vhd: a layer given twice": Hostile("a loop", twice, "same layer", Outcome.WALK),
    "vhd: a parent that it was not made over": Hostile(
        "mixed-up layers", files(a_vhd=vhd, b_vhd=child_of(PARENT)), "made over", Outcome.CHILD
    ),
    "vhd: smaller than its parent": Hostile(
        "mixed-up layers", files(a_vhd=vhd, b_vhd=child_of(ID, size=512)), "smaller than", Outcome.CHILD
    ),
}  # fmt: skip
