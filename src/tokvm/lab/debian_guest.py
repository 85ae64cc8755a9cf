"""A lab guest that is a real Debian (or Ubuntu): GRUB, a distribution's kernel, initramfs-tools, systemd, an agent.

    before 1 MiB   GRUB: boot_disk.py
    1 MiB …        ext4: debian_root.py's files (the cached root, the ledger client), and this disk's own: /etc/fstab,
                   /etc/lab.conf, /boot/grub/grub.cfg …

It boots from its disk by BIOS on IDE, pvscsi or NVMe, and on virtio stops in the initramfs: nobody told that of virtio. What it
does is the mini guest's (data/ledger_client.sh), so the outside clock understands it as it is. /etc/fstab names the root by
/dev/sda1, as old installations do; GRUB and the kernel find it by UUID.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path

from tokvm.core.units import KiB, MiB
from tokvm.lab.boot_disk import PARTITION_OFFSET, PRIVATE_USERS, grub_config, make_bootable, make_ext4, partitioned
from tokvm.lab.debian_root import debian_root, kernel_version, ledger_tree, pack
from tokvm.lab.errors import LabError
from tokvm.lab.guest_image import BiosGuest, GuestSettings
from tokvm.lab.programs import run_program
from tokvm.lab.settings import DISK_SIZES, GuestKind

DEFAULT_SIZE = DISK_SIZES[GuestKind.DEBIAN_NO_VIRTIO]
SMALLEST = 640 * MiB
INODES = 32768
JOURNAL = 16 * MiB
TITLE = "Debian GNU/Linux"
OWN_WORDS = "console=ttyS0 mitigations=off audit=0"
KERNEL_WORDS = f"ro quiet {OWN_WORDS}"
# For a grub.cfg that the guest makes anew, as virt-v2v has it do. The core has no fonts, and no list of other systems.
DEFAULT_GRUB = f"""GRUB_DEFAULT=0
GRUB_TIMEOUT=0
GRUB_DISTRIBUTOR=Debian
GRUB_CMDLINE_LINUX_DEFAULT=quiet
GRUB_CMDLINE_LINUX="{OWN_WORDS}"
GRUB_TERMINAL=console
GRUB_DISABLE_OS_PROBER=true
"""
_NAMESPACE = uuid.UUID("0b9a4a9e-58f3-4c39-9a59-6a5f0e2f7c11")


def build_debian(
    out: Path, *, size: int = DEFAULT_SIZE, settings: GuestSettings | None = None, root: Path | None = None
) -> BiosGuest:
    """Make the disk at `out` (replaced when it is there). `root`: a tar of debian_root.py, default the cached one."""
    if size < SMALLEST or size % MiB:
        raise LabError(f"a Debian's disk of {size} bytes", fix=f"give whole MiB, at least {SMALLEST // MiB}")
    settings, root = settings or GuestSettings(), root or debian_root()
    root_uuid = str(uuid.uuid5(_NAMESPACE, f"root of {settings.name}"))
    with tempfile.TemporaryDirectory(prefix="debian-", dir=out.parent) as work:
        folder = Path(work)
        tree, new = folder / "root", folder / "disk"
        partitioned(new, size)
        pack(ledger_tree(), folder / "ledger.tar")
        tree.mkdir()
        for part in (root, folder / "ledger.tar"):
            _unpack(part, tree)
        make_ext4(
            new,
            tree,
            offset=PARTITION_OFFSET,
            size=size - PARTITION_OFFSET,
            fs_uuid=root_uuid,
            label="debian",
            inodes=INODES,
            journal=JOURNAL,
            owners_kept=_private(),
        )
        run_program([*_as_root(), "rm", "-rf", str(tree)], package="coreutils")
        _write_files(new, folder, _own_files(settings, kernel_version(root), root_uuid, work_kib=size // 8 // KiB))
        make_bootable(new, folder, root_uuid)
        new.rename(out)
    return BiosGuest(out)


def _own_files(settings: GuestSettings, version: str, root_uuid: str, *, work_kib: int) -> dict[str, str]:
    return {
        "/etc/fstab": "/dev/sda1 / ext4 rw,noatime,errors=remount-ro 0 1\n",
        "/etc/hostname": f"{settings.name}\n",
        "/etc/default/grub": DEFAULT_GRUB,
        "/etc/machine-id": f"{uuid.uuid5(_NAMESPACE, settings.name).hex}\n",
        "/etc/lab.conf": settings.shell(work_kib),
        "/boot/grub/grub.cfg": grub_config(title=TITLE, version=version, root_uuid=root_uuid, words=KERNEL_WORDS),
    }


def _unpack(packed: Path, tree: Path) -> None:
    """With the owners that the tar names. /dev is the kernel's (devtmpfs), and a user may not make devices."""
    run_program(
        [*_as_root(), "tar", "-x", "--numeric-owner", "--exclude=./dev/*", "-f", str(packed), "-C", str(tree)],
        package="tar",
        timeout_s=600,
    )


def _write_files(disk: Path, folder: Path, files: dict[str, str]) -> None:
    """Into the unmounted file system, over what is there."""
    lines = ["mkdir /boot/grub"]
    for number, (path, content) in enumerate(files.items()):
        (folder / f"own-{number}").write_text(content)
        lines += [f"rm {path}", f'write "{folder / f"own-{number}"}" {path}']
    argv = ["debugfs", "-w", "-f", "-", f"{disk}?offset={PARTITION_OFFSET}"]
    run_program(argv, package="e2fsprogs", input_bytes="\n".join([*lines, ""]).encode())


def _private() -> bool:
    return os.geteuid() != 0


def _as_root() -> tuple[str, ...]:
    return PRIVATE_USERS if _private() else ()
