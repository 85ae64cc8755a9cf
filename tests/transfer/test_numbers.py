"""The small sums: rate limit, meter."""

from __future__ import annotations

import pytest

from tokvm.core.units import MiB
from tokvm.transfer.bucket import TokenBucket
from tokvm.transfer.progress import Meter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_lets_the_rate_through_and_no_more() -> None:
    clock = Clock()
    bucket = TokenBucket(1000.0, burst_s=1.0, clock=clock)
    assert bucket.take(1000) == 0.0
    assert bucket.take(500) == pytest.approx(0.5)
    clock.now += 0.5
    assert bucket.take(0) == 0.0
    sent, began = 0, clock.now
    while clock.now < began + 60:
        clock.now += bucket.take(333)
        sent += 333
    assert sent == pytest.approx(60_000, rel=0.03)


def test_idle_time_is_not_saved_up() -> None:
    clock = Clock()
    bucket = TokenBucket(1000.0, burst_s=0.25, clock=clock)
    clock.now += 3600
    assert bucket.take(1250) == pytest.approx(1.0)


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="moves nothing"):
        TokenBucket(0)


def test_the_meter_follows_the_last_seconds_not_the_whole_past() -> None:
    clock = Clock()
    meter = Meter(1000 * MiB, window_s=10.0, clock=clock)
    for _ in range(20):
        clock.now += 1
        meter.advance(10 * MiB)
    for _ in range(15):
        clock.now += 1
        meter.advance(40 * MiB)
    assert meter.rate == pytest.approx(40 * MiB, rel=0.01)
    assert meter.fraction == pytest.approx(0.8)
    assert meter.left_s == pytest.approx(5, rel=0.01)
    assert meter.seconds == pytest.approx(35)


def test_a_meter_at_rest_knows_no_end() -> None:
    clock = Clock()
    meter = Meter(10, clock=clock)
    clock.now += 1
    assert (meter.rate, meter.left_s) == (0.0, None)
    assert Meter(0, clock=clock).fraction == 1.0
