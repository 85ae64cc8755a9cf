"""What stands before the blocks: headers, region tables, metadata, linkage, and the CRC over them."""

from __future__ import annotations

import logging
import random
import struct
from typing import Any

import numpy as np
import pytest
from tests.images.naive_vhdx import CONTENT, ENTRY, HEADERS, MIB, TABLES, NaiveVhdx, patched, reseal
from tests.images.test_vhdx_reading import chain_of, layer_of

from tokvm.core.errors import ImageError
from tokvm.core.extents import Extent, ExtentKind
from tokvm.images.vhdx.crc import crc32c, joined, row_registers


def test_the_header_with_the_higher_sequence_number_counts(kit: Any) -> None:
    vhdx = NaiveVhdx(MIB)
    for one, two, expected in ((9, 4, 9), (4, 9, 9), (0, 2**64 - 1, 2**64 - 1)):
        other = NaiveVhdx(MIB, name="other")
        headers = [(vhdx if number == expected else other).header(number) for number in (one, two)]
        layer = layer_of(kit, patched(vhdx.build(), *zip(HEADERS, headers, strict=True)))
        assert layer.identity == str(vhdx.id)
        assert layer.describe()["header_sequence"] == expected
        assert layer.warnings == ()


def test_equal_headers_with_equal_numbers_are_fine(kit: Any) -> None:
    vhdx = NaiveVhdx(MIB)
    layer = layer_of(kit, patched(vhdx.build(), *((at, vhdx.header(1)) for at in HEADERS)))
    assert layer.identity == str(vhdx.id)


@pytest.mark.parametrize("damaged", [0, 1])
def test_one_damaged_header_is_read_around_with_a_warning(kit: Any, damaged: int, caplog: pytest.LogCaptureFixture) -> None:
    vhdx = NaiveVhdx(MIB)
    raw = bytearray(vhdx.build())
    raw[HEADERS[damaged] + 20] ^= 1
    with caplog.at_level(logging.WARNING):
        layer = layer_of(kit, bytes(raw))
    assert layer.describe()["header_sequence"] == (8, 7)[damaged]
    assert "one of the two headers is damaged" in str(layer.warnings)
    assert "one of the two headers is damaged" in caplog.text


def test_a_damaged_first_region_table_is_read_around_with_a_warning(kit: Any) -> None:
    raw = bytearray(NaiveVhdx(MIB, {0: 6}).build())
    raw[TABLES[0] + 500] ^= 1
    layer = layer_of(kit, bytes(raw))
    assert layer.warnings == ("the first region table is damaged; the second one is used",)
    raw[TABLES[0] + 500] ^= 1
    raw[TABLES[1] + 500] ^= 1
    assert layer_of(kit, bytes(raw)).warnings == ()


def test_unknown_things_that_are_not_required_are_skipped(kit: Any) -> None:
    vhdx = NaiveVhdx(MIB, {0: 6})
    regions = vhdx.regions([(NaiveVhdx(1, name="odd").id, 4 * MIB, MIB, 0)])
    raw = bytearray(patched(vhdx.build(), *((at, regions) for at in TABLES)))
    raw += bytes(2 * MIB)
    count = 2 * MIB + 10
    raw[count : count + 2] = struct.pack("<H", 6)
    entry = ENTRY["locator"]
    raw[entry : entry + 32] = struct.pack("<16sIIII", b"unknown to anyone".ljust(16)[:16], 0x10800, 5, 2, 0)
    with pytest.raises(ImageError, match="outside the region"):  # the unknown region lies over the block
        layer_of(kit, bytes(raw))
    regions = vhdx.regions([(NaiveVhdx(1, name="odd").id, 8 * MIB, MIB, 0)])
    raw = bytearray(patched(bytes(raw).ljust(9 * MIB, b"\0"), *((at, regions) for at in TABLES)))
    assert list(layer_of(kit, bytes(raw)).window(0, MIB)) == [Extent(0, MIB, ExtentKind.DATA, vhdx.places[0])]


def test_a_user_item_with_the_guid_of_a_known_one_is_another_item(kit: Any) -> None:
    vhdx = NaiveVhdx(MIB)
    raw = bytearray(vhdx.build())
    raw[2 * MIB + 10] = 6
    raw[ENTRY["locator"] : ENTRY["locator"] + 32] = (
        raw[ENTRY["size"] : ENTRY["size"] + 16] + struct.pack("<IIII", 0x10800, 8, 1, 0)
    )  # fmt: skip
    assert layer_of(kit, bytes(raw)).size == MIB


