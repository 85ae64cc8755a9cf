"""The names of our snapshots, `tokvm-<migration>-<n>`, and the keys by which we know them, `<VM>/<snapshot's id>`."""

from __future__ import annotations

import re

from tokvm.core.errors import SourceError
from tokvm.core.machine import Snapshot

UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MARK = re.compile(r"tokvm-[A-Za-z0-9][A-Za-z0-9._-]*")
_NUMBER = re.compile(r"-([0-9]{1,18})\Z")


def is_uuid(text: str) -> bool:
    return UUID.fullmatch(text) is not None


def is_mark(text: str) -> bool:
    """True for a name that we give to snapshots."""
    return _MARK.fullmatch(text) is not None


def number_of(mark: str) -> int:
    """The number at its end; -1 for none."""
    match = _NUMBER.search(mark)
    return int(match[1]) if match else -1


def key_of(vm: str, uid: int) -> str:
    return f"{vm}/{uid}"


def ids_of(snapshot: Snapshot, where: str) -> tuple[str, int]:
    """(VM, id) of a snapshot of ours."""
    vm, _, uid = snapshot.key.partition("/")
    if not (is_uuid(vm) and uid.isascii() and uid.isdecimal() and len(uid) < 10):
        raise SourceError(
            f"{snapshot.key!r} is no key of a snapshot", where=where, fix="the journal belongs to another kind of source"
        )
    return vm, int(uid)
