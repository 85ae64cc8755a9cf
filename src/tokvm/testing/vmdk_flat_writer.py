"""Writes flat VMDKs: a descriptor and files of raw bytes. ESXi's `disk-flat.vmdk` and VMware's split flat disks.

    VMFS  the extent is the whole file, no offset in its line       createType vmfs
    FLAT  the extent begins at an offset in the file                createType monolithicFlat, twoGbMaxExtentFlat
    ZERO  no file                                                   createType custom

What no run names is a hole in the file: zeros. Format: VMware, "Virtual Disk Format 5.0" (2011).
Imports no numpy: it runs inside short-lived commands.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from tokvm.core.units import SECTOR
from tokvm.testing.vmdk_descriptor import ESXI, Dialect, ExtentLine, Identity, extent_path, write_descriptor
from tokvm.testing.vmdk_grains import Kind, Piece, Range, Run, per_extent, pieces_of
from tokvm.testing.vmdk_writer import split_lengths


@dataclass(frozen=True, slots=True)
class FlatExtent:
    """`length` bytes of the disk, `file_offset` bytes inside the file `name`. Without a name: zeros, and no file."""

    length: int
    name: str = ""
    file_offset: int = 0


def write_flat(
    path: Path,
    *,
    size: int,
    runs: Iterable[Run],
    zeros: Iterable[Range] = (),
    create_type: str = "vmfs",
    extents: Sequence[FlatExtent] | None = None,
    split: int | None = None,
    identity: Identity | None = None,
    dialect: Dialect = ESXI,
) -> list[Path]:
    """Write a descriptor and its extent files; returns the files, the descriptor first.

    Without `extents` there is one `-flat.vmdk`, or with `split` extents `-f001.vmdk` … of so many bytes.
    """
    if extents is None:
        extents = default_extents(path, size, split)
    if sum(extent.length for extent in extents) != size:
        raise ValueError(f"the extents' lengths do not add up to the disk's {size} bytes")
    lines = [_line(extent, create_type) for extent in extents]
    path.write_bytes(write_descriptor(create_type, lines, identity=identity, dialect=dialect))
    files = {extent.name: path.with_name(extent.name) for extent in extents if extent.name}
    for name, file in files.items():
        file.write_bytes(b"")
        with file.open("r+b") as out:
            out.truncate(max(extent.file_offset + extent.length for extent in extents if extent.name == name))
    ends = list(accumulate(extent.length for extent in extents))
    for number, pieces in per_extent(pieces_of(size, runs, zeros), ends):
        _write_extent(extents[number], files.get(extents[number].name), pieces)
    return [path, *files.values()]


def default_extents(path: Path, size: int, split: int | None) -> list[FlatExtent]:
    if split is None:
        return [FlatExtent(size, extent_path(path, "flat").name)]
    lengths = enumerate(split_lengths(size, split), start=1)
    return [FlatExtent(length, extent_path(path, f"f{number:03}").name) for number, length in lengths]


def _line(extent: FlatExtent, create_type: str) -> ExtentLine:
    if extent.length < SECTOR or extent.length % SECTOR or extent.file_offset % SECTOR:
        raise ValueError(f"{extent} is not made of whole sectors")
    if not extent.name:
        return ExtentLine(extent.length, "ZERO")
    if not create_type.startswith("vmfs"):
        return ExtentLine(extent.length, "FLAT", extent.name, extent.file_offset)
    if extent.file_offset:
        raise ValueError(f"{extent}: a VMFS extent has no offset in its file")
    return ExtentLine(extent.length, "VMFS", extent.name)


def _write_extent(extent: FlatExtent, file: Path | None, pieces: Iterator[Piece]) -> None:
    data = (piece for piece in pieces if piece.kind is Kind.DATA)
    if file is None:
        if next(data, None) is not None:
            raise ValueError("a run touches a ZERO extent, which has no file")
        return
    with file.open("r+b") as out:
        for piece in data:
            out.seek(extent.file_offset + piece.offset)
            out.write(piece.data)
