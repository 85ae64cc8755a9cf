"""A ByteStream with a position: exact reads, skips, and an end that is believed only when the sender confirms it."""

from __future__ import annotations

from tokvm.core.errors import ImageError
from tokvm.core.units import KiB
from tokvm.images.base import ByteStream

_SCRATCH = 256 * KiB


class StreamCursor:
    """Reads `stream`, whose first byte has number `position`. `what` in its methods names the bytes, for messages."""

    def __init__(self, stream: ByteStream, name: str, position: int) -> None:
        self.position = position
        self._stream = stream
        self._name = name
        self._scratch = memoryview(b"")

    def read(self, view: memoryview, what: str) -> None:
        """Fill `view`, or ImageError naming the byte where the stream ended."""
        done = 0
        while done < len(view):
            count = self._stream.read_into(view[done:])
            if count == 0:
                self._stream.finish()  # what the sender says about it comes first
                raise ImageError(
                    f"the stream ended at byte {self.position:#x}, {len(view) - done} bytes before the end of {what}",
                    where=f"{self._name}@{self.position:#x}",
                    fix="run the same command again; it goes on from the last checkpoint",
                )
            done += count
            self.position += count

    def read_bytes(self, count: int, what: str) -> bytearray:
        raw = bytearray(count)
        self.read(memoryview(raw), what)
        return raw

    def skip_to(self, position: int, what: str) -> None:
        """Read past everything before `position`, which is not behind us."""
        if position < self.position:
            raise ValueError(f"a stream cannot go back from {self.position:#x} to {position:#x}")
        if position > self.position and not self._scratch:
            self._scratch = memoryview(bytearray(_SCRATCH))
        while self.position < position:
            self.read(self._scratch[: position - self.position], what)

    def read_rest(self, limit: int) -> bytes:
        """Everything up to the end, at most `limit` bytes and one (so that too much is seen)."""
        raw = memoryview(bytearray(limit + 1))
        done = 0
        while done <= limit:
            count = self._stream.read_into(raw[done:])
            if count == 0:
                break
            done += count
            self.position += count
        return bytes(raw[:done])

    def finish(self) -> None:
        self._stream.finish()

    def close(self) -> None:
        self._stream.close()
