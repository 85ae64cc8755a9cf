"""What a VHD says about the guest disk: bits, sizes, footers."""

from __future__ import annotations

import logging
import random
import struct
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokvm.core.errors import ImageError
from tokvm.core.extents import Extent, ExtentKind
from tokvm.images.open import open_image
from tokvm.images.reader import ChainReader
from tokvm.images.vhd.layer import VhdLayer, open_vhd

SECTOR = 512
FULL = {"max_examples": 60, "deadline": None, "suppress_health_check": list(HealthCheck)}


def data(byte: int) -> bytes:
    return bytes([byte]) * SECTOR


def layer_of(kit: Any, raw: bytes) -> VhdLayer:
    return open_vhd(kit.File(raw))


@settings(**FULL)  # type: ignore[arg-type]
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 300).map(lambda sectors: sectors * SECTOR),
    block_size=st.sampled_from([512, 1024, 2048, 4096, 16384, 65536]),
    count=st.integers(0, 12),
)
@pytest.mark.slow
def test_any_layout_of_a_dynamic_disk_reads_as_its_sectors(kit: Any, seed: int, size: int, block_size: int, count: int) -> None:
    rng = random.Random(seed)
    vhd = kit.Vhd(size, block_size=block_size, sectors=kit.random_sectors(rng, size, count), seed=seed)
    layer = layer_of(kit, vhd.build())
    assert layer.size == size
    assert kit.content(ChainReader(kit.chain(vhd.build()))) == vhd.over(b"")


