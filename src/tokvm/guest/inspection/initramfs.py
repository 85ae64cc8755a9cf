"""What one initramfs, or a kernel's folder of modules, says about drivers. Names as modprobe writes them: `virtio_blk`."""

from __future__ import annotations

from dataclasses import dataclass

from tokvm.core.text import readable
from tokvm.guest.base import GuestError
from tokvm.guest.initrd import archive

MODULES_LIMIT = 20_000


@dataclass(frozen=True, slots=True)
class Inside:
    """`problem`: why it could not be read; then there are no modules. packing: of the main archive."""

    modules: frozenset[str] = frozenset()
    packing: str = ""
    problem: str = ""


def look_inside(data: bytes, where: str) -> Inside:
    """Where inspection meets the initramfs parser. Never raises for what is in the file."""
    try:
        found = archive.read(data, where)
    except GuestError as failed:
        return Inside(problem=readable(failed.what))
    return Inside(frozenset(found.module_files), str(found.packing))


def names_in(text: str) -> frozenset[str]:
    """Modules named in modules.dep (`kernel/a/b.ko.xz: deps`) or modules.builtin (`kernel/a/b.ko`)."""
    paths = (line.partition(":")[0].strip() for line in text.splitlines()[:MODULES_LIMIT])
    return frozenset(name for path in paths if (name := archive.module_name(path)))
