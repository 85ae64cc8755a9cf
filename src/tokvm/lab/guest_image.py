"""The lab's guest: a real Linux on a bootable raw disk, made in seconds without root, loop devices or a network.

    before 1 MiB      GRUB: boot_disk.py
    1 MiB …           ext4: /boot/vmlinuz-VERSION, /boot/initrd.img-VERSION, /boot/grub/grub.cfg, /etc/fstab, /etc/os-release,
                      /lib/modules/VERSION, /bin/busybox, /sbin/init, /sbin/ledger-client, /etc/lab.conf, /ledger, /work

Kernel: kernel.py. Userland: busybox-static. The initrd (guest_initrd.py) has drivers for IDE and for virtio, so the guest boots
from either and needs no morphing; with `drivers="ide"` it needs one, and has all for it in /lib/modules. What the guest then
does: data/ledger_client.sh. The source VM boots kernel and initrd directly (they are kept beside the disk), the target through
SeaBIOS and GRUB from the disk alone.

`work_kib` bounds the file that the background writer goes round in.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokvm.core.units import KiB, MiB
from tokvm.lab.boot_disk import PARTITION_OFFSET, grub_config, make_bootable, make_ext4, partitioned
from tokvm.lab.errors import LabError
from tokvm.lab.guest_initrd import INSTALLED, Drivers, make_initrd, modules_tree, script
from tokvm.lab.kernel import GuestKernel, find_kernel
from tokvm.lab.programs import find_program, run_program

SMALLEST = 64 * MiB
SMALLEST_DATA = 16 * MiB
TITLE = "tokvm lab guest"
# Together these save a fifth of the emulated CPU's boot (2.8 instead of 3.5 s of CPU up to READY, QEMU 7.2 TCG).
FAST_BOOT = "mitigations=off nokaslr random.trust_cpu=on noreplace-smp cryptomgr.notests audit=0 rcupdate.rcu_expedited=1"
KERNEL_WORDS = f"console=ttyS0 quiet panic=1 {FAST_BOOT}"
MAX_DATA_DISKS = 3

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
_NAMESPACE = uuid.UUID("5e1f7b0e-2f0a-4f0e-9a51-0c2a3b6d7e10")


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestSettings:
    """`clock_port`: where the outside clock listens (0: nobody is told anything). `write_rate`: bytes per second of the
    background writer. `data_disks`: how many disks beside the root hold a copy of the ledger."""

    name: str = "guest"
    clock_port: int = 0
    write_rate: int = 0
    ledger_s: float = 0.2
    heartbeat_s: float = 0.1
    data_disks: int = 0

    def __post_init__(self) -> None:
        wrong = [
            text
            for text, fine in (
                (f"name {self.name!r}", bool(_NAME.fullmatch(self.name))),
                (f"port {self.clock_port}", 0 <= self.clock_port < 65536),
                (f"write rate {self.write_rate}", 0 <= self.write_rate < 1 << 30),
                (f"ledger interval {self.ledger_s} s", 0 < self.ledger_s < 3600),
                (f"heartbeat {self.heartbeat_s} s", 0 < self.heartbeat_s < 3600),
                (f"{self.data_disks} data disks", 0 <= self.data_disks <= MAX_DATA_DISKS),
            )
            if not fine
        ]
        if wrong:
            raise LabError(f"the guest cannot have {', '.join(wrong)}")

    def kernel_words(self) -> str:
        """The kernel command line that gives these settings to a guest whose disk says otherwise; the guest keeps them."""
        return (
            f"tokvm.guest={self.name} tokvm.port={self.clock_port} tokvm.write_rate={self.write_rate} "
            f"tokvm.ledger_s={self.ledger_s:g} tokvm.heartbeat_s={self.heartbeat_s:g}"
        )

    def shell(self, work_kib: int) -> str:
        """/etc/lab.conf. Every value is a number or matches _NAME, so none needs quoting."""
        return (
            f"guest={self.name} port={self.clock_port} write_rate={self.write_rate} ledger_s={self.ledger_s:g} "
            f"heartbeat_s={self.heartbeat_s:g} data_disks={self.data_disks} work_kib={work_kib}\n"
        )


@dataclass(frozen=True, slots=True)
class GuestImage:
    """`disk` boots by itself; `kernel`, `initrd` and `command_line` boot it without BIOS and GRUB."""

    disk: Path
    kernel: Path
    initrd: Path
    command_line: str


@dataclass(frozen=True, slots=True)
class BiosGuest:
    """A guest that boots from its disk only."""

    disk: Path


def build_guest(
    out: Path,
    *,
    size: int = 256 * MiB,
    settings: GuestSettings | None = None,
    kernel: GuestKernel | None = None,
    drivers: Literal["both", "ide"] = "both",
) -> GuestImage:
    """Make the guest's disk at `out` (replaced when it is there) and its kernel and initrd beside it. `drivers`: what the
    initrd can boot from (guest_initrd.Drivers)."""
    if size < SMALLEST or size % MiB:
        raise LabError(f"a guest's disk of {size} bytes", fix=f"give whole MiB, at least {SMALLEST // MiB}")
    settings, kernel = settings or GuestSettings(), kernel or find_kernel()
    busybox = Path(find_program("busybox", package="busybox-static"))
    root_uuid = str(uuid.uuid5(_NAMESPACE, f"root of {settings.name}"))
    with tempfile.TemporaryDirectory(prefix="guest-", dir=out.parent) as work:
        folder = Path(work)
        tree, new = folder / "root", folder / "disk"
        initrd = make_initrd(kernel, busybox, Drivers(drivers), folder / "initrd")
        _root_tree(tree, busybox, settings.shell(work_kib=size // 4 // KiB))
        modules_tree(kernel, INSTALLED, tree)
        _boot_folder(tree, kernel, initrd, root_uuid)
        partitioned(new, size)
        make_ext4(new, tree, offset=PARTITION_OFFSET, size=size - PARTITION_OFFSET, fs_uuid=root_uuid, label="tokvm-root")
        make_bootable(new, folder, root_uuid)
        beside_kernel, beside_initrd = out.with_suffix(".vmlinuz"), out.with_suffix(".initrd")
        shutil.copyfile(kernel.image, beside_kernel)
        beside_initrd.write_bytes(initrd)
        new.rename(out)
    return GuestImage(out, beside_kernel, beside_initrd, f"root=UUID={root_uuid} {KERNEL_WORDS}")


def build_data_disk(out: Path, *, index: int, size: int = 32 * MiB) -> Path:
    """A disk for a copy of the ledger: ext4 without a partition table, found by its label. `index` counts from 1."""
    if size < SMALLEST_DATA or size % MiB:
        raise LabError(f"a data disk of {size} bytes", fix=f"give whole MiB, at least {SMALLEST_DATA // MiB}")
    with tempfile.TemporaryDirectory(prefix="data-", dir=out.parent) as work:
        tree, new = Path(work) / "root", Path(work) / "disk"
        tree.mkdir()
        with new.open("wb") as file:
            file.truncate(size)
        fs_uuid = str(uuid.uuid5(_NAMESPACE, f"data {index}"))
        make_ext4(new, tree, offset=0, size=size, fs_uuid=fs_uuid, label=f"tokvm-data{index}")
        new.rename(out)
    return out


def _root_tree(tree: Path, busybox: Path, conf: str) -> None:
    for name in ("bin", "sbin", "dev", "proc", "sys", "run", "etc", "boot/grub"):
        (tree / name).mkdir(parents=True)
    shutil.copyfile(busybox, tree / "bin/busybox")
    (tree / "sbin/init").write_bytes(script("guest_init.sh"))
    (tree / "sbin/ledger-client").write_bytes(script("ledger_client.sh"))
    for program in ("bin/busybox", "sbin/init", "sbin/ledger-client"):
        (tree / program).chmod(0o755)
    applet_links(tree / "bin", "busybox")
    (tree / "etc/ledger.awk").write_bytes(script("ledger.awk"))
    (tree / "etc/lab.conf").write_text(conf)
    (tree / "etc/hostname").write_text("lab-guest\n")
    (tree / "etc/os-release").write_text(f'ID=tokvm-lab\nNAME="{TITLE}"\nPRETTY_NAME="{TITLE} 1"\nVERSION_ID=1\n')


def applet_links(folder: Path, busybox: str) -> None:
    """A link for each of busybox' applets. Debian's and Ubuntu's shells run applets in their own process; the links are for one
    that does not."""
    for applet in run_program(["busybox", "--list"], package="busybox-static").decode().split():
        if applet != "busybox":
            (folder / applet).symlink_to(busybox)


def _boot_folder(tree: Path, kernel: GuestKernel, initrd: bytes, root_uuid: str) -> None:
    """Where an installed system has them, so that inspection finds them: /boot, and /etc/fstab by UUID."""
    shutil.copyfile(kernel.image, tree / f"boot/vmlinuz-{kernel.version}")
    (tree / f"boot/initrd.img-{kernel.version}").write_bytes(initrd)
    config = grub_config(title=TITLE, version=kernel.version, root_uuid=root_uuid, words=KERNEL_WORDS)
    (tree / "boot/grub/grub.cfg").write_text(config)
    (tree / "etc/fstab").write_text(f"UUID={root_uuid} / ext4 rw,noatime 0 1\n")
