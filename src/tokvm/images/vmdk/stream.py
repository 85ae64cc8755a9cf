"""A stream-optimised VMDK read front to back: what an ESX export lease or an OVF download sends of a disk.

    |<----------- prefix ----------->|
    header 512 | descriptor … overhead | grain … grain | table | grain … | table | … | directory | footer | end of stream
    0                                   ^ each after a marker, on a sector's line

    marker, 512: value u64, size u32    size > 0: a grain; value is its first sector in the disk; size bytes of zlib at 12
                 type u32 at 12         size = 0: 0 end of stream, 1 table, 2 directory, 3 footer; value: its sectors

    position = the byte of the stream behind the chunk's last grain. A stream broken off anywhere goes on from there.

Where grains are is not known ahead, so nothing is covered: a base pass zeroes the target first, and grains that do not come
are zeros. Grains come in any order, each once; tables, directory and footer are checked against them (`stream_tables`). The
stream is whole only when the end-of-stream marker came, nothing follows it, and the sender says that it is done.
Tools that write a file, not a stream, put directory and tables first; then they are read with the prefix. QEMU writes no marker
for the end, but fills the file up with zeros, which read the same.
Specification: VMware, "Virtual Disk Format 5.0" (2011), "Stream-Optimized Compressed Sparse Extents".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tokvm.core.disk import BufferPool, Chunk
from tokvm.core.errors import ImageError
from tokvm.core.extents import ExtentMap
from tokvm.core.units import SECTOR, MiB
from tokvm.images.base import WINDOW, ByteStream
from tokvm.images.fields import bad_field
from tokvm.images.stream_cursor import StreamCursor
from tokvm.images.vmdk.stream_prefix import StreamPrefix, read_prefix
from tokvm.images.vmdk.stream_run import StreamRun

_WORTH_READING_PAST = 1 * MiB  # as for VHD: cheaper than another request


class VmdkStream:
    """Implements `core.disk.DiskReader`. `open_at(n)` opens the stream from byte n on.

    The prefix is read at once, so size, fingerprint and refusals are there before the first byte is written.
    """

    def __init__(
        self,
        open_at: Callable[[int], ByteStream],
        *,
        name: str,
        pool: BufferPool | None = None,
        expect_size: int | None = None,
    ) -> None:
        self.name = name
        self._open_at = open_at
        self._pool = pool or BufferPool()
        self._cursor: StreamCursor | None = None
        self._prefix = self._read_prefix()
        try:
            self._check_expected(expect_size)
        except ImageError:
            self.close()
            raise

    @property
    def size(self) -> int:
        return self._prefix.size

    @property
    def fingerprint(self) -> str:
        """Of header and descriptor, with the CID: what an export of the same content has again."""
        return self._prefix.fingerprint

    @property
    def identity(self) -> str:
        return self._prefix.descriptor.linkage.ids[0]

    @property
    def warnings(self) -> tuple[str, ...]:
        return self._prefix.warnings

    @property
    def total(self) -> int:
        """At most all of the disk: how much comes, nobody knows."""
        return self.size

    def covered(self) -> Iterator[ExtentMap]:
        """Nothing, so whatever the target holds is zeroed first."""
        for start in range(0, self.size, WINDOW):
            yield ExtentMap.empty(start, min(start + WINDOW, self.size))

    def chunks(self, position: int = 0) -> Iterator[Chunk]:
        position = max(position, self._prefix.grains_at) if position == 0 else position
        if position < self._prefix.grains_at or position % SECTOR:
            allowed = f"0, or a multiple of {SECTOR} from {self._prefix.grains_at} on"
            raise bad_field(self.name, max(position, 0), "resume position", position, allowed)
        cursor = self._cursor_for(position)
        try:
            yield from StreamRun(cursor, self._prefix, self._pool, name=self.name, position=position).chunks()
        finally:
            cursor.close()

    def close(self) -> None:
        cursor, self._cursor = self._cursor, None
        if cursor is not None:
            cursor.close()

    def _read_prefix(self) -> StreamPrefix:
        """Open the stream at its start and read up to the first grain; it stays open there."""
        self.close()
        self._cursor = StreamCursor(self._open_at(0), self.name, 0)
        try:
            return read_prefix(self._cursor, self.name)
        except BaseException:
            self.close()
            raise

    def _check_expected(self, size: int | None) -> None:
        if size is not None and size != self.size:
            raise bad_field(self.name, 12, "size of the disk", self.size, f"{size}, which the host states")
        grain_bytes = self._prefix.header.grain_bytes
        if grain_bytes > self._pool.size:
            raise bad_field(self.name, 20, "KDMV grain size", grain_bytes, f"at most {self._pool.size} bytes in a stream")

    def _cursor_for(self, position: int) -> StreamCursor:
        """A stream that is known to have our prefix, open at `position`. The caller closes it."""
        if self._cursor is None and self._read_prefix().fingerprint != self._prefix.fingerprint:
            self.close()
            raise ImageError(
                "the export changed: its header or descriptor is not what it was when the pass began",
                where=self.name,
                fix="copy this pass of the disk again from its start",
            )
        cursor, self._cursor = self._cursor, None
        if cursor is not None and position - cursor.position <= _WORTH_READING_PAST:
            cursor.skip_to(position, "grains")
            return cursor
        if cursor is not None:
            cursor.close()
        return StreamCursor(self._open_at(position), self.name, position)
