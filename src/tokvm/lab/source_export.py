"""What a frozen disk holds, and what changed since another; and both as XenServer would export them: a dynamic VHD as base,
a differencing one as delta.

    frozen "b"  = raw ◄ l1 ◄ l2 ◄ l3          chain of layers, base first
    frozen "a"  = raw ◄ l1                    delta("a" → "b"): what l2 or l3 hold, newest first

`qemu-img map` says at which depth of the chain each range is found: below the layers of the delta it did not change. Ranges
with data are read from the layer's file at the offset that the map gives (layers are neither compressed nor encrypted);
a ZERO range of a layer was made zero by the guest, so it is sent as zeros.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO
from uuid import UUID

from tokvm.core.units import SECTOR, GiB, MiB
from tokvm.images.vhd.structs import FOOTER_SIZE, Footer
from tokvm.lab.errors import LabError
from tokvm.lab.programs import run_program
from tokvm.testing.vhd_writer import Run, blocks_of, write_vhd

CONVERT_TIMEOUT_S = 6 * 3600.0
# One answer of qemu-img map must stay below what process.run keeps (16 MiB): at worst 65536 ranges of some 150 characters.
MAP_WINDOW = 8 * GiB
READ_SIZE = MiB


@dataclass(frozen=True, slots=True)
class LayerFile:
    """One file of a disk's chain; `index` counts from the base."""

    path: Path
    format: str
    index: int


@dataclass(frozen=True, slots=True)
class Change:
    """A range of the guest disk that differs from the older snapshot; `layer` None: zeros."""

    offset: int
    length: int
    layer: int | None
    file_offset: int


def write_raw(chain: Sequence[LayerFile], out: Path) -> None:
    """The disk that ends in the chain's last layer, as a sparse raw file."""
    _convert(chain[-1], out, ["-O", "raw"])


def write_base(chain: Sequence[LayerFile], out: Path, *, unique_id: UUID) -> None:
    """The same as a dynamic VHD, written by qemu-img."""
    _convert(chain[-1], out, ["-O", "vpc", "-o", "subformat=dynamic,force_size=on"])
    _set_identity(out, unique_id)


def write_delta(chain: Sequence[LayerFile], out: BinaryIO, *, since: int, size: int, unique_id: UUID, parent_id: UUID) -> None:
    """What the layers above number `since` changed, as a differencing VHD, written front to back."""
    changed = changes(chain, since=since, size=size)
    with ExitStack() as stack:
        files = {layer.index: stack.enter_context(layer.path.open("rb")) for layer in chain[since + 1 :]}
        write_vhd(
            out,
            size=size,
            kind="differencing",
            runs=_runs(changed, files),
            blocks=blocks_of((change.offset, change.length) for change in changed),
            unique_id=unique_id,
            parent_id=parent_id,
        )


def changes(chain: Sequence[LayerFile], *, since: int, size: int) -> list[Change]:
    """The ranges that the layers above number `since` hold: ascending, whole sectors. since -1: the whole disk."""
    top = chain[-1]
    newer = top.index - since
    found: list[Change] = []
    for row in _map(top, size) if newer else ():
        if row["depth"] >= newer:
            continue
        start, stop = row["start"], min(row["start"] + row["length"], size)
        if row["data"]:
            found.append(Change(start, stop - start, top.index - row["depth"], row["offset"]))
        elif row["zero"]:
            found.append(Change(start, stop - start, None, 0))
        else:
            raise LabError(f"qemu-img map knows no content for {start:#x}", where=str(top.path))
    return found


def _map(layer: LayerFile, size: int) -> Iterator[dict[str, int]]:
    for start in range(0, size, MAP_WINDOW):
        window = ["--start-offset", str(start), "--max-length", str(min(MAP_WINDOW, size - start))]
        said = run_program(
            ["qemu-img", "map", "--output=json", "-f", layer.format, *window, str(layer.path)], package="qemu-utils"
        )
        yield from json.loads(said)


def _runs(changed: list[Change], files: Mapping[int, BinaryIO]) -> Iterator[Run]:
    for change in changed:
        for done in range(0, change.length, READ_SIZE):
            length = min(READ_SIZE, change.length - done)
            yield change.offset + done, read_piece(files, change, done, length)


def read_piece(files: Mapping[int, BinaryIO], change: Change, skip: int, length: int) -> bytes:
    """`length` bytes of the range, from its byte `skip`. files: the layers, open, by index."""
    if change.layer is None:
        return bytes(length)
    file = files[change.layer]
    file.seek(change.file_offset + skip)
    # A cluster that was never written to its end may lie beyond the end of the file: zeros.
    return file.read(length).ljust(length, b"\0")


def _convert(top: LayerFile, out: Path, options: list[str]) -> None:
    argv = ["qemu-img", "convert", "-f", top.format, *options, str(top.path), str(out)]
    run_program(argv, package="qemu-utils", timeout_s=CONVERT_TIMEOUT_S)


def _set_identity(vhd: Path, identity: UUID) -> None:
    """Both copies of the footer: at the start and in the last sector."""
    with vhd.open("r+b") as file:
        end = file.seek(0, 2)
        for at in (0, end - SECTOR):
            file.seek(at)
            footer = replace(Footer.parse(file.read(FOOTER_SIZE), name=str(vhd), offset=at), unique_id=identity)
            file.seek(at)
            file.write(footer.pack())
