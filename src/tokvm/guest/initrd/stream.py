"""Unpacked bytes of an initramfs as they come: exact reads, skips, and a budget that a bomb runs out of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tokvm.core.units import GiB, MiB
from tokvm.guest.base import GuestError

PIECE = 1 * MiB
FIX = "build it again in the guest (update-initramfs -u -k all, or dracut -f --regenerate-all), or take another way than micro"


def bad(what: str, where: str, offset: int) -> GuestError:
    """The error of an initramfs at a byte of it (of the file, or of what an archive unpacks to)."""
    return GuestError(what, where=f"{where}@{offset:#x}", fix=FIX)


_ZEROS = re.compile(rb"\0*")


def zeros_at(data: bytes | memoryview, at: int) -> int:
    """How many zero bytes there are from `at` on; nothing is copied."""
    match = _ZEROS.match(data, at)
    return match.end() - at if match else 0


@dataclass(slots=True)
class Budget:
    """What is left of a whole initramfs' limits. The largest in the field: 0.5 GiB unpacked, some 10 000 members."""

    unpacked: int = 2 * GiB
    members: int = 200_000
    names: int = 16 * MiB
    kept: int = 48 * MiB
    archives: int = 256

    def spend(self, what: str, count: int, where: str, offset: int) -> None:
        """Take `count` of one limit, named like the field; GuestError when it is used up."""
        left: int = getattr(self, what) - count
        if left < 0:
            raise bad(f"an initramfs beyond every measure: too many or too large ({what})", where, offset)
        setattr(self, what, left)


class Unpacked:
    """Reads from pieces; `position` is the offset in what they add up to."""

    def __init__(self, pieces: Iterator[bytes | memoryview], budget: Budget, where: str) -> None:
        self.position = 0
        self.where = where
        self._pieces = pieces
        self._budget = budget
        self._piece = memoryview(b"")
        self._at = 0

    def more(self) -> bool:
        """Whether there is another byte."""
        while self._at == len(self._piece):
            piece = next(self._pieces, None)
            if piece is None:
                return False
            self._budget.spend("unpacked", len(piece), self.where, self.position)
            self._piece, self._at = memoryview(piece), 0
        return True

    def read(self, count: int, what: str) -> bytes:
        """Exactly `count` bytes (the caller bounded it), or GuestError."""
        parts = []
        while count:
            part = bytes(self._some(count, what))
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def read_some(self) -> memoryview:
        """The next bytes, as many as are at hand; `more` said that there are some."""
        return self._some(PIECE, "what was announced")

    def skip(self, count: int, what: str) -> None:
        while count:
            count -= len(self._some(count, what))

    def skip_zeros(self) -> None:
        """Stop before the next byte that is not zero, or at the end."""
        while self.more() and (zeros := zeros_at(self._piece, self._at)):
            self._move(zeros)

    def _some(self, count: int, what: str) -> memoryview:
        if not self.more():
            raise bad(f"it ends inside {what}", self.where, self.position)
        part = self._piece[self._at : self._at + count]
        self._move(len(part))
        return part

    def _move(self, count: int) -> None:
        self._at += count
        self.position += count
