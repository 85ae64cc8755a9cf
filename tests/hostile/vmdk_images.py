"""Hostile VMDKs whose structures are wrong: KDMV, compressed, COWD, seSparse, and descriptors that are too much."""

from __future__ import annotations

import io
import struct
import tempfile
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from tests.hostile.case import Hostile, Outcome, Table, files, patched, table, write_sparsely

from tokvm.core.units import GiB, MiB
from tokvm.testing.cowd_writer import write_cowd_extent
from tokvm.testing.sesparse_writer import SesparseOptions, write_sesparse_extent
from tokvm.testing.vmdk_descriptor import ExtentLine, Identity, write_descriptor
from tokvm.testing.vmdk_stream_writer import StreamOptions, write_stream
from tokvm.testing.vmdk_writer import SparseOptions, write_sparse_extent

SECTOR = 512
GRAIN = 4096
DISK = 6 * GRAIN
FRONT = 24 * SECTOR  # of a stream: header and descriptor, up to the first grain


@cache
def sparse(*, zeroed: bool = False) -> bytes:
    """Grains 1 and 3. Descriptor at sector 1, directory at 21, its table at 22."""
    out = io.BytesIO()
    text = write_descriptor("monolithicSparse", [ExtentLine(DISK, "SPARSE", "disk.vmdk")])
    runs = [(GRAIN, b"a" * GRAIN), (3 * GRAIN, b"b" * GRAIN)]
    options = SparseOptions(GRAIN, redundant=False, zeroed_grains=zeroed)
    write_sparse_extent(out, size=DISK, runs=runs, options=options, descriptor=text)
    return out.getvalue()


GD, GT = 21 * SECTOR, 22 * SECTOR


@cache
def stream() -> bytes:
    """Grain 0 at FRONT, grain 1 a sector behind it."""
    out = io.BytesIO()
    write_stream(
        out, size=DISK, runs=[(0, b"a" * GRAIN), (GRAIN, b"b" * GRAIN)], name="disk.vmdk", options=StreamOptions(GRAIN)
    )
    return out.getvalue()


@cache
def cowd() -> bytes:
    """Grains (sectors) 0 and 1; directory at 2048, its table at 2560."""
    out = io.BytesIO()
    write_cowd_extent(out, size=DISK, runs=[(0, b"a" * SECTOR), (SECTOR, b"b" * SECTOR)])
    return out.getvalue()


@cache
def sesparse(replay: int = 0) -> bytes:
    """Grains 0 and 1; directory at 2 MiB, its table at 3 MiB."""
    with tempfile.TemporaryFile() as out:
        options = SesparseOptions(replay_journal=replay)
        write_sesparse_extent(out, size=DISK, runs=[(0, b"a" * GRAIN), (GRAIN, b"b" * GRAIN)], options=options)
        out.seek(0)
        return out.read()


def u16(value: int) -> bytes:
    return struct.pack("<H", value)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def with_fields(raw: Callable[[], bytes], *changes: tuple[int, bytes]) -> Callable[[], bytes]:
    return lambda: patched(raw(), *changes)


def grain(data: bytes, *, lba: int = 0, size: int | None = None) -> Callable[[], bytes]:
    """The stream with another first grain, which has a sector of room."""
    raw = struct.pack("<QI", lba, len(data) if size is None else size) + data
    return with_fields(stream, (FRONT, raw.ljust(SECTOR, b"\0")))


def bomb() -> bytes:
    """A grain of a sector that unfolds to 400 KiB."""
    return zlib.compress(bytes(400 * 1024), 9)


