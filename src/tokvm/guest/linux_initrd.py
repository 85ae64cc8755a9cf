"""A guest's initramfs and modules, read through the appliance, and the segment that makes it find KVM's disks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tokvm.core.units import MiB
from tokvm.guest.appliance import Appliance
from tokvm.guest.base import GuestError, GuestFacts, InitrdFacts, LinuxFacts
from tokvm.guest.initrd import archive
from tokvm.guest.initrd.module_file import MODULE_LIMIT
from tokvm.guest.initrd.modules import Lists
from tokvm.guest.initrd.segment import Segment, make

INITRD_LIMIT = 512 * MiB
LIST_LIMIT = 16 * MiB
_MATTER = ("/", "/boot", "/efi", "/usr", "/etc", "/lib")


@dataclass(frozen=True, slots=True)
class Extended:
    """An initramfs as it is (mtime in nanoseconds), and what to append; no segment when it has all it needs."""

    path: str
    content: bytes
    mtime_ns: int
    segment: Segment | None


def mounts_that_matter(mounts: Mapping[str, str]) -> dict[str, str]:
    """Those of the mount points on which kernels, modules and /etc lie."""
    return {point: device for point, device in mounts.items() if point in _MATTER or point.startswith("/boot/")}


@contextmanager
def mounted(appliance: Appliance, mounts: Mapping[str, str], options: str = "") -> Iterator[None]:
    """Mount, and unmount whatever happens: an idle appliance must hold nothing of the disks."""
    try:
        appliance.mount(mounts, options)
        yield
    except BaseException:
        with suppress(GuestError):  # the first error is the one to tell
            appliance.unmount()
        raise
    appliance.unmount()


def linux_of(facts: GuestFacts) -> LinuxFacts:
    if facts.linux is None:
        raise GuestError("this is for Linux guests only")
    return facts.linux


def extend(appliance: Appliance, kernel: InitrdFacts, arch: str) -> Extended:
    """One kernel's initramfs, its file systems being mounted. GuestError when it cannot or must not be extended."""
    if kernel.measured:
        raise GuestError(
            "the initramfs is signed or measured: a changed one would not boot",
            where=kernel.initrd,
            fix="boot this guest on compatible hardware, or have virtio built into its initramfs on the source",
        )
    if not kernel.initrd:
        raise GuestError("this kernel has no initramfs", where=kernel.kernel)
    with appliance.translated(f"cannot look at {kernel.initrd!r}"):
        path = appliance.g.realpath(kernel.initrd)  # a symbolic link would be replaced by a file
    mtime_ns = stamp(appliance, path)[1]
    content = appliance.read(path, INITRD_LIMIT)
    folder = f"/lib/modules/{kernel.version}"
    segment = make(
        archive.read(content, path),
        len(content),
        version=kernel.version,
        arch=arch,
        lists=_lists(appliance, folder),
        read=lambda file: appliance.read(f"{folder}/{file}", MODULE_LIMIT),
    )
    return Extended(path, content, mtime_ns, segment)


def stamp(appliance: Appliance, path: str) -> tuple[int, int]:
    """(size in bytes, mtime in nanoseconds)."""
    with appliance.translated(f"cannot look at {path!r}"):
        found = appliance.g.statns(path)
    return int(found["st_size"]), int(found["st_mtime_sec"]) * 1_000_000_000 + int(found["st_mtime_nsec"])


def read_if_there(appliance: Appliance, path: str, limit: int) -> bytes | None:
    with appliance.translated(f"cannot look at {path!r}"):
        there = appliance.g.is_file(path, followsymlinks=True)
    return appliance.read(path, limit) if there else None


def _lists(appliance: Appliance, folder: str) -> Lists:
    texts = [_text(appliance, f"{folder}/{name}") for name in ("dep", "builtin", "alias", "softdep")]
    dep, builtin, aliases, softdeps = texts
    return Lists.parse(dep, builtin=builtin, aliases=aliases, softdeps=softdeps)


def _text(appliance: Appliance, path: str) -> str:
    folder, _, name = path.rpartition("/")
    content = read_if_there(appliance, f"{folder}/modules.{name}", LIST_LIMIT)
    return (content or b"").decode("utf-8", "surrogateescape")
