"""Did anybody write to a disk meanwhile? Two looks that cost nothing next to reading it all.

    cells(disk)    SHA-256 of some 70 pages on the medium: the first eight (partition table), the last, others evenly spread
    written(path)  a mark that each write through this host moves: a file's modification time, a device's sectors written

The second sees any write, but only this host's; the first sees what another host did to shared storage, but only with luck.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from tokvm.core.disk import DiskWriter
from tokvm.core.units import KiB
from tokvm.guest.durable import boot_id

UNKNOWN = ""
_CELL = 4 * KiB
_COUNT = 64
_HEAD = 8
_SECTORS_WRITTEN = 6  # field of /sys/dev/block/*/stat, counted from 0 (Documentation/block/stat.rst)


def cells(disk: DiskWriter) -> str:
    digest = hashlib.sha256()
    for offset in cell_offsets(disk.size):
        digest.update(disk.read_back(offset, min(_CELL, disk.size - offset)))
    return digest.hexdigest()


def cell_offsets(size: int) -> list[int]:
    """Where the cells of a disk of `size` bytes begin, ascending."""
    last = (size - 1) // _CELL
    pages = {page for page in range(_HEAD) if page <= last} | {last * number // _COUNT for number in range(_COUNT)} | {last}
    return sorted(page * _CELL for page in pages)


def written(path: str) -> str:
    """Equal marks: nobody on this host wrote in between. UNKNOWN where the kernel does not count; never equal over a reboot for
    a device, whose count begins anew then."""
    try:
        found = Path(path).stat()
        if stat.S_ISREG(found.st_mode):
            return f"mtime {found.st_mtime_ns}"
        folder = Path(f"/sys/dev/block/{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}").resolve()
        queue = folder if (folder / "queue").exists() else folder.parent
        if (queue / "queue" / "iostats").read_text().strip() != "1":
            return UNKNOWN
        return f"sectors {(folder / 'stat').read_text().split()[_SECTORS_WRITTEN]} boot {boot_id()}"
    except (OSError, IndexError):
        return UNKNOWN


def same(before: str, now: str) -> bool:
    """True only when it is known that nobody wrote."""
    return before == now != UNKNOWN
