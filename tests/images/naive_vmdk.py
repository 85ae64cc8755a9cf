"""VMDKs of every kind put together field by field, so that a test may put any of it wrong."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SECTOR = 512
AT_END = 2**64 - 1
ZERO = b""  # a grain that is explicitly zero


def descriptor(
    *extents: str,
    cid: str = "11111111",
    parent: str = "ffffffff",
    kind: str = "monolithicSparse",
    more: tuple[str, ...] = (),
    eol: str = "\n",
) -> bytes:
    lines = ["# Disk DescriptorFile", "version=1", f"CID={cid}", f"parentCID={parent}", f'createType="{kind}"', *more]
    lines += ["", "# Extent description", *extents, "", "# The Disk Data Base", "#DDB", 'ddb.adapterType = "lsilogic"', ""]
    return eol.join(lines).encode()


def padded(raw: bytes, step: int = SECTOR) -> bytes:
    return raw.ljust(-(-len(raw) // step) * step, b"\0")


@dataclass
class Listed:
    """ExtentFiles over files in memory; remembers what was asked for."""

    files: Mapping[str, Any]
    asked: list[str] = field(default_factory=list)

    def open(self, name: str) -> Any:
        self.asked.append(name)
        return self.files.get(name)


@dataclass
class Grains:
    """size: bytes. grains: number -> its bytes, or ZERO. seed: shuffles the grains in the file, gaps and garbage between."""

    size: int
    grains: dict[int, bytes] = field(default_factory=dict)
    seed: int | None = None

    grain_sectors = 8

    @property
    def grain_bytes(self) -> int:
        return self.grain_sectors * SECTOR

    @property
    def sectors(self) -> int:
        return -(-self.size // SECTOR)

    def order(self) -> list[int]:
        numbers = sorted(number for number, data in self.grains.items() if data != ZERO)
        if self.seed is not None:
            random.Random(self.seed).shuffle(numbers)
        return numbers

    def gap(self) -> bytes:
        rng = random.Random(self.seed)
        return b"" if self.seed is None else rng.randbytes(SECTOR * rng.randrange(3))

    def over(self, parent: bytes = b"") -> bytes:
        """The content of the disk over its parent's."""
        raw = bytearray(parent[: self.size].ljust(self.size, b"\0"))
        for number, data in self.grains.items():
            at = number * self.grain_bytes
            raw[at : at + self.grain_bytes] = data.ljust(self.grain_bytes, b"\0")[: self.size - at]
        return bytes(raw)


