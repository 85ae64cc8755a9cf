"""Small Linux disks for inspection: trees as mke2fs -d takes them, so that neither root nor loop devices are needed."""

from __future__ import annotations

import gzip
import shutil
import struct
from pathlib import Path

from tokvm.core.units import MiB
from tokvm.guest.initrd.cpio import pack
from tokvm.lab.programs import run_program

VERSION = "6.1.0-18-amd64"
NEWER = "6.1.0-25-amd64"
UUID = "5f1dbbf4-1c1e-4a0e-8b1a-2b7c1d9d0001"
DEBIAN_GRUB = """\
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="gnulinux-advanced-@@>gnulinux-6.1.0-18-amd64-advanced-@@"
fi
function savedefault {
  if [ -z "${boot_once}" ]; then
    saved_entry="${chosen}"
  fi
}
menuentry 'Debian GNU/Linux' --class debian --class os $menuentry_id_option 'gnulinux-simple-@@' {
	load_video
	if [ x$grub_platform = xxen ]; then insmod xzio; fi
	echo	'Loading Linux 6.1.0-25-amd64 ...'
	linux	/boot/vmlinuz-6.1.0-25-amd64 root=UUID=@@ ro  quiet
	initrd	/boot/initrd.img-6.1.0-25-amd64
}
submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-@@' {
	menuentry 'Debian GNU/Linux, with Linux 6.1.0-25-amd64' --class debian $menuentry_id_option 'gnulinux-6.1.0-25-amd64-advanced-@@' {
		linux	/boot/vmlinuz-6.1.0-25-amd64 root=UUID=@@ ro  quiet
		initrd	/boot/initrd.img-6.1.0-25-amd64
	}
	menuentry 'Debian GNU/Linux, with Linux 6.1.0-18-amd64' --class debian $menuentry_id_option 'gnulinux-6.1.0-18-amd64-advanced-@@' {
		linux	/boot/vmlinuz-6.1.0-18-amd64 root=UUID=@@ ro console=ttyS0
		initrd	/boot/initrd.img-6.1.0-18-amd64
	}
}
""".replace("@@", UUID)  # fmt: skip  # noqa: E501


def initrd(*modules: str) -> bytes:
    """A gzip'd newc archive with these modules in it."""
    members = [(f"usr/lib/modules/{VERSION}/kernel/{one}.ko", 0o100644, b"\x7fELF") for one in modules]
    return gzip.compress(pack(members), mtime=0)


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def system(root: Path, *, ident: str, title: str, version: str) -> Path:
    """What libguestfs takes for a Linux: /etc, /bin with an x86-64 program, /etc/fstab, os-release."""
    release = f'ID={ident}\nNAME="{title}"\nPRETTY_NAME="{title} {version}"\nVERSION_ID="{version}"\n'
    write(root, {"etc/os-release": release, "etc/fstab": f"UUID={UUID} / ext4 defaults 0 1\n", "etc/hostname": f"{ident}-1\n"})
    (root / "bin").mkdir(exist_ok=True)
    shutil.copyfile("/bin/true", root / "bin/ls")
    return root


def kernel(root: Path, version: str, initrd_name: str, data: bytes, *, available: tuple[str, ...]) -> None:
    dep = "".join(f"kernel/drivers/{one}.ko.xz: kernel/lib/other.ko\n" for one in available)
    files: dict[str, str | bytes] = {
        f"boot/vmlinuz-{version}": b"MZ kernel",
        f"boot/{initrd_name}": data,
        f"lib/modules/{version}/modules.dep": dep,
        f"lib/modules/{version}/modules.builtin": "kernel/drivers/virtio/virtio_pci.ko\nkernel/fs/ext4/ext4.ko\n",
    }
    write(root, files)


def ext4(tree: Path, out: Path, size: int, *, offset: int = 0) -> Path:
    """A file system with the tree in it, at `offset` of the file."""
    with out.open("ab") as made:
        made.truncate(size + offset)
    options = f"offset={offset},root_owner=0:0,hash_seed={UUID}"
    argv = ["mke2fs", "-q", "-F", "-t", "ext4", "-U", UUID, "-E", options, "-d", str(tree), str(out), f"{size // 1024}k"]
    run_program(argv, package="e2fsprogs")
    return out


def with_mbr(disk: Path, *, boot_code: bytes = b"\xebcGRUB \0", active: bool = True) -> Path:
    """One Linux partition from 1 MiB to the end, and a boot sector that a BIOS would start."""
    count = (disk.stat().st_size - MiB) // 512
    entry = struct.pack("<B3xB3xII", 0x80 if active else 0, 0x83, MiB // 512, count)
    with disk.open("r+b") as file:
        file.write(boot_code.ljust(446, b"\0") + entry + bytes(48) + b"\x55\xaa")
    return disk