def test_linkage_is_by_data_write_guid_in_any_case(kit: Any) -> None:
    base, child = NaiveVhdx(MIB, name="base"), NaiveVhdx(MIB, is_child=True, parent="base", name="child")
    layer = layer_of(kit, child.build())
    assert layer.linkage.parents == (str(base.id),)
    assert layer.parent_identity == str(base.id)
    assert layer.linkage.unique
    assert chain_of(kit, base.build(), child.build()).identity == str(child.id)
    loud = Loud(MIB, is_child=True, parent="base", name="child")
    assert len(chain_of(kit, base.build(), loud.build()).layers) == 2
    stranger = NaiveVhdx(MIB, name="stranger")
    with pytest.raises(ImageError, match="it was made over parent"):
        chain_of(kit, stranger.build(), child.build())


def test_the_second_linkage_is_as_good_as_the_first(kit: Any) -> None:
    base, child = NaiveVhdx(MIB, name="base"), Second(MIB, is_child=True, parent="nobody", name="child")
    assert layer_of(kit, child.build()).linkage.parents[1] == str(base.id)
    assert len(chain_of(kit, base.build(), child.build()).layers) == 2


class Loud(NaiveVhdx):
    @property
    def locator(self) -> dict[str, str]:
        return {key: value.upper() if key == "parent_linkage" else value for key, value in super().locator.items()}


class Second(NaiveVhdx):
    @property
    def locator(self) -> dict[str, str]:
        return super().locator | {"parent_linkage2": str(NaiveVhdx(1, name="base").id)}


def test_a_null_id_names_nobody(kit: Any) -> None:
    """Two disks with a null data write guid are not the same disk, and a raw file is the parent of neither."""
    vhdx = NaiveVhdx(MIB)
    headers = [(at, vhdx.header(1, data=bytes(16))) for at in HEADERS]
    layer = layer_of(kit, patched(vhdx.build(), *headers))
    assert layer.linkage.ids == ()
    assert layer.identity == ""


def test_sectors_of_another_size_than_the_parents_are_refused(kit: Any) -> None:
    base = NaiveVhdx(MIB, name="base", sector_size=4096)
    child = NaiveVhdx(MIB, is_child=True, parent="base", name="child")
    with pytest.raises(ImageError, match="logical sectors have 512 bytes"):
        chain_of(kit, base.build(), child.build())


def test_describe_says_what_a_person_wants_to_know(kit: Any) -> None:
    child = NaiveVhdx(3 * MIB, {0: 7, 1: 2}, {0: bytes(512)}, is_child=True, parent="base", sector_size=512)
    found = layer_of(kit, child.build()).describe()
    assert found["type"] == "differencing"
    assert found["virtual_size"] == 3 * MIB
    assert (found["block_size"], found["logical_sector_size"], found["physical_sector_size"]) == (MIB, 512, 4096)
    assert found["creator"] == r"naïve \x1b[1m"
    assert found["log"] == "clean"
    assert found["parent_locator"]["relative_path"] == ".\\parent.vhdx"  # type: ignore[index]
    assert found["blocks_by_state"] == {"not_present": 1, "zero": 1, "partially_present": 1}
    assert layer_of(kit, NaiveVhdx(MIB, fixed=True).build()).describe()["type"] == "fixed"
    assert layer_of(kit, NaiveVhdx(MIB).build()).describe()["type"] == "dynamic"


def naive_crc(data: bytes) -> int:
    """Bit by bit."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def test_crc32c_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of the CRC catalogue
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    rng = random.Random(1)
    for length in (*range(10), 63, 64, 65, 127, 128, 129, 191, 1000, 4095, 4096, 4097):
        data = rng.randbytes(length)
        assert crc32c(data) == naive_crc(data), length
    data = rng.randbytes(5 * 4096)
    registers = row_registers(np.frombuffer(data, np.uint8).reshape(5, 4096))
    assert joined(registers.tolist(), 4096) == naive_crc(data)


def test_a_parameter_changed_without_its_crc_is_found_where_a_crc_covers_it(kit: Any) -> None:
    raw = NaiveVhdx(MIB).build()
    for at in (HEADERS[0] + 16, HEADERS[1] + 72, TABLES[0] + 40):
        flipped = bytearray(raw)
        flipped[at] ^= 1
        assert layer_of(kit, bytes(flipped)).warnings
    repaired = bytearray(raw)
    repaired[CONTENT["size"]] ^= 1
    reseal(repaired)
    with pytest.raises(ImageError, match="virtual disk size"):
        layer_of(kit, bytes(repaired))
