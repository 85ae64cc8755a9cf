"""Stream-optimised VMDK read front to back: any piece size, any order, taken up anywhere, never believed when it ends early."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Generator
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.images.naive_vmdk import SECTOR, ZERO, NaiveSparse, descriptor, padded, some_grains

from tokvm.core.disk import BufferPool, Chunk, DiskReader
from tokvm.core.errors import ConnectionLost, ImageError, SourceError
from tokvm.core.extents import ExtentKind
from tokvm.images.chain import Chain
from tokvm.images.open import open_image
from tokvm.images.reader import ChainReader
from tokvm.images.vmdk.stream import VmdkStream

SOME = {"max_examples": 40, "deadline": None, "suppress_health_check": list(HealthCheck)}


def disk(seed: int, *, kind: str = "stream", sectors: int = 200, shuffled: bool = True, **options: Any) -> NaiveSparse:
    grains = some_grains(random.Random(seed), sectors * SECTOR, 4096)
    return NaiveSparse(sectors * SECTOR, grains, seed if shuffled else None, kind=kind, **options)


def stream(export: Any, pool: BufferPool | None = None, **options: Any) -> VmdkStream:
    return VmdkStream(export, name="export", pool=pool, **options)


def taken(chunk: Chunk) -> tuple[int, int, bytes]:
    assert chunk.kind is ExtentKind.DATA
    assert chunk.data is not None
    copy = (chunk.position, chunk.offset, bytes(chunk.data))
    chunk.release()
    return copy


def drained(reader: VmdkStream, position: int = 0) -> list[tuple[int, int, bytes]]:
    return [taken(chunk) for chunk in reader.chunks(position)]


def pieces(chunks: list[tuple[int, int, bytes]]) -> dict[int, bytes]:
    return {offset + at: raw[at : at + SECTOR] for _, offset, raw in chunks for at in range(0, len(raw), SECTOR)}


def test_it_is_a_disk_reader(kit: Any) -> None:
    reader = stream(kit.Exporter(disk(1).build()))
    assert isinstance(reader, DiskReader)
    assert reader.total == reader.size
    assert reader.identity == "cid-11111111"
    assert not reader.warnings


def test_nothing_is_covered_so_the_target_is_zeroed_first(kit: Any) -> None:
    reader = stream(kit.Exporter(disk(1).build()))
    windows = list(reader.covered())
    assert (windows[0].start, windows[-1].stop) == (0, reader.size)
    assert not any(len(window) for window in windows)


@settings(**SOME)  # type: ignore[arg-type]
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(["stream", "front"]),
    sectors=st.integers(1, 9000),
    step=st.sampled_from([1, 100, 512, 4097, 1 << 20]),
    pool_size=st.sampled_from([4096, 8192, 65536]),
    shuffled=st.booleans(),
    order=st.sampled_from(["between", "last"]),
)
@pytest.mark.slow
def test_it_says_the_same_as_random_access(
    kit: Any, seed: int, kind: str, sectors: int, step: int, pool_size: int, shuffled: bool, order: str
) -> None:
    sectors = sectors if step > 100 else min(sectors, 100)
    vmdk = disk(seed, kind=kind, sectors=sectors, shuffled=shuffled, table_order=order)
    if shuffled and kind == "stream":
        vmdk.gap = lambda: b""  # type: ignore[method-assign]
    if kind == "front":
        vmdk.seed = None
        vmdk.tail = bytes(SECTOR)
    raw = vmdk.build()
    pool = BufferPool(2, pool_size)
    export = kit.Exporter(raw, step)
    found = kit.content(stream(export, pool))
    assert found == vmdk.over()
    assert found == kit.content(ChainReader(Chain.open([open_image(kit.File(raw))])))
    assert export.opened == [0]
    assert export.streams[0].finished
    assert export.streams[0].closed
    assert kit.free_buffers(pool) == 2


def test_neighbouring_grains_are_one_chunk(kit: Any) -> None:
    vmdk = NaiveSparse(100 * 4096, {n: b"%04d" % n * 1024 for n in range(100)}, kind="stream")
    chunks = drained(stream(kit.Exporter(vmdk.build()), BufferPool(2, 65536)))
    assert [len(raw) for _, _, raw in chunks] == [65536] * 6 + [4 * 4096]


@pytest.mark.parametrize("kind", ["stream", "front"])
@pytest.mark.parametrize("pool_size", [4096, 65536])
@pytest.mark.slow
def test_it_goes_on_exactly_behind_any_chunk(kit: Any, kind: str, pool_size: int) -> None:
    vmdk = disk(21, kind=kind, sectors=9000, shuffled=False, tail=bytes(SECTOR) if kind == "front" else b"")
    raw = vmdk.build()
    whole = drained(stream(kit.Exporter(raw), BufferPool(2, pool_size)))
    for done in range(0, len(whole), 5 if pool_size > 4096 else 29):
        again = stream(kit.Exporter(raw), BufferPool(2, pool_size))
        assert pieces(drained(again, whole[done][0])) == pieces(whole[done + 1 :])


def test_a_far_position_is_opened_there_after_the_prefix_was_read_again(kit: Any) -> None:
    rng = random.Random(3)
    vmdk = NaiveSparse(1000 * 4096, {n: rng.randbytes(4096) for n in range(1000)}, kind="stream")
    raw = vmdk.build()
    export = kit.Exporter(raw)
    reader = stream(export)
    whole = drained(stream(kit.Exporter(raw), BufferPool(2, 65536)))
    middle = whole[len(whole) // 2]
    assert pieces(drained(reader, middle[0])) == pieces(whole[len(whole) // 2 + 1 :])
    assert export.opened == [0, middle[0]]
    assert all(seen.closed for seen in export.streams)
    assert drained(reader, whole[-1][0]) == []  # the end again: tables, directory, footer
    assert export.opened[2:] == [0, whole[-1][0]]


def test_positions_that_are_none_are_refused(kit: Any) -> None:
    reader = stream(kit.Exporter(disk(1).build()))
    for position in (-1, 1, 512, 4097, (1 << 40) + 1):
        with pytest.raises(ImageError, match="resume position"):
            next(iter(reader.chunks(position)))


def test_an_export_that_changed_is_not_taken_up(kit: Any) -> None:
    export = kit.Exporter(disk(1).build())
    reader = stream(export)
    whole = drained(reader)
    export.raw = disk(1, text=descriptor('RW 200 SPARSE "disk.vmdk"', cid="22")).build()
    with pytest.raises(ImageError, match="the export changed"):
        drained(reader, whole[0][0])
    assert all(seen.closed for seen in export.streams)


def test_the_fingerprint_is_of_header_and_descriptor(kit: Any) -> None:
    one, same = (stream(kit.Exporter(disk(1).build())).fingerprint for _ in range(2))
    other = stream(kit.Exporter(disk(1, text=descriptor('RW 200 SPARSE "x"', cid="22")).build())).fingerprint
    assert one == same != other
    assert one.startswith("vmdk-")


def test_a_stream_that_ends_anywhere_is_refused(kit: Any) -> None:
    for kind in ("stream", "front"):
        raw = disk(5, kind=kind, sectors=60, shuffled=False, tail=bytes(SECTOR) if kind == "front" else b"").build()
        for length in [*range(0, len(raw), 311), len(raw) - 512, len(raw) - 1]:
            pool = BufferPool(2, 65536)
            with pytest.raises(ImageError, match="the stream ended at byte") as caught:
                drained(stream(kit.Exporter(raw[:length]), pool))
            assert f"@{length:#x}" in caught.value.where
            assert kit.free_buffers(pool) == 2


def test_what_the_sender_says_comes_first(kit: Any) -> None:
    raw = disk(5).build()
    for error in (ConnectionLost("gone"), SourceError("lease lost")):
        with pytest.raises(type(error)):
            drained(stream(kit.Exporter(raw[:-600], finish_error=error)))
        with pytest.raises(type(error)):  # the whole stream came, and the sender says that it did not
            drained(stream(kit.Exporter(raw, finish_error=error)))


def test_nothing_may_follow_the_end(kit: Any) -> None:
    for tail in (b"x", bytes(1), bytes(512)):
        with pytest.raises(ImageError, match="the stream behind its end"):
            drained(stream(kit.Exporter(disk(5, tail=tail).build())))
    for tail in (bytes(512 + 4097), bytes(512) + b"x"):
        with pytest.raises(ImageError, match="the stream behind its end"):
            drained(stream(kit.Exporter(disk(5, kind="front", shuffled=False, tail=tail).build())))


def test_the_size_that_the_host_states_is_checked(kit: Any) -> None:
    raw = disk(5).build()
    assert stream(kit.Exporter(raw), expect_size=200 * SECTOR).size == 200 * SECTOR
    export = kit.Exporter(raw)
    with pytest.raises(ImageError, match="which the host states"):
        stream(export, expect_size=201 * SECTOR)
    assert export.streams[0].closed


def test_a_grain_is_no_larger_than_a_buffer(kit: Any) -> None:
    raw = disk(5).build()
    with pytest.raises(ImageError, match="KDMV grain size is 4096; allowed: at most 2048"):
        stream(kit.Exporter(raw), BufferPool(2, 2048))


VBOX_PARENT = 'ddb.uuid.parent="a9c614d1-7ecd-47df-8e2e-f3db36cf0286"'
PREFIXES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "not compressed": ({"kind": "sparse"}, {}, "compressed, with markers"),
    "no markers": ({"kind": "compressed"}, {}, "compressed, with markers"),
    "grains over the descriptor": ({}, {"overhead": 1}, "KDMV overhead is 1"),
    "a huge overhead": ({}, {"overhead": 1 << 40}, "KDMV overhead"),
    "no descriptor": ({"text": bytes(512)}, {}, "KDMV descriptor sector"),
    "a child": ({"text": descriptor('RW 200 SPARSE "a"', parent="7")}, {}, "a child of cid-00000007"),
    "a VirtualBox child": ({"text": descriptor('RW 200 SPARSE "a"', more=(VBOX_PARENT,))}, {}, "a child"),
    "a directory behind the grains": ({"kind": "front", "redundant": False}, {"gd": 99}, "KDMV grain directory"),
    "a directory for far too many grains": ({"text": descriptor(f'RW {62 << 31} SPARSE "a"')}, {"capacity": 62 << 31},
                                            "larger grains"),
}  # fmt: skip


@pytest.mark.parametrize("case", PREFIXES)
def test_prefixes(case: str, kit: Any) -> None:
    options, changes, match = PREFIXES[case]
    vmdk = disk(5, shuffled=False, **options)
    raw = vmdk.build()
    changes = {"gd": 2**64 - 1} | changes if vmdk.kind == "stream" else changes
    export = kit.Exporter(kit.patched(raw, 0, vmdk.header(**changes)) if changes else raw)
    with pytest.raises(ImageError, match=match):
        stream(export)
    assert all(seen.closed for seen in export.streams)


def small(**options: Any) -> NaiveSparse:
    grains = {0: b"a" * 4096, 1: b"b" * 4096, 3: b"c" * 4096, 600: b"d" * 4096, 7: ZERO}
    return NaiveSparse(700 * 4096, grains, kind="stream", **options)


def broken(kit: Any, at: str, field: int, value: bytes, match: str, **options: Any) -> None:
    vmdk = small(**options)
    raw = vmdk.build()
    pool = BufferPool(2, 65536)
    with pytest.raises(ImageError, match=match) as caught:
        drained(stream(kit.Exporter(kit.patched(raw, vmdk.places[at] + field, value)), pool))
    assert caught.value.where.startswith("export@")
    assert kit.free_buffers(pool) == 2


MARKERS: dict[str, tuple[str, int, bytes, str]] = {
    "a grain between grains": ("grain1", 0, struct.pack("<Q", 9), "lba of a compressed grain is 9"),
    "a grain behind the disk": ("grain1", 0, struct.pack("<Q", 5600), "lba of a compressed grain is 5600"),
    "a grain far behind the disk": ("grain1", 0, b"\xf8" + b"\xff" * 7, "lba of a compressed grain"),
    "a grain twice": ("grain1", 0, struct.pack("<Q", 0), "each grain once"),
    "a huge grain": ("grain1", 8, b"\xff" * 4, "size of a compressed grain is 4294967295"),
    "no zlib": ("grain1", 12, b"abcd", "no zlib stream"),
    "a grain of another place": ("grain3", 0, struct.pack("<Q", 16), "the sector of the grain that is in this place"),
    "a grain of another table": ("grain3", 0, struct.pack("<Q", 515 * 8), "the sector of a grain of the same table"),
    "an unknown marker": ("gt0", -500, struct.pack("<I", 4), "marker type is 4"),
    "a table of another size": ("gt0", -512, struct.pack("<Q", 5), "sectors of the table is 5"),
    "a directory of another size": ("gd", -512, struct.pack("<Q", 2), "sectors of the directory is 2"),
    "a footer of another size": ("footer", -512, struct.pack("<Q", 0), "sectors of the footer is 0"),
    "the end too early": ("gt0", -512, bytes(16), "marker type is 0"),
    "the end instead of the footer": ("footer", -512, bytes(16), "marker type is 0"),
    "a footer instead of a directory": ("gd", -500, struct.pack("<I", 3), "marker type is 3"),
    "a table instead of a directory": ("gd", -512, struct.pack("<QII", 4, 0, 1), "is 0x4c444d4b|entry"),
    "a table instead of a footer": ("footer", -500, struct.pack("<I", 1), "marker type is 1"),
    "an end with something in it": ("end", 100, b"x", "end-of-stream marker is not all zeros"),
    "a grain behind the directory": ("footer", -504, struct.pack("<I", 9), "marker is a grain's"),
    "a table that lists too little": ("gt0", 4, bytes(4), "grain 1; allowed: a grain that a table lists"),
    "a table that lists too much": ("gt0", 16, struct.pack("<I", 3), "entry 4 of a grain table is 0x3"),
    "a table that lists what has not come": ("gt0", 4, struct.pack("<I", 1 << 20), "entry 1 of a grain table is 0x100000"),
    "a table that lists two at one place": ("gt0", 8, b"", ""),
    "a directory without a table": ("gd", 0, bytes(4), "grain directory entry 0 is 0x0"),
    "a directory with tables mixed up": ("gd", 4, b"", ""),
    "a directory with a table that did not come": ("gd", 4, struct.pack("<I", 99), "grain directory entry 1 is 0x63"),
    "another disk's footer": ("footer", 12, struct.pack("<Q", 5592), "the footer is another disk's"),
    "a damaged footer": ("footer", 0, b"x", "KDMV magic"),
    "a footer with another directory": ("footer", 56, struct.pack("<Q", 8), "KDMV grain directory is sector 0x8"),
    "a footer that refers to itself": ("footer", 56, b"\xff" * 8, "KDMV grain directory is in a footer"),
}


@pytest.mark.parametrize("case", MARKERS)
def test_markers(case: str, kit: Any) -> None:
    at, field, value, match = MARKERS[case]
    vmdk = small()
    vmdk.build()
    if case == "a table that lists two at one place":
        value, match = struct.pack("<I", vmdk.places["grain1"] // SECTOR), "entry 2 of a grain table"
    if case == "a directory with tables mixed up":
        value, match = struct.pack("<I", vmdk.places["gt0"] // SECTOR), "grain directory entry 1"
    broken(kit, at, field, value, match)


@pytest.mark.parametrize("case", ["a grain of another place", "a grain of another table"])
def test_a_grain_under_a_wrong_place_is_found_wherever_the_tables_are(case: str, kit: Any) -> None:
    at, field, value, match = MARKERS[case]
    broken(kit, at, field, value, match, table_order="last")


def test_tables_that_came_first_are_checked_too(kit: Any) -> None:
    vmdk = NaiveSparse(700 * 4096, {0: b"a" * 4096, 3: b"c" * 4096}, kind="front", tail=bytes(SECTOR))
    raw = vmdk.build()
    with pytest.raises(ImageError, match="grain 4; allowed: a grain that a table lists"):
        drained(stream(kit.Exporter(kit.patched(raw, vmdk.places["grain3"], struct.pack("<Q", 32)))))
    at = vmdk.places["gt0"] + 8
    with pytest.raises(ImageError, match="no grain 2 at sector 0x999; allowed: every grain that its tables list"):
        drained(stream(kit.Exporter(kit.patched(raw, at, struct.pack("<I", 0x999)))))


BODIES = {
    "a bomb": (zlib.compress(bytes(8 << 20)), "more than 4096 bytes"),
    "short": (zlib.compress(bytes(4095)), "4095 bytes"),
    "raw deflate": (zlib.compress(b"x" * 4096)[2:-4], "no zlib stream"),
    "cut": (zlib.compress(b"x" * 4096)[:-3], "without its end"),
}


@pytest.mark.parametrize("case", BODIES)
def test_grains_that_unfold_to_something_else(case: str, kit: Any) -> None:
    body, match = BODIES[case]
    vmdk = small()
    vmdk.packed = {1: padded(struct.pack("<QI", 8, len(body)) + body)}
    with pytest.raises(ImageError, match=match if len(body) <= 8192 else "size of a compressed grain") as caught:
        drained(stream(kit.Exporter(vmdk.build())))
    assert caught.value.where.startswith("export@")


def test_a_stream_that_was_taken_up_still_checks_what_comes(kit: Any) -> None:
    vmdk = small()
    raw = vmdk.build()
    position = vmdk.places["grain1"]
    assert set(pieces(drained(stream(kit.Exporter(raw)), position))) == {
        n * 4096 + at for n in (1, 3, 600) for at in range(0, 4096, SECTOR)
    }
    for place, value, match in (
        (vmdk.places["grain3"], struct.pack("<Q", 16), "in this place of the disk"),
        (vmdk.places["gt0"] + 4, bytes(4), "a grain that a table lists"),
        (vmdk.places["gd"], bytes(4), "grain directory entry 0"),
    ):
        with pytest.raises(ImageError, match=match):
            drained(stream(kit.Exporter(kit.patched(raw, place, value))), position)


def test_whoever_stops_early_closes_the_stream(kit: Any) -> None:
    pool = BufferPool(2, 4096)
    export = kit.Exporter(disk(5).build())
    reader = stream(export, pool)
    chunks = cast("Generator[Chunk]", reader.chunks())
    next(chunks).release()
    chunks.close()
    reader.close()
    assert all(seen.closed for seen in export.streams)
    assert kit.free_buffers(pool) == 2
