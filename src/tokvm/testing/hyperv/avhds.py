"""VHD and AVHD files of generation 1's guests, as vhds.py has VHDX and AVHDX.

A file is known by the unique id in its footer, which stays when it is written to; a child names its parent's. There are no
trimmed blocks: a child has to say zeros, and so it does.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from uuid import UUID

from tokvm.testing.hyperv import paths
from tokvm.testing.hyperv.state import DIFFERENCING, FIXED, Vhd
from tokvm.testing.vhd_writer import Run, write_vhd

_EPOCH = 946_684_800  # 2000-01-01 UTC, from which a footer counts
_FOOTER = 512
_PARENT_ID = 512 + 40


def write(path: Path, vhd: Vhd, parent: Vhd | None, runs: Iterable[Run]) -> None:
    """The whole file anew, in place; its footer bears another timestamp than the file had."""
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(0)
        write_vhd(
            file,
            size=vhd["size"],
            kind={DIFFERENCING: "differencing", FIXED: "fixed"}.get(vhd["type"], "dynamic"),  # type: ignore[arg-type]
            runs=runs,
            unique_id=UUID(vhd["identifier"]),
            parent_id=UUID(parent["identifier"]) if parent else None,
            parent_name=paths.name_of(parent["path"]) if parent else "",
            block_size=vhd["block_size"],
            timestamp=int(time.time()) - _EPOCH,
        )


def is_linked(path: Path, parent: Vhd) -> bool:
    """The file says that it was made over `parent`."""
    with path.open("rb") as file:
        file.seek(_PARENT_ID)
        return file.read(16) == UUID(parent["identifier"]).bytes


def spoil(path: Path) -> None:
    """No footer is left: whoever reads the file of a running VM is told."""
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        for offset in (0, size - _FOOTER):
            file.seek(offset)
            file.write(b"tokvm: a VM runs on it".ljust(_FOOTER, b"\0"))
