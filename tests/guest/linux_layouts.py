"""Disks as installers lay them out: RHEL's XFS on LVM, Debian's ext4 on LVM, SUSE's btrfs with snapshots, Fedora's btrfs.

Made in an appliance, but for XFS: its mkfs is not in libguestfs' appliance everywhere, so the host makes the file system in a
file and its bytes are carried over. The guests hold a real initramfs (IDE only) and real modules; they are not booted.
"""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.guest import disk_trees

from tokvm.core.units import SECTOR, MiB
from tokvm.guest.appliance import PIECE, Appliance
from tokvm.guest.base import GuestDisk
from tokvm.lab.guest_initrd import INSTALLED, Drivers, make_initrd, modules_tree
from tokvm.lab.kernel import GuestKernel
from tokvm.lab.programs import run_program
from tokvm.remote import process

XFS = 320 * MiB  # mkfs.xfs makes none below 300 MiB (xfsprogs 5.19)
BOOT_UUID = "b0070000-1c1e-4a0e-8b1a-2b7c1d9d0001"
ROOT_UUID = "70070000-1c1e-4a0e-8b1a-2b7c1d9d0002"
LABEL = "system_u:object_r:etc_t:s0"


@dataclass(frozen=True, slots=True)
class Layout:
    """make: fills one empty disk of the appliance. initrd: of its kernel, `{}` for the version. more: other files, `@v` in
    them for the version. file_systems: offset and size of each, and the program of its maker that finds it sound."""

    size: int
    distro: str
    initrd: str
    fstab: str
    more: dict[str, str]
    make: Callable[[Any, str, Path], dict[str, str]]
    file_systems: tuple[tuple[int, int, list[str]], ...]


def make(name: str, layout: Layout, work: Path, kernel: GuestKernel, *, tcg: bool) -> Path:
    """The disk, with the distribution's files in it."""
    tree = tree_of(name, layout, work, kernel)
    disk = work / f"{name}.raw"
    with disk.open("wb") as made:
        made.truncate(layout.size)
    with Appliance.launch([GuestDisk(str(disk))], readonly=False, tcg=tcg) as appliance:
        g = appliance.g
        appliance.mount(layout.make(g, g.list_devices()[0], work))
        g.tar_in(str(packed(tree)), "/")
        if layout.distro == "rhel":
            g.setxattr("security.selinux", LABEL, len(LABEL), "/etc/dracut.conf.d")
    return disk


def tree_of(name: str, layout: Layout, work: Path, kernel: GuestKernel) -> Path:
    root = disk_trees.system(work / f"{name}-tree", ident=layout.distro, title=name, version="9")
    modules_tree(kernel, INSTALLED, root)
    initrd = make_initrd(kernel, Path(process.which("busybox")), Drivers.IDE, work)
    files = {f"boot/{layout.initrd.format(kernel.version)}": initrd, f"boot/vmlinuz-{kernel.version}": b"MZ kernel"}
    filled = {path.format(kernel.version): text.replace("@v", kernel.version) for path, text in layout.more.items()}
    return disk_trees.write(root, {**files, "etc/fstab": layout.fstab, "var/log/old": b"o" * 70_000, **filled})


def packed(tree: Path) -> Path:
    out = tree.with_suffix(".tar")
    with tarfile.open(out, "w") as archive:
        archive.add(tree, arcname=".", filter=_by_root)
    return out


def _by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    return member


