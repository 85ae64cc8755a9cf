"""The images of the formats part: one recipe for each format and kind of runs. They are made one after another and deleted
again, because together they would need a hundred times the disk's data.

                 large runs                              4 KiB random runs
VHD              dynamic                                 exact bitmaps: every other 4 KiB
VHD chain        base + 2 children of 1-16 MiB runs      base + 2 children of 4 KiB runs
VHDX             blocks of 32 MiB                        blocks of 1 MiB, shuffled (it has no smaller unit without a parent)
AVHDX chain      as VHD chain, children's blocks 2 MiB
VMDK flat        every other 64 MiB                      every other 4 KiB is a hole of the file
VMDK sparse      grains of 64 KiB in order               grains of 4 KiB, shuffled
VMDK stream      grains of 64 KiB in order               every other grain
COWD, seSparse   flat base + 2 children, as VHD chain
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from benchmarks.inputs import KiB, MiB
from benchmarks.shapes import Shape
from tokvm.testing.cowd_writer import write_cowd
from tokvm.testing.sesparse_writer import write_sesparse
from tokvm.testing.vhd_writer import Run, blocks_of, write_vhd
from tokvm.testing.vhdx_writer import write_vhdx
from tokvm.testing.vmdk_descriptor import Identity
from tokvm.testing.vmdk_flat_writer import write_flat
from tokvm.testing.vmdk_stream_writer import StreamOptions, write_stream_file
from tokvm.testing.vmdk_writer import SparseOptions, write_sparse

LARGE, SMALL = "large", "4 KiB"


@dataclass(frozen=True, slots=True)
class Images:
    """layers: what tokvm is given, base first. files: all of them. qemu: what qemu-img is given, and as which format.
    flat: that is a flat equivalent, because qemu-img cannot read the chain. dissect: the top that it reads right, or ""."""

    layers: tuple[str, ...]
    files: tuple[str, ...]
    qemu: tuple[str, str]
    flat: bool = False
    dissect: str = ""


@dataclass(frozen=True, slots=True)
class Recipe:
    """`shape`: what the disk holds, see `shapes`. `make`: writes it into a folder."""

    format: str
    runs: str
    shape: str
    make: Callable[[Path, Shape], Images]


def make_vhd(folder: Path, shape: Shape) -> Images:
    path = folder / "disk.vhd"
    _write_vhd(path, shape, 0, shape.merged_runs())
    return Images((str(path),), (str(path),), ("vpc", str(path)), dissect=str(path))


def make_vhd_chain(folder: Path, shape: Shape) -> Images:
    """dissect reads a child as if it had no parent."""
    paths = [folder / f"layer-{index}.vhd" for index in range(len(shape.layers))]
    for index, path in enumerate(paths):
        _write_vhd(path, shape, index, shape.runs(index))
    flat = _by_qemu(shape, folder / "flat.vhd", "vpc", "subformat=dynamic,force_size=on")
    layers = tuple(map(str, paths))
    return Images(layers, (*layers, flat), ("vpc", flat), flat=True)


def _write_vhd(path: Path, shape: Shape, index: int, runs: Iterator[Run]) -> None:
    with path.open("wb", buffering=4 * MiB) as out:
        write_vhd(
            out,
            size=shape.size,
            kind="differencing" if index else "dynamic",
            runs=runs,
            blocks=blocks_of(shape.layers[index]),
            unique_id=UUID(int=index + 1),
            parent_id=UUID(int=index) if index else None,
            parent_name=f"layer-{index - 1}.vhd" if index else "",
        )


def make_vhdx(folder: Path, shape: Shape) -> Images:
    path = folder / "disk.vhdx"
    write_vhdx(path, size=shape.size, kind="dynamic", data_write_guid=UUID(int=1), runs=shape.merged_runs())
    return Images((str(path),), (str(path),), ("vhdx", str(path)), dissect=str(path))


def make_vhdx_shuffled(folder: Path, shape: Shape) -> Images:
    path = folder / "disk.vhdx"
    runs = shape.merged_runs()
    write_vhdx(path, size=shape.size, kind="dynamic", data_write_guid=UUID(int=1), runs=runs, block_size=MiB, seed=1)
    return Images((str(path),), (str(path),), ("vhdx", str(path)), dissect=str(path))


def make_avhdx_chain(folder: Path, shape: Shape) -> Images:
    paths = [folder / f"layer-{index}.{'avhdx' if index else 'vhdx'}" for index in range(len(shape.layers))]
    for index, path in enumerate(paths):
        write_vhdx(
            path,
            size=shape.size,
            kind="differencing" if index else "dynamic",
            data_write_guid=UUID(int=index + 1),
            parent_linkage=UUID(int=index) if index else None,
            locator={"relative_path": f".\\{paths[index - 1].name}"} if index else None,
            runs=shape.runs(index),
        )
    flat = _by_qemu(shape, folder / "flat.vhdx", "vhdx", "subformat=dynamic")
    layers = tuple(map(str, paths))
    return Images(layers, (*layers, flat), ("vhdx", flat), flat=True, dissect=layers[-1])


def make_vmdk_flat(folder: Path, shape: Shape) -> Images:
    return _vmdk([write_flat(folder / "disk.vmdk", size=shape.size, runs=shape.merged_runs())])


def make_vmdk_sparse(folder: Path, shape: Shape) -> Images:
    return _vmdk([write_sparse(folder / "disk.vmdk", size=shape.size, runs=shape.merged_runs())])


def make_vmdk_sparse_shuffled(folder: Path, shape: Shape) -> Images:
    options = SparseOptions(grain_size=4 * KiB, seed=1)
    return _vmdk([write_sparse(folder / "disk.vmdk", size=shape.size, runs=shape.merged_runs(), options=options)])


def make_vmdk_stream(folder: Path, shape: Shape) -> Images:
    options = StreamOptions(level=1)
    return _vmdk([write_stream_file(folder / "disk.vmdk", size=shape.size, runs=shape.merged_runs(), options=options)])


def make_cowd_chain(folder: Path, shape: Shape) -> Images:
    return _snapshots(folder, shape, lambda path, index, identity: write_cowd(
        path, size=shape.size, runs=shape.runs(index), identity=identity
    ))  # fmt: skip


def make_sesparse_chain(folder: Path, shape: Shape) -> Images:
    return _snapshots(folder, shape, lambda path, index, identity: write_sesparse(
        path, size=shape.size, runs=shape.runs(index), identity=identity
    ))  # fmt: skip


def _snapshots(folder: Path, shape: Shape, write: Callable[[Path, int, Identity], list[Path]]) -> Images:
    """A flat base and its children, as ESXi makes them."""
    written = [write_flat(folder / "disk.vmdk", size=shape.size, runs=shape.runs(0), identity=Identity(cid=1))]
    for index in range(1, len(shape.layers)):
        identity = Identity(cid=index + 1, parent_cid=index, parent_hint=written[-1][0].name)
        written.append(write(folder / f"disk-{index:06}.vmdk", index, identity))
    return _vmdk(written)


def _vmdk(written: list[list[Path]]) -> Images:
    """One list of files for each layer, the descriptor or the whole disk first."""
    layers = tuple(str(paths[0]) for paths in written)
    files = tuple(str(path) for paths in written for path in paths)
    return Images(layers, files, ("vmdk", layers[-1]), dissect=layers[-1])


def _by_qemu(shape: Shape, path: Path, format_: str, options: str) -> str:
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", format_, "-o", options, shape.flat, str(path)], check=True)
    return str(path)


RECIPES = (
    Recipe("VHD", LARGE, "large", make_vhd),
    Recipe("VHD", SMALL, "pages", make_vhd),
    Recipe("VHD chain", LARGE, "large", make_vhd_chain),
    Recipe("VHD chain", SMALL, "small", make_vhd_chain),
    Recipe("VHDX", LARGE, "large", make_vhdx),
    Recipe("VHDX", "1 MiB blocks, shuffled", "large", make_vhdx_shuffled),
    Recipe("AVHDX chain", LARGE, "large", make_avhdx_chain),
    Recipe("AVHDX chain", SMALL, "small", make_avhdx_chain),
    Recipe("VMDK flat", LARGE, "large", make_vmdk_flat),
    Recipe("VMDK flat", SMALL, "pages", make_vmdk_flat),
    Recipe("VMDK sparse", LARGE, "large", make_vmdk_sparse),
    Recipe("VMDK sparse", "4 KiB grains, shuffled", "pages", make_vmdk_sparse_shuffled),
    Recipe("VMDK stream", LARGE, "packed", make_vmdk_stream),
    Recipe("VMDK stream", "64 KiB", "packed-grains", make_vmdk_stream),
    Recipe("COWD chain", LARGE, "large", make_cowd_chain),
    Recipe("COWD chain", SMALL, "small", make_cowd_chain),
    Recipe("seSparse chain", LARGE, "large", make_sesparse_chain),
    Recipe("seSparse chain", SMALL, "small", make_sesparse_chain),
)
