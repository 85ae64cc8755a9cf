"""What must hold of whatever a reader accepts. A failure is a Wrong, or whatever else the reader let escape."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from typing import Protocol

import numpy as np

from tokvm.core.disk import Chunk
from tokvm.core.errors import ImageError
from tokvm.core.extents import ExtentKind, ExtentMap
from tokvm.core.units import KiB, MiB
from tokvm.images.base import Layer
from tokvm.images.chain import Chain
from tokvm.images.random_access import ChainBytes
from tokvm.images.vmdk.inflate import InflatedFile

_WINDOWS = 24  # of a hostile disk of 62 TiB there are a thousand, all alike
_READS = 48
_READ = 8 * KiB
_AGAIN = 4 * MiB
CONTENT_LIMIT = MiB  # disks up to this size are read as a whole, in two ways where there are two


class Wrong(AssertionError):
    """A reader accepted an image and said something impossible about it."""


class Reader(Protocol):
    @property
    def size(self) -> int: ...

    def chunks(self, position: int = 0) -> Iterator[Chunk]: ...

    def close(self) -> None: ...


def check_layer(layer: Layer) -> None:
    """Its description can be shown, its map lies within the disk and the file, and all of it can be read."""
    json.dumps([layer.describe(), list(layer.warnings)])  # whoever prints them escapes what moves a cursor
    stop, reads = 0, _READS
    for number, window in enumerate(islice(layer.windows(), _WINDOWS)):
        if not window.start == stop < window.stop <= layer.size:
            raise Wrong(f"window {window.start:#x} to {window.stop:#x} behind {stop:#x} of {layer.size:#x}")
        stop = window.stop
        _check_rows(window, layer)
        reads -= _read_some(window, layer, reads)
        if number < 2:
            _check_again(window, layer)


def _check_rows(window: ExtentMap, layer: Layer) -> None:
    end = window.offset + window.length
    good = [
        bool((window.length > 0).all()),
        bool((window.offset >= window.start).all() and (end <= window.stop).all()),
        bool((window.offset[1:] >= end[:-1]).all()),
        bool(np.isin(window.kind, (int(ExtentKind.DATA), int(ExtentKind.ZERO))).all()),
    ]
    data = window.kind == ExtentKind.DATA
    where = window.file_offset[data]
    good.append(bool((where >= 0).all() and (where + window.length[data] <= layer.file.size).all()))
    if not all(good):
        raise Wrong(f"rows of {window.start:#x} to {window.stop:#x}: {good}")


def _read_some(window: ExtentMap, layer: Layer, most: int) -> int:
    """How many reads were made. What the map calls DATA can be read, but for compressed grains, which only reading shows."""
    data = window.only(ExtentKind.DATA)
    count = min(len(data), most)
    files = getattr(layer.file, "files", (layer.file,))
    compressed = any(isinstance(file, InflatedFile) for file in files)
    for where, length in zip(data.file_offset[:count].tolist(), data.length[:count].tolist(), strict=True):
        for at, take in {(where, min(length, _READ)), (where + max(length - _READ, 0), min(length, _READ))}:
            try:
                layer.file.read_into(at, memoryview(bytearray(take)))
            except ImageError as exc:
                if not compressed:
                    raise Wrong("what the map calls DATA cannot be read") from exc
    return count


def _check_again(window: ExtentMap, layer: Layer) -> None:
    """The map of a range, asked for by itself, says the same."""
    stop = min(window.stop, window.start + _AGAIN)
    if len(window) > 4096:
        return
    whole, again = _spans(window.clip(window.start, stop)), _spans(layer.window(window.start, stop))
    if whole != again:
        raise Wrong(f"a walk says {whole[:4]}, a look {again[:4]}")


def _spans(found: ExtentMap) -> list[tuple[int, int, int, int]]:
    """(offset, end, kind, file offset of DATA), neighbours joined."""
    spans: list[tuple[int, int, int, int]] = []
    for extent in found:
        shift = extent.file_offset - extent.offset if extent.kind is ExtentKind.DATA else 0
        if spans and spans[-1][1:] == (extent.offset, int(extent.kind), shift):
            spans[-1] = (spans[-1][0], extent.end, int(extent.kind), shift)
        else:
            spans.append((extent.offset, extent.end, int(extent.kind), shift))
    return spans


def check_refusal(error: ImageError, name: str) -> None:
    """It says where and what next; nothing in it moves a cursor."""
    if not error.where.startswith(name) or not error.fix:
        raise Wrong(f"a refusal without a place or a way on: {error!r} at {error.where!r}") from error
    for text in (error.what, error.where, error.fix):
        if not text.isprintable():
            raise Wrong(f"{text!r} is not fit to be shown") from error


def check_stream(make: Callable[[], Reader], cut: int, layer: Layer | None) -> None:
    """Its chunks lie in the disk, ascend by position, and go on from any of them; a file with the same bytes says the same."""
    reader = make()
    try:
        if reader.size > CONTENT_LIMIT:
            return
        content, positions = _content(reader, 0, bytes(reader.size))
    finally:
        reader.close()
    if positions:
        _check_resumed(make, positions[cut % len(positions)], content)
    if layer is not None and layer.size == len(content):
        _check_same(content, layer)


def _content(reader: Reader, position: int, under: bytes) -> tuple[bytes, list[int]]:
    raw = bytearray(under)
    positions: list[int] = []
    for chunk in reader.chunks(position):
        if not 0 <= chunk.offset < chunk.offset + chunk.length <= reader.size:
            raise Wrong(f"a chunk of {chunk.length:#x} at {chunk.offset:#x} of {reader.size:#x}")
        data = bytes(chunk.length) if chunk.data is None else chunk.data
        raw[chunk.offset : chunk.offset + chunk.length] = data
        positions.append(chunk.position)
        chunk.release()
    if any(later <= earlier for earlier, later in pairwise(positions)):
        raise Wrong(f"positions do not ascend: {positions[:8]}")
    return bytes(raw), positions


def _check_resumed(make: Callable[[], Reader], position: int, content: bytes) -> None:
    reader = make()
    try:
        again, _ = _content(reader, position, content)
    finally:
        reader.close()
    if again != content:
        raise Wrong(f"another content when the stream goes on from {position:#x}")


def _check_same(content: bytes, layer: Layer) -> None:
    try:
        same = bytes(ChainBytes(Chain.open([layer])).read_back(0, layer.size))
    except ImageError:
        return  # random access looks at other structures, too
    if same != content:
        raise Wrong("the stream and the file differ in content")
