"""A disk as a stream whose beginning says what the rest is: opened, its prefix read, opened again where a pass goes on.

|<------ prefix ------>|
header, tables         | blocks or grains …            position = the byte of the stream behind a chunk
0                      ^ the stream stays open here    a resumed pass opens it anew, if the prefix is still the same
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Generic, Protocol, TypeVar

from tokvm.core.disk import BufferPool
from tokvm.core.errors import ImageError
from tokvm.core.units import MiB
from tokvm.images.base import ByteStream
from tokvm.images.stream_cursor import StreamCursor

_WORTH_READING_PAST = 1 * MiB  # reading on is cheaper than a second export that the host must seek through


class _Prefix(Protocol):
    @property
    def fingerprint(self) -> str: ...


P = TypeVar("P", bound=_Prefix)


class PrefixedStream(ABC, Generic[P]):
    """`open_at(n)` opens the stream from byte n on. The prefix is read at once, so size, fingerprint and refusals are there
    before the first byte is written. told: by what an export is known to be the same, for the message when it is not."""

    told: ClassVar[str]

    def __init__(self, open_at: Callable[[int], ByteStream], *, name: str, pool: BufferPool | None) -> None:
        self.name = name
        self._open_at = open_at
        self._pool = pool or BufferPool()
        self._cursor: StreamCursor | None = None
        self._prefix = self._read_prefix()

    @abstractmethod
    def _parse(self, cursor: StreamCursor) -> P:
        """Read the prefix from the stream's beginning, or ImageError."""

    def close(self) -> None:
        cursor, self._cursor = self._cursor, None
        if cursor is not None:
            cursor.close()

    def _read_prefix(self) -> P:
        """Open the stream at its start and read what says where everything is; the stream stays open behind it."""
        self.close()
        self._cursor = StreamCursor(self._open_at(0), self.name, 0)
        try:
            return self._parse(self._cursor)
        except BaseException:
            self.close()
            raise

    def _cursor_at(self, start: int, *, from_beginning: bool = False) -> StreamCursor:
        """A stream that is known to have our prefix, open at `start` or not far before it (from_beginning: anywhere before it,
        if it is open). The caller closes it."""
        if self._cursor is None and self._read_prefix().fingerprint != self._prefix.fingerprint:
            self.close()
            raise ImageError(
                f"the export changed: its {self.told} is not what it was when the pass began",
                where=self.name,
                fix="copy this pass of the disk again from its start",
            )
        cursor, self._cursor = self._cursor, None
        if cursor is not None and (from_beginning or start - cursor.position <= _WORTH_READING_PAST):
            return cursor
        if cursor is not None:
            cursor.close()
        return StreamCursor(self._open_at(start), self.name, start)
