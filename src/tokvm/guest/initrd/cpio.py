"""The "newc" cpio format, as the kernel unpacks it.

    header 110: magic 070701 | 13 fields of 8 hex digits: ino mode uid gid nlink mtime size devmajor devminor rdevmajor
                rdevminor namesize check
    name (with its zero byte), padded to 4 | content, padded to 4 | … | a member called TRAILER!!! ends the archive

070702 is the same with checksums. Spec: Linux, Documentation/driver-api/early-userspace/buffer-format.rst; init/initramfs.c.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tokvm.core.text import readable
from tokvm.core.units import MiB
from tokvm.guest.initrd.stream import Budget, Unpacked, bad

TRAILER = "TRAILER!!!"
LONGEST_NAME = 4096  # PATH_MAX: the kernel's limit
KEPT_LIMIT = 16 * MiB
_HEADER = 110
_MAGICS = (b"070701", b"070702")


@dataclass(frozen=True, slots=True)
class Member:
    """One file, directory or link. `name` has neither a leading slash nor `./`. content: None where it was not kept."""

    name: str
    mode: int
    size: int = 0
    content: bytes | None = None

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


def members(source: Unpacked, budget: Budget, keep: Callable[[str], bool]) -> Iterator[Member]:
    """The members of one archive up to its trailer, which is read, too. `keep` says by name whose content is wanted."""
    start = source.position
    while True:
        mode, size, name = _header(source, budget, start)
        if name == TRAILER:
            source.skip(size, "a trailer")
            _pad(source, start)
            return
        name = name.lstrip("/").removeprefix("./")
        content = None
        if stat.S_ISREG(mode) and keep(name):
            content = _content(source, budget, name, size)
        else:
            source.skip(size, "a member's content")
        _pad(source, start)
        yield Member(name, mode, size, content)


def pack(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """An archive of (name, mode, content): owner 0, mtime 0, inode numbers in order, so equal entries give equal bytes."""
    out = bytearray()
    for number, (name, mode, content) in enumerate([*entries, (TRAILER, 0, b"")], start=1):
        raw = name.encode("utf-8", "surrogateescape") + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (number, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(raw), 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + raw
        out += bytes(-len(out) % 4) + content
        out += bytes(-len(out) % 4)
    return bytes(out)


def _header(source: Unpacked, budget: Budget, archive: int) -> tuple[int, int, str]:
    """(mode, size, name) of the next member of the archive that starts there."""
    start = source.position
    budget.spend("members", 1, source.where, start)
    raw = source.read(_HEADER, "a member's header")
    try:
        fields = struct.unpack(">13I", bytes.fromhex(raw[6:].decode("ascii")))
    except (ValueError, struct.error):
        fields = ()
    if raw[:6] not in _MAGICS or not fields:
        raise bad(f"a member's header starts with {readable(repr(raw[:16]))}", source.where, start)
    length = fields[11]
    if not 2 <= length <= LONGEST_NAME:
        raise bad(f"a member's name of {length} bytes", source.where, start)
    budget.spend("names", length, source.where, start)
    name = source.read(length, "a member's name")
    if name[-1]:
        raise bad("a member's name has no end", source.where, start)
    _pad(source, archive)
    return fields[1], fields[6], name.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _content(source: Unpacked, budget: Budget, name: str, size: int) -> bytes:
    if size > KEPT_LIMIT:
        raise bad(f"{readable(name)} has {size} bytes", source.where, source.position)
    budget.spend("kept", size, source.where, source.position)
    return source.read(size, "a member's content")


def _pad(source: Unpacked, start: int) -> None:
    source.skip((start - source.position) % 4, "padding")
