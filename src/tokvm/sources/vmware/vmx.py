"""Dictionaries of VMware: .vmx (what the VM is) and .vmsd (its snapshots).

    .encoding = "UTF-8"
    displayName = "the |22new|22 one|0Asecond line"        |XX: a byte in hexadecimal; so quotes, newlines and | are escaped
    scsi0:0.fileName = "web-000012.vmdk"

Keys in any case. Texts of people cannot imitate anything here, which makes these files the judge of what dumps say. A key that
is said twice with two values is refused when it is asked for.

    snapshot.needConsolidate = "TRUE"
    snapshot10.uid = "12"                  numbers run past 9, and so do those of disks
    snapshot10.displayName = "tokvm-…"
    snapshot10.numDisks = "1"
    snapshot10.disk0.fileName = "web.vmdk"     the file that it froze
    snapshot10.disk0.node = "scsi0:0"
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tokvm.core.text import readable

LONGEST = 2 << 20
_KEY = re.compile(r'[^=\s"#][^="]{0,200}')
_VALUE = re.compile(r'"([^"]*)"|([^"\s]*)')
_ESCAPE = re.compile(rb"\|([0-9A-Fa-f]{2})")
_ENCODING = re.compile(rb'^[ \t]*\.encoding[ \t]*=[ \t]*"([A-Za-z0-9_.-]{1,32})"', re.MULTILINE)
_DISK = re.compile(r"((?:ide|scsi|sata|nvme)[0-9]{1,2}:[0-9]{1,3})\.filename")
_SNAPSHOT = re.compile(r"snapshot([0-9]{1,6})\.uid")
_OURS = {"windows-936": "gb18030", "windows-932": "cp932", "windows-949": "cp949", "windows-950": "cp950"}


class Dictionary:
    """Values by lower-case key. ValueError for lines that are none."""

    def __init__(self, text: str) -> None:
        """text: as it came over the wire, undecodable bytes as surrogates."""
        raw = text.encode("utf-8", "surrogateescape")
        if len(raw) > LONGEST:
            raise ValueError(f"it is longer than {LONGEST} bytes")
        self._values: dict[str, list[str]] = {}
        codec = _codec(raw)
        for number, line in enumerate(raw.split(b"\n"), 1):
            self._line(number, line.rstrip(b"\r").decode("latin-1"), codec)

    def _line(self, number: int, line: str, codec: str) -> None:
        if not line.strip() or line.lstrip().startswith("#"):
            return
        key, sign, rest = line.partition("=")
        found = _VALUE.fullmatch(rest.strip())
        if found is None or not sign or not _KEY.fullmatch(key.strip()):
            raise ValueError(f'line {number} is {readable(repr(line), limit=80)}, not key = "value"')
        value = _decoded(found[1] if found[1] is not None else found[2], codec)
        values = self._values.setdefault(key.strip().lower(), [])
        if value not in values:
            values.append(value)

    def get(self, key: str, default: str = "") -> str:
        values = self._values.get(key.lower(), [])
        if len(values) > 1:
            raise ValueError(
                f"it says {key} twice: {readable(repr(values[0]), limit=60)}, {readable(repr(values[1]), limit=60)}"
            )
        return values[0] if values else default

    def truth(self, key: str) -> bool:
        return self.get(key).lower() in ("true", "1", "yes", "on")

    def __iter__(self) -> Iterator[str]:
        """Its keys."""
        return iter(self._values)

    def disks(self) -> dict[str, str]:
        """File names by node (`scsi0:1`), of what is present and a disk."""
        found = {}
        for key in self._values:
            node = _DISK.fullmatch(key)
            if node is not None and self.truth(f"{node[1]}.present") and self._is_disk(node[1]):
                found[node[1]] = self.get(key)
        return found

    def _is_disk(self, node: str) -> bool:
        kind = self.get(f"{node}.deviceType").lower()
        return "cdrom" not in kind and "atapi" not in kind and self.get(f"{node}.fileName").lower().endswith(".vmdk")


def _codec(raw: bytes) -> str:
    stated = _ENCODING.search(raw)
    label = stated[1].decode("ascii").lower() if stated else "utf-8"
    try:
        return codecs.lookup(_OURS.get(label, label)).name
    except LookupError:
        return "utf-8"


def _decoded(text: str, codec: str) -> str:
    raw = _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), text.encode("latin-1"))
    try:
        return raw.decode(codec)
    except (UnicodeError, LookupError):  # Python knows codecs, like rot13, that are none of texts
        return raw.decode("utf-8", "surrogateescape")


@dataclass(frozen=True, slots=True)
class SnapshotEntry:
    """One snapshot of the .vmsd. frozen: the file names that it froze, by node."""

    uid: int
    name: str
    frozen: dict[str, str]


@dataclass(frozen=True, slots=True)
class SnapshotList:
    entries: tuple[SnapshotEntry, ...] = ()
    needs_consolidation: bool = False

    @classmethod
    def parse(cls, text: str) -> SnapshotList:
        """ValueError when two have one uid, or a number is none."""
        said = Dictionary(text)
        numbers = sorted(int(found[1]) for key in said if (found := _SNAPSHOT.fullmatch(key)))
        entries = tuple(_entry(said, number) for number in numbers)
        if len({entry.uid for entry in entries}) != len(entries):
            raise ValueError("two snapshots have one uid")
        return cls(entries, said.truth("snapshot.needConsolidate"))

    def with_uid(self, uid: int) -> SnapshotEntry | None:
        return next((entry for entry in self.entries if entry.uid == uid), None)


def _entry(said: Dictionary, number: int) -> SnapshotEntry:
    prefix = f"snapshot{number}"
    frozen: dict[str, str] = {}
    for disk in range(_number(said, f"{prefix}.numDisks", "0", most=256)):
        node = said.get(f"{prefix}.disk{disk}.node").lower()
        if not node or node in frozen:
            raise ValueError(f"{prefix}.disk{disk}.node is {readable(repr(node), limit=40)}, which is missing or said before")
        frozen[node] = said.get(f"{prefix}.disk{disk}.fileName")
    return SnapshotEntry(_number(said, f"{prefix}.uid", ""), said.get(f"{prefix}.displayName"), frozen)


def _number(said: Dictionary, key: str, default: str, *, most: int = 1 << 31) -> int:
    text = said.get(key, default)
    if not (text.isascii() and text.isdecimal() and len(text) < 12 and int(text) <= most):
        raise ValueError(f"{key} is {readable(repr(text), limit=40)}, no number")
    return int(text)