def big_bomb(folder: Path) -> Sequence[str]:
    """A grain of a MiB that unfolds to a GiB: the only grain of a disk, as large as a packed one may be."""
    out = io.BytesIO()
    write_stream(
        out, size=2 * MiB, runs=[(0, bytes(range(256)) * 8192)], name="disk.vmdk", options=StreamOptions(2 * MiB, level=0)
    )
    raw = bytearray(out.getvalue())
    at = next(place for place in range(FRONT, len(raw), SECTOR) if struct.unpack_from("<QI", raw, place)[1] > MiB)
    packer = zlib.compressobj(9)
    first = packer.compress(bytes(MiB)) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(bytes(MiB)) + packer.flush(
        zlib.Z_FULL_FLUSH
    )  # what came before no longer matters: it can be repeated
    packed = first + again * 1023
    raw[at + 8 : at + 12 + len(packed)] = u32(len(packed)) + packed
    write_sparsely(folder / "disk.vmdk", bytes(raw))
    return ["disk.vmdk"]


@cache
def wide() -> bytes:
    """Of 130 GiB, which is three windows of a map; only its last grain is wrong."""
    with tempfile.TemporaryFile() as out:
        size, options = 130 * GiB, SparseOptions(redundant=False, all_tables=False)
        text = write_descriptor("monolithicSparse", [ExtentLine(size, "SPARSE", "disk.vmdk")])
        runs = [(at, b"a" * 65536) for at in (0, size - 65536)]
        write_sparse_extent(out, size=size, runs=runs, options=options, descriptor=text)
        out.seek(0)
        raw = out.read()
    tables = [number for number in struct.unpack_from("<4160I", raw, GD) if number]
    return patched(raw, (tables[-1] * SECTOR + 4 * 511, u32(0x7FFFFFFF)))


def descriptor(*lines: str, head: Sequence[str] = (), parent: str = "ffffffff", kind: str = "vmfs") -> bytes:
    start = ["# Disk DescriptorFile", "version=1", "CID=11111111", f"parentCID={parent}", f'createType="{kind}"', *head]
    return "\n".join([*start, *lines, ""]).encode("utf-8", "surrogateescape")


def beside(extent: Callable[[], bytes], kind: str, suffix: str) -> Callable[[Path], Sequence[str]]:
    """A child's descriptor that names this extent by its own name; the extent is not listed."""

    def build(folder: Path) -> Sequence[str]:
        name = f"disk-{suffix}.vmdk"
        (folder / "disk.vmdk").write_bytes(descriptor(f'RW {DISK // SECTOR} {kind} "{name}"', parent="22222222", kind=kind))
        write_sparsely(folder / name, extent())
        return ["disk.vmdk"]

    return build


def unaligned_giant(folder: Path) -> Sequence[str]:
    """A file of a TiB, nearly all holes, with grains that do not lie at multiples of their size."""
    write_sparsely(folder / "disk.vmdk", patched(sparse(), (GT, u32(1 << 28 | 1)), (GT + 8, u32(1 << 29 | 3))), 1 << 40)
    return ["disk.vmdk"]


def giant_descriptor(folder: Path) -> Sequence[str]:
    write_sparsely(folder / "disk.vmdk", descriptor('RW 8 VMFS "disk-flat.vmdk"'), GiB)
    return ["disk.vmdk"]


def children(first: Identity, second: Identity) -> Callable[[Path], Sequence[str]]:
    def build(folder: Path) -> Sequence[str]:
        for name, identity in (("a", first), ("b", second)):
            line = ExtentLine(DISK, "VMFS", f"{name}-flat.vmdk")
            (folder / f"{name}.vmdk").write_bytes(write_descriptor("vmfs", [line], identity=identity))
            write_sparsely(folder / f"{name}-flat.vmdk", name.encode() * DISK)
        return ["a.vmdk", "b.vmdk"]

    return build


def cut(length: int, raw: Callable[[], bytes] = sparse) -> Callable[[], bytes]:
    return lambda: raw()[:length]


def _beside(kind: str, suffix: str, outcome: Outcome, made: Table) -> dict[str, Hostile]:
    name = frozenset({f"disk-{suffix}.vmdk"})
    return {
        f"{suffix}: {title}": Hostile("CVE-2014-0223 family", beside(raw, kind, suffix), says, outcome, beside=name)
        for title, (raw, says) in made.items()
    }


