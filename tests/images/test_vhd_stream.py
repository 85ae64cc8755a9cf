"""VHD read front to back: any piece size, any block order, taken up anywhere, and never believed when it ends early."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokvm.core.disk import BufferPool, Chunk, DiskReader
from tokvm.core.errors import ConnectionLost, ImageError, SourceError
from tokvm.core.extents import ExtentKind
from tokvm.images.reader import ChainReader
from tokvm.images.vhd.stream import StreamKind, VhdStream

SECTOR = 512
SOME = {"max_examples": 60, "deadline": None, "suppress_health_check": list(HealthCheck)}


def disk(kit: Any, seed: int, *, kind: int = 3, sectors: int = 200, block_size: int = 16384, **options: Any) -> Any:
    vhd = kit.Vhd(sectors * SECTOR, kind=kind, block_size=block_size, seed=seed, parent="p" if kind == 4 else None, **options)
    vhd.sectors = kit.random_sectors(random.Random(seed), vhd.size, 8)
    return vhd


def taken(chunk: Chunk) -> tuple[int, int, int, ExtentKind, bytes | None]:
    copy = (chunk.position, chunk.offset, chunk.length, chunk.kind, None if chunk.data is None else bytes(chunk.data))
    chunk.release()
    return copy


def stream(export: Any, pool: BufferPool | None = None, **options: Any) -> VhdStream:
    return VhdStream(export, name="vdi-export", pool=pool, **options)


def test_it_is_a_disk_reader(kit: Any) -> None:
    assert isinstance(stream(kit.Exporter(disk(kit, 1).build())), DiskReader)


@settings(**SOME)  # type: ignore[arg-type]
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from([3, 4]),
    step=st.sampled_from([1, 100, 512, 4097, 1 << 20]),
    block_size=st.sampled_from([512, 4096, 16384, 65536]),
    pool_size=st.sampled_from([512, 4096, 8192, 65536]),
)
@pytest.mark.slow
def test_it_says_the_same_as_random_access(kit: Any, seed: int, kind: int, step: int, block_size: int, pool_size: int) -> None:
    vhd = disk(kit, seed, kind=kind, block_size=block_size)
    raw, under = vhd.build(), random.Random(seed).randbytes(vhd.size)
    pool = BufferPool(2, pool_size)
    export = kit.Exporter(raw, step)
    found = kit.content(stream(export, pool), under=under)
    assert found == kit.content(ChainReader(kit.chain(raw)), under=under)
    if kind == 4:
        assert found == vhd.over(under)
    assert export.opened == [0]
    assert export.streams[0].finished
    assert export.streams[0].closed
    assert max(seen.asked for seen in export.streams) <= max(pool_size, 256 << 10)
    assert kit.free_buffers(pool) == 2


@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("pool_size", [4096, 65536])
def test_it_goes_on_exactly_behind_any_chunk(kit: Any, kind: int, pool_size: int) -> None:
    raw = disk(kit, 21, kind=kind).build()
    whole = [taken(chunk) for chunk in stream(kit.Exporter(raw), BufferPool(2, pool_size)).chunks()]
    for done, chunk in enumerate(whole):
        export = kit.Exporter(raw)
        again = stream(export, BufferPool(2, pool_size))
        rest = [taken(found) for found in again.chunks(chunk[0])]
        assert pieces(rest) == pieces(whole[done + 1 :])


def pieces(chunks: list[tuple[int, int, int, ExtentKind, bytes | None]]) -> dict[int, bytes | None]:
    return {
        offset + at: None if raw is None else raw[at : at + SECTOR]
        for _, offset, length, _, raw in chunks
        for at in range(0, length, SECTOR)
    }


def test_a_far_position_is_opened_there_after_the_prefix_was_read_again(kit: Any) -> None:
    vhd = kit.Vhd(8 << 20, block_size=1 << 20, sectors=dict.fromkeys(range(0, 16384, 3), b"\7" * SECTOR))
    raw = vhd.build()
    export = kit.Exporter(raw)
    whole = [taken(chunk) for chunk in stream(kit.Exporter(raw)).chunks()]
    reader = stream(export)
    middle = whole[len(whole) // 2]
    rest = [taken(chunk) for chunk in reader.chunks(middle[0])]
    assert rest == whole[len(whole) // 2 + 1 :]
    block = middle[1] // (1 << 20)
    assert export.opened == [0, vhd.block_starts[block]]
    assert all(seen.closed for seen in export.streams)
    assert [taken(chunk) for chunk in reader.chunks(whole[-1][0])] == []  # the end again: prefix, then the footer
    assert export.opened[2:] == [0, len(raw) - 512]


def test_positions_between_chunks_are_good_too(kit: Any) -> None:
    raw = disk(kit, 22, kind=4, sectors=64).build()
    whole = [taken(chunk) for chunk in stream(kit.Exporter(raw)).chunks()]
    for position in range(0, whole[-1][0], 500):
        rest = [taken(chunk) for chunk in stream(kit.Exporter(raw)).chunks(position)]
        assert set(pieces(rest)) >= set(pieces([one for one in whole if one[0] - one[2] >= position]))
        assert all(one[0] > position for one in rest)


def test_a_position_outside_the_stream_is_refused(kit: Any) -> None:
    reader = stream(kit.Exporter(disk(kit, 1).build()))
    for position in (-1, 1 << 40):
        with pytest.raises(ImageError, match="resume position"):
            next(iter(reader.chunks(position)))


def test_an_export_that_changed_is_not_taken_up(kit: Any) -> None:
    export = kit.Exporter(disk(kit, 23).build())
    reader = stream(export)
    first = next(chunks := reader.chunks())
    first.release()
    chunks.close()  # type: ignore[attr-defined]
    export.raw = disk(kit, 24).build()
    with pytest.raises(ImageError, match="the export changed"):
        next(iter(reader.chunks(first.position)))
    assert all(seen.closed for seen in export.streams)


def test_the_fingerprint_ignores_what_an_exporter_invents_anew(kit: Any) -> None:
    def fingerprint(**changes: Any) -> str:
        vhd = disk(kit, 25, **{key: value for key, value in changes.items() if key in ("kind", "sectors")})
        footer = {key: value for key, value in changes.items() if key in ("id", "time")}
        return stream(kit.Exporter(kit.patched(vhd.build(**footer), 0, vhd.footer(**footer)))).fingerprint

    assert fingerprint() == fingerprint(id=bytes(16), time=77)
    assert len({fingerprint(), fingerprint(kind=4), fingerprint(sectors=199)}) == 3


def test_covered_is_the_block_map(kit: Any) -> None:
    vhd = kit.Vhd(5 * 4096 + 512, block_size=4096, sectors={0: b"\1" * 512, 40: b"\2" * 512})
    reader = stream(kit.Exporter(vhd.build()))
    (window,) = reader.covered()
    assert [(extent.offset, extent.length, extent.kind) for extent in window] == [
        (0, 4096, ExtentKind.DATA),
        (20480, 512, ExtentKind.DATA),
    ]
    assert (window.start, window.stop) == (0, reader.size)
    assert reader.total == 4096 + 512


@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.slow
def test_every_truncation_is_an_error_naming_the_byte(kit: Any, kind: int) -> None:
    raw = disk(kit, 26, kind=kind, sectors=40, block_size=4096).build()
    for length in range(0, len(raw), 100):
        with pytest.raises(ImageError) as caught:
            kit.content(stream(kit.Exporter(raw[:length])))
        assert caught.value.where.startswith("vdi-export@0x")
        assert caught.value.fix
        if "ended at byte" in caught.value.what:
            assert caught.value.where == f"vdi-export@{length:#x}"


@pytest.mark.parametrize("error", [ConnectionLost("gone"), SourceError("exit status 1")])
def test_what_the_sender_says_about_a_short_stream_comes_first(kit: Any, error: Exception) -> None:
    raw = disk(kit, 26).build()
    for length in (300, 1700, len(raw) // 2, len(raw) - 512, len(raw)):
        with pytest.raises(type(error)):
            kit.content(stream(kit.Exporter(raw[:length], finish_error=error)))


def test_bytes_behind_the_footer_are_refused(kit: Any) -> None:
    raw = disk(kit, 27).build()
    for more in (b"x", bytes(512), raw[:512], random.Random(1).randbytes(1 << 20)):
        with pytest.raises(ImageError, match=r"footer|stream's end"):
            kit.content(stream(kit.Exporter(raw + more[:-1] + b"x")))


def test_padding_before_the_footer_is_read_past(kit: Any) -> None:
    """Windows aligns the footer; the last 512 bytes are it."""
    vhd = disk(kit, 28)
    raw = vhd.build()
    found = kit.content(stream(kit.Exporter(raw[:-512] + bytes(3584) + vhd.footer())))
    assert found == vhd.over(b"")


def test_a_trailing_footer_of_another_disk_is_refused(kit: Any) -> None:
    vhd = disk(kit, 29)
    raw = vhd.build()[:-512]
    for changes, field in (({"size": 512}, "current_size"), ({"kind": 4}, "type"), ({"data_offset": 1024}, "data_offset")):
        with pytest.raises(ImageError, match=f"trailing footer {field}"):
            kit.content(stream(kit.Exporter(raw + vhd.footer(**changes))))
    assert kit.content(stream(kit.Exporter(raw + vhd.footer(id=bytes(16))))) == vhd.over(b"")


def test_a_delta_without_changes_has_no_chunks(kit: Any) -> None:
    vhd = kit.Vhd(1 << 20, kind=4, block_size=4096, parent="p", behind_bat=bytes(5 * 512))
    reader = stream(kit.Exporter(vhd.build()))
    assert list(reader.chunks()) == []
    assert reader.total == 0
    with pytest.raises(ImageError, match="stream's end"):
        list(stream(kit.Exporter(vhd.build()[: -512 - 5 * 512])).chunks())


def test_locators_and_a_batmap_are_read_past(kit: Any) -> None:
    batmap = bytearray(1024)
    batmap[:8] = b"tdbatmap"
    vhd = disk(kit, 30, kind=4, behind_bat=bytes(batmap), bat_offset=2048)
    assert kit.content(stream(kit.Exporter(vhd.build(), step=700))) == vhd.over(b"")


def test_a_bat_before_the_header_is_found(kit: Any) -> None:
    vhd = kit.Vhd(16384, block_size=4096, sectors={9: b"\5" * 512})
    raw = bytearray(vhd.build())
    header = vhd.header(bat=512)
    moved = vhd.footer(data_offset=1024) + raw[1536:2048] + header + raw[2048:-512] + vhd.footer(data_offset=1024)
    assert len(moved) == len(raw)
    assert kit.content(stream(kit.Exporter(bytes(moved)))) == vhd.over(b"")


def test_a_block_before_the_bat_cannot_be_streamed(kit: Any) -> None:
    vhd = kit.Vhd(4096, block_size=4096, sectors={0: b"\5" * 512})
    body = vhd.build()[2048:-512]
    bat = struct.pack(">I", 3).ljust(512, b"\xff")
    raw = vhd.footer() + vhd.header(bat=1536 + len(body)) + body + bat + vhd.footer()
    assert kit.content(ChainReader(kit.chain(raw))) == vhd.over(b"")
    with pytest.raises(ImageError, match=r"BAT\[0\] is sector 0x3.*cannot go back"):
        stream(kit.Exporter(raw))


@pytest.mark.parametrize("step", [511, 1 << 20])
def test_a_fixed_disk_is_streamed_when_its_size_is_known(kit: Any, step: int) -> None:
    vhd = kit.Vhd(100 * 512, kind=2, sectors={7: b"\5" * 512})
    raw = vhd.build()
    reader = stream(kit.Exporter(raw, step), BufferPool(2, 8192), expect_size=vhd.size, expect_parent=StreamKind.FIXED)
    assert kit.content(reader) == vhd.over(b"")
    whole = [taken(chunk) for chunk in reader.chunks()]
    assert [taken(chunk) for chunk in reader.chunks(whole[2][0])] == whole[3:]
    for options in ({}, {"expect_size": vhd.size}, {"expect_size": vhd.size, "expect_parent": StreamKind.BASE}):
        with pytest.raises(ImageError, match="footer cookie"):
            stream(kit.Exporter(raw), **options)
    for wrong in (vhd.size - 512, vhd.size + 512):
        with pytest.raises(ImageError, match=r"footer|ended at byte"):
            kit.content(stream(kit.Exporter(raw), expect_size=wrong, expect_parent=StreamKind.FIXED))
    for other in (kit.Vhd(512, block_size=512), kit.Vhd(512, kind=4, block_size=512)):
        with pytest.raises(ImageError, match=r"footer|ended at byte"):
            kit.content(stream(kit.Exporter(other.build()), expect_size=512, expect_parent=StreamKind.FIXED))


def test_a_message_instead_of_a_disk_is_refused(kit: Any) -> None:
    for text in (b"", b"The uuid you supplied was invalid.\ntype: VDI\n", b"HTTP/1.1 500 Internal Error\r\n" * 100):
        for size in (None, 1 << 20):
            with pytest.raises(ImageError, match=r"ended at byte|footer cookie"):
                kit.content(stream(kit.Exporter(text), expect_size=size))


def test_the_expected_size_and_kind_are_checked_before_the_first_chunk(kit: Any) -> None:
    base, delta = disk(kit, 31).build(), disk(kit, 31, kind=4).build()
    for raw, options, message in (
        (base, {"expect_size": 512}, "current size is 102400; allowed: 512"),
        (base, {"expect_parent": StreamKind.DIFFERENCING}, "dynamic; allowed: a delta"),
        (delta, {"expect_parent": StreamKind.BASE}, "differencing; allowed: a whole disk"),
    ):
        export = kit.Exporter(raw)
        with pytest.raises(ImageError, match=message):
            stream(export, **options)
        assert export.streams[0].closed
    assert stream(kit.Exporter(delta), expect_size=102400, expect_parent=StreamKind.DIFFERENCING).parent_identity


def test_a_reader_that_is_dropped_closes_its_stream_and_frees_its_buffers(kit: Any) -> None:
    pool = BufferPool(3, 4096)
    export = kit.Exporter(disk(kit, 32).build())
    chunks = stream(export, pool).chunks()
    held = next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    held.release()
    assert export.streams[0].closed
    assert kit.free_buffers(pool) == 3


def test_close_before_use_closes_the_stream(kit: Any) -> None:
    export = kit.Exporter(disk(kit, 33).build())
    reader = stream(export)
    reader.close()
    reader.close()
    assert export.streams[0].closed
    assert kit.content(reader) == disk(kit, 33).over(b"")  # and it may be opened again
    assert export.opened == [0, 0]


def test_only_the_prefix_is_read_before_chunks_are_asked_for(kit: Any) -> None:
    export = kit.Exporter(disk(kit, 34, sectors=4000).build())
    stream(export)
    assert len(export.raw) - len(export.streams[0].raw) < 4096


def test_a_stream_from_a_pipe(kit: Any, tmp_path: Path) -> None:
    """Short reads as the kernel gives them."""
    import os
    import threading

    vhd = disk(kit, 35, sectors=2000, block_size=65536)
    raw = vhd.build()
    out, into = os.pipe()

    def send() -> None:
        with os.fdopen(into, "wb", buffering=0) as pipe:
            sent = 0
            while sent < len(raw):
                sent += pipe.write(raw[sent : sent + 7001]) or 0

    class Pipe:
        def read_into(self, buffer: memoryview) -> int:
            return os.readv(out, [buffer])

        def finish(self) -> None:
            sender.join()

        def close(self) -> None:
            os.close(out)

    sender = threading.Thread(target=send)
    sender.start()
    assert kit.content(stream(lambda _at: Pipe())) == vhd.over(b"")
