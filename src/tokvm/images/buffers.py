"""One pool buffer shared by several chunks: it goes back to the pool when the last of them is released."""

from __future__ import annotations

import threading
from collections.abc import Callable

PAGE = 4096  # what O_DIRECT wants of an address at most


class SharedBuffer:
    """A buffer with a count of its users. The maker is one of them; each chunk cut from it is another."""

    __slots__ = ("_give_back", "_lock", "_users", "view")

    def __init__(self, view: memoryview, give_back: Callable[[], None]) -> None:
        self.view = view
        self._give_back = give_back
        self._users = 1
        self._lock = threading.Lock()

    def retain(self) -> None:
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """One user less. Callable from any thread."""
        with self._lock:
            self._users -= 1
            left = self._users
        if left == 0:
            self._give_back()


def page_offset(offset: int, size: int) -> int:
    """Where in a buffer of `size` the bytes of guest `offset` go, so that page-aligned guest bytes lie on page-aligned
    addresses and can be written with O_DIRECT without a copy."""
    return offset % PAGE if size >= 2 * PAGE else 0
