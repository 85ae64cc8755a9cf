"""(c) The most memory that a pass needs, by the disk's size: the data stays the same, the disk around it grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.inputs import MiB, spread
from benchmarks.measure import Result, Variant, alternate, worker

GiB = 1024 * MiB
# A VHD ends at 2040 GiB.
SIZES = (GiB, 64 * GiB, 512 * GiB, 2040 * GiB)
PAYLOAD = 256 * MiB


def by_size(folder: Path, *, sizes: Sequence[int] = SIZES, tell: Callable[[str], None]) -> list[Result]:
    """One run for each size, onto a sparse file."""
    results: list[Result] = []
    for size in sizes:
        chain = spread(folder, size, PAYLOAD)
        target = folder / "memory.raw"
        target.unlink(missing_ok=True)
        variant = Variant(f"tokvm pass, disk of {size // GiB} GiB", (worker("pass", str(target), "-", *chain.layers),))
        try:
            results += alternate([variant], repeats=1, payload=chain.payload, tell=tell)
        finally:
            target.unlink(missing_ok=True)
    return results
