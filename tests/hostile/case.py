"""One named hostile image: what it attacks, how it is made, what tokvm must say to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

PAGE = 4096
Table = Mapping[str, tuple[Callable[[], bytes], str]]
Build = Callable[[Path], Sequence[str]]  # makes files in an empty folder; the names to give on the command line


class Outcome(Enum):
    """What must come of it. Whatever it is, nothing but what was named is opened, and nothing of the image moves a cursor."""

    OPEN = "every verb refuses it, nothing is written"
    WALK = "what needs its map refuses it, nothing is written; info may describe it"
    READ = "only reading its bytes shows it: the target is never noted as holding it"
    CHILD = "it is fine as a layer, but says where its parent lies: shown, never followed; converting it alone is refused"
    HARMLESS = "it is read, and means what its format says"


@dataclass(frozen=True, slots=True)
class Hostile:
    """attack: the CVE or class. says: a regular expression, in what every refusal prints. options: after the verb.
    beside: files that belong to it without being named, which may be opened. root: needs mknod. xfail: a known fault of ours;
    xfail_only: it shows in this test alone, `image` or `verbs`. content: what the disk holds, of what is read."""

    attack: str
    build: Build
    says: str = ""
    outcome: Outcome = Outcome.OPEN
    options: tuple[str, ...] = ()
    beside: frozenset[str] = field(default=frozenset())
    root: bool = False
    xfail: str = ""
    xfail_only: str = ""
    content: Callable[[Path], bytes] | None = None


def files(**made: Callable[[], bytes] | bytes) -> Build:
    """Files of these bytes: `disk_vmdk=…` is disk.vmdk. All are named on the command line, in this order."""

    def build(folder: Path) -> Sequence[str]:
        for name, raw in made.items():
            write_sparsely(folder / file_name(name), raw if isinstance(raw, bytes) else raw())
        return [file_name(name) for name in made]

    return build


def table(suffix: str, attack: str, made: Table, outcome: Outcome = Outcome.OPEN) -> dict[str, Hostile]:
    """Images that are one file each: name -> its bytes, what a refusal says."""
    return {
        f"{suffix}: {name}": Hostile(attack, files(**{f"disk_{suffix}": raw}), says, outcome)
        for name, (raw, says) in made.items()
    }


def file_name(name: str) -> str:
    stem, _, suffix = name.rpartition("_")
    return f"{stem.replace('_', '-')}.{suffix}"


def write_sparsely(path: Path, raw: bytes, size: int = 0) -> None:
    """With holes where pages are zeros."""
    with path.open("wb") as out:
        out.truncate(max(len(raw), size))
        for at in range(0, len(raw), PAGE):
            if raw[at : at + PAGE].strip(b"\0"):
                out.seek(at)
                out.write(raw[at : at + PAGE])


def patched(raw: bytes, *changes: tuple[int, bytes]) -> bytes:
    found = bytearray(raw)
    for at, data in changes:
        found[at : at + len(data)] = data
    return bytes(found)