def sound(disk: Path, layout: Layout, work: Path) -> None:
    """Every file system, by its own maker's program; AssertionError with what that says."""
    for start, size, argv in layout.file_systems:
        part = work / "file-system"
        with disk.open("rb") as whole, part.open("wb") as made:
            whole.seek(start)
            for _ in range(size // MiB):
                made.write(whole.read(MiB))
        done = subprocess.run([*argv, str(part)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{argv[0]}: {done.stdout[-2000:]} {done.stderr[-2000:]}"


def _xfs(g: Any, device: str, uuid: str, work: Path) -> None:
    image = work / "xfs"
    image.unlink(missing_ok=True)
    run_program(["mkfs.xfs", "-q", "-m", f"uuid={uuid}", "-d", f"file,name={image},size={XFS}"], package="xfsprogs")
    with image.open("rb") as file:
        for at in range(0, XFS, PIECE):
            piece = file.read(PIECE)
            if piece.strip(b"\0"):
                g.pwrite_device(device, piece, at)


def _bios(g: Any, device: str) -> None:
    g.pwrite_device(device, b"\xebcGRUB \0".ljust(440, b"\0"), 0)


def _gpt(g: Any, device: str, *ends: int) -> None:
    """GRUB's own partition, one MiB long, then one up to each of the ends (bytes)."""
    g.part_init(device, "gpt")
    g.part_add(device, "p", 2048, 4095)
    g.part_set_gpt_type(device, 1, "21686148-6449-6E6F-744E-656564454649")
    start = 2 * MiB
    for end in ends:
        g.part_add(device, "p", start // SECTOR, end // SECTOR - 1)
        start = end
    _bios(g, device)


def rhel(g: Any, device: str, work: Path) -> dict[str, str]:
    """MBR; /boot on XFS, the root on XFS in a logical volume."""
    g.part_init(device, "mbr")
    g.part_add(device, "primary", MiB // SECTOR, (MiB + XFS) // SECTOR - 1)
    g.part_add(device, "primary", (MiB + XFS) // SECTOR, -1)
    g.part_set_bootable(device, 1, True)
    _bios(g, device)
    g.pvcreate(f"{device}2")
    g.vgcreate("rhel", [f"{device}2"])
    g.lvcreate("root", "rhel", XFS // MiB)
    _xfs(g, f"{device}1", BOOT_UUID, work)
    _xfs(g, "/dev/rhel/root", ROOT_UUID, work)
    _with_folder(g, "/dev/rhel/root", "/boot")
    return {"/": "/dev/rhel/root", "/boot": f"{device}1"}


def debian(g: Any, device: str, work: Path) -> dict[str, str]:
    """GPT for a BIOS; /boot on ext2, the root on ext4 in a logical volume behind another one."""
    _gpt(g, device, 98 * MiB, 255 * MiB)
    g.pvcreate(f"{device}3")
    g.vgcreate("debian-vg", [f"{device}3"])
    g.lvcreate("swap_1", "debian-vg", 16)
    g.lvcreate("root", "debian-vg", 96)
    g.mkswap("/dev/debian-vg/swap_1")
    g.mkfs("ext2", f"{device}2")
    g.set_uuid(f"{device}2", BOOT_UUID)
    g.mkfs("ext4", "/dev/debian-vg/root")
    _with_folder(g, "/dev/debian-vg/root", "/boot")
    return {"/": "/dev/debian-vg/root", "/boot": f"{device}2"}


def suse(g: Any, device: str, work: Path) -> dict[str, str]:
    """GPT for a BIOS; one btrfs, booted from the first of its snapshots (the default subvolume), with another one of it."""
    _gpt(g, device, 322 * MiB)
    g.mkfs_btrfs([f"{device}2"])
    g.set_uuid(f"{device}2", ROOT_UUID)
    g.mount(f"{device}2", "/")
    g.btrfs_subvolume_create("/@")
    g.btrfs_subvolume_create("/@/.snapshots")
    g.mkdir("/@/.snapshots/1")
    g.btrfs_subvolume_create("/@/.snapshots/1/snapshot")
    g.btrfs_subvolume_create("/@/home")
    for name in (".snapshots", "home"):
        g.mkdir(f"/@/.snapshots/1/snapshot/{name}")
    numbers = {one["btrfssubvolume_path"]: one["btrfssubvolume_id"] for one in g.btrfs_subvolume_list("/")}
    g.btrfs_subvolume_set_default(numbers["@/.snapshots/1/snapshot"], "/")
    g.mkdir("/@/.snapshots/2")
    g.umount_all()
    return {"/": f"{device}2"}


def fedora(g: Any, device: str, work: Path) -> dict[str, str]:
    """GPT for a BIOS; /boot on ext4, and a btrfs whose subvolumes `root` and `home` the command line and fstab name."""
    _gpt(g, device, 98 * MiB, 418 * MiB)
    g.mkfs("ext4", f"{device}2")
    g.set_uuid(f"{device}2", BOOT_UUID)
    g.mkfs_btrfs([f"{device}3"])
    g.set_uuid(f"{device}3", ROOT_UUID)
    g.mount(f"{device}3", "/")
    for name in ("root", "home"):
        g.btrfs_subvolume_create(f"/{name}")
    g.mkdir("/root/boot")
    g.umount_all()
    return {"/": f"btrfsvol:{device}3/root", "/boot": f"{device}2"}


def keep_a_snapshot(g: Any, device: str) -> None:
    """As snapper does before an update: a read-only snapshot of the running system, another system for libguestfs."""
    g.mount_options("subvolid=5", f"{device}2", "/")  # the top level, whatever the default is
    g.btrfs_subvolume_snapshot("/@/.snapshots/1/snapshot", "/@/.snapshots/2/snapshot", ro=True)
    g.umount_all()


def _with_folder(g: Any, device: str, folder: str) -> None:
    g.mount(device, "/")
    g.mkdir(folder)
    g.umount_all()


BLS = """\
title Linux (@v)
version @v
linux /vmlinuz-@v
initrd /initramfs-@v.img
options @o
"""
DRACUT = {"usr/bin/dracut": "#!/bin/sh\n", "etc/dracut.conf.d/50-site.conf": "\n"}
GRUB = "menuentry 'Linux' {\n  linux @d/vmlinuz-@v root=@r ro quiet\n  initrd @d/@i\n}\n"


def _grub(folder: str, root: str, initrd: str) -> str:
    return GRUB.replace("@d", folder).replace("@r", root).replace("@i", initrd)


def _bls(options: str) -> dict[str, str]:
    return {"boot/grub2/grub.cfg": "blscfg\n", "boot/loader/entries/abc-{}.conf": BLS.replace("@o", options)}


LAYOUTS = {
    "rhel": Layout(
        size=2 * MiB + 2 * XFS + 16 * MiB,
        distro="rhel",
        initrd="initramfs-{}.img",
        fstab=f"/dev/mapper/rhel-root / xfs defaults 0 0\nUUID={BOOT_UUID} /boot xfs defaults 0 0\n",
        more=_bls("root=/dev/mapper/rhel-root ro rd.lvm.lv=rhel/root") | DRACUT,
        make=rhel,
        file_systems=((MiB, XFS, ["xfs_repair", "-n", "-f"]), (2 * MiB + XFS, XFS, ["xfs_repair", "-n", "-f"])),
    ),
    "debian": Layout(
        size=256 * MiB,
        distro="debian",
        initrd="initrd.img-{}",
        fstab=f"/dev/mapper/debian--vg-root / ext4 errors=remount-ro 0 1\nUUID={BOOT_UUID} /boot ext2 defaults 0 2\n",
        more={
            "boot/grub/grub.cfg": _grub("", "/dev/mapper/debian--vg-root", "initrd.img-@v"),
            "usr/sbin/update-initramfs": "#!/bin/sh\n",
            "etc/initramfs-tools/modules": "# none\n",
        },
        make=debian,
        file_systems=((2 * MiB, 96 * MiB, ["e2fsck", "-fn"]), ((98 + 1 + 16) * MiB, 96 * MiB, ["e2fsck", "-fn"])),
    ),
    "suse": Layout(
        size=324 * MiB,
        distro="opensuse",
        initrd="initrd-{}",
        fstab=f"UUID={ROOT_UUID} / btrfs defaults 0 0\nUUID={ROOT_UUID} /home btrfs subvol=/@/home 0 0\n"
        f"UUID={ROOT_UUID} /.snapshots btrfs subvol=/@/.snapshots 0 0\n",
        more={"boot/grub2/grub.cfg": _grub("/boot", f"UUID={ROOT_UUID}", "initrd-@v"), **DRACUT},
        make=suse,
        file_systems=((2 * MiB, 320 * MiB, ["btrfs", "check", "--readonly"]),),
    ),
    "fedora": Layout(
        size=420 * MiB,
        distro="fedora",
        initrd="initramfs-{}.img",
        fstab=f"UUID={ROOT_UUID} / btrfs subvol=root 0 0\nUUID={BOOT_UUID} /boot ext4 defaults 1 2\n"
        f"UUID={ROOT_UUID} /home btrfs subvol=home 0 0\n",
        more=_bls(f"root=UUID={ROOT_UUID} ro rootflags=subvol=root") | DRACUT,
        make=fedora,
        file_systems=(
            (2 * MiB, 96 * MiB, ["e2fsck", "-fn"]),
            (98 * MiB, 320 * MiB, ["btrfs", "check", "--readonly"]),
        ),
    ),
}
