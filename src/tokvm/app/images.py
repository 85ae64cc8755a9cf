"""What an image file says of itself, and where a chain's bytes are."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from tokvm.app.image_files import Formats, open_layers
from tokvm.core.extents import Extent, ExtentKind
from tokvm.images.base import ReadAt
from tokvm.images.chain import Chain
from tokvm.images.reader import ChainReader


def describe(paths: Sequence[str], formats: Formats | None = None) -> list[dict[str, object]]:
    """Everything a person wants to know about each image among these files."""
    with open_layers(paths, formats) as layers:
        return [{"file": layer.name, "file_size": _file_size(layer.file), **layer.describe()} for layer in layers]


def _file_size(file: ReadAt) -> int:
    """Of all the image's files together; where they lie in their common address space has gaps."""
    parts: tuple[ReadAt, ...] = getattr(file, "files", ())
    return sum(part.size for part in parts) if parts else file.size


def map_extents(chain: Chain) -> Iterator[Extent]:
    """The chain's merged map, ABSENT ranges included, as ascending extents that do not stop at window borders."""
    reader = ChainReader(chain)
    deque(reader.covered(), maxlen=0)  # all tables are looked at before the first row, so that damage leaves no half of a map
    last: Extent | None = None
    for window in reader.covered():
        for extent in window.explicit():
            if last is not None and _goes_on(last, extent):
                last = Extent(last.offset, last.length + extent.length, last.kind, last.file_offset, last.layer)
                continue
            if last is not None:
                yield last
            last = extent
    if last is not None:
        yield last


def _goes_on(last: Extent, extent: Extent) -> bool:
    same = last.kind is extent.kind and last.layer == extent.layer and last.end == extent.offset
    return same and (last.kind is not ExtentKind.DATA or last.file_offset + last.length == extent.file_offset)


def map_rows(chain: Chain) -> Iterator[dict[str, object]]:
    """One row per extent with the keys of `qemu-img map --output=json`, and `kind` and `file` besides.

    depth: 0 is the top layer. present: some layer says something here. offset: in `file`, of data that lies there as it is;
    compressed data has none. What no layer says anything about reads as zeros, or is the parent's when the base is not listed.
    """
    top = len(chain.layers) - 1
    for extent in map_extents(chain):
        row: dict[str, object] = {"start": extent.offset, "length": extent.length}
        is_data = extent.kind is ExtentKind.DATA
        row |= {
            "depth": top - extent.layer if is_data else 0,
            "present": extent.kind is not ExtentKind.ABSENT,
            "zero": extent.kind is ExtentKind.ZERO or (extent.kind is ExtentKind.ABSENT and not chain.partial),
            "data": is_data,
            "kind": extent.kind.name,
        }
        yield row | (_place(chain, extent) if is_data else {})


def _place(chain: Chain, extent: Extent) -> dict[str, object]:
    """In which file the bytes lie, and where. A file that is several, or shows inflated bytes, knows (`locate`)."""
    file = chain.layers[extent.layer].file
    locate = getattr(file, "locate", None)
    name, offset = (file.name, extent.file_offset) if locate is None else locate(extent.file_offset)
    return {"file": name} | ({"compressed": True} if offset is None else {"offset": offset})
