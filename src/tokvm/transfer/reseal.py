"""Keep partly overwritten cells verifiable: read them back after the pass, and hash them anew.

    cell, 64 KiB   |........DDDD..........DD....|      D: written by this pass (its own hashes), .: by earlier passes
    SEAL record    |============================|      hash of the whole cell as it was read back from the medium

The earlier hash of such a cell is of bytes that are partly gone, so it proves nothing any more. What a SEAL proves:

  * at the moment of sealing every D was on the medium exactly as it was handed to the target (compared by its own hash), and
  * since that moment no byte of the cell has changed, the dots included.

What it does not prove: that the dots did not rot *between* the earlier pass and the sealing. Whoever wants that too runs
`verify` before the next pass. Without a SEAL (no time left, see PassLimits.reseal_s) the D's stay verifiable by their own
hashes and the dots count as unverifiable.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from tokvm.core.errors import TargetError
from tokvm.transfer.manifest import CELL, ManifestReader, ManifestWriter, RecordKind, data_records
from tokvm.transfer.resolve import Resolved, resolve, windows
from tokvm.transfer.verify import Piece, Readable, check_run

log = logging.getLogger(__name__)

Cell = tuple[int, int, list[Piece]]  # offset, length (the disk's last cell may be short), what this pass wrote in it


def reseal(target: Readable, manifest: ManifestWriter, *, until: float, workers: int) -> int:
    """Seal what this pass wrote only partly, until the `time.monotonic()` instant. Returns how many cells were left unsealed.

    TargetError when the medium does not hold what the pass wrote.
    """
    reader = manifest.read()
    left = 0
    waiting: list[Future[bytes]] = []
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="reseal") as pool:
            for cell in _partial_cells(reader):
                if time.monotonic() >= until:
                    left += 1
                    continue
                waiting.append(pool.submit(_seal, target, cell))
                if len(waiting) > 4 * workers:
                    manifest.append(waiting.pop(0).result())
            for future in waiting:
                manifest.append(future.result())
    finally:
        reader.close()
    manifest.flush()
    if left:
        log.info("%s: no time to seal %d partly overwritten cells; their older bytes cannot be verified", manifest.path, left)
    return left


def _partial_cells(reader: ManifestReader) -> Iterator[Cell]:
    size = reader.header.size
    for start, stop in windows(size):
        found = resolve([reader], start, stop)
        pieces: dict[int, list[Piece]] = {}
        covered: dict[int, int] = {}
        for offset, length, hashed in _pieces(found):
            pieces.setdefault(offset // CELL, []).append((offset, length, hashed))
            covered[offset // CELL] = covered.get(offset // CELL, 0) + length
        for cell in sorted(pieces):
            length = min(CELL, size - cell * CELL)
            if covered[cell] < length:
                yield cell * CELL, length, sorted(pieces[cell])


def _pieces(found: Resolved) -> Iterator[Piece]:
    """What this pass wrote, cut at the cells' edges; whole cells of zeros are left out, they need no seal."""
    for row in found.whole:
        if (row["kind"] == RecordKind.DATA and row["length"] < CELL) or row["kind"] == RecordKind.SEAL:
            yield int(row["offset"]), int(row["length"]), row["digest"].tobytes()
    for offset, length in found.zeros:
        end = offset + length
        for at in {offset // CELL, (end - 1) // CELL}:
            low, high = max(offset, at * CELL), min(end, (at + 1) * CELL)
            if high - low < CELL:
                yield low, high - low, b""


def _seal(target: Readable, cell: Cell) -> bytes:
    """The packed SEAL record of one cell."""
    start, length, pieces = cell
    held = _Held(start, target.read_back(start, length), target.size)
    _, bad = check_run(held, pieces)
    if bad:
        where = f"{getattr(target, 'path', 'target')}@{bad[0][0]:#x}"
        fix = "the storage does not keep what it is given: check it (dmesg), and use another target"
        raise TargetError(f"{bad[0][1]} bytes read back differ from what was written", where=where, fix=fix)
    return data_records(start, held.data, kind=RecordKind.SEAL)


class _Held:
    """One cell that was read already, as something to check pieces against."""

    def __init__(self, start: int, data: memoryview, size: int) -> None:
        self.data = data
        self.size = size
        self._start = start

    def read_back(self, offset: int, length: int) -> memoryview:
        return self.data[offset - self._start : offset - self._start + length]
