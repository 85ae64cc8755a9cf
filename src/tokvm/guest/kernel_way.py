"""Direct kernel boot: the guest's kernel and its extended initramfs beside the VM; nothing of the disks is changed.

Made before the cutover, so that it costs nothing inside the downtime, and BIOS and boot loader are skipped. Until the
initramfs is morphed for good, the guest boots the kernel that was current when this was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokvm.core.units import MiB
from tokvm.guest import durable
from tokvm.guest.appliance import Appliance
from tokvm.guest.base import GuestError, GuestFacts
from tokvm.guest.linux_initrd import extend, linux_of, mounted, mounts_that_matter, stamp

KERNEL_LIMIT = 256 * MiB
COMMAND_LINE_LIMIT = 2047  # COMMAND_LINE_SIZE of x86 and arm64 is 2048 with the zero byte
_BOOT_LOADERS_OWN = ("BOOT_IMAGE=", "initrd=")


@dataclass(frozen=True, slots=True)
class DirectKernelFiles:
    kernel: Path
    initrd: Path
    cmdline: str


def kernel_way(appliance: Appliance, facts: GuestFacts, store: Path) -> DirectKernelFiles:
    """The default kernel's files in `store`, on the medium when this returns. Nothing may be mounted. GuestError as in
    linux_initrd.extend, or when the boot entry's command line cannot be used."""
    linux = linux_of(facts)
    kernel = linux.default_kernel
    if kernel is None:
        raise GuestError("the guest has no kernel that could be booted directly", where=facts.root)
    cmdline = command_line(linux.command_line, linux.root)
    with mounted(appliance, mounts_that_matter(facts.mounts)):
        extended = extend(appliance, kernel, facts.arch)
        image = appliance.read(kernel.kernel, KERNEL_LIMIT)
    initrd = extended.segment.applied(extended.content) if extended.segment else extended.content
    files = DirectKernelFiles(store / "kernel", store / "initrd", cmdline)
    durable.write_file(files.kernel, image)
    durable.write_file(files.initrd, initrd)
    return files


def boot_files(facts: GuestFacts) -> dict[str, list[int]]:
    """What the files were made from: path → [size in bytes, mtime in nanoseconds], as inspection found them."""
    kernel = facts.linux.default_kernel if facts.linux else None
    return {kernel.initrd: [kernel.size, kernel.mtime_ns]} if kernel else {}


def check(appliance: Appliance, mounts: Mapping[str, str], files: Mapping[str, Sequence[int]]) -> None:
    """Would the guest still boot this kernel? GuestError when its initramfs is another one now. Nothing may be mounted."""
    with mounted(appliance, mounts_that_matter(dict(mounts))):
        for path, known in files.items():
            if list(stamp(appliance, path)) != list(known):
                raise GuestError("the guest's boot files changed since the rehearsal", where=path, fix="rehearse again")


def command_line(line: str, root: str) -> str:
    """The boot entry's words without those that only a boot loader understands; with a root."""
    words = [word for word in line.split() if not word.startswith(_BOOT_LOADERS_OWN)]
    if root and not any(word.startswith("root=") for word in words):
        words.insert(0, f"root={root}")
    text = " ".join(words)
    if not any(word.startswith("root=") for word in words) or "$" in text:
        raise GuestError("the boot entry does not say what the root is", where=text[:200], fix="take another way than kernel")
    if len(text) > COMMAND_LINE_LIMIT or not text.isascii() or not text.isprintable():
        raise GuestError(f"a kernel command line of {len(text)} characters that no kernel takes", where=text[:200])
    return text
