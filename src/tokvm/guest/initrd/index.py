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
from dataclasses import dataclass, field

from tokvm.core.units import MiB
from tokvm.guest.base import GuestError

_MAGIC = struct.pack(">II", 0xB007F457, 0x00020001)
_PREFIX, _VALUES, _CHILDREN = 0x80000000, 0x40000000, 0x20000000
LONGEST_KEY = 500  # the trie is at most so deep
INDEX_LIMIT = 32 * MiB  # a distribution's largest has 2; a node with two children may have 512 bytes of offsets
Entry = tuple[str, int, str]


def index(entries: Iterable[Entry]) -> bytes:
    """The index of (key, priority, value). GuestError for a key that no module has (too long, or not ASCII), and for an index
    larger than INDEX_LIMIT."""
    ordered = sorted(entries)
    for key, _, value in ordered:
        if len(key) > LONGEST_KEY or not key.isascii() or not value.isascii():
            raise GuestError(f"a name in the guest's module lists that depmod would not write: {key[:60]!r}")
    out = bytearray(_MAGIC + bytes(4))
    struct.pack_into(">I", out, len(_MAGIC), _write(out, ordered) if ordered else 0)
    return bytes(out)


@dataclass(slots=True)
class _Node:
    """The entries from `values` to `end`, whose keys agree up to `at`: those from `values` on have their key's end there, those
    from `children` on go on. `next`: the first entry of the next child to write. offsets: character → offset of a child."""

    prefix: str
    at: int
    values: int
    children: int
    end: int
    next: int
    offsets: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Sequence[Entry], start: int, end: int, at: int) -> _Node:
        """The node of entries (sorted) from `start` to `end`, whose keys agree up to `at`."""
        prefix = _common(entries[start][0], entries[end - 1][0], at)
        at += len(prefix)
        children = start
        while children < end and len(entries[children][0]) == at:
            children += 1
        return cls(prefix, at, start, children, end, children)

    def take_child(self, entries: Sequence[Entry]) -> _Node:
        """The next child, not written yet."""
        start, code = self.next, entries[self.next][0][self.at]
        while self.next < self.end and entries[self.next][0][self.at] == code:
            self.next += 1
        return _Node.of(entries, start, self.next, self.at + 1)

    def write(self, out: bytearray, entries: Sequence[Entry]) -> int:
        """Its offset with the flags; all its children are written."""
        node = len(out)
        if self.prefix:
            out += self.prefix.encode() + b"\0"
            node |= _PREFIX
        if self.offsets:
            first, last = min(self.offsets), max(self.offsets)
            out += bytes((first, last))
            out += struct.pack(f">{last - first + 1}I", *(self.offsets.get(code, 0) for code in range(first, last + 1)))
            node |= _CHILDREN
        if self.values < self.children:
            out += struct.pack(">I", self.children - self.values)
            for _, priority, value in entries[self.values : self.children]:
                out += struct.pack(">I", priority) + value.encode() + b"\0"
            node |= _VALUES
        if len(out) > INDEX_LIMIT:
            raise GuestError(f"an index of the guest's modules of more than {INDEX_LIMIT} bytes", fix="run depmod in the guest")
        return node


def _write(out: bytearray, entries: Sequence[Entry]) -> int:
    """The offset of the root. By a list of the nodes that are open and not by calls: the keys say how deep it goes."""
    path = [_Node.of(entries, 0, len(entries), 0)]
    while True:
        node = path[-1]
        if node.next < node.end:
            path.append(node.take_child(entries))
            continue
        offset = path.pop().write(out, entries)
        if not path:
            return offset
        path[-1].offsets[ord(entries[node.values][0][path[-1].at])] = offset


def _common(first: str, last: str, at: int) -> str:
    """What the first and the last of sorted keys have in common from `at` on, and so all between them."""
    length = 0
    for one, other in zip(first[at:], last[at:], strict=False):
        if one != other:
            break
        length += 1
    return first[at : at + length]
