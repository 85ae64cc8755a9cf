"""The clock of the played vSphere: the wall clock, moved by tests (sessions that idle, leases that nobody keeps alive).

FOLDER/clock   how far it was moved, seconds; another process sees it at once
"""

from __future__ import annotations

import datetime
import time
from pathlib import Path

from tokvm.testing.persona.store import replace


class Clock:
    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time() + self._moved()

    def move(self, seconds: float) -> None:
        replace(self._file, f"{self._moved() + seconds!r}\n")

    def _moved(self) -> float:
        try:
            return float(self._file.read_text(encoding="ascii"))
        except FileNotFoundError:
            return 0.0


def moment(seconds: float) -> datetime.datetime:
    """As the API says times."""
    return datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC)
