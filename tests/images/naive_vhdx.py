"""A VHDX put together field by field, so that a test may put any of it wrong.

It shares nothing with the shipped writer or reader but the CRC, which real images and a bitwise CRC vouch for."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from uuid import UUID, uuid5

from tokvm.images.vhdx.crc import crc32c

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE = 4 * KIB
NAMESPACE = UUID(int=0x7075)
NULL = UUID(int=0)

HEADERS = (64 * KIB, 128 * KIB)
TABLES = (192 * KIB, 256 * KIB)
LOG = MIB
METADATA = 2 * MIB
ITEMS = METADATA + 64 * KIB
BAT = 3 * MIB

BAT_GUID = UUID("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA_GUID = UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E")
LOCATOR_GUID = UUID("B04AEFB7-D19E-4A81-B789-25B8E9445913")
ITEM_GUIDS = {
    "parameters": UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B"),
    "size": UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8"),
    "disk_id": UUID("BECA12AB-B2E6-4523-93EF-C309E000C746"),
    "logical": UUID("8141BF1D-A96F-4709-BA47-F233A8FAAB5F"),
    "physical": UUID("CDA348C7-445D-4471-9CC9-E9885251C556"),
    "locator": UUID("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C"),
}
# The table entry of each item, in the order of ITEM_GUIDS, and its content.
ENTRY = {name: METADATA + 32 + 32 * number for number, name in enumerate(ITEM_GUIDS)}
CONTENT = {name: ITEMS + 64 * number for number, name in enumerate(ITEM_GUIDS)}

Content = bytes | int  # of a log write: a page, or the length of a range of zeros


def sealed(raw: bytes | bytearray) -> bytes:
    """With its CRC, which is at 4, put right."""
    raw = bytes(raw)
    return raw[:4] + struct.pack("<I", crc32c(raw[:4] + bytes(4) + raw[8:])) + raw[8:]


def reseal(raw: bytearray) -> None:
    """Both headers and both region tables of a file."""
    for at, length in (*((at, PAGE) for at in HEADERS), *((at, 64 * KIB) for at in TABLES)):
        raw[at : at + length] = sealed(raw[at : at + length])


def patched(raw: bytes, *changes: tuple[int, bytes]) -> bytes:
    """With bytes replaced, and the CRCs right again."""
    changed = bytearray(raw)
    for at, data in changes:
        changed[at : at + len(data)] = data
    reseal(changed)
    return bytes(changed)


def locator(entries: dict[str, str], *, kind: UUID = LOCATOR_GUID) -> bytes:
    at = 20 + 12 * len(entries)
    table, text = b"", b""
    for key, value in entries.items():
        raw_key, raw_value = key.encode("utf-16-le"), value.encode("utf-16-le")
        here = at + len(text)
        table += struct.pack("<IIHH", here, here + len(raw_key), len(raw_key), len(raw_value))
        text += raw_key + raw_value
    return struct.pack("<16sHH", kind.bytes_le, 0, len(entries)) + table + text


def log_entry(
    writes: Sequence[tuple[int, Content]],
    *,
    guid: UUID,
    sequence: int,
    tail: int,
    flushed: int = 0,
    last: int = 0,
    change: Callable[[bytearray], None] = lambda raw: None,
) -> bytes:
    """A log entry; `change` spoils it before it is sealed."""
    table, data = bytearray(), bytearray()
    for offset, content in writes:
        if isinstance(content, int):
            table += struct.pack("<4s4xQQQ", b"zero", content, offset, sequence)
        else:
            table += struct.pack("<4s4s8sQQ", b"desc", content[-4:], content[:8], offset, sequence)
            high, low = sequence >> 32, sequence & 0xFFFFFFFF
            data += struct.pack("<4sI", b"data", high) + content[8:-4] + struct.pack("<I", low)
    size = -(-(64 + len(table)) // PAGE) * PAGE
    head = struct.pack(
        "<4sIIIQII16sQQ", b"loge", 0, size + len(data), tail, sequence, len(writes), 0, guid.bytes_le, flushed, last
    )
    raw = bytearray((head + table).ljust(size, b"\0") + data)
    change(raw)
    return sealed(raw)


@dataclass
class NaiveVhdx:
    """states: of blocks; what is not named is NOT_PRESENT. sectors: what is written, logical sector number -> its bytes.

    A block in state 6 holds its sectors and garbage between them. seed: shuffles the blocks, leaves gaps and stale bitmap bits.
    log: (place in the ring, entry); entries may run over its end.
    """

    size: int
    states: dict[int, int] = field(default_factory=dict)
    sectors: dict[int, bytes] = field(default_factory=dict)
    is_child: bool = False
    fixed: bool = False
    block_size: int = MIB
    sector_size: int = 512
    name: str = "disk"
    parent: str | None = None
    seed: int | None = None
    log_guid: UUID = NULL
    log_length: int = MIB
    log: list[tuple[int, bytes]] = field(default_factory=list)
    bat_length: int = 0
    places: dict[int, int] = field(default_factory=dict)  # file offset of each block in the file, filled by build
    bitmaps: dict[int, int] = field(default_factory=dict)  # of each chunk

    @property
    def id(self) -> UUID:
        return uuid5(NAMESPACE, self.name)

    @property
    def blocks(self) -> int:
        return -(-self.size // self.block_size)

    @property
    def per_block(self) -> int:
        return self.block_size // self.sector_size

    @property
    def ratio(self) -> int:
        return (1 << 23) * self.sector_size // self.block_size

    @property
    def entries(self) -> int:
        if self.is_child:
            return -(-self.blocks // self.ratio) * (self.ratio + 1)
        return self.blocks + (self.blocks - 1) // self.ratio

    @property
    def locator(self) -> dict[str, str]:
        linkage = uuid5(NAMESPACE, self.parent or "parent")
        return {"parent_linkage": f"{{{linkage}}}", "relative_path": ".\\parent.vhdx", "parent_linkage2": f"{{{NULL}}}"}

    def index(self, block: int) -> int:
        return block + block // self.ratio

    def bitmap_index(self, chunk: int) -> int:
        return (chunk + 1) * self.ratio + chunk

    def entry_at(self, index: int) -> int:
        """Where in the file this entry of the BAT is, with a log of the usual length."""
        return BAT + 8 * index

    def header(self, sequence: int, **changes: object) -> bytes:
        values: dict[str, object] = {
            "signature": b"head", "crc": 0, "sequence": sequence, "file": uuid5(NAMESPACE, "file").bytes_le,
            "data": self.id.bytes_le, "log": self.log_guid.bytes_le, "log_version": 0, "version": 1,
            "log_length": self.log_length, "log_offset": LOG if self.log_length == MIB else self._log_far,
        }  # fmt: skip
        return sealed(struct.pack("<4sIQ16s16s16sHHIQ", *(values | changes).values()).ljust(PAGE, b"\0"))

    @property
    def _log_far(self) -> int:
        return BAT + self._bat_length

    @property
    def _bat_length(self) -> int:
        return self.bat_length or -(-8 * self.entries // MIB) * MIB

    def regions(self, extra: Sequence[tuple[UUID, int, int, int]] = ()) -> bytes:
        entries = [(METADATA_GUID, METADATA, MIB, 1), (BAT_GUID, BAT, self._bat_length, 1), *extra]
        raw = struct.pack("<4sIII", b"regi", 0, len(entries), 0)
        raw += b"".join(struct.pack("<16sQII", guid.bytes_le, *rest) for guid, *rest in entries)
        return sealed(raw.ljust(64 * KIB, b"\0"))

    def metadata(self) -> bytes:
        flags = int(self.fixed) | 2 * self.is_child
        contents = {
            "parameters": struct.pack("<II", self.block_size, flags),
            "size": struct.pack("<Q", self.size),
            "disk_id": uuid5(NAMESPACE, "disk").bytes_le,
            "logical": struct.pack("<I", self.sector_size),
            "physical": struct.pack("<I", 4096),
        }
        if self.is_child:
            contents["locator"] = locator(self.locator)
        table = struct.pack("<8sHH20x", b"metadata", 0, len(contents))
        body = bytearray(MIB)
        for name, content in contents.items():
            at = CONTENT[name] - METADATA
            table += struct.pack("<16sIIII", ITEM_GUIDS[name].bytes_le, at, len(content), 4 if name == "parameters" else 6, 0)
            body[at : at + len(content)] = content
        body[: len(table)] = table
        return bytes(body)

    def build(self) -> bytes:
        rng = random.Random(self.seed)
        raw = bytearray(b"vhdxfile" + "naïve \x1b[1m".encode("utf-16-le")).ljust(HEADERS[0], b"\0")
        raw += self.header(7).ljust(64 * KIB, b"\0") + self.header(8).ljust(64 * KIB, b"\0")
        raw += self.regions() * 2
        raw = raw.ljust(LOG, b"\0") + bytes(MIB) + self.metadata() + bytes(self._bat_length)
        log_at = LOG
        if self.log_length != MIB:
            log_at = len(raw)
            raw += bytes(self.log_length)
        for place, entry in self.log:
            for at in range(0, len(entry), PAGE):
                here = log_at + (place + at) % self.log_length
                raw[here : here + PAGE] = entry[at : at + PAGE]
        self._add_blocks(raw, rng)
        bat = [0] * self.entries
        for block, state in self.states.items():
            bat[self.index(block)] = self.places.get(block, 0) | state
        for chunk, place in self.bitmaps.items():
            bat[self.bitmap_index(chunk)] = place | 6
        raw[BAT : BAT + 8 * len(bat)] = struct.pack(f"<{len(bat)}Q", *bat)
        return bytes(raw)

    def _add_blocks(self, raw: bytearray, rng: random.Random) -> None:
        waiting = [("block", block) for block, state in self.states.items() if state in (6, 7)]
        partial = {block // self.ratio for block, state in self.states.items() if state == 7}
        waiting += [("bitmap", chunk) for chunk in sorted(partial)]
        if self.seed is not None:
            rng.shuffle(waiting)
        for what, number in waiting:
            raw += bytes(MIB * rng.randrange(2) if self.seed is not None else 0)
            (self.places if what == "block" else self.bitmaps)[number] = len(raw)
            raw += self.block(number) if what == "block" else self.bitmap(number, rng)

    def block(self, block: int) -> bytes:
        data = bytearray(random.Random(f"{self.name} {block}").randbytes(64) * (self.block_size // 64))
        for place in range(self.per_block):
            found = self.sectors.get(block * self.per_block + place)
            if found is not None:
                data[place * self.sector_size : (place + 1) * self.sector_size] = found
        return bytes(data)

    def bitmap(self, chunk: int, rng: random.Random) -> bytes:
        """Least significant bit first; of blocks that are not partial, stale."""
        bits = bytearray(MIB)
        width = self.per_block // 8
        for block, state in self.states.items():
            if block // self.ratio == chunk:
                at = block % self.ratio * width
                if state == 7:
                    for place in range(self.per_block):
                        if block * self.per_block + place in self.sectors:
                            bits[at + place // 8] |= 1 << place % 8
                elif self.seed is not None:
                    bits[at : at + width] = rng.randbytes(width)
        return bytes(bits)

    def over(self, parent: bytes = b"") -> bytes:
        """The content of the disk over its parent's content (zeros beyond its end)."""
        raw = bytearray(parent[: self.size].ljust(self.size, b"\0"))
        for block, state in self.states.items():
            at = block * self.block_size
            if state == 6:
                raw[at : at + self.block_size] = self.block(block)
            elif state in (1, 2, 3):
                raw[at : at + self.block_size] = bytes(self.block_size)
        for sector, data in self.sectors.items():
            if self.states.get(sector // self.per_block, 0) == 7:
                raw[sector * self.sector_size : (sector + 1) * self.sector_size] = data
        return bytes(raw[: self.size])


def random_layer(rng: random.Random, size: int, *, is_child: bool, sector_size: int = 512, **options: object) -> NaiveVhdx:
    """Blocks in every state, partial ones with runs of written sectors."""
    made = NaiveVhdx(size, is_child=is_child, sector_size=sector_size, seed=rng.randrange(1 << 32), **options)  # type: ignore[arg-type]
    for block in range(made.blocks):
        made.states[block] = rng.choice([0, 1, 2, 3, 6] + [7] * 3 * is_child)
        at = block * made.per_block
        end = min(at + made.per_block, size // sector_size)
        for _ in range(rng.randrange(5)):
            first = rng.randrange(at, end)
            for sector in range(first, min(end, first + rng.choice((1, 1, 2, 7, 8, 9, 33)))):
                made.sectors[sector] = rng.choice((rng.randbytes(sector_size), bytes(sector_size)))
    return made
