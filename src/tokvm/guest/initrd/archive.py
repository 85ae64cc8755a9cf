"""An initramfs: archives one behind the other, each packed in its own way or not at all.

    [early microcode, not packed] zeros [main archive, packed] zeros [our segment, gzip] …

A later member of a name replaces an earlier one. An archive that is not packed starts at a multiple of 4; zeros between
archives mean nothing. Read as the kernel does (init/initramfs.c, unpack_to_rootfs), but strictly, and bounded: it comes from
the guest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokvm.guest.initrd import cpio
from tokvm.guest.initrd.packing import Packing, Stream, packing_at
from tokvm.guest.initrd.stream import Budget, Unpacked, bad, zeros_at

_MODULE = re.compile(r"(?:.*/)?([^/]+)\.ko(?:\.(?:xz|gz|zst))?")
_KEPT = frozenset({"modules.dep", "modules.alias", "modules.softdep"})
FORCED = "conf/modules"
"""initramfs-tools' list of modules that are loaded whatever the hardware says."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One packed run of archives: its place in the file, in bytes, what it unpacks to, and how much is in it."""

    offset: int
    length: int
    packing: Packing
    unpacked: int
    members: int


@dataclass(frozen=True, slots=True)
class Archive:
    """members: name → the member that the kernel leaves standing; contents only of modules.dep, .alias, .softdep, conf/modules.
    end: offset behind the last archive; what follows it in the file is zeros."""

    pieces: tuple[Piece, ...]
    members: dict[str, cpio.Member]
    end: int

    @property
    def packing(self) -> Packing:
        """How the main archive is packed: the one with the most members."""
        return max(self.pieces, key=lambda piece: piece.members).packing if self.pieces else Packing.NONE

    @property
    def module_files(self) -> dict[str, str]:
        """Name of each module (`virtio_blk`) → the member that has it."""
        return {name: path for path, member in self.members.items() if member.is_file and (name := module_name(path))}

    def modules_below(self, folder: str) -> dict[str, str]:
        """Like `module_files`, in one folder only, with paths below it."""
        start = f"{folder}/"
        return {name: path.removeprefix(start) for name, path in self.module_files.items() if path.startswith(start)}

    def text(self, name: str) -> str | None:
        """A kept member's content; None when it is not there."""
        member = self.members.get(name)
        return None if member is None or member.content is None else member.content.decode("utf-8", "surrogateescape")


def module_name(path: str) -> str:
    """`kernel/drivers/block/virtio-blk.ko.xz` → `virtio_blk`, as modprobe calls it; "" when it is no module."""
    match = _MODULE.fullmatch(path)
    return match[1].replace("-", "_") if match else ""


def modules_in(data: bytes) -> frozenset[str]:
    """The names of all modules in an initramfs. GuestError when it is not one, is damaged, or is beyond every measure."""
    return frozenset(read(data).module_files)


def read(data: bytes, where: str = "initramfs", *, budget: Budget | None = None) -> Archive:
    """The whole of an initramfs; errors as in `modules_in`, with `where` and the offset."""
    budget = budget or Budget()
    view, at = memoryview(data), 0
    pieces: list[Piece] = []
    found: dict[str, cpio.Member] = {}
    end = 0
    while (at := at + zeros_at(view, at)) < len(data):
        budget.spend("archives", 1, where, at)
        packing = packing_at(view, at, where)
        if packing is Packing.NONE and at % 4:
            raise bad("an archive that is not packed starts off the multiple of 4 where the kernel looks", where, at)
        pieces.append(_one(view, at, packing, where, budget, found))
        at = end = at + pieces[-1].length
    if not pieces:
        raise bad("there is no archive in it", where, 0)
    return Archive(tuple(pieces), found, end)


def _one(view: memoryview, at: int, packing: Packing, where: str, budget: Budget, found: dict[str, cpio.Member]) -> Piece:
    """Read what starts at `at` into `found`. Packed, it may hold several archives."""
    stream = Stream(view, at, packing, where)
    inside = where if packing is Packing.NONE else f"{where}@{at:#x}, unpacked"
    source = Unpacked(stream.pieces(), budget, inside)
    seen = 0
    while True:
        source.skip_zeros()
        for member in cpio.members(source, budget, _is_kept):
            found[member.name] = member
            seen += 1
        if packing is Packing.NONE:
            return Piece(at, source.position, packing, source.position, seen)
        source.skip_zeros()
        if not source.more():
            return Piece(at, stream.end - at, packing, source.position, seen)


def _is_kept(name: str) -> bool:
    return name == FORCED or ("/modules/" in name and name.rpartition("/")[2] in _KEPT)
