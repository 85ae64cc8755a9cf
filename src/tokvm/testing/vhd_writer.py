"""Writes VHDs front to back, without seeking: what `xe vdi-export format=vhd` sends, and files for tests.

    footer copy | header | parent locator | BAT | [batmap header, batmap] | block … block | footer
    0             512      1536              2048, or 1536 without locator

Blocks are ascending and hold whole block_size bytes, the disk's last one too. Sector bitmaps are exact: a bit for each sector
that was written, so a delta says no more than it knows. Fixed disks are raw bytes and a footer.
Imports no numpy: it runs inside short-lived commands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO, Literal
from uuid import UUID

from tokvm.core.units import SECTOR, MiB, round_up
from tokvm.images.vhd.structs import (
    BATMAP_COOKIE,
    FOOTER_SIZE,
    HEADER_SIZE,
    NO_BLOCK,
    NO_OFFSET,
    NULL_ID,
    DiskType,
    DynamicHeader,
    Footer,
    Locator,
    bitmap_size,
)

Bytes = bytes | bytearray | memoryview
Run = tuple[int, Bytes]
Kind = Literal["fixed", "dynamic", "differencing"]

BLOCK_SIZE = 2 * MiB
_ZEROS = bytes(MiB)


def write_vhd(
    out: BinaryIO,
    *,
    size: int,
    kind: Kind,
    runs: Iterable[Run],
    unique_id: UUID,
    parent_id: UUID | None = None,
    parent_name: str = "",
    block_size: int = BLOCK_SIZE,
    creator: bytes = b"win ",
    creator_version: int = 0x000A_0000,
    timestamp: int = 0,
    blocks: Sequence[int] | None = None,
    batmap: bool = False,
) -> None:
    """Write a disk of `size` bytes that holds `runs`: (guest offset, data), ascending, disjoint, whole sectors.

    The BAT comes before the blocks, so they must be known first: `blocks` are their numbers, ascending (see `blocks_of`),
    and `runs` is then consumed as it is written. Without `blocks`, `runs` is gathered in memory.
    parent_id: of a differencing disk; None there means a raw parent. batmap: with XenServer's batmap region.
    """
    disk_type = DiskType[kind.upper()]
    footer = Footer(
        disk_type, size, unique_id, NO_OFFSET if disk_type is DiskType.FIXED else FOOTER_SIZE, size, chs_geometry(size),
        creator, creator_version, timestamp=timestamp,
    )  # fmt: skip
    if disk_type is DiskType.FIXED:
        _write_fixed(out, size, _checked(runs, size))
    else:
        if blocks is None:
            runs = list(runs)
            blocks = blocks_of(((offset, len(data)) for offset, data in runs), block_size)
        pieces = cut_at_blocks(_checked(runs, size), block_size)
        locators, locator_data = _parent_locators(parent_name if disk_type is DiskType.DIFFERENCING else "")
        header = DynamicHeader(
            FOOTER_SIZE + HEADER_SIZE + len(locator_data), -(-size // block_size), block_size, parent_id or NULL_ID,
            0, parent_name, locators,
        )  # fmt: skip
        out.write(footer.pack() + header.pack() + locator_data)
        _write_tables(out, header, blocks, batmap=batmap)
        _write_blocks(out, blocks, block_size, pieces)
    out.write(footer.pack())


def blocks_of(extents: Iterable[tuple[int, int]], block_size: int = BLOCK_SIZE) -> list[int]:
    """Numbers of the blocks that these ascending (offset, length) extents touch."""
    found: list[int] = []
    for offset, length in extents:
        first, last = offset // block_size, -(-(offset + length) // block_size)
        found.extend(range(max(first, found[-1] + 1 if found else 0), last))
    return found


def runs_of(extents: Iterable[tuple[int, int]], read: Callable[[int, int], Bytes], limit: int = BLOCK_SIZE) -> Iterator[Run]:
    """Runs for ascending (offset, length) extents, read when they are needed, at most `limit` bytes at a time."""
    for offset, length in extents:
        for at in range(offset, offset + length, limit):
            yield at, read(at, min(limit, offset + length - at))


def chs_geometry(size: int) -> tuple[int, int, int]:
    """(cylinders, heads, sectors per track) as the specification's appendix computes them, rounded down."""
    total = min(size // SECTOR, 65535 * 16 * 255)
    if total >= 65535 * 16 * 63:
        return total // (16 * 255), 16, 255
    sectors = 17
    cylinder_heads = total // sectors
    heads = max((cylinder_heads + 1023) // 1024, 4)
    if cylinder_heads >= heads * 1024 or heads > 16:
        sectors, heads = 31, 16
        cylinder_heads = total // sectors
    if cylinder_heads >= heads * 1024:
        sectors, heads = 63, 16
        cylinder_heads = total // sectors
    return cylinder_heads // heads, heads, sectors


def _checked(runs: Iterable[Run], size: int) -> Iterator[tuple[int, memoryview]]:
    end = 0
    for offset, data in runs:
        view = memoryview(data).cast("B")
        if offset < end or offset + len(view) > size:
            raise ValueError(f"run {offset:#x}+{len(view):#x} is out of order or behind the disk's end {size:#x}")
        if offset % SECTOR or len(view) % SECTOR:
            raise ValueError(f"run {offset:#x}+{len(view):#x} is not made of whole sectors")
        end = offset + len(view)
        yield offset, view


def cut_at_blocks(runs: Iterable[tuple[int, memoryview]], block_size: int) -> Iterator[tuple[int, int, memoryview]]:
    """(block, offset in it, data): the runs, cut where blocks end."""
    for offset, view in runs:
        done = 0
        while done < len(view):
            block, inside = divmod(offset + done, block_size)
            take = min(len(view) - done, block_size - inside)
            yield block, inside, view[done : done + take]
            done += take


def _parent_locators(parent_name: str) -> tuple[tuple[Locator, ...], bytes]:
    """A relative path in the notation that every reader knows, in the sectors behind the header."""
    if not parent_name:
        return (), b""
    path = f".\\{parent_name}".encode("utf-16-le")
    locator = Locator(b"W2ru", len(path), FOOTER_SIZE + HEADER_SIZE)
    return (locator,), path.ljust(round_up(len(path), SECTOR), b"\0")


def _write_tables(out: BinaryIO, header: DynamicHeader, blocks: Sequence[int], *, batmap: bool) -> None:
    bat = bytearray(NO_BLOCK.to_bytes(4, "big") * header.entries).ljust(round_up(header.bat_bytes, SECTOR), b"\xff")
    batmap_data = _batmap(header, blocks) if batmap else b""
    at = header.bat_offset + len(bat) + len(batmap_data)
    for block in blocks:
        bat[4 * block : 4 * block + 4] = (at // SECTOR).to_bytes(4, "big")
        at += bitmap_size(header.block_size) + header.block_size
    out.write(bat + batmap_data)


def _batmap(header: DynamicHeader, blocks: Sequence[int]) -> bytes:
    """Header and map. No block is called whole, which is always true enough."""
    bits = bytes(round_up(-(-header.entries // 8), SECTOR))
    raw = bytearray(SECTOR)
    raw[:8] = BATMAP_COOKIE
    raw[8:16] = (header.batmap_offset + SECTOR).to_bytes(8, "big")
    raw[16:20] = (len(bits) // SECTOR).to_bytes(4, "big")
    raw[20:24] = (0x0001_0002).to_bytes(4, "big")
    raw[24:28] = (~sum(bits) & 0xFFFF_FFFF).to_bytes(4, "big")
    return bytes(raw) + bits


def _write_blocks(out: BinaryIO, blocks: Sequence[int], block_size: int, pieces: Iterator[tuple[int, int, memoryview]]) -> None:
    piece = next(pieces, None)
    for block in blocks:
        bitmap, data = 0, bytearray(block_size)
        while piece is not None and piece[0] == block:
            _, inside, view = piece
            data[inside : inside + len(view)] = view
            bitmap |= _bits(inside, len(view), block_size)
            piece = next(pieces, None)
        width = bitmap_size(block_size)
        out.write((bitmap << (8 * width - block_size // SECTOR)).to_bytes(width, "big"))
        out.write(data)
    if piece is not None:
        raise ValueError(f"a run touches block {piece[0]}, which `blocks` does not list in its order")


def _bits(inside: int, length: int, block_size: int) -> int:
    """The bitmap of one run as a number: the block's first sector is the highest of block_size / 512 bits."""
    behind = (block_size - inside - length) // SECTOR
    return ((1 << length // SECTOR) - 1) << behind


def _write_fixed(out: BinaryIO, size: int, runs: Iterable[tuple[int, memoryview]]) -> None:
    at = 0
    for offset, view in runs:
        _write_zeros(out, offset - at)
        out.write(view)
        at = offset + len(view)
    _write_zeros(out, size - at)


def _write_zeros(out: BinaryIO, count: int) -> None:
    while count > 0:
        out.write(_ZEROS[: min(count, len(_ZEROS))])
        count -= len(_ZEROS)
