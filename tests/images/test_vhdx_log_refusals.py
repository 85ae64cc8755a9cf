"""Logs that cannot be replayed are refused with the reason; hostile ones cost little."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from tests.images.mutation import CPU_LIMIT_S, refusal
from tests.images.naive_vhdx import HEADERS, LOG, MIB, PAGE, TABLES, Content, NaiveVhdx, log_entry, patched
from tests.images.test_vhdx_log import FREE, GUID, STALE, Writes, dirty, entries, opened

from tokvm.core.errors import ImageError
from tokvm.images.vhdx.layer import open_vhdx
from tokvm.images.vhdx.log import MAX_WRITES


def spoiled(offset: int, data: bytes) -> Callable[[], bytes]:
    """One entry, changed at an offset before it was sealed."""

    def change(raw: bytearray) -> None:
        raw[offset : offset + len(data)] = data

    writes: Writes = [(FREE, b"\x01" * PAGE), (FREE + MIB, PAGE)]
    return lambda: dirty(entries([writes], change=change)).build()


def aimed(offset: int, content: Content) -> Callable[[], bytes]:
    return lambda: dirty(entries([[(offset, content)]])).build()


def unsealed() -> bytes:
    place, entry = entries([[(FREE, b"\x01" * PAGE)]])[0]
    return dirty([(place, entry[:100] + b"\xff" + entry[101:])]).build()


def twice() -> bytes:
    one = entries([[(FREE, b"\x01" * PAGE)]], first=5)
    other = entries([[(FREE, b"\x02" * PAGE)]], first=5, place=MIB // 2)
    return dirty([*one, *other]).build()


def cut_entry() -> bytes:
    """Another entry was begun in the middle of it."""
    log = entries([[(FREE + PAGE * page, b"\x01" * PAGE) for page in range(9)]])
    return dirty([*log, (4 * PAGE, log_entry([], guid=STALE, sequence=1, tail=0))]).build()


def too_long() -> bytes:
    log = entries([[(FREE, b"\x01" * PAGE)]])
    front = dirty(log).build()
    vhdx = dirty(log)
    headers = [(at, vhdx.header(9, log_length=257 * MIB, log_offset=5 * MIB)) for at in HEADERS]
    return patched(front, *headers) + bytes(257 * MIB)


ENTRY_AT, DESCRIPTOR_AT, DATA_AT = 0, 64, PAGE
CASES: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "no entry at all": (lambda: dirty([]).build(), LOG, "no active sequence; no entry bears its guid"),
    "wrong guid": (lambda: dirty(entries([[]], guid=STALE)).build(), LOG, "no entry bears its guid"),
    "checksum": (unsealed, LOG, r"the entry at 0x100000 has checksum 0x"),
    "length 0": (spoiled(8, bytes(4)), LOG, "the entry at 0x100000 has a length of 0"),
    "length not of sectors": (spoiled(8, struct.pack("<I", PAGE + 1)), LOG, "has a length of 4097"),
    "length over the log": (spoiled(8, struct.pack("<I", 2 * MIB)), LOG, "has a length of 2097152, where at most 1048576"),
    "length short": (spoiled(8, struct.pack("<I", PAGE)), LOG, r"has checksum|has 1 data descriptors for 0"),
    "another entry inside": (cut_entry, LOG, "has a length of 40960, where at most 16384 are its own"),
    "tail not of sectors": (spoiled(12, b"\x01"), LOG, "has tail 0x1"),
    "tail over the log": (spoiled(12, struct.pack("<I", MIB)), LOG, "has tail 0x100000"),
    "tail where no entry is": (spoiled(12, struct.pack("<I", 8 * PAGE)), LOG, "has tail 0x8000, where no entry"),
    "sequence 0": (lambda: dirty(entries([[]], first=0)).build(), LOG, "sequence number 0"),
    "descriptors absurd": (spoiled(24, b"\xff" * 4), LOG, "4294967295 descriptors in 2 sectors"),
    "a descriptor too few": (spoiled(24, b"\x00"), LOG, "0 data descriptors for 1 data sectors"),
    "a descriptor too many": (spoiled(24, b"\x03"), LOG, "a descriptor of another entry, of no known kind"),
    "descriptor kind": (spoiled(DESCRIPTOR_AT, b"what"), LOG, "of no known kind"),
    "descriptor sequence": (spoiled(DESCRIPTOR_AT + 24, b"\x09"), LOG, "a descriptor of another entry"),
    "descriptor offset": (spoiled(DESCRIPTOR_AT + 16, b"\x01"), LOG, "not of whole sectors"),
    "zero descriptor length": (spoiled(DESCRIPTOR_AT + 32 + 8, b"\x01"), LOG, "not of whole sectors"),
    "data sector signature": (spoiled(DATA_AT, b"dat\0"), LOG, "a data sector of another entry"),
    "data sector sequence, high": (spoiled(DATA_AT + 4, b"\x01"), LOG, "a data sector of another entry"),
    "data sector sequence, low": (spoiled(2 * PAGE - 4, b"\x07"), LOG, "a data sector of another entry"),
    "two sequences of one number": (twice, LOG, "two sequences end with number 5"),
    "file cut short": (lambda: dirty(entries([[]], flushed=5 * MIB + 1)).build(), LOG + 48,
                       "flushed file offset is 5242881; allowed: at most the file's 5242880 bytes: the file was cut short"),
    "file absurdly long": (lambda: dirty(entries([[]], last=1 << 60)).build(), LOG + 56, "last file offset is 115292150"),
    "write over a header": (aimed(HEADERS[0], b"\x01" * PAGE), LOG, "target of log descriptor 0 is 0x1000 bytes at 0x10000"),
    "zeros over the front": (aimed(0, PAGE), LOG, "target of log descriptor 0 is 0x1000 bytes at 0x0"),
    "write into the log": (aimed(LOG + 8 * PAGE, b"\x01" * PAGE), LOG, "0x1000 bytes at 0x108000.*outside the log"),
    "zeros over the log": (aimed(TABLES[0], 2 * MIB), LOG, "0x200000 bytes at 0x30000.*outside the log"),
    "zeros absurdly long": (aimed(FREE, (1 << 63) - PAGE), LOG, "0x7ffffffffffff000 bytes at 0x400000"),
    "zeros past any file": (aimed((1 << 64) - PAGE, PAGE), LOG, "0x1000 bytes at 0xfffffffffffff000"),
    "log too long to replay": (too_long, HEADERS[0] + 68, "length of a log to replay is 269484032; allowed: at most 268435456"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_a_log_that_cannot_be_replayed_is_refused_with_the_reason(kit: Any, case: str) -> None:
    build, offset, message = CASES[case]
    with pytest.raises(ImageError, match=message) as caught:
        opened(kit, build())
    assert caught.value.where == f"dirty.vhdx@{offset:#x}"
    assert caught.value.fix


@pytest.mark.slow
def test_every_flipped_bit_of_the_only_entry_is_refused(kit: Any) -> None:
    """In its header, its descriptors, its data: without that entry there is nothing to replay."""
    raw = dirty(entries([[(FREE, b"\x01" * PAGE), (FREE + MIB, PAGE)]])).build()
    for at in [*range(LOG, LOG + 128, 3), *range(LOG + 128, LOG + 2 * PAGE, 499), LOG + 2 * PAGE - 1]:
        flipped = bytearray(raw)
        flipped[at] ^= 1 << at % 8
        with pytest.raises(ImageError, match="the log cannot be replayed"):
            opened(kit, bytes(flipped))


def test_too_many_writes_are_refused(kit: Any) -> None:
    groups: list[Writes] = [[(FREE, PAGE)] * 8000, [(FREE, PAGE)] * 8000, [(FREE, PAGE)] * (MAX_WRITES - 16000)]
    log = entries(groups)
    assert "16384 writes" in str(opened(kit, dirty(log).build()).describe()["log"])
    with pytest.raises(ImageError, match="more than 16384 writes"):
        opened(kit, dirty(entries([*groups, [(FREE, PAGE)]])).build())


def hostile_logs() -> dict[str, bytes]:
    """64 MiB each. Every sector begins an entry that claims the whole log; one entry full of descriptors; entries in a row."""
    length = 64 * MIB
    claim = bytearray(log_entry([], guid=GUID, sequence=1, tail=0))
    claim[8:12] = struct.pack("<I", length)
    many = log_entry([(FREE, PAGE)] * (length // 32 - 2), guid=GUID, sequence=1, tail=0)
    assert len(many) == length
    row = np.frombuffer(log_entry([], guid=GUID, sequence=1, tail=0), np.uint8)
    return {"claims": bytes(claim) * (length // PAGE), "descriptors": many, "row": np.tile(row, length // PAGE).tobytes()}


@pytest.mark.slow
def test_hostile_logs_of_64_mib_cost_little(kit: Any) -> None:
    for name, log in hostile_logs().items():
        vhdx = NaiveVhdx(MIB, log_guid=GUID, log_length=len(log), log=[])
        raw = bytearray(vhdx.build())
        raw[-len(log) :] = log
        file = kit.File(bytes(raw))
        begin = time.process_time()
        refused = refusal(partial(open_vhdx, file))
        assert time.process_time() - begin < CPU_LIMIT_S, name
        assert (refused is None) == (name == "row")  # its first entry is a sequence by itself
