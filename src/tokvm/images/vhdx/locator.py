"""Where a VHDX's parent may be found, as its writer thought.

    0   type guid [16]   16  0 u16   18  entries u16
    20  entries of 12: key offset u32, value offset u32, key length u16, value length u16     offsets from 0, bytes
    …   keys and values, UTF-16LE without a NUL

Keys: parent_linkage (the parent's data write guid; required), parent_linkage2 (another one it may have had), and the paths
relative_path, volume_path, absolute_win32_path, of which one suffices. All are shown, none is followed.
Spec: [MS-VHDX] 2.6.2.6. Windows writes a drive letter where the text demands \\\\?\\, and a parent_linkage2 of zeros, nobody's.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from uuid import UUID

from tokvm.core.text import printable, readable
from tokvm.images.fields import bad_field
from tokvm.images.vhdx.structs import NULL_GUID, guid

VHDX_LOCATOR = UUID("b04aefb7-d19e-4a81-b789-25b8e9445913")
PATHS = ("relative_path", "volume_path", "absolute_win32_path")
HEADER_SIZE = 20
_HEADER = struct.Struct("<16sHH")
_ENTRY = struct.Struct("<IIHH")
_GUID = re.compile(r"\{?([0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12})\}?")


@dataclass(frozen=True, slots=True)
class ParentLocator:
    """linkage: data write guids, the parent has one of them. entries: all keys and values, fit to be shown."""

    linkage: tuple[UUID, ...]
    entries: tuple[tuple[str, str], ...]

    @classmethod
    def parse(cls, raw: bytes | bytearray, *, name: str, offset: int) -> ParentLocator:
        """The locator in this metadata item, read at `offset` of the file `name`, or ImageError."""
        kind, _, count = _HEADER.unpack_from(raw)
        if guid(kind) != VHDX_LOCATOR:
            raise bad_field(name, offset, "parent locator type", guid(kind), str(VHDX_LOCATOR))
        table_end = HEADER_SIZE + _ENTRY.size * count
        if table_end > len(raw):
            allowed = f"at most {(len(raw) - HEADER_SIZE) // _ENTRY.size} in an item of {len(raw)} bytes"
            raise bad_field(name, offset + 18, "parent locator entries", count, allowed)
        entries = _entries(bytes(raw), table_end, name, offset)
        found = [_linkage(entries, key, name, offset) for key in ("parent_linkage", "parent_linkage2")]
        if found[0] is None or found[0] == NULL_GUID:
            read = "absent" if found[0] is None else NULL_GUID
            raise bad_field(name, offset, "parent locator's parent_linkage", read, "the data write guid of the parent")
        if not any(path in entries for path in PATHS):
            raise bad_field(name, offset, "parent locator", "without a path", f"one of {', '.join(PATHS)}")
        linkage = tuple(dict.fromkeys(one for one in found if one is not None and one != NULL_GUID))
        return cls(linkage, tuple((printable(key), printable(value)) for key, value in entries.items()))


def _entries(raw: bytes, table_end: int, name: str, offset: int) -> dict[str, str]:
    found: dict[str, str] = {}
    room = len(raw) - table_end  # keys and values lie apart, so together they fit
    for at in range(HEADER_SIZE, table_end, _ENTRY.size):
        key_at, value_at, key_length, value_length = _ENTRY.unpack_from(raw, at)
        room -= key_length + value_length
        key = _text(raw, "key", (key_at, key_length), table_end, name, offset + at)
        value = _text(raw, "value", (value_at, value_length), table_end, name, offset + at)
        if not key or key in found:
            raise bad_field(name, offset + at, "parent locator key", f"'{readable(key)}'", "each key once, none empty")
        if room < 0:
            raise bad_field(name, offset + at, "parent locator entry", "over another", "keys and values that lie apart")
        found[key] = value
    return found


def _text(raw: bytes, what: str, place: tuple[int, int], table_end: int, name: str, offset: int) -> str:
    at, length = place
    if length % 2 or not table_end <= at <= len(raw) - length:
        allowed = f"whole UTF-16 units at {table_end:#x} to {len(raw):#x}"
        raise bad_field(name, offset, f"parent locator {what}", f"{length} bytes at {at:#x}", allowed)
    return raw[at : at + length].decode("utf-16-le", errors="replace")


def _linkage(entries: dict[str, str], key: str, name: str, offset: int) -> UUID | None:
    text = entries.get(key)
    if text is None:
        return None
    match = _GUID.fullmatch(text)
    if match is None:
        raise bad_field(name, offset, f"parent locator's {key}", f"'{readable(text)}'", "a guid in braces")
    return UUID(match[1])