def _sparse(*changes: tuple[int, bytes]) -> Callable[[], bytes]:
    return with_fields(sparse, *changes)


_LINE = f'RW {DISK // SECTOR} VMFS "disk-flat.vmdk"'
IMAGES: dict[str, Hostile] = {
    **table("vmdk", "CVE-2014-0223: table sizes", {
        "capacity 0": (_sparse((12, u64(0))), "capacity is 0"),
        "capacity 2^63": (_sparse((12, u64(2**63))), "capacity"),
        "capacity 2^40 sectors": (_sparse((12, u64(2**40))), "capacity"),
        "a capacity below what its descriptor says": (_sparse((12, u64(8))), "capacity is 8"),
        "grains of 0 sectors": (_sparse((20, u64(0))), "grain size is 0"),
        "grains of 3 sectors": (_sparse((20, u64(3))), "grain size is 3"),
        "grains of 2^63 sectors": (_sparse((20, u64(2**63))), "grain size"),
        "2^32-1 entries in a table": (_sparse((44, u32(2**32 - 1))), "entries of a grain table"),
        "no entries in a table": (_sparse((44, u32(0))), "entries of a grain table is 0"),
        "an embedded descriptor of 2^60 sectors": (_sparse((36, u64(2**60))), "descriptor size"),
        "an embedded descriptor behind the end": (_sparse((28, u64(2**40))), "a structure|descriptor"),
        "a directory behind the end": (_sparse((56, u64(2**40))), "grain directory"),
        "a directory at 2^64-2": (_sparse((56, u64(2**64 - 2))), "grain directory"),
        "a footer that is not there": (_sparse((56, u64(2**64 - 1))), "marker near the end"),
        "version 99": (_sparse((4, u32(99))), "version is 99"),
        "the highest flag": (_sparse((8, u32(0x80000003))), "flags is 0x80000003"),
        "the lowest unknown flag": (_sparse((8, u32(0xB))), "flags is 0xb"),
        "a flag behind the known ones": (_sparse((8, u32(0x40003))), "flags is 0x40003"),
        "copied as text": (_sparse((73, b"\n \n\n")), "copied as text"),
        "compression 7": (_sparse((77, u16(7))), "compression is 7"),
    }),
    **table("vmdk", "tables into structures", {
        "a directory over the header": (_sparse((56, u64(0))), "grain directory"),
        "a directory over the descriptor": (_sparse((56, u64(2))), "outside the descriptor"),
        "a table over the header": (_sparse((GD, u32(0xFFFFFFFF))), "grain directory entry 0"),
        "a table over the directory": (_sparse((GD, u32(GD // SECTOR))), "outside the grain directory"),
        "a table over the descriptor": (_sparse((GD, u32(3))), "outside the descriptor"),
    }),
    **table("vmdk", "grains into structures", {
        "two grains at one place": (lambda: patched(sparse(), (GT, sparse()[GT + 4 : GT + 8])), "no other grain takes"),
        "a grain over half of another": (
            lambda: patched(sparse(), (GT, u32(struct.unpack_from("<I", sparse(), GT + 4)[0] + 4))), "no other grain takes"),
        "a table that is a grain of its own": (_sparse((GT, u32(GT // SECTOR))), "entry 0 of grain table 0"),
        "a directory that is a grain": (_sparse((GT, u32(GD // SECTOR))), "entry 0 of grain table 0"),
        "a descriptor that is a grain": (_sparse((GT, u32(2))), "entry 0 of grain table 0"),
        "a grain behind the end": (_sparse((GT, u32(0x7FFFFFFF))), "entry 0 of grain table 0"),
        "an entry of 1 without the flag": (_sparse((GT, u32(1))), "only with the zeroed-grain flag"),
    }, Outcome.WALK),
    "vmdk: a bad grain behind a hundred good gibibytes": Hostile(
        "half an answer", files(disk_vmdk=wide), "entry 511 of grain table 4159", Outcome.WALK,
    ),
    **table("vmdk", "zlib bombs", {
        "a grain that unfolds to a hundred grains": (grain(bomb()), "more than 4096 bytes"),
        "a grain that unfolds to less": (grain(zlib.compress(b"a" * 4095)), "4095 bytes"),
        "a grain of another place": (grain(zlib.compress(b"a" * GRAIN), lba=8), "lba of a compressed grain"),
        "a grain of 4 GiB": (grain(zlib.compress(b"a" * GRAIN), size=2**32 - 1), "size of a compressed grain"),
        "a grain of nothing": (grain(b"", size=0), "size of a compressed grain is 0"),
        "a raw deflate stream": (grain(zlib.compress(b"a" * GRAIN)[2:-4]), "no zlib stream"),
        "a wrong checksum in a grain": (grain(zlib.compress(b"a" * GRAIN)[:-1] + b"!"), "no zlib stream"),
    }, Outcome.READ),
    "vmdk: a grain that unfolds to a gibibyte": Hostile("CVE-2015-5162", big_bomb, "more than 2097152 bytes", Outcome.READ),
    "vmdk: bytes behind a grain's stream": Hostile(
        "zlib bombs", files(disk_vmdk=grain(zlib.compress(b"a" * GRAIN) + b"garbage")), outcome=Outcome.HARMLESS
    ),
    **table("vmdk", "CVE-2015-5162", {
        "a million extents": (lambda: descriptor(*["RW 1 ZERO"] * 100_000), "number of extents|descriptor size"),
        "a line of half a mebibyte": (lambda: descriptor(_LINE, "x=" + "y" * 524288), "length is 524290"),
        "a line of half a mebibyte of quotes": (lambda: descriptor('RW 1 VMFS "' + '" 1' * 170_000 + '"'), "length is"),
        "negative sectors": (lambda: descriptor('RW -1 VMFS "disk-flat.vmdk"'), "descriptor line"),
        "sectors of twenty digits": (lambda: descriptor(f'RW {10**19} VMFS "disk-flat.vmdk"'), "descriptor line"),
        "two extents of 2^62 sectors": (lambda: descriptor(*[f"RW {2**62} ZERO"] * 2), "sum of the extents"),
    }),
    "vmdk: unaligned grains in a tebibyte of holes": Hostile(
        "CVE-2015-5162", unaligned_giant, outcome=Outcome.HARMLESS,
    ),
    "vmdk: a descriptor of a gibibyte": Hostile("CVE-2015-5162", giant_descriptor, "descriptor size is 1073741824"),
    **table("vmdk", "encrypted payload taken for data", {
        "encrypted": (lambda: descriptor(_LINE, 'encryption.keySafe = "vmware:key/list/(pair"'), "encrypted"),
        "encrypted by a filter": (lambda: descriptor(_LINE, 'ddb.iofilters = "vmwarevmcrypt"'), "encrypted"),
    }),
    "vmdk: a child of another content": Hostile(
        "mixed-up layers", children(Identity(1), Identity(3, 2)), "made over", Outcome.CHILD,
        beside=frozenset({"a-flat.vmdk", "b-flat.vmdk"}),
    ),
    **table("vmdk", "truncation", {
        f"cut at {length}": (cut(length), "allowed|format") for length in (3, 79, 511, 512, SECTOR * 2, GD, GT, GT + 2047)
    }),
    "vmdk: cut within its last grain": Hostile(
        "truncation", files(disk_vmdk=lambda: sparse()[:-512]), "entry 3 of grain table 0", Outcome.WALK
    ),
    **table("vmdk", "truncation", {
        f"stream cut {early} bytes early": (cut(-early, stream), "marker near the end") for early in (1, 512, 1024, 1536, 4096)
    }),
    **_beside("VMFSSPARSE", "delta", Outcome.OPEN, {
        "capacity 0": (with_fields(cowd, (12, u32(0))), "COWD capacity is 0"),
        "grains of 3 sectors": (with_fields(cowd, (16, u32(3))), "COWD grain size is 3"),
        "2^32-1 directory entries": (with_fields(cowd, (24, u32(2**32 - 1))), "4294967295"),
        "a directory over the header": (with_fields(cowd, (20, u32(0))), "COWD grain directory"),
        "a table over the header": (with_fields(cowd, (2048, u32(1))), "grain directory entry 0"),
        "a table over the directory": (with_fields(cowd, (2048, u32(4))), "grain directory entry 0"),
        "a table behind the end": (with_fields(cowd, (2048, u32(2**32 - 1))), "grain directory entry 0"),
        "cut within its table": (lambda: cowd()[:4000], "grain directory entry 0"),
    }),
    **_beside("VMFSSPARSE", "delta", Outcome.WALK, {
        "a grain at sector 2": (with_fields(cowd, (2560, u32(2))), "entry 0 of grain table 0"),
        "a grain over the directory": (with_fields(cowd, (2560, u32(4))), "entry 0 of grain table 0"),
        "a grain over its own table": (with_fields(cowd, (2560, u32(5))), "entry 0 of grain table 0"),
        "two grains at one place": (lambda: patched(cowd(), (2564, cowd()[2560:2564])), "no other grain takes"),
        "a grain behind the end": (with_fields(cowd, (2560, u32(2**32 - 1))), "entry 0 of grain table 0"),
    }),
    **_beside("SESPARSE", "sesparse", Outcome.OPEN, {
        "a journal to replay": (lambda: sesparse(1), "replay_journal is 1"),
        "version 3": (with_fields(sesparse, (8, u64(3))), "version"),
        "capacity 2^63": (with_fields(sesparse, (16, u64(2**63))), "capacity"),
        "flags": (with_fields(sesparse, (40, u64(1))), "flags"),
        "something in the padding": (with_fields(sesparse, (400, b"!")), "padding"),
        "tables over the directory": (with_fields(sesparse, (144, u64(4096))), "grain (tables|directory)"),
        "grains in the header": (with_fields(sesparse, (192, u64(0))), "grains"),
        "a directory at 2^60": (with_fields(sesparse, (128, u64(2**60))), "grain directory"),
        "a directory entry of another type": (with_fields(sesparse, (2 * MiB, u64(2 << 60))), "grain directory entry 0"),
        "reserved bits of a directory entry": (
            with_fields(sesparse, (2 * MiB, u64(1 << 60 | 1 << 40))), "grain directory entry 0"),
        "a table behind the end": (with_fields(sesparse, (2 * MiB, u64(1 << 60 | 0xFFFFFFF0))), "grain directory entry 0"),
    }),
    **_beside("SESPARSE", "sesparse", Outcome.WALK, {
        "a grain of type 4": (with_fields(sesparse, (3 * MiB, u64(4 << 60))), "entry 0 of grain table 0"),
        "a grain of type 15": (with_fields(sesparse, (3 * MiB, u64(2**64 - 1))), "entry 0 of grain table 0"),
        "bits of an absent grain": (with_fields(sesparse, (3 * MiB, u64(77))), "entry 0 of grain table 0"),
        "a grain behind the end": (with_fields(sesparse, (3 * MiB, u64(3 << 60 | 0xFFF << 48))), "at most 0x1"),
        "a grain at the highest index": (with_fields(sesparse, (3 * MiB, u64(3 << 60 | (1 << 60) - 1))), "at most 0x1"),
        "two grains at one place": (with_fields(sesparse, (3 * MiB + 8, u64(3 << 60))), "no other grain takes"),
    }),
}  # fmt: skip
