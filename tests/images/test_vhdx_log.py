"""A VHDX whose log was not replayed reads as if it had been, or is refused with the reason; the file is never written."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.images.naive_vhdx import (
    BAT,
    HEADERS,
    METADATA,
    MIB,
    PAGE,
    TABLES,
    Content,
    NaiveVhdx,
    log_entry,
    reseal,
)

from tokvm.core.errors import ImageError
from tokvm.core.extents import ExtentKind
from tokvm.images.vhdx.layer import VhdxLayer, open_vhdx
from tokvm.images.vhdx.patched import PatchedFile, Write

GUID = UUID(int=0xABCD << 96 | 7)
STALE = UUID(int=0x1234 << 96)
Writes = list[tuple[int, Content]]
Log = list[tuple[int, bytes]]  # places in the ring, entries
FREE = 4 * MIB  # where no structure is


def dirty(log: Sequence[tuple[int, bytes]], states: dict[int, int] | None = None, **options: Any) -> NaiveVhdx:
    return NaiveVhdx(4 * MIB, states or {0: 6}, log=list(log), log_guid=GUID, **options)


def opened(kit: Any, raw: bytes) -> VhdxLayer:
    return open_vhdx(kit.File(raw, "dirty.vhdx"))


def whole_file(layer: VhdxLayer) -> bytes:
    raw = bytearray(layer.file.size)
    layer.file.read_into(0, memoryview(raw))
    return bytes(raw)


def replayed(raw: bytes, writes: Writes, last: int = 0) -> bytes:
    """The naive replay."""
    changed = bytearray(raw)
    for offset, content in writes:
        data = bytes(content) if isinstance(content, int) else content
        changed = changed.ljust(offset + len(data), b"\0")
        changed[offset : offset + len(data)] = data
    return bytes(changed.ljust(-(-last // MIB) * MIB, b"\0"))


def entries(
    groups: Sequence[Writes], *, first: int = 1, place: int = 0, length: int = MIB, **common: Any
) -> list[tuple[int, bytes]]:
    """One entry per group of writes, one behind the other around the ring; the tail is the first."""
    found = []
    tail = place
    for number, writes in enumerate(groups):
        named: dict[str, Any] = {"guid": GUID, "sequence": first + number, "tail": tail} | common
        entry = log_entry(writes, **named)
        found.append((place, entry))
        place = (place + len(entry)) % MIB
    return found


def random_writes(rng: random.Random, count: int) -> Writes:
    writes: Writes = []
    for _ in range(count):
        page = FREE + PAGE * rng.randrange(3 * MIB // PAGE)
        writes.append((page, rng.choice((rng.randbytes(PAGE), PAGE, 3 * PAGE, MIB))))
    return writes


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
@pytest.mark.slow
def test_any_log_is_replayed_in_order_wherever_it_lies_in_the_ring(kit: Any, seed: int) -> None:
    rng = random.Random(seed)
    groups = [random_writes(rng, rng.choice((0, 1, 2, 5, 40))) for _ in range(rng.randint(1, 4))]
    place = PAGE * rng.randrange(MIB // PAGE)
    last = rng.choice((0, 9 * MIB, 9 * MIB + PAGE))
    first = rng.choice((100, 2**32 - 1, 2**63))
    log = entries(groups, first=first, place=place, last=last)
    behind = (log[-1][0] + len(log[-1][1])) % MIB
    if MIB - sum(len(entry) for _, entry in log) >= 2 * PAGE:
        guid, sequence = rng.choice(((STALE, first + 50), (GUID, first - 50)))
        log.append((behind, log_entry([(FREE, b"\xaa" * PAGE)], guid=guid, sequence=sequence, tail=behind)))
    raw = dirty(log).build()
    layer = opened(kit, raw)
    expected = replayed(raw, [write for group in groups for write in group], last)
    assert whole_file(layer) == expected
    assert layer.size == 4 * MIB
    for _ in range(20):
        start = rng.randrange(len(expected))
        part = bytearray(min(len(expected) - start, rng.choice((1, 512, PAGE, 3 * PAGE, MIB))))
        layer.file.read_into(start, memoryview(part))
        assert part == expected[start : start + len(part)]


def test_blocks_metadata_and_region_tables_are_read_from_the_log(kit: Any) -> None:
    """What the file itself says of them is damaged."""
    whole = NaiveVhdx(4 * MIB, {0: 6, 2: 6})
    clean = whole.build()
    writes: Writes = [(BAT, clean[BAT : BAT + PAGE]), (METADATA, clean[METADATA : METADATA + PAGE])]
    writes += [(at, clean[at : at + PAGE]) for at in range(TABLES[0], TABLES[0] + 64 * 1024, PAGE)]
    writes += [(METADATA + 64 * 1024, clean[METADATA + 64 * 1024 :][:PAGE]), (whole.places[2] + PAGE, b"\x55" * PAGE)]
    vhdx = dirty(entries([writes[:5], writes[5:]]), {0: 6, 2: 6})
    damaged = bytearray(vhdx.build())
    for at, content in writes:
        damaged[at : at + PAGE] = b"\xdd" * PAGE
        assert isinstance(content, bytes)
    damaged[TABLES[1] : TABLES[1] + PAGE] = b"\xdd" * PAGE
    layer = opened(kit, bytes(damaged))
    assert layer.identity == str(vhdx.id)
    rows = list(layer.window(0, layer.size))
    assert [(row.offset, row.length, row.kind) for row in rows] == [(0, MIB, ExtentKind.DATA), (2 * MIB, MIB, ExtentKind.DATA)]
    page = bytearray(3 * PAGE)
    layer.file.read_into(rows[1].file_offset, memoryview(page))
    assert page == clean[whole.places[2] :][:PAGE] + b"\x55" * PAGE + clean[whole.places[2] + 2 * PAGE :][:PAGE]


def test_a_block_behind_the_files_end_is_zeros_once_the_log_says_so(kit: Any) -> None:
    """The host had made room for the block and lost power before the file was longer."""
    vhdx = dirty([])
    end = len(vhdx.build())
    bat = struct.pack("<4Q", FREE | 6, 0, end | 6, 0).ljust(PAGE, b"\0")
    vhdx.log = entries([[(BAT, bat)]], last=end + MIB)
    layer = opened(kit, vhdx.build())
    (row,) = layer.window(2 * MIB, 3 * MIB)
    assert (row.kind, row.file_offset) == (ExtentKind.DATA, end)
    page = bytearray(b"\xee" * PAGE)
    layer.file.read_into(end + MIB - PAGE, memoryview(page))
    assert not any(page)
    with pytest.raises(ImageError, match="with its log replayed the file ends"):
        layer.file.read_into(end + MIB - PAGE + 1, memoryview(page))


def test_an_entry_without_writes_is_a_log_to_replay(kit: Any) -> None:
    raw = dirty(entries([[]])).build()
    layer = opened(kit, raw)
    assert whole_file(layer) == raw
    assert layer.describe()["log"] == "replayed in memory: 1 entries, 0 writes"


def test_a_torn_newest_entry_ends_the_sequence_before_it(kit: Any) -> None:
    log = entries([[(FREE, b"\x01" * PAGE)], [(FREE, b"\x02" * PAGE)], [(FREE, b"\x03" * PAGE)]])
    torn = bytearray(log[2][1])
    torn[-PAGE:] = bytes(PAGE)
    layer = opened(kit, dirty([*log[:2], (log[2][0], bytes(torn))]).build())
    assert whole_file(layer)[FREE : FREE + PAGE] == b"\x02" * PAGE
    assert layer.describe()["log"] == "replayed in memory: 2 entries, 2 writes"


def test_replay_begins_at_the_heads_tail(kit: Any) -> None:
    """What lies before it is in its place already, and may have changed since."""
    one = log_entry([(FREE, b"\x01" * PAGE)], guid=GUID, sequence=5, tail=0)
    two = log_entry([(FREE + PAGE, b"\x02" * PAGE)], guid=GUID, sequence=6, tail=len(one))
    layer = opened(kit, (raw := dirty([(0, one), (len(one), two)]).build()))
    assert whole_file(layer) == replayed(raw, [(FREE + PAGE, b"\x02" * PAGE)])


def test_the_sequence_with_the_highest_head_is_the_active_one(kit: Any) -> None:
    for high, low in ((0, 512 * 1024), (512 * 1024, 0)):
        newer = entries([[(FREE, b"\x02" * PAGE)]], first=70, place=high)
        older = entries([[(FREE, b"\x01" * PAGE)], []], first=3, place=low)
        assert whole_file(opened(kit, dirty([*newer, *older]).build()))[FREE : FREE + PAGE] == b"\x02" * PAGE


def test_a_read_that_touches_no_patch_goes_straight_to_the_file(kit: Any) -> None:
    raw = bytes(range(256)) * 4096
    file = kit.File(raw)
    seen: list[tuple[int, memoryview]] = []
    file.read_into = lambda offset, buffer: seen.append((offset, buffer))
    patches = PatchedFile(file, [Write(PAGE, PAGE, b"x" * PAGE), Write(5 * PAGE, PAGE)], 0)
    buffer = memoryview(bytearray(PAGE))
    for offset in (0, 2 * PAGE, 4 * PAGE, 6 * PAGE):
        patches.read_into(offset, buffer)
        assert seen.pop() == (offset, buffer)
    patches.read_into(PAGE, buffer)
    assert not seen


def test_the_warning_and_the_description_say_that_the_log_was_replayed(kit: Any) -> None:
    layer = opened(kit, dirty(entries([[(FREE, b"\x01" * PAGE)]])).build())
    assert "the log holds 1 writes" in str(layer.warnings)
    assert layer.describe()["log"] == "replayed in memory: 1 entries, 1 writes"


def test_a_clean_file_with_an_old_log_is_not_replayed(kit: Any) -> None:
    vhdx = NaiveVhdx(4 * MIB, {0: 6}, log=entries([[(FREE, b"\x01" * PAGE)]]))
    layer = opened(kit, vhdx.build())
    assert layer.describe()["log"] == "clean"
    assert not isinstance(layer.file, PatchedFile)


def test_the_log_of_the_used_header_counts(kit: Any) -> None:
    """The older header's guid is of a log that is long over."""
    vhdx = NaiveVhdx(4 * MIB, {0: 6})
    raw = bytearray(vhdx.build())
    raw[HEADERS[0] + 48 : HEADERS[0] + 64] = GUID.bytes_le
    reseal(raw)
    assert opened(kit, bytes(raw)).describe()["log"] == "clean"
    raw[HEADERS[1] + 48 : HEADERS[1] + 64] = GUID.bytes_le
    reseal(raw)
    with pytest.raises(ImageError, match="no entry bears its guid"):
        opened(kit, bytes(raw))
