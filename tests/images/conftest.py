"""What the image tests share: a naive VHD builder of their own, files and streams in memory, and real images."""

from __future__ import annotations

import json
import lzma
import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid5

import pytest

from tokvm.core.disk import BufferPool, DiskReader
from tokvm.core.errors import ImageError
from tokvm.core.extents import ExtentKind
from tokvm.images.chain import Chain
from tokvm.images.open import open_image

SECTOR = 512
NAMESPACE = UUID(int=0x7075)


class MemoryFile:
    """A ReadAt over bytes."""

    def __init__(self, raw: bytes, name: str = "memory.vhd") -> None:
        self.raw = raw
        self.name = name
        self.closed = False

    @property
    def size(self) -> int:
        return len(self.raw)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset < 0 or offset + len(buffer) > len(self.raw):
            raise ImageError("past the end", where=f"{self.name}@{offset:#x}")
        buffer[:] = self.raw[offset : offset + len(buffer)]

    def close(self) -> None:
        self.closed = True


class MemoryStream:
    """A ByteStream over bytes, in pieces of at most `step`."""

    def __init__(self, raw: bytes, at: int, step: int, finish_error: Exception | None = None) -> None:
        self.raw = memoryview(raw)[at:]
        self.step = step
        self.finish_error = finish_error
        self.asked = 0
        self.finished = self.closed = False

    def read_into(self, buffer: memoryview) -> int:
        count = min(len(buffer), self.step, len(self.raw))
        buffer[:count] = self.raw[:count]
        self.raw = self.raw[count:]
        self.asked = max(self.asked, len(buffer))
        return count

    def finish(self) -> None:
        self.finished = True
        if self.finish_error is not None:
            raise self.finish_error

    def close(self) -> None:
        self.closed = True


@dataclass
class Exporter:
    """`open_at` of a stream, remembering what was opened."""

    raw: bytes
    step: int = 1 << 20
    finish_error: Exception | None = None
    opened: list[int] = field(default_factory=list)
    streams: list[MemoryStream] = field(default_factory=list)

    def __call__(self, at: int) -> MemoryStream:
        self.opened.append(at)
        self.streams.append(MemoryStream(self.raw, at, self.step, self.finish_error))
        return self.streams[-1]


def checksum(raw: bytes | bytearray, at: int) -> bytes:
    total = sum(byte for place, byte in enumerate(raw) if not at <= place < at + 4)
    return struct.pack(">I", ~total & 0xFFFFFFFF)


def sealed_footer(raw: bytes) -> bytes:
    return raw[:64] + checksum(raw, 64) + raw[68:]


def sealed_header(raw: bytes) -> bytes:
    return raw[:36] + checksum(raw, 36) + raw[40:]


