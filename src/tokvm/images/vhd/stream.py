"""A VHD read front to back: what XAPI's vdi-export sends for a base (dynamic) or a delta (differencing).

    |<-------- prefix -------->|
    footer copy | header … BAT | locators, batmap, gaps | bitmap, block | bitmap, block … | footer | end
    0                          ^ kept: 4 bytes a block    ^ in the order of the file, not of the guest

    position = the byte of the stream behind the chunk. A stream broken off anywhere goes on from the last position: the
    bitmap of its block is read again, and what was handed out of the block is read past.

Nothing is sought: the BAT must come before the blocks. Only the prefix and one buffer are held. The stream is whole only when
the footer at its end was read, nothing follows it, and the sender says that it is done; a short stream with a clean exit is
an error. Bits decide: DATA where set; clear is ZERO in a dynamic disk, ABSENT in a differencing one (no chunk).

A fixed VHD has its footer at the end only: its stream is read when the caller says so and knows the size; all of it is DATA.
It is never guessed: whatever does not begin with a footer (an error page, a flipped bit) is refused before the first chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum

import numpy as np

from tokvm.core.disk import BufferPool, Chunk
from tokvm.core.errors import ImageError
from tokvm.core.extents import ExtentKind, ExtentMap
from tokvm.core.units import KiB, MiB
from tokvm.images.base import WINDOW, ByteStream
from tokvm.images.buffers import SharedBuffer, page_offset
from tokvm.images.fields import bad_field
from tokvm.images.prefixed_stream import PrefixedStream
from tokvm.images.raw import linear_map
from tokvm.images.stream_cursor import StreamCursor
from tokvm.images.vhd.blocks import BlockTable
from tokvm.images.vhd.prefix import Prefix, fixed_prefix, read_prefix
from tokvm.images.vhd.structs import FOOTER_SIZE, DiskType, Footer

_MAX_SLACK = 64 * KiB  # between the last block and the footer: Windows pads to 4 KiB
_MAX_TAIL = 16 * MiB  # the same where there are no blocks: locators and batmap


class StreamKind(Enum):
    """What the caller asked the exporter for."""

    BASE = "base"
    DIFFERENCING = "differencing"
    FIXED = "fixed"


_WANTED = {
    StreamKind.BASE: (DiskType.DYNAMIC, "a whole disk (dynamic)"),
    StreamKind.DIFFERENCING: (DiskType.DIFFERENCING, "a delta over the previous snapshot (differencing)"),
    StreamKind.FIXED: (DiskType.FIXED, "a fixed disk whose size is known"),
}


class VhdStream(PrefixedStream[Prefix]):
    """Implements `core.disk.DiskReader`.

    A delta that comes back as a full disk is refused, and the other way round: the exporter lost the base snapshot or was
    asked wrongly, and absent ranges would mean something else than the caller thinks.
    """

    told = "size, type, parent or BAT"

    def __init__(
        self,
        open_at: Callable[[int], ByteStream],
        *,
        name: str,
        pool: BufferPool | None = None,
        expect_size: int | None = None,
        expect_parent: StreamKind | None = None,
    ) -> None:
        self._fixed_size = expect_size if expect_parent is StreamKind.FIXED else None
        super().__init__(open_at, name=name, pool=pool)
        try:
            self._check_expected(expect_size, expect_parent)
        except ImageError:
            self.close()
            raise

    @property
    def size(self) -> int:
        return self._prefix.footer.current_size

    @property
    def fingerprint(self) -> str:
        """Of size, type, parent and BAT: what decides which byte of the stream is what. Not of the disk's own id or times,
        which an exporter may invent anew."""
        return self._prefix.fingerprint

    @property
    def parent_identity(self) -> str | None:
        """The id of the disk that a delta was made over; None for a full disk."""
        return self._prefix.parent_identity

    @property
    def total(self) -> int:
        table = self._prefix.table
        return self.size if table is None else int(table.length(self._prefix.order).sum())

    def covered(self) -> Iterator[ExtentMap]:
        """By whole blocks, from the BAT: within a block named DATA, sectors may turn out ZERO or ABSENT."""
        table = self._prefix.table
        for start in range(0, self.size, WINDOW):
            stop = min(start + WINDOW, self.size)
            yield linear_map(start, stop) if table is None else _block_map(table, start, stop)

    def chunks(self, position: int = 0) -> Iterator[Chunk]:
        prefix = self._prefix
        if not 0 <= position <= prefix.blocks_end:
            raise bad_field(self.name, position, "resume position", position, f"0 to {prefix.blocks_end}")
        cursor = self._cursor_at(prefix.resume_at(position), from_beginning=position == 0)
        try:
            if prefix.table is None:
                yield from self._linear(cursor, position, prefix.blocks_end)
            else:
                for block in prefix.blocks_behind(position).tolist():
                    yield from self._block(cursor, prefix.table, block, position)
            self._check_end(cursor)
        finally:
            cursor.close()

    def _parse(self, cursor: StreamCursor) -> Prefix:
        return read_prefix(cursor, self.name) if self._fixed_size is None else fixed_prefix(self._fixed_size)

    def _check_expected(self, size: int | None, kind: StreamKind | None) -> None:
        if size is not None and size != self.size:
            raise bad_field(self.name, 48, "footer current size", self.size, f"{size}, which the host states")
        type_, asked = self._prefix.footer.type, None if kind is None else _WANTED[kind]
        if asked is not None and type_ is not asked[0]:
            raise bad_field(self.name, 60, "footer disk type", type_.name.lower(), asked[1])

    def _linear(self, cursor: StreamCursor, position: int, end: int) -> Iterator[Chunk]:
        """A fixed disk: stream and guest disk are the same bytes."""
        cursor.skip_to(position, "guest data")
        while position < end:
            take = min(end - position, self._pool.size)
            buffer = self._read(cursor, 0, take)
            position += take
            yield Chunk(position - take, take, ExtentKind.DATA, position, buffer.view[:take], buffer.release)

    def _block(self, cursor: StreamCursor, table: BlockTable, block: int, position: int) -> Iterator[Chunk]:
        """The chunks of one block that lie behind `position`."""
        start, guest = int(table.start[block]), block * table.block_size
        shift = start + table.bitmap_bytes - guest  # stream offset = guest offset + shift, all through the block
        cursor.skip_to(start, "the bytes between blocks")
        bits = np.frombuffer(cursor.read_bytes(table.bitmap_bytes, f"the bitmap of block {block}"), np.uint8)
        stop = min(guest + table.block_size, self.size)
        rows = ExtentMap.build(guest, stop, *table.rows(np.array([block]), bits[np.newaxis]))
        at = max(guest, position - shift)
        while at < stop:
            end = min(at + self._pool.size - page_offset(at, self._pool.size), stop)
            yield from self._piece(cursor, rows.clip(at, end), shift)
            at = end

    def _piece(self, cursor: StreamCursor, rows: ExtentMap, shift: int) -> Iterator[Chunk]:
        """The chunks of a part of a block that fits into one buffer; its clear sectors at either end are read past."""
        data = rows.only(ExtentKind.DATA)
        buffer, base = None, 0
        if len(data):
            first, last = int(data.offset[0]), int(data.offset[-1] + data.length[-1])
            base = first - page_offset(first, self._pool.size)
            cursor.skip_to(first + shift, "a block")
            buffer = self._read(cursor, first - base, last - first)
        try:
            for extent in rows:
                position = extent.end + shift
                if extent.kind is ExtentKind.DATA and buffer is not None:
                    buffer.retain()
                    view = buffer.view[extent.offset - base : extent.end - base]
                    yield Chunk(extent.offset, extent.length, ExtentKind.DATA, position, view, buffer.release)
                else:
                    yield Chunk(extent.offset, extent.length, ExtentKind.ZERO, position)
        finally:
            if buffer is not None:
                buffer.release()

    def _read(self, cursor: StreamCursor, at: int, length: int) -> SharedBuffer:
        """The next `length` bytes of guest data, at `at` in a fresh buffer."""
        buffer = SharedBuffer(*self._pool.acquire())
        try:
            cursor.read(buffer.view[at : at + length], "guest data")
        except BaseException:
            buffer.release()
            raise
        return buffer

    def _check_end(self, cursor: StreamCursor) -> None:
        """The last bytes are a footer that says the same as the first; and the sender says that it is done."""
        prefix = self._prefix
        cursor.skip_to(prefix.blocks_end, "the last block")
        at = cursor.position
        limit = (_MAX_TAIL if prefix.table is not None and not len(prefix.order) else _MAX_SLACK) + FOOTER_SIZE
        rest = cursor.read_rest(limit)
        cursor.finish()
        if not FOOTER_SIZE <= len(rest) <= limit:
            read = f"{len(rest)} bytes" if len(rest) <= limit else f"more than {limit} bytes"
            raise bad_field(self.name, at, "the stream's end", read, f"a footer of {FOOTER_SIZE} bytes and nothing behind it")
        at = cursor.position - FOOTER_SIZE
        footer, expected = Footer.parse(rest[-FOOTER_SIZE:], name=self.name, offset=at), prefix.footer
        for field in ("type", "current_size", "data_offset"):
            read, allowed = getattr(footer, field), getattr(expected, field)
            if read != allowed:
                raise bad_field(self.name, at, f"trailing footer {field}", read, f"{allowed}, as at the stream's start")


def _block_map(table: BlockTable, start: int, stop: int) -> ExtentMap:
    blocks = table.present(start // table.block_size, -(-stop // table.block_size))
    if not len(blocks):
        return ExtentMap.empty(start, stop)
    data = table.start[blocks] + table.bitmap_bytes
    return ExtentMap.build(start, stop, blocks * table.block_size, table.block_size, int(ExtentKind.DATA), data)
