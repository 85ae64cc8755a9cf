"""kmod's binary indexes (modules.dep.bin, modules.alias.bin): what modprobe and udev really read; the texts are for people.

    magic b007f457 | version 00020001 | offset of the root node          a trie over the keys; all numbers 32 bit, big-endian
    node: [prefix, zero] [first, last: characters; offset of a child for each from first to last, 0 for none]
          [count; per value: priority, value, zero]
    an offset's high bits say what its node has: 8 prefix, 4 values, 2 children

Written as depmod writes it, byte for byte: children before their node, values by priority. Source: kmod, libkmod-index.h and
tools/depmod.c. We write it because depmod would have to parse the guest's module files, on the host and with our rights.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from tokvm.guest.base import GuestError

_MAGIC = struct.pack(">II", 0xB007F457, 0x00020001)
_PREFIX, _VALUES, _CHILDREN = 0x80000000, 0x40000000, 0x20000000
LONGEST_KEY = 500  # the trie is at most so deep
Entry = tuple[str, int, str]


def index(entries: Iterable[Entry]) -> bytes:
    """The index of (key, priority, value). GuestError for a key that no module has: too long, or not ASCII."""
    ordered = sorted(entries)
    for key, _, value in ordered:
        if len(key) > LONGEST_KEY or not key.isascii() or not value.isascii():
            raise GuestError(f"a name in the guest's module lists that depmod would not write: {key[:60]!r}")
    out = bytearray(_MAGIC + bytes(4))
    struct.pack_into(">I", out, len(_MAGIC), _write(out, ordered, 0))
    return bytes(out)


def _write(out: bytearray, entries: Sequence[Entry], at: int) -> int:
    """The node of entries (sorted) whose keys agree up to `at`; its offset with the flags."""
    if not entries:
        return 0
    prefix = _common(entries[0][0], entries[-1][0], at)
    at += len(prefix)
    values = [(priority, value) for key, priority, value in entries if len(key) == at]
    children = _children(out, entries[len(values) :], at)
    node = len(out)
    if prefix:
        out += prefix.encode() + b"\0"
        node |= _PREFIX
    if children:
        out += children
        node |= _CHILDREN
    if values:
        out += struct.pack(">I", len(values))
        for priority, value in values:
            out += struct.pack(">I", priority) + value.encode() + b"\0"
        node |= _VALUES
    return node


def _children(out: bytearray, entries: Sequence[Entry], at: int) -> bytes:
    if not entries:
        return b""
    groups: dict[int, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(ord(entry[0][at]), []).append(entry)
    first, last = min(groups), max(groups)
    offsets = [_write(out, groups.get(code, ()), at + 1) for code in range(first, last + 1)]
    return bytes((first, last)) + struct.pack(f">{len(offsets)}I", *offsets)


def _common(first: str, last: str, at: int) -> str:
    """What the first and the last of sorted keys have in common from `at` on, and so all between them."""
    length = 0
    for one, other in zip(first[at:], last[at:], strict=False):
        if one != other:
            break
        length += 1
    return first[at : at + length]
