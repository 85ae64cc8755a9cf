"""Sizes and durations as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokvm.core.units import (
    GiB,
    KiB,
    MiB,
    TiB,
    format_bytes,
    format_duration,
    format_rate,
    parse_duration,
    parse_size,
    round_up,
)


@given(st.integers(0, 1 << 64), st.integers(1, 1 << 40))
def test_round_up_is_the_next_multiple(value: int, step: int) -> None:
    rounded = round_up(value, step)
    assert rounded % step == 0
    assert value <= rounded < value + step


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("64K", 64 * KiB),
        ("64k", 64 * KiB),
        ("64 KiB", 64 * KiB),
        ("1.5 GiB", 3 * GiB // 2),
        ("1.5G", 3 * GiB // 2),
        ("0.5M", MiB // 2),
        (" 2 TB ", 2 * TiB),
        ("7B", 7),
        ("9999999999999999999", 9999999999999999999),
    ],
)
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5.2G", "1 P", "0x10", "1e3", "12345678901234567890", "１K\n1", "1G1"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@given(st.integers(0, 1 << 62))
def test_plain_numbers_are_bytes(count: int) -> None:
    assert parse_size(str(count)) == count


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("60s", 60), ("2m", 120), ("2 min", 120), ("1.5h", 5400), ("20ms", 0.02), (" 3 s ", 3)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1d", "1:30", "1,5s", "1234567890"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (3 * GiB // 2, "1.5 GiB"), (2 * TiB, "2 TiB"), (5000 * TiB, "5000 TiB")],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text
    assert format_rate(count) == f"{text}/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.842, "0.84 s"), (12.34, "12.3 s"), (59.94, "59.9 s"), (245, "4 min 05 s"), (7625, "2 h 07 min"), (3600, "1 h 00 min")],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
