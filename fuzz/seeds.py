"""Small valid images of every kind, by the testing writers: what fuzzing starts from. The same bytes every time."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

from tokvm.core.units import MiB
from tokvm.testing.cowd_writer import CowdOptions, write_cowd_extent
from tokvm.testing.sesparse_writer import SesparseOptions, write_sesparse_extent
from tokvm.testing.vhd_writer import Kind, write_vhd
from tokvm.testing.vhdx_log_writer import Part, make_dirty
from tokvm.testing.vhdx_writer import write_vhdx
from tokvm.testing.vmdk_descriptor import Dialect, ExtentLine, Identity, write_descriptor
from tokvm.testing.vmdk_stream_writer import GrainHeader, StreamOptions, Tables, write_stream
from tokvm.testing.vmdk_writer import SparseOptions, write_sparse_extent

ID, PARENT = UUID(int=0x1D), UUID(int=0xFA)
_SHORT = Dialect(ddb={"ddb.adapterType": "lsilogic"})


def vhds() -> Iterator[bytes]:
    kinds: list[tuple[Kind, int, int, bool]] = [
        ("fixed", 4096, 512, False), ("dynamic", 5 * 512, 512, False), ("dynamic", 8192 + 512, 4096, True),
        ("differencing", 5 * 512, 512, False), ("differencing", 8192 + 512, 4096, False),
    ]  # fmt: skip
    for kind, size, block_size, batmap in kinds:
        out = io.BytesIO()
        runs = [(512, b"a" * 512), (2048, b"b" * 512)]
        parent = (PARENT, "p.vhd") if kind == "differencing" else (None, "")
        write_vhd(
            out, size=size, kind=kind, runs=runs, unique_id=ID, block_size=block_size, parent_id=parent[0],
            parent_name=parent[1], batmap=batmap,
        )  # fmt: skip
        yield out.getvalue()


def vhdxs() -> Iterator[bytes]:
    yield _vhdx("dynamic", 3 * MiB + 512, zeros=[(2 * MiB, MiB)])
    yield _vhdx("dynamic", 3 * MiB, logical_sector=4096)
    yield _vhdx("differencing", 3 * MiB, unmapped=[(2 * MiB, MiB)])
    yield _vhdx("differencing", 3 * MiB, logical_sector=4096)
    dirty = io.BytesIO(_vhdx("dynamic", 3 * MiB))
    make_dirty(dirty, entries=2, pages=2, parts=frozenset({Part.BAT, Part.PAYLOAD}), noise=False)
    yield dirty.getvalue()


def _vhdx(kind: str, size: int, **more: object) -> bytes:
    out = io.BytesIO()
    sector = int(more.get("logical_sector", 512))  # type: ignore[call-overload]
    runs = [(0, b"a" * MiB), (MiB + sector, b"b" * sector)]
    child = {"parent_linkage": PARENT, "locator": {"relative_path": ".\\p.vhdx"}} if kind == "differencing" else {}
    write_vhdx(out, size=size, kind=kind, data_write_guid=ID, runs=runs, block_size=MiB, **child, **more)  # type: ignore[arg-type]
    return out.getvalue()


def sparses() -> Iterator[bytes]:
    """KDMV for random access: hosted sparse, and compressed in each of the ways that it is found."""
    for zeroed, redundant in ((False, False), (True, True)):
        out = io.BytesIO()
        options = SparseOptions(4096, redundant=redundant, zeroed_grains=zeroed)
        text = _text("monolithicSparse", [ExtentLine(5 * 4096 + 512, "SPARSE", "d.vmdk")])
        runs, zeros = [(4096, b"a" * 4096), (3 * 4096, b"b" * 512)], [(2 * 4096, 4096)]
        write_sparse_extent(out, size=5 * 4096 + 512, runs=runs, zeros=zeros, options=options, descriptor=text)
        yield out.getvalue()
    yield from streams()
    yield _stream(StreamOptions(4096, tables=Tables.FRONT, grain_header=GrainHeader.SIZE))


def streams() -> Iterator[bytes]:
    """streamOptimized, with tables behind the grains and before them."""
    for options in (StreamOptions(4096), StreamOptions(4096, tables=Tables.FRONT), StreamOptions(4096, short_last_grain=True)):
        yield _stream(options)


def _stream(options: StreamOptions) -> bytes:
    out = io.BytesIO()
    runs = [(0, b"a" * 4096), (4096, b"b" * 4096), (3 * 4096, b"c" * 512), (5 * 4096, b"d" * 512)]
    write_stream(out, size=5 * 4096 + 512, runs=runs, name="d.vmdk", options=options, dialect=_SHORT)
    return out.getvalue()


def cowds() -> Iterator[bytes]:
    for grain, zeroed in ((512, False), (4096, True)):
        runs, zeros = [(0, b"a" * 4096), (8192, b"b" * 4096)], [(4096, 4096)]
        yield _extent(write_cowd_extent, 5 * 4096 + 512, runs, zeros=zeros, options=CowdOptions(grain, zero_grains=zeroed))


def sesparses() -> Iterator[bytes]:
    size, runs = 17 * MiB, [(0, b"a" * 4096), (8192, b"b" * 4096), (16 * MiB, b"c" * 4096)]
    for first in (0, 1):
        options = SesparseOptions(first_grain=first)
        yield _extent(write_sesparse_extent, size, runs, zeros=[(4096, 4096)], unmapped=[(12288, 4096)], options=options)


def _extent(write: Callable[..., None], size: int, runs: list[tuple[int, bytes]], **more: object) -> bytes:
    with tempfile.TemporaryFile() as out:
        write(out, size=size, runs=runs, read_parent=lambda _, length: bytes(length), **more)
        out.seek(0)
        return out.read()


def descriptors() -> Iterator[bytes]:
    flat = [ExtentLine(4096, "VMFS", "d-flat.vmdk")]
    yield _text("vmfs", flat)
    yield _text("vmfsSparse", [ExtentLine(4096, "VMFSSPARSE", "d-delta.vmdk")], Identity(2, 1, "base.vmdk"))
    yield _text("seSparse", [ExtentLine(4096, "SESPARSE", "d-sesparse.vmdk")], Identity(2, 1))
    lines = [ExtentLine(4096, "FLAT", "d-f001.vmdk", 512), ExtentLine(4096, "ZERO"), ExtentLine(4096, "SPARSE", "d-s002.vmdk")]
    yield _text("custom", lines, dialect=Dialect(newline="\r\n", header_lines=('changeTrackPath="d-ctk.vmdk"',)))
    uuids = {"ddb.uuid.image": str(ID), "ddb.uuid.parent": str(PARENT)}
    yield _text("monolithicSparse", [ExtentLine(4096, "SPARSE", "d.vmdk")], dialect=Dialect(ddb=uuids, encoding="UTF-8"))
    yield write_descriptor("vmfs", [ExtentLine(4096, "VMFS", "gr\xf6\xdfe.vmdk")], dialect=Dialect(encoding="windows-1252"))


def _text(kind: str, lines: list[ExtentLine], identity: Identity | None = None, dialect: Dialect = _SHORT) -> bytes:
    return write_descriptor(kind, lines, identity=identity, dialect=dialect)


def written(folder: Path, images: Iterator[bytes], windows: Callable[[bytes], bytes]) -> None:
    """The seeds as inputs, one file each."""
    for number, image in enumerate(images):
        (folder / f"seed-{number}").write_bytes(windows(image))
