"""Image files given on the command line: opened, chained, described, copied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Protocol

from tokvm.core.disk import BufferPool
from tokvm.core.extents import Extent, ExtentKind
from tokvm.images.chain import Chain
from tokvm.images.files import open_file
from tokvm.images.open import open_image
from tokvm.images.reader import ChainReader
from tokvm.targets.open import TargetSpec, open_target
from tokvm.transfer.passes import Checkpoint, PassResult, TargetState, run_pass

BUFFERS = 12


class PassProgress(Protocol):
    """What a conversion tells whoever watches."""

    def begin(self, total: int) -> None: ...

    def advance(self, count: int) -> None: ...


@contextmanager
def open_chain(paths: Sequence[str], *, force_linkage: bool = False) -> Iterator[Chain]:
    """The chain of these files, base first. Only the files named here are opened, whatever the images say."""
    with ExitStack() as stack:
        layers = []
        for path in paths:
            file = open_file(path)
            stack.callback(file.close)
            layers.append(open_image(file))
        yield Chain.open(layers, force_linkage=force_linkage)


def describe(path: str) -> dict[str, object]:
    """Everything a person wants to know about one image file."""
    file = open_file(path)
    try:
        return {"file": path, "file_size": file.size, **open_image(file).describe()}
    finally:
        file.close()


def map_extents(chain: Chain) -> Iterator[Extent]:
    """The chain's merged map, ABSENT ranges included, as ascending extents that do not stop at window borders."""
    last: Extent | None = None
    for window in chain.windows():
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


def convert(chain: Chain, spec: TargetSpec, progress: PassProgress) -> PassResult:
    """The chain's content, all of it, onto the target; absent ranges read as zeros afterwards whatever it held before."""
    reader = ChainReader(chain, pool=BufferPool(BUFFERS))
    writer = open_target(spec, size=chain.size)
    try:
        progress.begin(reader.total)
        return run_pass(reader, writer, state=TargetState.UNKNOWN, resume=None, record=_keep_nothing, progress=progress.advance)
    finally:
        writer.close()
        reader.close()


def _keep_nothing(_checkpoint: Checkpoint) -> None:
    """A conversion is one command: when it breaks it is run again from the start."""


def extent_row(extent: Extent) -> dict[str, object]:
    """`qemu-img map --output=json`-like, with our three kinds."""
    row = asdict(extent)
    row["kind"] = extent.kind.name
    if extent.kind is not ExtentKind.DATA:
        del row["file_offset"], row["layer"]
    return row