def some_grains(rng: random.Random, size: int, grain_bytes: int, *, share: float = 0.5, zeros: bool = True) -> dict[int, bytes]:
    """Random grains: some of random bytes, some of zeros, some explicitly zero."""
    found: dict[int, bytes] = {}
    for number in range(-(-size // grain_bytes)):
        if rng.random() < share:
            texts = [rng.randbytes(grain_bytes), bytes(grain_bytes), (b"%08d" % number) * (grain_bytes // 8)]
            found[number] = rng.choice([*texts, ZERO] if zeros else texts)
    return found


@dataclass
class NaiveSparse(Grains):
    """KDMV. kind: sparse, compressed (no markers), front (markers, tables first), stream (markers, tables last)."""

    kind: str = "sparse"
    grain_sectors: int = 8
    version: int = 1
    text: bytes | None = None  # the embedded descriptor; None: one that fits, b"": none
    redundant: bool = True
    zeroed: bool = True
    fields: dict[str, int] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)  # of what was built: gd, rgd, gt0, …, grain0, …
    table_order: str = "between"  # of a stream: or "last"
    tail: bytes = b""
    packed: dict[int, bytes] = field(default_factory=dict)  # grains that are put into the file like this

    @property
    def compressed(self) -> bool:
        return self.kind != "sparse"

    @property
    def marked(self) -> bool:
        return self.kind in ("front", "stream")

    @property
    def tables(self) -> int:
        return -(-self.size // (512 * self.grain_bytes))

    @property
    def flags(self) -> int:
        redundant = self.redundant and self.kind != "stream"
        return 1 | 2 * redundant | 4 * self.zeroed | 0x10000 * self.compressed | 0x20000 * self.marked

    def embedded(self) -> bytes:
        if self.text is not None:
            return self.text
        kind = "streamOptimized" if self.compressed else "monolithicSparse"
        return descriptor(f'RW {self.sectors} SPARSE "disk.vmdk"', kind=kind)

    def header(self, **changes: int | bytes) -> bytes:
        text = len(padded(self.embedded())) // SECTOR
        values: dict[str, int | bytes] = {
            "magic": b"KDMV", "version": self.version, "flags": self.flags, "capacity": self.sectors,
            "grain": self.grain_sectors, "descriptor": 1 if text else 0, "descriptor_size": text, "gtes": 512,
            "rgd": self.places.get("rgd", 0) // SECTOR,
            "gd": self.places.get("gd", 0) // SECTOR, "overhead": self.places["data"] // SECTOR, "unclean": 0,
            "newlines": b"\n \r\n", "compression": int(self.compressed),
        }  # fmt: skip
        return struct.pack("<4sIIQQQQIQQQB4sH", *(values | self.fields | changes).values()).ljust(SECTOR, b"\0")

    def grain(self, number: int) -> bytes:
        if number in self.packed:
            return self.packed[number]
        data = self.grains[number].ljust(self.grain_bytes, b"\0")
        if not self.compressed:
            return data
        data = data[: self.size - number * self.grain_bytes] if self.kind == "front" else data  # either is seen in the field
        packed = zlib.compress(data)
        head = struct.pack("<QI", number * self.grain_sectors, len(packed)) if self.marked else struct.pack("<I", len(packed))
        return padded(head + packed)

    def build(self) -> bytes:
        return self._stream() if self.kind == "stream" else self._file()

    def _file(self) -> bytes:
        at = SECTOR + len(padded(self.embedded()))
        for name in ("rgd", "gd") if self.redundant else ("gd",):
            self.places[name], at = at, at + len(padded(bytes(4 * self.tables)))
            for table in range(self.tables):
                self.places[f"{name[:-1]}t{table}"], at = at, at + 2048
        self.places["data"] = at
        raw = bytearray(at)
        entries = {number: 1 for number, data in self.grains.items() if data == ZERO}
        for number in self.order():
            raw += self.gap()
            self.places[f"grain{number}"], entries[number] = len(raw), len(raw) // SECTOR
            raw += self.grain(number)
        for name in ("rgd", "gd") if self.redundant else ("gd",):
            self._write_tables(raw, name, entries)
        text = self.embedded()
        raw[: SECTOR + len(text)] = self.header() + text
        return bytes(raw) + self.tail

    def _write_tables(self, raw: bytearray, name: str, entries: dict[int, int]) -> None:
        for table in range(self.tables):
            at = self.places[f"{name[:-1]}t{table}"]
            struct.pack_into("<I", raw, self.places[name] + 4 * table, at // SECTOR)
            struct.pack_into("<512I", raw, at, *(entries.get(512 * table + index, 0) for index in range(512)))

    def _stream(self) -> bytes:
        self.places["data"] = at = SECTOR + len(padded(self.embedded()))
        raw = bytearray(self.header(gd=AT_END) + self.embedded()).ljust(at, b"\0")
        entries = {number: 1 for number, data in self.grains.items() if data == ZERO}
        order = self.order()
        tables: list[int] = []
        for place, number in enumerate(order):
            self.places[f"grain{number}"], entries[number] = len(raw), len(raw) // SECTOR
            raw += self.grain(number)
            table = number // 512
            last = table not in [later // 512 for later in order[place + 1 :]]
            if last and self.table_order == "between":
                self._marked_table(raw, table, entries)
            tables += [table] if last else []
        left = {number // 512 for number in entries}
        for table in sorted(left if self.table_order == "last" else left - set(tables)):
            self._marked_table(raw, table, entries)
        places = [self.places.get(f"gt{table}", 0) // SECTOR for table in range(self.tables)]
        directory = padded(struct.pack(f"<{self.tables}I", *places))
        self._marker(raw, len(directory) // SECTOR, 2)
        self.places["gd"] = len(raw)
        raw += directory
        self._marker(raw, 1, 3)
        self.places["footer"] = len(raw)
        raw += self.header()
        self.places["end"] = len(raw)
        self._marker(raw, 0, 0)
        return bytes(raw) + self.tail

    def _marked_table(self, raw: bytearray, table: int, entries: dict[int, int]) -> None:
        self._marker(raw, 4, 1)
        self.places[f"gt{table}"] = len(raw)
        raw += struct.pack("<512I", *(entries.get(512 * table + index, 0) for index in range(512)))

    @staticmethod
    def _marker(raw: bytearray, sectors: int, kind: int) -> None:
        raw += struct.pack("<QII", sectors, 0, kind).ljust(SECTOR, b"\0")


@dataclass
class NaiveCowd(Grains):
    grain_sectors: int = 1
    fields: dict[str, int] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)

    @property
    def tables(self) -> int:
        return -(-self.size // (4096 * self.grain_bytes))

    def header(self, **changes: int) -> bytes:
        values = {
            "version": 1, "flags": 3, "capacity": self.sectors, "grain": self.grain_sectors, "gd": 4, "entries": self.tables,
            "free": 0,
        } | self.fields | changes  # fmt: skip
        unclean = values.pop("unclean", 0)
        raw = struct.pack("<4s7I", b"COWD", *values.values()).ljust(1648, b"\0") + bytes([unclean])
        return raw.ljust(2048, b"\0")

    def build(self) -> bytes:
        raw = bytearray(padded(self.header() + bytes(4 * self.tables)))
        used = {number // 4096 for number in self.grains}
        for number in [*self.order(), *(number for number, data in self.grains.items() if data == ZERO)]:
            table = number // 4096
            if table in used:
                used.discard(table)
                raw += self.gap()
                self.places[f"gt{table}"] = len(raw)
                struct.pack_into("<I", raw, 2048 + 4 * table, len(raw) // SECTOR)
                raw += bytes(16384)
            entry = 1
            if self.grains[number] != ZERO:
                raw += self.gap()
                self.places[f"grain{number}"], entry = len(raw), len(raw) // SECTOR
                raw += self.grains[number].ljust(self.grain_bytes, b"\0")
            struct.pack_into("<I", raw, self.places[f"gt{table}"] + 4 * (number % 4096), entry)
        return bytes(raw)


@dataclass
class NaiveSesparse(Grains):
    """first_index: of the grains; with one above 4095 their index goes into both of its parts."""

    first_index: int = 0
    words: dict[int, int] = field(default_factory=dict)  # of the constant header
    volatile: tuple[int, ...] = (0xCAFECAFE, 1, 7, 0)
    places: dict[str, int] = field(default_factory=dict)

    @property
    def tables(self) -> int:
        return -(-self.size // (4096 * 4096))

    def build(self) -> bytes:
        used = sorted({number // 4096 for number in self.grains})
        if self.seed is not None:
            random.Random(self.seed).shuffle(used)
        gd, gd_sectors = 4, len(padded(bytes(8 * self.tables))) // SECTOR
        gt, gt_sectors = gd + gd_sectors, 64 * max(len(used), 1)
        grains = gt + gt_sectors + 2
        words = [0xCAFEBABE, 0x200000001, self.sectors, 8, 64, 0, 0, 0, 0, 0, 1, 1, 2, 1, 3, 1, gd, gd_sectors, gt, gt_sectors]
        words += [gt + gt_sectors, 1, gt + gt_sectors + 1, 1, grains, 1 << 20]
        for place, value in self.words.items():
            words[place] = value
        raw = bytearray(struct.pack("<26Q", *words).ljust(SECTOR, b"\0") + struct.pack("<4Q", *self.volatile))
        raw = raw.ljust(grains * SECTOR, b"\0")
        for index, table in enumerate(used):
            self.places[f"gt{table}"] = gt * SECTOR + index * 32768
            struct.pack_into("<Q", raw, gd * SECTOR + 8 * table, 1 << 60 | index)
        self.places |= {"gd": gd * SECTOR, "grains": grains * SECTOR}
        order = self.order()
        for index, number in enumerate(order, self.first_index):
            at = grains * SECTOR + index * 4096
            self.places[f"grain{number}"] = at
            raw = raw.ljust(at, b"\xdd") + self.grains[number].ljust(4096, b"\0")
            self._entry(raw, number, 3 << 60 | (index & 0xFFF) << 48 | index >> 12)
        for number, data in self.grains.items():
            if data == ZERO:  # unmapped with its old index, or zero
                self._entry(raw, number, (1 << 60 | 5) if number % 2 else 2 << 60)
        return bytes(raw)

    def _entry(self, raw: bytearray, number: int, entry: int) -> None:
        struct.pack_into("<Q", raw, self.places[f"gt{number // 4096}"] + 8 * (number % 4096), entry)


class Beside:
    """ExtentFiles over the files of one directory: for tests, which know what is in it."""

    def __init__(self, directory: Any, opener: Any) -> None:
        self._directory = directory
        self._opener = opener
        self.opened: list[str] = []

    def open(self, name: str) -> Any:
        if "/" in name:
            raise AssertionError(f"{name} was asked for")
        self.opened.append(name)
        path = self._directory / name
        return self._opener(path) if path.exists() else None
