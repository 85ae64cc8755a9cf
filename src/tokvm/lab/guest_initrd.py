"""The lab guest's initramfs and /lib/modules: laid out as initramfs-tools and dracut do, so that it is morphed as theirs are.

    init                              data/guest_initrd.sh
    bin/busybox
    conf/modules                      loaded first, in this order (initramfs-tools' file of the same name)
    lib/modules/<version>/kernel/…    the modules, not packed
                         /modules.dep modules.alias …    depmod's, for the modules that are here

What the hardware asks for besides is loaded by modalias, as udev does. So a driver that somebody adds, with indexes that know
it, is used without a word in any list.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from importlib import resources
from pathlib import Path

from tokvm.lab.kernel import GuestKernel, module_bytes
from tokvm.lab.programs import run_program


class Drivers(StrEnum):
    """What the initramfs can boot from. IDE: as a hypervisor's own kernel list (`MODULES=dep`, hostonly) leaves it on IDE
    hardware; the guest stops in the initramfs on virtio until somebody morphs it."""

    BOTH = "both"
    IDE = "ide"


PLAIN = ("ata_piix", "ahci", "sd_mod", "ext4", "crc32c", "button", "evdev")
VIRTIO = ("virtio_pci", "virtio_blk", "virtio_scsi", "virtio_net")
FORCED = {Drivers.BOTH: (*PLAIN, *VIRTIO), Drivers.IDE: PLAIN}
# /lib/modules of the root has these too, as a distribution's has every driver of its kernel.
INSTALLED = (
    *(*PLAIN, *VIRTIO, "virtio_balloon", "virtio_console", "sg", "sr_mod", "af_packet"),
    *("vmw_pvscsi", "mptspi", "mptsas", "nvme", "megaraid_sas", "hv_storvsc", "hv_netvsc", "vmxnet3", "e1000", "e1000e"),
)
LISTS = ("modules.order", "modules.builtin", "modules.builtin.modinfo")
# busybox reads the texts; libkmod's binary indexes would only be bytes to unpack.
TEXTS = ("modules.dep", "modules.alias", "modules.softdep", "modules.symbols", "modules.order", "modules.builtin")


def script(name: str) -> bytes:
    return resources.files("tokvm.lab").joinpath("data", name).read_bytes()


def modules_tree(kernel: GuestKernel, names: tuple[str, ...], tree: Path) -> Path:
    """`tree`/lib/modules/VERSION with the modules of those names and all that they need, unpacked, and depmod's indexes."""
    folder = tree / "lib/modules" / kernel.version
    folder.mkdir(parents=True)
    for file in kernel.files_of(names):
        inside = file.relative_to(kernel.modules)
        target = folder / inside.with_name(inside.name.split(".ko")[0] + ".ko")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(module_bytes(file))
    for name in LISTS:
        if (kernel.modules / name).is_file():
            (folder / name).write_bytes((kernel.modules / name).read_bytes())
    run_program(["depmod", "-b", str(tree), kernel.version], package="kmod")
    return folder


def make_initrd(kernel: GuestKernel, busybox: Path, drivers: Drivers, work: Path) -> bytes:
    """Not compressed: reading the bytes costs an emulated CPU less than unpacking them. `work` is a folder for our use."""
    forced = FORCED[drivers]
    modules = modules_tree(kernel, forced, work)
    found = [*modules.rglob("*.ko"), *(modules / name for name in TEXTS if (modules / name).is_file())]
    files = [
        ("init", 0o100755, script("guest_initrd.sh")),
        ("bin/busybox", 0o100755, busybox.read_bytes()),
        ("conf/modules", 0o100644, "".join(f"{name}\n" for name in forced).encode()),
        *sorted((str(file.relative_to(work)), 0o100644, file.read_bytes()) for file in found),
    ]
    folders = {str(parent) for name, _, _ in files for parent in Path(name).parents} - {"."}
    return cpio([*((name, 0o040755, b"") for name in sorted({*folders, "dev", "proc", "sys", "new"})), *files])


def cpio(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A "newc" archive: per entry a header of 8-digit hex fields, the name, the content, each padded to 4 bytes.

    Linux, Documentation/driver-api/early-userspace/buffer-format.rst."""
    out = bytearray()
    for number, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        raw = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(raw), 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + raw
        out += bytes(-len(out) % 4) + content
        out += bytes(-len(out) % 4)
    return bytes(out) + bytes(-len(out) % 512)
