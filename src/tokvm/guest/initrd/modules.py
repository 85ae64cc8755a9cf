"""The modules that a kernel needs to find its disk on KVM, by the guest's own lists (modules.dep and its neighbours).

    modules.dep      kernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio.ko …    direct and indirect needs
    modules.alias    alias virtio:d00000002v* virtio_blk
    modules.softdep  softdep crc_t10dif pre: crct10dif
    modules.builtin  kernel/fs/ext4/ext4.ko

Never virtio_net: a NIC that has its driver in the initramfs is named there, before the root's .link files apply.
Spec: modules.dep(5), depmod.d(5).
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from tokvm.core.text import readable
from tokvm.guest.base import GuestError
from tokvm.guest.initrd.archive import module_name
from tokvm.guest.initrd.lines import lines

BUS = "virtio_pci"
DISKS = ("virtio_blk", "virtio_scsi")
WANTED = (BUS, *DISKS, "sd_mod")
LONGEST_PATH = 512
_MOST_NEEDED = 200
# Those of a whole list. A distribution's kernel has some 20 000 words in modules.dep and 200 in modules.softdep.
_MOST_NEEDS = 500_000
_MOST_SOFT = 10_000


@dataclass(frozen=True, slots=True)
class Lists:
    """One kernel's lists. files: module → (path below the folder of the lists, paths it needs)."""

    files: dict[str, tuple[str, tuple[str, ...]]]
    builtin: frozenset[str] = frozenset()
    aliases: str = ""
    softdeps: str = ""

    @classmethod
    def parse(cls, dep: str, *, builtin: str = "", aliases: str = "", softdeps: str = "") -> Lists:
        """GuestError when a list is beyond every measure."""
        files = {module_name(path): (path, needs) for path, needs in _dependencies(dep)}
        return cls(files, frozenset(module_name(line.strip()) for line in lines(builtin)), aliases, softdeps)

    def missing(self, have: Iterable[str]) -> tuple[str, ...]:
        """Modules to add to those that the initramfs has, by name. GuestError when the kernel has no virtio."""
        there = {*have, *self.builtin}
        known = {*there, *self.files}
        if BUS not in known or not known.intersection(DISKS):
            raise GuestError(
                "the guest's kernel has no virtio drivers",
                fix="boot it on compatible hardware, or install a kernel with virtio in the guest",
            )
        soft = _SoftNeeds.read(self)
        waiting = [name for name in WANTED if name in self.files and name not in there]
        needed = set(waiting)
        while waiting:
            for need in self._needs(waiting.pop(), soft):
                if need in needed or need in there:
                    continue
                needed.add(need)
                waiting.append(need)
                if len(needed) > _MOST_NEEDED:
                    raise GuestError(f"virtio needs more than {_MOST_NEEDED} modules by the guest's lists of modules")
        return tuple(sorted(needed))

    def path(self, name: str) -> str:
        return self.files[name][0]

    def needs(self, name: str) -> tuple[str, ...]:
        """Names of the modules that must be there before it, as modules.dep has them."""
        return tuple(module_name(path) for path in self.files[name][1])

    def _needs(self, name: str, soft: _SoftNeeds) -> Iterator[str]:
        for need in self.needs(name):
            if need not in self.files and need not in self.builtin:
                raise GuestError(f"the guest's {readable(name)} needs {readable(need)}, which its modules.dep does not have")
            yield need
        yield from soft.of(name)


@dataclass(frozen=True, slots=True)
class _SoftNeeds:
    """words: module → what its softdeps name, by a module's own name or by an alias (`crypto-crct10dif`); behind: alias → its
    modules. Each about as large as its list: one is looked up in the other for a module only when that is asked for."""

    files: Mapping[str, object]
    words: dict[str, dict[str, None]]
    behind: dict[str, dict[str, None]]

    @classmethod
    def read(cls, lists: Lists) -> _SoftNeeds:
        words = _softdeps(lists)
        asked = {word for some in words.values() for word in some if word not in lists.files}
        return cls(lists.files, words, _behind(lists, asked) if asked else {})

    def of(self, name: str) -> Iterator[str]:
        """What this module softly needs, of what there is."""
        for word in self.words.get(name, ()):
            yield from (word,) if word in self.files else self.behind.get(word, ())


def _softdeps(lists: Lists) -> dict[str, dict[str, None]]:
    found: dict[str, dict[str, None]] = {}
    count = 0
    for line in lines(lists.softdeps):
        parts = line.replace("-", "_").split()
        if len(parts) < 3 or parts[0] != "softdep" or parts[1] not in lists.files:
            continue
        found.setdefault(parts[1], {}).update(dict.fromkeys(word for word in parts[2:] if not word.endswith(":")))
        count += len(parts)
        if count > _MOST_SOFT:
            raise GuestError(f"more than {_MOST_SOFT} words in the guest's modules.softdep", fix="run depmod in the guest")
    return found


def _behind(lists: Lists, asked: set[str]) -> dict[str, dict[str, None]]:
    """Alias → its modules, for these aliases; no more of them than would be refused."""
    found: dict[str, dict[str, None]] = {}
    for line in lines(lists.aliases):
        parts = line.replace("-", "_").split(None, 3)
        if len(parts) == 3 and parts[1] in asked and parts[2] in lists.files:
            modules = found.setdefault(parts[1], {})
            if len(modules) <= _MOST_NEEDED:
                modules[parts[2]] = None
    return found


def _dependencies(text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Lines that name anything outside the folder are left out: what needs such a module is refused as incomplete."""
    count = 0
    for line in lines(text):
        path, colon, needs = line.partition(":")
        every = (path, *needs.split())
        count += len(every)
        if count > _MOST_NEEDS:
            raise GuestError(f"more than {_MOST_NEEDS} names in the guest's modules.dep", fix="run depmod in the guest")
        if colon and all(map(_is_inside, every)):
            yield path, every[1:]


def _is_inside(path: str) -> bool:
    """Whether it is a module's path below the folder, of a sane length."""
    return bool(module_name(path)) and not posixpath.isabs(path) and ".." not in path.split("/") and len(path) <= LONGEST_PATH
