"""One way through the markers of a stream-optimised VMDK, from a grain on to the end: grains as chunks, all else checked."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from tokvm.core.disk import BufferPool, Chunk
from tokvm.core.extents import ExtentKind
from tokvm.core.units import SECTOR, round_up
from tokvm.images.buffers import SharedBuffer
from tokvm.images.fields import bad_field
from tokvm.images.stream_cursor import StreamCursor
from tokvm.images.vmdk.header import AT_END, TABLE_BYTES, SparseHeader
from tokvm.images.vmdk.inflate import inflate, max_compressed
from tokvm.images.vmdk.stream_prefix import StreamPrefix
from tokvm.images.vmdk.stream_tables import StreamTables

_MARKER = struct.Struct("<QII")
_GRAIN_HEAD = 12
_SECTOR_LIMIT = 1 << 32  # tables count sectors of the stream in 32 bits


class Marker(IntEnum):
    END = 0
    TABLE = 1
    DIRECTORY = 2
    FOOTER = 3


@dataclass(slots=True)
class _Piece:
    """Grains one behind the other in the guest, in one buffer."""

    offset: int
    length: int
    position: int
    buffer: SharedBuffer

    def chunk(self) -> Chunk:
        view = self.buffer.view[: self.length]
        return Chunk(self.offset, self.length, ExtentKind.DATA, self.position, view, self.buffer.release)


class StreamRun:
    """One way through the stream, from a position to its end."""

    def __init__(self, cursor: StreamCursor, prefix: StreamPrefix, pool: BufferPool, *, name: str, position: int) -> None:
        self._name = name
        self._pool = pool
        self._prefix = prefix
        self._header = prefix.header
        self._cursor = cursor
        self._tables = StreamTables(name, prefix, position)
        self._footer_came = False

    def chunks(self) -> Iterator[Chunk]:
        piece: _Piece | None = None
        try:
            while True:
                at = self._cursor.position
                raw = self._cursor.read_bytes(SECTOR, "the stream, which has no end-of-stream marker")
                value, size, type_ = _MARKER.unpack_from(raw)
                if size:
                    guest = self._guest(at, value, size)
                    grain = self._grain(at, raw, size, guest)
                    if piece is not None and not self._joins(piece, guest, len(grain)):
                        done, piece = piece, None
                        yield done.chunk()
                    piece = self._put(piece, guest, grain)
                elif self._metadata(at, raw, value, type_) is Marker.END:
                    break
            if piece is not None:
                done, piece = piece, None
                yield done.chunk()
        finally:
            if piece is not None:
                piece.buffer.release()
        self._check_end()

    def _joins(self, piece: _Piece, guest: int, length: int) -> bool:
        return piece.offset + piece.length == guest and piece.length + length <= self._pool.size

    def _put(self, piece: _Piece | None, guest: int, grain: memoryview) -> _Piece:
        piece = piece or _Piece(guest, 0, 0, SharedBuffer(*self._pool.acquire()))
        piece.buffer.view[piece.length : piece.length + len(grain)] = grain
        piece.length += len(grain)
        piece.position = self._cursor.position
        return piece

    def _guest(self, at: int, lba: int, size: int) -> int:
        """Where in the disk this grain belongs."""
        header = self._header
        if at >= _SECTOR_LIMIT * SECTOR:
            raise bad_field(self._name, at, "place of a grain", f"{at:#x}", "the first 2 TiB of a stream")
        if self._tables.directory_at is not None:
            raise bad_field(self._name, at, "marker", "a grain's", "a footer's or the end of the stream")
        if lba % header.grain_sectors or lba * SECTOR >= self._prefix.size:
            allowed = f"a multiple of {header.grain_sectors} below {self._prefix.size // SECTOR}"
            raise bad_field(self._name, at, "lba of a compressed grain", lba, allowed)
        if size > max_compressed(header.grain_bytes):
            allowed = f"1 to {max_compressed(header.grain_bytes)} bytes"
            raise bad_field(self._name, at + 8, "size of a compressed grain", size, allowed)
        self._tables.grain(at, lba // header.grain_sectors)
        return lba * SECTOR

    def _grain(self, at: int, raw: bytearray, size: int, guest: int) -> memoryview:
        rest = round_up(_GRAIN_HEAD + size, SECTOR) - SECTOR
        if rest:
            raw += self._cursor.read_bytes(rest, "a compressed grain")
        needed = min(self._header.grain_bytes, self._prefix.size - guest)
        packed = memoryview(raw)[_GRAIN_HEAD : _GRAIN_HEAD + size]
        grain = inflate(packed, grain_bytes=self._header.grain_bytes, needed=needed, name=self._name, offset=at + _GRAIN_HEAD)
        return memoryview(grain)[:needed]

    def _metadata(self, at: int, raw: bytearray, sectors: int, type_: int) -> Marker:
        """Read and check what a metadata marker announces."""
        if type_ not in tuple(Marker):
            raise bad_field(self._name, at + 12, "marker type", type_, "0 to 3")
        kind = Marker(type_)
        self._check_order(at, kind)
        place = at + SECTOR
        if sectors != self._sectors(kind):
            raise bad_field(self._name, at, f"sectors of the {kind.name.lower()}", sectors, f"{self._sectors(kind)}")
        if kind is Marker.END and any(raw):
            raise bad_field(self._name, at, "end-of-stream marker", "not all zeros", "zeros")
        body = self._cursor.read_bytes(sectors * SECTOR, f"the {kind.name.lower()}") if sectors else b""
        match kind:
            case Marker.TABLE:
                self._tables.table(place, body)
            case Marker.DIRECTORY:
                self._tables.directory(place, body)
            case Marker.FOOTER:
                self._footer(place, body)
            case Marker.END:
                self._tables.end(at)
        return kind

    def _sectors(self, kind: Marker) -> int:
        tables = -(-self._prefix.size // self._header.span)
        sectors = {Marker.TABLE: TABLE_BYTES // SECTOR, Marker.DIRECTORY: -(-4 * tables // SECTOR), Marker.FOOTER: 1}
        return sectors.get(kind, 0)

    def _check_order(self, at: int, kind: Marker) -> None:
        """Tables with grains, then a directory, a footer, the end; only the end where the tables came first."""
        allowed: tuple[Marker, ...] = (Marker.END,)
        if self._prefix.listed is None and not self._footer_came:
            allowed = (Marker.TABLE, Marker.DIRECTORY) if self._tables.directory_at is None else (Marker.FOOTER,)
        if kind not in allowed:
            names = " or ".join(f"{one.value} ({one.name.lower()})" for one in allowed)
            raise bad_field(self._name, at + 12, "marker type", f"{kind.value} ({kind.name.lower()})", names)

    def _footer(self, at: int, raw: bytes | bytearray) -> None:
        footer, directory = SparseHeader.parse(raw, name=self._name, offset=at), self._tables.directory_at
        if not footer.same_disk(self._header):
            raise bad_field(self._name, at, "the footer", "another disk's", "what the header says, but for the directory")
        if directory is None or footer.directory_sector != directory // SECTOR:
            read = "in a footer" if footer.directory_sector == AT_END else f"sector {footer.directory_sector:#x}"
            allowed = f"sector {(directory or 0) // SECTOR:#x}, where it came"
            raise bad_field(self._name, at + 56, "KDMV grain directory", read, allowed)
        self._footer_came = True

    def _check_end(self) -> None:
        """Nothing follows, and the sender is content. Zeros may fill up a stream whose tables told what would come."""
        at = self._cursor.position
        limit = 0 if self._prefix.listed is None else self._header.grain_bytes
        rest = self._cursor.read_rest(limit)
        self._cursor.finish()
        if len(rest) > limit or any(rest):
            raise bad_field(self._name, at, "the stream behind its end", f"{len(rest)} bytes or more", "nothing")