@dataclass
class NaiveVhd:
    """A VHD put together field by field, so that a test may put any of it wrong.

    sectors: what is written, sector number -> 512 bytes. seed: shuffles the blocks and leaves gaps and garbage.
    """

    size: int
    kind: int = 3
    block_size: int = 16384
    sectors: dict[int, bytes] = field(default_factory=dict)
    name: str = "disk"
    parent: str | None = None
    seed: int | None = None
    empty_blocks: tuple[int, ...] = ()
    creator: bytes = b"win "
    creator_version: int = 0xA0000
    bat_offset: int = 1536
    extra_entries: int = 0
    behind_bat: bytes = b""
    geometry: tuple[int, int, int] = (1, 4, 17)
    block_starts: dict[int, int] = field(default_factory=dict)

    @property
    def id(self) -> UUID:
        return uuid5(NAMESPACE, self.name)

    @property
    def parent_id(self) -> UUID:
        return UUID(int=0) if self.parent is None else uuid5(NAMESPACE, self.parent)

    def footer(self, **changes: object) -> bytes:
        values: dict[str, object] = {
            "cookie": b"conectix", "features": 2, "version": 0x10000, "data_offset": 512 if self.kind != 2 else 2**64 - 1,
            "time": 0, "app": self.creator, "app_version": self.creator_version, "os": b"Wi2k", "original": self.size,
            "size": self.size, "c": self.geometry[0], "h": self.geometry[1], "s": self.geometry[2], "kind": self.kind,
            "sum": 0, "id": self.id.bytes, "saved": 0, "hidden": 0,
        }  # fmt: skip
        raw = struct.pack(">8sIIQI4sI4sQQHBBII16sBB", *(values | changes).values())
        return sealed_footer(raw.ljust(512, b"\0"))

    def header(self, **changes: object) -> bytes:
        values: dict[str, object] = {
            "cookie": b"cxsparse", "unused": 2**64 - 1, "bat": self.bat_offset, "version": 0x10000, "entries": self.entries,
            "block_size": self.block_size, "sum": 0, "parent": self.parent_id.bytes, "time": 0, "reserved": 0,
            "name": "parent.vhd".encode("utf-16-be"),
        }  # fmt: skip
        raw = struct.pack(">8sQQIIII16sII512s", *(values | changes).values())
        return sealed_header(raw.ljust(1024, b"\0"))

    @property
    def entries(self) -> int:
        return -(-self.size // self.block_size) + self.extra_entries

    def build(self, **footer: object) -> bytes:
        if self.kind == 2:
            raw = bytearray(self.size)
            for sector, data in self.sectors.items():
                raw[sector * SECTOR : (sector + 1) * SECTOR] = data
            return bytes(raw) + self.footer(**footer)
        rng = random.Random(self.seed)
        per_block = self.block_size // SECTOR
        blocks = sorted({sector // per_block for sector in self.sectors} | set(self.empty_blocks))
        if self.seed is not None:
            rng.shuffle(blocks)
        bat = [0xFFFFFFFF] * self.entries
        at = -(-(self.bat_offset + 4 * self.entries) // SECTOR) * SECTOR
        body = bytearray(self.footer(**footer) + self.header()).ljust(at, b"\0") + self.behind_bat
        for block in blocks:
            body += bytes(SECTOR * rng.randrange(4) if self.seed is not None else 0)
            bat[block] = len(body) // SECTOR
            self.block_starts[block] = len(body)
            body += self._block(block, per_block, rng)
        body[self.bat_offset : self.bat_offset + 4 * self.entries] = struct.pack(f">{self.entries}I", *bat)
        return bytes(body) + self.footer(**footer)

    def _block(self, block: int, per_block: int, rng: random.Random) -> bytes:
        bits = bytearray((per_block + 8 * SECTOR - 1) // (8 * SECTOR) * SECTOR)
        data = bytearray(rng.randbytes(self.block_size) if self.seed is not None else b"\xee" * self.block_size)
        for place in range(per_block):
            found = self.sectors.get(block * per_block + place)
            if found is not None:
                bits[place >> 3] |= 0x80 >> (place & 7)
                data[place * SECTOR : (place + 1) * SECTOR] = found
        return bytes(bits + data)

    def over(self, parent: bytes) -> bytes:
        """The naive content of the disk over its parent's content (zeros beyond its end)."""
        raw = bytearray(parent[: self.size].ljust(self.size, b"\0"))
        for sector, data in self.sectors.items():
            raw[sector * SECTOR : (sector + 1) * SECTOR] = data[: self.size - sector * SECTOR]
        return bytes(raw)


def patched(raw: bytes, offset: int, data: bytes) -> bytes:
    return raw[:offset] + data + raw[offset + len(data) :]


def content(reader: DiskReader, under: bytes = b"", position: int = 0) -> bytes:
    """What a target that held `under` holds after the reader's chunks. Every chunk is checked and released."""
    raw = bytearray(under[: reader.size].ljust(reader.size, b"\0"))
    last = position
    for chunk in reader.chunks(position):
        assert 0 <= chunk.offset < chunk.offset + chunk.length <= reader.size
        assert chunk.position > last
        last = chunk.position
        if chunk.kind is ExtentKind.DATA:
            assert chunk.data is not None
            assert len(chunk.data) == chunk.length
            raw[chunk.offset : chunk.offset + chunk.length] = chunk.data
        else:
            assert chunk.kind is ExtentKind.ZERO
            assert chunk.data is None
            raw[chunk.offset : chunk.offset + chunk.length] = bytes(chunk.length)
        chunk.release()
    return bytes(raw)


def free_buffers(pool: BufferPool) -> int:
    """How many buffers can be had now; gives them back."""
    got = []
    while (buffer := pool.try_acquire()) is not None:
        got.append(buffer)
    for _, give_back in got:
        give_back()
    return len(got)


def random_sectors(rng: random.Random, size: int, count: int) -> dict[int, bytes]:
    """Runs of random length at random places, about `count` of them."""
    total = -(-size // SECTOR)
    found: dict[int, bytes] = {}
    for _ in range(count):
        first = rng.randrange(total)
        for sector in range(first, min(total, first + rng.choice((1, 1, 2, 7, 8, 9, 33)))):
            found[sector] = rng.choice((rng.randbytes(SECTOR), bytes(SECTOR)))
    return found


@dataclass(frozen=True)
class Kit:
    """The helpers above, handed to tests as one fixture."""

    Vhd: type[NaiveVhd] = NaiveVhd
    File: type[MemoryFile] = MemoryFile
    Exporter: type[Exporter] = Exporter
    content: Callable[..., bytes] = content
    patched: Callable[[bytes, int, bytes], bytes] = patched
    sealed_footer: Callable[[bytes], bytes] = sealed_footer
    sealed_header: Callable[[bytes], bytes] = sealed_header
    free_buffers: Callable[[BufferPool], int] = free_buffers
    random_sectors: Callable[[random.Random, int, int], dict[int, bytes]] = random_sectors

    def chain(self, *images: bytes, force_linkage: bool = False) -> Chain:
        layers = [open_image(MemoryFile(raw, f"layer{index}.vhd")) for index, raw in enumerate(images)]
        return Chain.open(layers, force_linkage=force_linkage)


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()


def fixtures_dir() -> Path:
    named = os.environ.get("TOKVM_FIXTURES")
    return Path(named) if named else Path(__file__).parents[2].parent / "shared" / "fixtures"


def manifest() -> list[dict[str, object]]:
    path = fixtures_dir() / "MANIFEST.json"
    if not path.exists():
        return []
    return [entry for entry in json.loads(path.read_text()) if str(entry["image"]).endswith(".vhd")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "manifest_entry" in metafunc.fixturenames:
        entries = manifest()
        missing = pytest.mark.skip(reason="no external fixtures (TOKVM_FIXTURES)")
        params = [pytest.param(entry, id=str(entry["image"])) for entry in entries] or [pytest.param({}, marks=missing)]
        metafunc.parametrize("manifest_entry", params)


@pytest.fixture(scope="session")
def expand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """A real image by its name in the manifest, expanded into a temporary directory."""
    directory = tmp_path_factory.mktemp("real-images")

    def expanded(name: str) -> Path:
        path = directory / name.replace("/", "_")
        if not path.exists():
            path.write_bytes(lzma.decompress((fixtures_dir() / f"{name}.xz").read_bytes()))
        return path

    yield expanded
    for path in directory.iterdir():
        path.unlink()
