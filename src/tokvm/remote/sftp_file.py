"""One remote file: pieces asked for ahead, taken in any order, asked for again when they come short.

    ranges ─► pieces of read_size ─► 64 in flight ─► each reply lands in its piece's own memory ─► sink / the caller's buffer

A reply may bring less than was asked for: servers cap a read, some at 64 KiB. The rest of the piece is asked for again.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from tokvm.core.errors import ImageError, SourceError, TokvmError
from tokvm.remote.sftp_pipe import Pending, SftpPipe
from tokvm.remote.sftp_replies import is_eof, refusal
from tokvm.remote.sftp_wire import Kind, request, string, u32, u64

IN_FLIGHT = 64
_NOTHING = memoryview(b"")


@dataclass(slots=True)
class _Piece(Pending):
    """`memory` is to hold the file from `start` on; its first `got` bytes have come. `slot`: what to give back after use."""

    start: int = 0
    memory: memoryview = field(default=_NOTHING)
    slot: memoryview = field(default=_NOTHING)
    got: int = 0


class SftpFile:
    """An open file. `size` is what it was when it was opened; `name` is for messages. Thread-safe."""

    def __init__(self, pipe: SftpPipe, *, name: str, handle: bytes, size: int, read_size: int) -> None:
        self._pipe = pipe
        self._handle = string(handle)
        self._read_size = read_size
        self.name = name
        self.size = size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`. ImageError when the file ends before."""
        step = self._read_size
        transfer = _Transfer(self._pipe, self._handle, self.name, in_flight=IN_FLIGHT)
        pieces = (
            _Piece(transfer.ready, start=offset + at, memory=buffer[at : at + step]) for at in range(0, len(buffer), step)
        )
        transfer.run(pieces, lambda _piece: None)

    def read_ranges(
        self,
        ranges: Iterable[tuple[int, int]],
        sink: Callable[[int, memoryview], None],
        *,
        in_flight: int = IN_FLIGHT,
    ) -> None:
        """Read (file offset, length) ranges; `sink` gets them in pieces, each byte once, in the order they arrive.

        The memory is the sink's until it returns. Ranges are asked for as they come: best ascending and coalesced.
        """
        step = self._read_size
        whole = memoryview(mmap.mmap(-1, step * in_flight))
        free = [whole[at : at + step] for at in range(0, step * in_flight, step)]
        transfer = _Transfer(self._pipe, self._handle, self.name, in_flight=in_flight)

        def pieces() -> Iterator[_Piece]:
            for start, length in ranges:
                for at in range(start, start + length, step):
                    slot = free.pop()
                    yield _Piece(transfer.ready, start=at, memory=slot[: min(step, start + length - at)], slot=slot)

        def arrived(piece: _Piece) -> None:
            sink(piece.start, piece.memory)
            free.append(piece.slot)

        transfer.run(pieces(), arrived)

    def close(self) -> None:
        """Let the server forget the file."""
        with contextlib.suppress(SourceError):
            self._pipe.ask(lambda n: request(Kind.CLOSE, n, self._handle))


class _Transfer:
    """One caller's reads, from the first request to the last reply. At most `in_flight` pieces exist at a time."""

    def __init__(self, pipe: SftpPipe, handle: bytes, name: str, *, in_flight: int) -> None:
        self._pipe = pipe
        self._handle = handle
        self._name = name
        self._in_flight = in_flight
        self.ready: deque[_Piece] = deque()
        self._again: deque[_Piece] = deque()
        self._flying = 0

    def run(self, pieces: Iterator[_Piece], arrived: Callable[[_Piece], None]) -> None:
        try:
            self._top_up(pieces)
            while self._flying:
                piece = self._pipe.wait(self.ready)
                self._flying -= 1
                if self._is_whole(piece):
                    arrived(piece)
                if self._flying <= self._in_flight * 3 // 4:  # several requests in one write: fewer wake-ups on both sides
                    self._top_up(pieces)
        except TokvmError:
            self._drain()
            raise
        except BaseException:  # Ctrl-C, or a sink that failed: replies may still be on their way into our memory
            self._pipe.close()
            raise

    def _top_up(self, pieces: Iterator[_Piece]) -> None:
        batch: list[_Piece] = []
        while self._flying + len(batch) < self._in_flight:
            piece = self._again.popleft() if self._again else next(pieces, None)
            if piece is None:
                break
            batch.append(piece)
        if batch:
            self._flying += len(batch)
            self._pipe.send([(piece, self._request(piece)) for piece in batch])

    def _request(self, piece: _Piece) -> Callable[[int], bytes]:
        piece.into = piece.memory[piece.got :]
        place = u64(piece.start + piece.got) + u32(len(piece.into))
        return lambda n: request(Kind.READ, n, self._handle, place)

    def _is_whole(self, piece: _Piece) -> bool:
        """False when it came short and must be asked for again."""
        at = piece.start + piece.got
        if is_eof(piece):
            raise ImageError("the file ends here, but more of it was expected", where=f"{self._name}@{at:#x}")
        if piece.kind != Kind.DATA:
            raise refusal(piece, where=f"{self._name}@{at:#x}")
        piece.got += piece.length
        if piece.got == len(piece.memory):
            return True
        self._again.append(piece)
        return False

    def _drain(self) -> None:
        """Take the replies still on their way: the memory they land in is about to be somebody else's."""
        with contextlib.suppress(SourceError):
            while self._flying:
                self._pipe.wait(self.ready)
                self._flying -= 1
