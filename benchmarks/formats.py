"""(d) Every image format to a raw file by `tokvm image convert`, against qemu-img, the kernel's own copy and dissect.

The kernel copies a dense file of as many bytes as the disk has data. dissect (`dissect.hypervisor`) is a reader in plain Python
without numpy: it reads the start of the disk once, in pieces of 1 MiB, and its rate is taken for the rest. Every way ends with
an fsync, and the first copy of every way is compared with what the disk holds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.copies import CP, KERNEL, Once, both, compare, cp
from benchmarks.format_inputs import RECIPES, Images, Recipe
from benchmarks.inputs import MiB
from benchmarks.measure import Result, Variant, alternate, apart, evict, need_room, worker
from benchmarks.report import FormatLine, Section
from benchmarks.shapes import flat_name, make_dense, make_shape

CONVERT = "tokvm image convert"
QEMU = "qemu-img convert + fsync"
DISSECT = "dissect, the disk's start"
DISSECT_BYTES = 1024 * MiB  # of the guest disk
ROOM = 7  # times the disk's data: dense, flat, a chain whose blocks are whole, its flat equivalent, a target
NAMES = tuple(dict.fromkeys(recipe.format for recipe in RECIPES))


@dataclass(frozen=True, slots=True)
class Prepared:
    """A recipe's images, and the flat file of what they read as. payload: bytes of data; start_payload: in the disk's start."""

    images: Images
    flat: Path
    size: int
    payload: int
    start_payload: int


def every_format(
    folder: Path, size: int, *, names: Sequence[str], repeats: int, tell: Callable[[str], None]
) -> Iterator[Section]:
    """One section for each recipe of the formats `names`."""
    need_room(folder, ROOM * size // 2, f"images of disks of {size // MiB} MiB")
    place = folder / "formats"
    place.mkdir(exist_ok=True)
    dense = place / "dense.raw"
    try:
        apart(make_dense, dense, size // 2)
        chosen = [number for number, recipe in enumerate(RECIPES) if recipe.format in names]
        for number in chosen:
            recipe = RECIPES[number]
            tell(f"{recipe.format}, {recipe.runs}: making the images")
            yield _section(recipe, apart(_prepare, number, place, size), dense, repeats=repeats, tell=tell)
            if not any(RECIPES[other].shape == recipe.shape for other in chosen if other > number):
                (place / flat_name(recipe.shape)).unlink()
    finally:
        shutil.rmtree(place)


def _prepare(number: int, place: Path, size: int) -> Prepared:
    recipe = RECIPES[number]
    shape = make_shape(place, recipe.shape, size)
    start = shape.payload_to(min(DISSECT_BYTES, size))
    return Prepared(recipe.make(place, shape), Path(shape.flat), size, shape.payload, start)


def _section(recipe: Recipe, found: Prepared, dense: Path, *, repeats: int, tell: Callable[[str], None]) -> Section:
    images = found.images
    try:
        results = _measure(found, dense, found.flat.with_name("target.raw"), repeats=repeats, tell=tell)
    finally:
        for file in images.files:
            Path(file).unlink()
    title = f"{recipe.format}, {recipe.runs}, {found.payload // MiB} MiB of data → raw file"
    line = FormatLine(recipe.format, recipe.runs, CONVERT, (KERNEL, CP), QEMU, DISSECT if images.dissect else "", images.flat)
    return Section(title, KERNEL, results, (line,))


def _measure(found: Prepared, dense: Path, target: Path, *, repeats: int, tell: Callable[[str], None]) -> list[Result]:
    images = found.images

    def fresh() -> None:
        target.unlink(missing_ok=True)
        target.with_name(f"{target.name}.tokvm.json").unlink(missing_ok=True)

    def same(size: int = found.size) -> Once:
        return Once(lambda: compare(target, found.flat, size))

    before = both(evict(dense, *map(Path, images.files)), fresh)
    format_, path = images.qemu
    convert = ("qemu-img", "convert", "-f", format_, "-O", "raw", "-t", "writeback", path, str(target))
    sync = ("sync", str(target))
    variants = [
        Variant(KERNEL, (worker("kernel", str(target), str(dense)),), before),
        Variant(CP, (cp(str(dense), target), sync), before),
        Variant(QEMU, (convert, sync), before, same()),
        Variant(CONVERT, (worker("convert", str(target), *images.layers),), before, same()),
    ]
    try:
        results = alternate(variants, repeats=repeats, payload=found.payload, tell=tell)
        if images.dissect:
            end = min(DISSECT_BYTES, found.size)
            variant = Variant(DISSECT, (worker("dissect", str(target), images.dissect, str(end)),), before, same(end))
            results += alternate([variant], repeats=1, payload=found.start_payload, tell=tell)
        return results
    finally:
        fresh()
