"""The kernels of a Linux guest and the initramfs of each.

    Debian, Ubuntu   /boot/vmlinuz-V   /boot/initrd.img-V        RHEL, Fedora   /boot/vmlinuz-V   /boot/initramfs-V.img
    SUSE             /boot/vmlinuz-V   /boot/initrd-V            Arch           /boot/vmlinuz-linux   /boot/initramfs-linux.img
    kernel-install   {/boot,/efi,/boot/efi}/MACHINE-ID/V/linux and initrd        UKI   …/EFI/Linux/NAME.efi, both in one

V is the folder below /lib/modules. Where the file's name is not V (Arch, Alpine), the kernel itself tells it: x86's boot
protocol has at 0x20E the offset, less 0x200, of a string that starts with V (Linux, Documentation/arch/x86/boot.rst).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tokvm.core.units import MiB
from tokvm.guest.appliance import READ_LIMIT
from tokvm.guest.base import InitrdFacts
from tokvm.guest.inspection.boot_entry import BootEntry, version_key
from tokvm.guest.inspection.initramfs import Inside, look_inside, names_in
from tokvm.guest.inspection.tree import Tree, word
from tokvm.guest.inspection.uki import section_text, sections_of

KERNELS_LIMIT = 12
DEP_LIMIT = 8 * MiB
"""modules.dep of RHEL 9 has 0.7 MiB."""
INSTALL_ROOTS = ("/boot", "/efi", "/boot/efi")
_KERNEL = re.compile(r"(?:vmlinuz|vmlinux|kernel|Image)(?:-([\w.+~@-]{1,120}))?")
_MACHINE_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class KernelFiles:
    """suffix: what the files' names say about the version; "" for a bare `vmlinuz`. initrd: "" when there is none."""

    suffix: str
    kernel: str
    initrd: str
    uki: bool = False


def find_kernels(tree: Tree) -> list[KernelFiles]:
    """Newest first, the first KERNELS_LIMIT of them. Rescue kernels are left out: nobody boots them by default, and their
    initramfs holds every driver, so that they would say nothing about the guest."""
    found = [*_in_boot(tree), *_by_kernel_install(tree), *_unified(tree)]
    found = [one for one in found if "rescue" not in one.suffix and not one.suffix.endswith(".old")]
    found.sort(key=lambda one: version_key(one.suffix), reverse=True)
    if len(found) > KERNELS_LIMIT:
        tree.problem(f"{len(found)} kernels, of which the {KERNELS_LIMIT} newest were looked at", where="/boot")
    return found[:KERNELS_LIMIT]


def _in_boot(tree: Tree) -> Iterator[KernelFiles]:
    names = tree.names("/boot")
    matches = [match for name in names if (match := _KERNEL.fullmatch(name))]
    suffixed = [match for match in matches if match[1]]
    for match in suffixed or matches:  # beside versions, bare names are symbolic links to one of them
        fit = (name for name in initrd_names(match[1] or "") if name in names)
        initrd = next(fit, "")
        yield KernelFiles(match[1] or "", f"/boot/{match[0]}", f"/boot/{initrd}" if initrd else "")


def initrd_names(suffix: str) -> tuple[str, ...]:
    """Names that distributions give to the initramfs of a kernel called `vmlinuz-SUFFIX`."""
    if not suffix:
        return ("initrd.img", "initrd", "initramfs.img", "initramfs")
    patterns = ("initrd.img-{}", "initramfs-{}.img", "initrd-{}", "initrd-{}.img", "initramfs-{}")
    return tuple(pattern.format(suffix) for pattern in patterns)


def _by_kernel_install(tree: Tree) -> Iterator[KernelFiles]:
    for root in INSTALL_ROOTS:
        for machine in [name for name in tree.names(root) if _MACHINE_ID.fullmatch(name)][:4]:
            for version in tree.names(f"{root}/{machine}")[: 4 * KERNELS_LIMIT]:
                folder = f"{root}/{machine}/{version}"
                names = tree.names(folder)
                if "linux" in names:
                    initrd = next((name for name in ("initrd", "initrd.img") if name in names), "")
                    yield KernelFiles(version, f"{folder}/linux", f"{folder}/{initrd}" if initrd else "")


def _unified(tree: Tree) -> Iterator[KernelFiles]:
    seen: set[str] = set()
    for root in INSTALL_ROOTS:
        for name in tree.names(f"{root}/EFI/Linux", "*.efi")[:KERNELS_LIMIT]:
            if name not in seen:  # the same ESP under two mount points
                seen.add(name)
                path = f"{root}/EFI/Linux/{name}"
                yield KernelFiles(name.removesuffix(".efi"), path, path, uki=True)


def kernel_version(head: bytes) -> str:
    """The version that an x86 kernel image carries, from its first 64 KiB; "" when it is none."""
    if head[0x202:0x206] != b"HdrS":
        return ""
    at = int.from_bytes(head[0x20E:0x210], "little") + 0x200
    return head[at : at + 120].split(b"\0")[0].split(b" ")[0].decode("ascii", "replace")


def same_file(entry_path: str, guest_path: str) -> bool:
    """Whether a boot entry means this file: its path starts at another root, or with `(hd0,gpt2)`, `($root)` or `/@`."""
    entry, guest = (path.split("/") for path in (entry_path, guest_path))
    parts = 3 if guest[-1] in {"linux", "initrd"} else 1
    return entry[-parts:] == guest[-parts:]


def look_at(tree: Tree, files: KernelFiles, entry: BootEntry | None, *, signed: bool) -> InitrdFacts:
    """Read one kernel's initramfs and modules. `signed`: the boot loader checks signatures of all that it loads."""
    data = tree.content(files.initrd, READ_LIMIT) if files.initrd else b""
    stat = tree.stat(files.initrd) if files.initrd else None
    sections = sections_of(data) if files.uki else {}
    version = _version(tree, files, section_text(sections, ".uname"))
    inside = _inside(files, sections.get(".initrd", b"") if files.uki else data)
    folder = f"/lib/modules/{version}"
    return InitrdFacts(
        version=word(version),
        kernel=files.kernel,
        initrd=files.initrd,
        size=stat.size if stat else 0,
        mtime_ns=stat.mtime_ns if stat else 0,
        sha256=hashlib.sha256(data).hexdigest() if data else "",
        modules=inside.modules,
        builtin=names_in(tree.text(f"{folder}/modules.builtin", DEP_LIMIT)) if version else frozenset(),
        available=names_in(tree.text(f"{folder}/modules.dep", DEP_LIMIT)) if version else frozenset(),
        packing=inside.packing,
        measured=files.uki or signed or tree.is_file(f"{files.initrd}.sig"),
        default=entry is not None and same_file(entry.kernel, files.kernel),
        problem=inside.problem,
    )


def _inside(files: KernelFiles, data: bytes) -> Inside:
    if not files.initrd:
        return Inside(problem="this kernel has no initramfs")
    return look_inside(data, files.initrd) if data else Inside(problem="the initramfs could not be read")


def _version(tree: Tree, files: KernelFiles, said: str) -> str:
    """The name of the folder below /lib/modules that belongs to the kernel; the file's suffix when there is none."""
    own = said or files.suffix
    if own and "/" not in own and tree.is_folder(f"/lib/modules/{own}"):
        return own
    inside = kernel_version(tree.head(files.kernel, 64 * 1024))
    return inside if inside and "/" not in inside and inside.isprintable() else own.replace("/", "_")
