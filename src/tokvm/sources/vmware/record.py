"""What is remembered of a VM, in two files in its own directory, each one line of JSON.

    tokvm-owner   {"owner": "…", "v": 1}                                whose it is: whoever makes the file first, holds the VM
    tokvm.json    {"asked": {…}, "fence": {…}, "v": 1}                  written by the owner alone, replaced whole

fence: how the host's autostart had the VM before us · asked: when the guest was asked to stop, by the host's clock, and in
which run of the VM (its boot time). A file goes when nothing is left in it. Storage vMotion leaves both behind: it moves a
VM's own files. Whoever may write to the datastore may write them, so every field is checked before it is believed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tokvm.core.errors import SourceError
from tokvm.core.text import readable
from tokvm.remote.ssh import quote
from tokvm.sources.vmware.machines import Place
from tokvm.sources.vmware.shell import Answer, Command, Shell

_VERSION = 1
_LONGEST = 64 << 10
OWNER = "tokvm-owner"
STATE = "tokvm.json"


@dataclass(frozen=True, slots=True)
class AutoStart:
    """One VM's entry in the host's autostart sequence. Numbers may be -1: the default."""

    action: str
    delay: int
    order: int
    stop_action: str
    stop_delay: int
    heartbeat: str


@dataclass(frozen=True, slots=True)
class Fence:
    """before None: the host had no entry for the VM."""

    reason: str
    before: AutoStart | None


@dataclass(frozen=True, slots=True)
class Asked:
    """at: seconds since 1970 by the host's clock. boot: the VM's boot time then."""

    at: int
    boot: str


@dataclass(frozen=True, slots=True)
class Record:
    fence: Fence | None = None
    asked: Asked | None = None

    def to_line(self) -> str | None:
        """None when there is nothing to say."""
        found = {key: value for key, value in asdict(self).items() if value is not None}
        return _line(found) if found else None

    @classmethod
    def from_line(cls, line: str) -> Record:
        """ValueError for one that nobody here wrote."""
        found = _fields(line, {"fence", "asked"})
        fence, asked = found.get("fence"), found.get("asked")
        return cls(None if fence is None else _fence(fence), None if asked is None else _made(Asked, asked))


def _line(found: Mapping[str, object]) -> str:
    return json.dumps({"v": _VERSION, **found}, sort_keys=True, separators=(",", ":"))


def _fields(line: str, allowed: set[str]) -> dict[str, Any]:
    if len(line) > _LONGEST:
        raise ValueError(f"it is longer than {_LONGEST} bytes")
    found = json.loads(line)
    if not isinstance(found, dict) or found.pop("v", None) != _VERSION or not found.keys() <= allowed:
        raise ValueError("it is no record, or one of another version")
    return found


def _fence(found: object) -> Fence:
    if not isinstance(found, dict) or found.keys() != {"reason", "before"} or not isinstance(found["reason"], str):
        raise ValueError("its fence has other fields")
    before = found["before"]
    return Fence(found["reason"], None if before is None else _made(AutoStart, before))


def _made(kind: type[Any], found: object) -> Any:
    """A dataclass of texts and numbers."""
    types = {name: int if said == "int" else str for name, said in kind.__annotations__.items()}
    if not isinstance(found, dict) or found.keys() != types.keys():
        raise ValueError(f"its {kind.__name__.lower()} has other fields")
    for name, value in found.items():
        if not isinstance(value, types[name]) or isinstance(value, bool):
            raise ValueError(f"its {name} is of another type")  # noqa: TRY004 - it is about the text
    return kind(**found)


def question(place: Place) -> Command:
    return ("cat", place.file(STATE))


def owner_question(place: Place) -> Command:
    return ("cat", place.file(OWNER))


def record_of(shell: Shell, answer: Answer) -> Record:
    """The record that `question` was answered with. SourceError for one that nobody here wrote."""
    text = _content(shell, answer)
    if text is None:
        return Record()
    try:
        return Record.from_line(text)
    except (ValueError, RecursionError) as exc:
        raise _unknown(answer, str(exc)) from exc


def owner_of(shell: Shell, answer: Answer) -> str:
    """The holder; "" for nobody."""
    text = _content(shell, answer)
    if text is None:
        return ""
    try:
        found = _fields(text, {"owner"}).get("owner")
    except (ValueError, RecursionError) as exc:
        raise _unknown(answer, str(exc)) from exc
    if not isinstance(found, str) or not found:
        raise _unknown(answer, "it names nobody")
    return found


def _content(shell: Shell, answer: Answer) -> str | None:
    """None when there is no such file; what cannot be read is no proof of that, so it is asked for its words."""
    if answer.code == 0:
        return answer.text
    code, said = shell.said(answer.command)
    if code and "no such file" in said.lower():
        return None
    if code:
        raise SourceError(f"`{answer.what}` failed: {readable(said.strip(), limit=200)}", where=shell.where)
    return shell.ask([answer.command])[0].checked()


def _unknown(answer: Answer, why: str) -> SourceError:
    return SourceError(
        f"{answer.command[-1]} is not what this tokvm wrote: {why}",
        where=answer.where,
        fix="if no other tokvm has the VM in hand, delete that file by hand, look at the VM's autostart entry, and run the "
        "same command again",
    )


def write(shell: Shell, place: Place, wanted: Record) -> None:
    """Replace the record, and read it back."""
    path, line = place.file(STATE), wanted.to_line()
    if line is None:
        shell.act(("rm", "-f", path))
    else:
        new = f"{path}.new"
        shell.act_line(f"{quote(['printf', '%s', line])} >{quote([new])} && {quote(['mv', '-f', new, path])}")
    if record_of(shell, shell.ask([question(place)])[0]) != wanted:
        raise SourceError(
            f"{path} could not be written", where=shell.where, fix="see whether the datastore is full, or read-only"
        )


def write_owner(shell: Shell, place: Place, owner: str) -> None:
    """Make the file unless there is one; whose it is shows when it is read."""
    path = place.file(OWNER)
    shell.act_line(f"set -C; {quote(['printf', '%s', _line({'owner': owner})])} >{quote([path])}")


def remove_owner(shell: Shell, place: Place) -> None:
    shell.act(("rm", "-f", place.file(OWNER)))
