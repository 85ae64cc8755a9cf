"""How fast is it going, and when will it be done? Numbers only; whoever shows them lives in the CLI."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable


class Meter:
    """Bytes done out of `total`, the rate over the last `window_s` seconds, and the seconds left at that rate."""

    def __init__(
        self, total: int, *, done: int = 0, window_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total = total
        self.done = done
        self._window_s = window_s
        self._clock = clock
        self._began = clock()
        self._points: deque[tuple[float, int]] = deque([(self._began, done)])

    def advance(self, count: int) -> None:
        self.done += count
        now = self._clock()
        if now - self._points[-1][0] >= self._window_s / 100:
            self._points.append((now, self.done))
        while len(self._points) > 2 and now - self._points[1][0] >= self._window_s:
            self._points.popleft()

    @property
    def seconds(self) -> float:
        """Since the meter was made."""
        return self._clock() - self._began

    @property
    def rate(self) -> float:
        """Bytes per second over the window; 0 while nothing is known. Falls when nothing arrives."""
        at, done = self._points[0]
        passed = self._clock() - at
        return (self.done - done) / passed if passed > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds to go; None while nothing moves."""
        rate = self.rate
        return max(0, self.total - self.done) / rate if rate > 0 else None

    @property
    def fraction(self) -> float:
        return min(1.0, self.done / self.total) if self.total > 0 else 1.0
