"""Which inputs are worth keeping? The smallest set that reaches every line-to-line step of the readers that all together reach.

A plain trace in this process: slow, but it needs nothing, and says the same on every machine.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from fuzz.targets import Target

Step = tuple[str, int, int]
FINDING = "finding-"  # such inputs stay in the corpus, whatever they reach
_CODE = "/tokvm/images/"


def steps_of(target: Target, data: bytes) -> frozenset[Step] | None:
    """The steps that an input takes through the readers; None when it is a finding."""
    seen: set[Step] = set()
    last: dict[int, int] = {}

    def line(frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "line":
            key = id(frame)
            seen.add((frame.f_code.co_filename, last.get(key, 0), frame.f_lineno))
            last[key] = frame.f_lineno
        return line

    def call(frame: FrameType, _event: str, _argument: Any) -> Any:
        last.pop(id(frame), None)
        return line if _CODE in frame.f_code.co_filename else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        target.attempt(data)
    except Exception:  # noqa: BLE001 - whatever a finding is
        return None
    finally:
        sys.settrace(before)
    return frozenset(seen)


def keep(target: Target, candidates: Iterable[bytes]) -> list[bytes]:
    """The chosen ones. Small and early ones win."""
    chosen: list[bytes] = []
    covered: set[Step] = set()
    for data in sorted(set(candidates), key=lambda data: (len(data), data)):
        steps = steps_of(target, data)
        if steps is not None and not steps <= covered:
            chosen.append(data)
            covered |= steps
    return chosen


def write(folder: Path, inputs: Iterable[bytes]) -> int:
    """Make the folder hold these, and what was a finding once. How many bytes they are."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {hashlib.sha256(data).hexdigest()[:16]: data for data in inputs}
    for path in folder.iterdir():
        if path.name not in wanted and not path.name.startswith(FINDING):
            path.unlink()
    for name, data in wanted.items():
        (folder / name).write_bytes(data)
    logging.getLogger(__name__).debug("%s: %d inputs", folder, len(wanted))
    return sum(map(len, wanted.values()))
