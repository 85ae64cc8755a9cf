"""From raw files to the VHD that vdi-export streams, and the small changes that make one stream say something else.

    footer copy 512 | header 1024 | BAT | blocks, ascending | footer 512

A stream's identity (uuid, parent, time) is put in while it is sent, so one file serves every case.
"""

from __future__ import annotations

import mmap
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from tokvm.images.vhd.structs import checksum
from tokvm.testing.vhd_writer import write_vhd
from tokvm.testing.xenserver.backend import PIECE, MiB, data_ranges

BLOCK = 2 * MiB
FOOTER = 512
HEADER = 1024
CREATOR = b"tap\0"  # tapdisk 1.3, as the files on a XenServer say; qemu-img then believes the size
CREATOR_VERSION = 0x0001_0003


def export_raw(out: Path, path: Path, parent: Path | None) -> None:
    """`path` as a dynamic VHD, or what differs from `parent` as a differencing one."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as disk:
        view = memoryview(disk)
        # Slices of the map, not copies: the writer needs all runs before the first byte, for the BAT.
        if parent is None:
            runs = [(at, view[at:stop]) for at, stop in _written(file.fileno(), disk, size)]
        else:
            runs = [(at, view[at:stop]) for at, stop in _changed(file.fileno(), disk, parent, size)]
        with out.open("wb") as target:
            write_vhd(
                target,
                size=size,
                kind="dynamic" if parent is None else "differencing",
                runs=runs,
                unique_id=uuid.uuid4(),
                parent_id=None if parent is None else uuid.uuid4(),
                parent_name="" if parent is None else "base.vhd",
                block_size=BLOCK,
                creator=CREATOR,
                creator_version=CREATOR_VERSION,
            )
        for _, data in runs:
            data.release()
        view.release()


def _written(file: int, disk: mmap.mmap, size: int) -> Iterator[tuple[int, int]]:
    """Runs that are not all zero, joined."""
    zero = bytes(PIECE)
    ranges = data_ranges(file, size)
    return joined(at for start, stop in ranges for at in pieces(start, stop) if disk[at : at + PIECE] != zero[: size - at])


def _changed(file: int, disk: mmap.mmap, parent: Path, size: int) -> Iterator[tuple[int, int]]:
    """Runs that differ from the parent; behind its end it counts as zeros."""
    with parent.open("rb") as old_file:
        old_size = os.fstat(old_file.fileno()).st_size
        ranges = sorted({*_blocks(data_ranges(file, size)), *_blocks(data_ranges(old_file.fileno(), old_size))})
        found = []
        for start in ranges:
            stop = min(start + BLOCK, size)
            old = os.pread(old_file.fileno(), stop - start, start).ljust(stop - start, b"\0")
            if disk[start:stop] != old:
                found += [at for at in pieces(start, stop) if disk[at : at + PIECE] != old[at - start : at - start + PIECE]]
    return ((start, min(stop, size)) for start, stop in joined(found))


def _blocks(ranges: list[tuple[int, int]]) -> Iterator[int]:
    for start, stop in ranges:
        yield from range(start // BLOCK * BLOCK, stop, BLOCK)


def pieces(start: int, stop: int) -> range:
    return range(start // PIECE * PIECE, stop, PIECE)


def joined(starts: Iterator[int] | list[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring pieces as one run."""
    first = last = -1
    for at in starts:
        if at != last:
            if last > 0:
                yield first, last
            first = at
        last = at + PIECE
    if last > 0:
        yield first, last


def relabel(path: Path, *, unique: str, parent: str, timestamp: int) -> dict[int, bytes]:
    """Patches (file offset → bytes) that give the VHD in `path` another uuid, parent and time, with right checksums."""
    with path.open("rb") as file:
        footer = bytearray(file.read(FOOTER))
        header = bytearray(file.read(HEADER))
        end = file.seek(0, os.SEEK_END)
    footer[24:28] = timestamp.to_bytes(4, "big")
    footer[68:84] = uuid.UUID(unique).bytes
    footer[64:68] = checksum(footer, 64).to_bytes(4, "big")
    if parent:
        header[40:56] = uuid.UUID(parent).bytes
        header[36:40] = checksum(header, 36).to_bytes(4, "big")
    return {0: bytes(footer) + bytes(header), end - FOOTER: bytes(footer)}