@settings(**FULL)  # type: ignore[arg-type]
@given(seed=st.integers(0, 2**32), sectors=st.integers(1, 200), block_size=st.sampled_from([2048, 4096, 16384]))
def test_a_child_names_exactly_the_sectors_with_a_set_bit(kit: Any, seed: int, sectors: int, block_size: int) -> None:
    rng = random.Random(seed)
    vhd = kit.Vhd(sectors * SECTOR, kind=4, block_size=block_size, parent="base", seed=seed)
    vhd.sectors = kit.random_sectors(rng, vhd.size, 6)
    found = layer_of(kit, vhd.build()).window(0, vhd.size)
    named = {at // SECTOR for extent in found for at in range(extent.offset, extent.end, SECTOR)}
    assert named == set(vhd.sectors)
    assert {extent.kind for extent in found} <= {ExtentKind.DATA}


def test_clear_bits_are_zero_in_a_dynamic_disk_and_absent_in_a_child(kit: Any) -> None:
    for kind, expected in (
        (3, [ExtentKind.DATA, ExtentKind.ZERO, ExtentKind.DATA, ExtentKind.ZERO]),
        (4, [ExtentKind.DATA] * 2),
    ):
        vhd = kit.Vhd(4096, kind=kind, block_size=4096, sectors={0: data(1), 3: data(2)}, parent="p" if kind == 4 else None)
        found = list(layer_of(kit, vhd.build()).window(0, 4096))
        assert [extent.kind for extent in found] == expected


def test_a_block_that_is_not_in_the_file_is_absent(kit: Any) -> None:
    vhd = kit.Vhd(12288, block_size=4096, sectors={8: data(7)})
    found = list(layer_of(kit, vhd.build()).window(0, 12288))
    start = vhd.block_starts[1] + 512
    assert found == [Extent(4096, 512, ExtentKind.DATA, start), Extent(4608, 3584, ExtentKind.ZERO)]


@pytest.mark.parametrize("size", [512, 4096 - 512, 4096, 4096 + 512, 3 * 4096 - 512])
def test_the_last_block_is_clipped_to_the_disk(kit: Any, size: int) -> None:
    last = size // SECTOR - 1
    vhd = kit.Vhd(size, block_size=4096, sectors={last: data(9)})
    found = list(layer_of(kit, vhd.build()).window(0, 1 << 40))
    assert found[-1].end == size
    assert kit.content(ChainReader(kit.chain(vhd.build())))[-SECTOR:] == data(9)


def test_a_last_block_that_was_stored_short_is_enough(kit: Any) -> None:
    vhd = kit.Vhd(4096 + 512, block_size=4096, sectors={8: data(9)})
    raw = vhd.build()
    short = raw[: -512 - 4096 + 512] + vhd.footer()
    assert kit.content(ChainReader(kit.chain(short))) == vhd.over(b"")


def test_the_size_is_the_current_size_not_chs(kit: Any) -> None:
    vhd = kit.Vhd(20 * 4 * 17 * 512 + 1536, block_size=65536, geometry=(20, 4, 17))
    layer = layer_of(kit, vhd.build())
    assert layer.size == vhd.size
    assert layer.describe()["chs_size"] == 20 * 4 * 17 * 512


def test_a_fixed_disk_is_its_bytes(kit: Any) -> None:
    vhd = kit.Vhd(8192, kind=2, sectors={3: data(5)})
    assert kit.content(ChainReader(kit.chain(vhd.build()))) == vhd.over(b"")


def test_a_footer_written_by_the_guest_into_a_fixed_disk_is_ignored(kit: Any) -> None:
    inner = kit.Vhd(4096, block_size=4096).build()
    sectors = {place: inner[place * SECTOR :][:SECTOR] for place in range(len(inner) // SECTOR)}
    vhd = kit.Vhd(8192, kind=2, sectors=sectors)
    assert layer_of(kit, vhd.build()).size == 8192
    assert kit.content(ChainReader(kit.chain(vhd.build()))) == vhd.over(b"")


def test_a_damaged_trailing_footer_is_replaced_by_the_copy_with_a_warning(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    vhd = kit.Vhd(8192, block_size=4096, sectors={1: data(3)})
    raw = vhd.build()
    with caplog.at_level(logging.WARNING):
        layer = layer_of(kit, kit.patched(raw, len(raw) - 512 + 48, b"\x01"))
    assert "copy at the start is used" in str(layer.describe()["warnings"])
    assert "copy at the start is used" in caplog.text
    assert list(layer.window(0, 8192)) == list(layer_of(kit, raw).window(0, 8192))


def test_a_missing_trailing_footer_is_a_damaged_one(kit: Any) -> None:
    vhd = kit.Vhd(8192, block_size=4096, sectors={1: data(3)})
    assert layer_of(kit, vhd.build()[:-512]).warnings


def test_a_damaged_or_different_copy_is_only_a_warning(kit: Any) -> None:
    vhd = kit.Vhd(8192, block_size=4096, sectors={1: data(3)})
    raw = vhd.build()
    for copy, expected in ((bytes(512), "is damaged"), (vhd.footer(size=4096), "differ in current_size")):
        layer = layer_of(kit, copy + raw[512:])
        assert expected in layer.warnings[0]
        assert layer.size == 8192


def test_virtual_pc_wrote_a_footer_of_511_bytes(kit: Any) -> None:
    vhd = kit.Vhd(8192, block_size=4096, sectors={1: data(3)})
    layer = layer_of(kit, vhd.build()[:-1])
    assert layer.size == 8192
    assert not layer.warnings


def test_old_tapdisk_set_hidden_without_summing_again(kit: Any) -> None:
    vhd = kit.Vhd(8192, block_size=4096, creator=b"tap\0", creator_version=0x10001)
    footer = bytearray(vhd.footer())
    footer[85] = 1
    raw = vhd.build()
    layer = layer_of(kit, bytes(footer) + raw[512:-512] + bytes(footer))
    assert layer.describe()["hidden"] is True
    assert not layer.warnings
    modern = footer[:28] + b"win " + footer[32:]
    with pytest.raises(ImageError, match="checksum"):
        layer_of(kit, bytes(modern) + raw[512:-512] + bytes(modern))


def test_a_saved_state_is_a_warning(kit: Any) -> None:
    layer = layer_of(kit, kit.Vhd(8192, block_size=4096).build(saved=1))
    assert "suspended" in layer.warnings[0]


def test_extra_bat_entries_of_a_resized_disk_are_not_read(kit: Any) -> None:
    vhd = kit.Vhd(8192, block_size=4096, sectors={1: data(3)}, extra_entries=3)
    raw = kit.patched(vhd.build(), 1536 + 4 * 2, struct.pack(">I", 0x00FFFFFF))
    assert kit.content(ChainReader(kit.chain(raw))) == vhd.over(b"")


def test_a_null_parent_id_means_a_raw_parent(kit: Any) -> None:
    layer = layer_of(kit, kit.Vhd(8192, kind=4, block_size=4096, parent=None).build())
    assert layer.parent_identity == "00000000-0000-0000-0000-000000000000"


def test_locators_are_shown_and_their_control_characters_escaped(kit: Any) -> None:
    vhd = kit.Vhd(8192, kind=4, block_size=4096, parent="p", bat_offset=2048)
    raw = bytearray(vhd.build())
    path = "C:\\a\n\x1b[31mb".encode("utf-16-le")
    raw[512 + 576 : 512 + 600] = struct.pack(">4sIIIQ", b"W2ku", 512, len(path), 0, 1536)
    raw[512 + 600 : 512 + 624] = struct.pack(">4sIIIQ", b"MacX", 512, 1 << 31, 0, 1 << 60)
    raw[1536 : 1536 + len(path)] = path
    raw[512:1536] = kit.sealed_header(bytes(raw[512:1536]))
    described = layer_of(kit, bytes(raw)).describe()
    assert described["parent_locators"] == [
        {"code": "W2ku", "path": "C:\\a\\n\\x1b[31mb"},
        {"code": "MacX", "path": None},
    ]


def test_windows_are_bounded_in_rows_and_cover_the_disk(kit: Any) -> None:
    size = 64 * 16384
    vhd = kit.Vhd(size, block_size=16384, sectors={sector: data(1) for sector in range(0, size // SECTOR, 2)})
    layer = layer_of(kit, vhd.build())
    whole = layer.window(0, size)
    for max_rows in (1, 32, 33, 500, 10_000):
        windows = list(layer.windows(max_rows=max_rows))
        assert [window.start for window in windows] == [0, *(window.stop for window in windows[:-1])]
        assert windows[-1].stop == size
        assert all(len(window) <= max(max_rows, 32) for window in windows)
        assert [extent for window in windows for extent in window] == list(whole.explicit())


def test_describe_is_ready_for_json(kit: Any) -> None:
    described = open_image(kit.File(kit.Vhd(8192, block_size=4096, sectors={0: data(1)}).build())).describe()
    assert described["format"] == "vhd"
    assert described["type"] == "dynamic"
    assert described["blocks_present"] == 1
    assert described["creator"] == "win 10.0"
    assert described["created"] == "2000-01-01T00:00:00+00:00"
