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
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from tokvm.core.text import readable
from tokvm.guest.base import GuestError
from tokvm.guest.initrd.archive import module_name

BUS = "virtio_pci"
DISKS = ("virtio_blk", "virtio_scsi")
WANTED = (BUS, *DISKS, "sd_mod")
_MOST_NEEDED = 200


@dataclass(frozen=True, slots=True)
class Lists:
    """One kernel's lists. files: module → (path below the folder of the lists, paths it needs)."""

    files: dict[str, tuple[str, tuple[str, ...]]]
    builtin: frozenset[str] = frozenset()
    aliases: str = ""
    softdeps: str = ""

    @classmethod
    def parse(cls, dep: str, *, builtin: str = "", aliases: str = "", softdeps: str = "") -> Lists:
        files = {module_name(path): (path, needs) for path, needs in _dependencies(dep)}
        return cls(files, frozenset(map(module_name, builtin.split())), aliases, softdeps)

    def missing(self, have: Iterable[str]) -> tuple[str, ...]:
        """Modules to add to those that the initramfs has, by name. GuestError when the kernel has no virtio."""
        there = {*have, *self.builtin}
        known = {*there, *self.files}
        if BUS not in known or not known.intersection(DISKS):
            raise GuestError(
                "the guest's kernel has no virtio drivers",
                fix="boot it on compatible hardware, or install a kernel with virtio in the guest",
            )
        needed: set[str] = set()
        soft = self._soft_needs()
        waiting = [name for name in WANTED if name in self.files and name not in there]
        while waiting:
            name = waiting.pop()
            if name in needed or name in there:
                continue
            needed.add(name)
            if len(needed) > _MOST_NEEDED:
                raise GuestError(f"virtio needs more than {_MOST_NEEDED} modules by the guest's modules.dep")
            waiting += self._needs(name, soft)
        return tuple(sorted(needed))

    def path(self, name: str) -> str:
        return self.files[name][0]

    def needs(self, name: str) -> tuple[str, ...]:
        """Names of the modules that must be there before it, as modules.dep has them."""
        return tuple(module_name(path) for path in self.files[name][1])

    def _needs(self, name: str, soft: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
        for need in self.needs(name):
            if need not in self.files and need not in self.builtin:
                raise GuestError(f"the guest's {readable(name)} needs {readable(need)}, which its modules.dep does not have")
            yield need
        yield from (found for found in soft.get(name, ()) if found in self.files)

    def _soft_needs(self) -> dict[str, tuple[str, ...]]:
        """Module → those that its softdeps name: by their own names, or by an alias (`crypto-crct10dif`)."""
        words: dict[str, list[str]] = {}
        for line in self.softdeps.splitlines():
            parts = line.replace("-", "_").split()
            if len(parts) > 2 and parts[0] == "softdep":
                words.setdefault(parts[1], []).extend(word for word in parts[2:] if not word.endswith(":"))
        asked = {word for some in words.values() for word in some}
        behind: dict[str, list[str]] = {}
        for line in self.aliases.splitlines():
            parts = line.replace("-", "_").split()
            if len(parts) == 3 and parts[1] in asked:
                behind.setdefault(parts[1], []).append(parts[2])
        return {
            name: tuple(found for word in some for found in ([word] if word in self.files else behind.get(word, ())))
            for name, some in words.items()
        }


def lines_of(text: str, kind: str, names: Collection[str], *, at: int) -> Iterator[str]:
    """The lines `kind … …` whose word number `at` is one of these modules."""
    for line in text.splitlines():
        parts = line.split()
        if len(parts) > at and parts[0] == kind and parts[at].replace("-", "_") in names:
            yield line


def _dependencies(text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Lines that name anything outside the folder are left out: what needs such a module is refused as incomplete."""
    for line in text.splitlines():
        path, colon, needs = line.partition(":")
        every = (path, *needs.split())
        if colon and all(module_name(one) and not posixpath.isabs(one) and ".." not in one.split("/") for one in every):
            yield path, every[1:]
