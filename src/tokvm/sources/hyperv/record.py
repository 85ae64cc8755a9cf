"""Our one line in the VM's Notes, which stays with the VM wherever it moves.

    #tokvm {"asked": …, "fence": {…}, "owner": "…", "settings": {…}, "v": 1}

owner: who migrates it · settings: what to put back when our last checkpoint is gone · fence: what to put back when the fence is
lifted · asked: when the guest was last asked to shut down, by the host's clock. The line goes when nothing is left in it.

Every change is compare-and-set on the host (record.ps1, under a mutex); whoever loses reads again and decides anew.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from tokvm.core.errors import SourceError
from tokvm.core.text import readable
from tokvm.sources.hyperv.answers import Fields
from tokvm.sources.hyperv.machine import Facts
from tokvm.sources.hyperv.powershell import Asking

log = logging.getLogger(__name__)

_VERSION = 1
_TRIES = 8


@dataclass(frozen=True, slots=True)
class Settings:
    """How checkpoints were set before us; None: the host has no such setting."""

    checkpoint_type: str | None
    automatic_checkpoints: bool | None


@dataclass(frozen=True, slots=True)
class Fence:
    """What started the VM before us. The last two: None for a VM that is no cluster role."""

    reason: str
    auto_start: str
    priority: int | None
    restart_action: int | None


@dataclass(frozen=True, slots=True)
class Record:
    owner: str = ""
    settings: Settings | None = None
    fence: Fence | None = None
    asked: int | None = None

    def to_line(self) -> str | None:
        """None when there is nothing to say."""
        found = {key: value for key, value in asdict(self).items() if value is not None and value != ""}
        return json.dumps({"v": _VERSION, **found}, sort_keys=True, separators=(",", ":")) if found else None

    @classmethod
    def from_line(cls, line: str | None) -> Record:
        """ValueError for anything that `to_line` did not write."""
        if line is None:
            return cls()
        found = json.loads(line)
        if not isinstance(found, dict) or found.pop("v", None) != _VERSION:
            raise ValueError("not a record of this version")
        if not found.keys() <= {"owner", "settings", "fence", "asked"}:
            raise ValueError("it has a field that this version does not know")
        settings, fence = found.get("settings"), found.get("fence")
        made = cls(
            owner=found.get("owner", ""),
            settings=None if settings is None else Settings(**_object(settings, Settings)),
            fence=None if fence is None else Fence(**_object(fence, Fence)),
            asked=found.get("asked"),
        )
        made.check()
        return made

    def check(self) -> None:
        """ValueError when a field is of another type."""
        texts = [self.owner, *((self.fence.reason, self.fence.auto_start) if self.fence else ())]
        numbers = [self.asked, *((self.fence.priority, self.fence.restart_action) if self.fence else ())]
        kinds = self.settings or Settings(None, None)
        right = (
            all(isinstance(text, str) for text in texts)
            and all(number is None or (isinstance(number, int) and not isinstance(number, bool)) for number in numbers)
            and isinstance(kinds.checkpoint_type, str | None)
            and isinstance(kinds.automatic_checkpoints, bool | None)
        )
        if not right:
            raise ValueError("a field is of another type")


def _object(found: object, kind: type[Settings] | type[Fence]) -> dict[str, Any]:
    if not isinstance(found, dict) or found.keys() != set(kind.__slots__):
        raise ValueError(f"its {kind.__name__.lower()} has other fields")
    return found


def look(shell: Asking, vm: str) -> Facts:
    """How the VM stands now, with its record's line."""
    return Facts.parse(shell.ask("power", {"vm": vm}), shell.where)


def record_of(shell: Asking, vm: str, line: str | None) -> Record:
    """SourceError for a line that nobody here wrote: somebody edited the Notes, or a newer tokvm did."""
    try:
        return Record.from_line(line)
    except (ValueError, RecursionError) as exc:
        raise SourceError(
            f"the line `#tokvm …` in the VM's Notes is not what this tokvm wrote: {exc}",
            where=f"{shell.where} VM {vm}",
            fix="if no other tokvm has the VM in hand, delete that line by hand (Get-VM -Id … | Select-Object Notes), look at "
            "its AutomaticStartAction and CheckpointType, and run the same command again",
        ) from exc


def change(shell: Asking, vm: str, decide: Callable[[Record], Record], *, known: Facts | None = None) -> Record:
    """Set the record to what `decide` makes of it; returns what is there afterwards. known: facts just read, to save a look."""
    line = (known or look(shell, vm)).record
    for _ in range(_TRIES):
        record = record_of(shell, vm, line)
        wanted = decide(record)
        if wanted == record:
            return record
        data: dict[str, object] = {"vm": vm, "expect": line, "write": wanted.to_line()}
        answer = Fields.of(shell.act("record", data), shell.where, "record")
        line = answer.text_or_none("record")
        if answer.truth("swapped"):
            return _written(shell, vm, wanted, line)
        log.debug("VM %s: another one wrote the record first: %s", vm, readable(line or "nothing"))
    raise SourceError(
        "the VM's Notes change faster than they can be written", where=f"{shell.where} VM {vm}", fix="see who edits them"
    )


def _written(shell: Asking, vm: str, wanted: Record, line: str | None) -> Record:
    if record_of(shell, vm, line) != wanted:
        raise SourceError(
            f"the record could not be saved in the VM's Notes: read back, it is {readable(line or 'not there')}",
            where=f"{shell.where} VM {vm}",
            fix="see whether somebody edits the Notes, or whether the host keeps them; then run the same command again",
        )
    return wanted
