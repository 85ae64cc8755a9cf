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
from tokvm.core.units import SECTOR
from tokvm.images.base import WINDOW, ByteStream
from tokvm.images.fields import bad_field
from tokvm.images.prefixed_stream import PrefixedStream
from tokvm.images.stream_cursor import StreamCursor
from tokvm.images.vmdk.stream_prefix import StreamPrefix, read_prefix
from tokvm.images.vmdk.stream_run import StreamRun


class VmdkStream(PrefixedStream[StreamPrefix]):
    """Implements `core.disk.DiskReader`."""

    told = "header or descriptor"

    def __init__(
        self,
        open_at: Callable[[int], ByteStream],
        *,
        name: str,
        pool: BufferPool | None = None,
        expect_size: int | None = None,
    ) -> None:
        super().__init__(open_at, name=name, pool=pool)
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
        cursor = self._cursor_at(position)
        try:
            cursor.skip_to(position, "grains")
            yield from StreamRun(cursor, self._prefix, self._pool, name=self.name, position=position).chunks()
        finally:
            cursor.close()

    def _parse(self, cursor: StreamCursor) -> StreamPrefix:
        return read_prefix(cursor, self.name)

    def _check_expected(self, size: int | None) -> None:
        if size is not None and size != self.size:
            raise bad_field(self.name, 12, "size of the disk", self.size, f"{size}, which the host states")
        grain_bytes = self._prefix.header.grain_bytes
        if grain_bytes > self._pool.size:
            raise bad_field(self.name, 20, "KDMV grain size", grain_bytes, f"at most {self._pool.size} bytes in a stream")
