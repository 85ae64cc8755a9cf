"""What long work on image files tells whoever watches."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    def begin(self, what: str, total: int, done: int) -> None:
        """Bytes there are at most, and how many an earlier run did."""
        ...

    def advance(self, count: int) -> None: ...
