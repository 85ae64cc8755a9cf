"""A token bucket: how long to wait before so many bytes may go."""

from __future__ import annotations

import time
from collections.abc import Callable


class TokenBucket:
    """`rate` bytes per second on average, bursts of up to `burst_s` seconds' worth."""

    def __init__(self, rate: float, *, burst_s: float = 0.25, clock: Callable[[], float] = time.monotonic) -> None:
        if rate <= 0:
            raise ValueError(f"a rate of {rate} bytes per second moves nothing")
        self._rate = rate
        self._burst = rate * burst_s
        self._clock = clock
        self._tokens = self._burst
        self._at = clock()

    def take(self, count: int) -> float:
        """Takes the tokens (the account may go below zero) and says how many seconds to wait before going on."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate) - count
        self._at = now
        return max(0.0, -self._tokens / self._rate)
