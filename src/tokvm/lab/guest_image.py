"""The lab's guest: a real Linux on a bootable raw disk, made in seconds without root, loop devices or a network.

    sector 0          GRUB boot.img (440 bytes) and the partition table: one partition, active
    sector 1 …        GRUB core.img, with its configuration inside
    1 MiB …           ext4: /boot/vmlinuz, /boot/initrd.img, /bin/busybox, /sbin/init, /etc/lab.conf, /ledger, /work

Kernel: kernel.py. Userland: busybox-static. The initrd has drivers for IDE and for virtio, so the guest boots from either and
needs no morphing. What the guest then does: data/guest_init.sh. The source VM boots kernel and initrd directly (they are kept
beside the disk), the target through SeaBIOS and GRUB from the disk alone.

`work_kib` bounds the file that the background writer goes round in.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from tokvm.core.units import KiB, MiB
from tokvm.lab.errors import LabError
from tokvm.lab.kernel import GuestKernel, find_kernel, module_bytes
from tokvm.lab.programs import find_program, run_program

PARTITION_OFFSET = MiB
SMALLEST = 64 * MiB
SMALLEST_DATA = 16 * MiB
MODULES = (
    *("ata_piix", "ahci", "sd_mod", "ext4", "crc32c"),
    *("virtio_pci", "virtio_blk", "virtio_scsi", "virtio_net", "button", "evdev"),
)
GRUB_FOLDER = Path("/usr/lib/grub/i386-pc")
GRUB_MODULES = ("biosdisk", "part_msdos", "ext2", "search_fs_uuid", "linux", "boot")
# Spelled out, because a newer mke2fs turns on features (orphan_file, metadata_csum_seed) that older GRUBs cannot read.
EXT4_FEATURES = (
    "none,has_journal,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize"
)
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


def build_guest(
    out: Path, *, size: int = 256 * MiB, settings: GuestSettings | None = None, kernel: GuestKernel | None = None
) -> GuestImage:
    """Make the guest's disk at `out` (replaced when it is there) and its kernel and initrd beside it."""
    if size < SMALLEST or size % MiB:
        raise LabError(f"a guest's disk of {size} bytes", fix=f"give whole MiB, at least {SMALLEST // MiB}")
    settings, kernel = settings or GuestSettings(), kernel or find_kernel()
    busybox = Path(find_program("busybox", package="busybox-static"))
    root_uuid = str(uuid.uuid5(_NAMESPACE, f"root of {settings.name}"))
    initrd = _initrd(kernel, busybox)
    with tempfile.TemporaryDirectory(prefix="guest-", dir=out.parent) as work:
        folder = Path(work)
        tree = folder / "root"
        _root_tree(tree, busybox, settings.shell(work_kib=size // 4 // KiB))
        shutil.copyfile(kernel.image, tree / "boot/vmlinuz")
        (tree / "boot/initrd.img").write_bytes(initrd)
        new = folder / "disk"
        _partitioned(new, size)
        _make_ext4(new, tree, offset=PARTITION_OFFSET, size=size - PARTITION_OFFSET, fs_uuid=root_uuid, label="tokvm-root")
        _make_bootable(new, folder, root_uuid)
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
        _make_ext4(new, tree, offset=0, size=size, fs_uuid=fs_uuid, label=f"tokvm-data{index}")
        new.rename(out)
    return out


def _script(name: str) -> bytes:
    return resources.files("tokvm.lab").joinpath("data", name).read_bytes()


def _root_tree(tree: Path, busybox: Path, conf: str) -> None:
    for name in ("bin", "sbin", "dev", "proc", "sys", "run", "etc", "boot"):
        (tree / name).mkdir(parents=True)
    shutil.copyfile(busybox, tree / "bin/busybox")
    (tree / "sbin/init").write_bytes(_script("guest_init.sh"))
    for program in ("bin/busybox", "sbin/init"):
        (tree / program).chmod(0o755)
    # Debian's and Ubuntu's busybox shells run applets in their own process; the links are for one that does not.
    for applet in run_program(["busybox", "--list"], package="busybox-static").decode().split():
        if applet != "busybox":
            (tree / "bin" / applet).symlink_to("busybox")
    (tree / "etc/ledger.awk").write_bytes(_script("ledger.awk"))
    (tree / "etc/lab.conf").write_text(conf)
    (tree / "etc/hostname").write_text("lab-guest\n")
    (tree / "etc/os-release").write_text('ID=tokvm-lab\nNAME="tokvm lab guest"\nVERSION_ID=1\n')


def _initrd(kernel: GuestKernel, busybox: Path) -> bytes:
    """Not compressed: reading the bytes costs an emulated CPU less than unpacking them."""
    modules = kernel.files_of(MODULES)
    names = [file.name.split(".ko")[0] + ".ko" for file in modules]
    folders = ("bin", "dev", "proc", "modules", "new")
    return cpio(
        [
            *((name, 0o040755, b"") for name in folders),
            ("init", 0o100755, _script("guest_initrd.sh")),
            ("bin/busybox", 0o100755, busybox.read_bytes()),
            ("modules.list", 0o100644, "".join(f"{name}\n" for name in names).encode()),
            *((f"modules/{name}", 0o100644, module_bytes(file)) for name, file in zip(names, modules, strict=True)),
        ]
    )


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


def _partitioned(disk: Path, size: int) -> None:
    with disk.open("wb") as file:
        file.truncate(size)
    table = f"label: dos\nlabel-id: 0x746f6b76\n{PARTITION_OFFSET // 512},,83,*\n"
    run_program(["sfdisk", "-q", str(disk)], package="fdisk", input_bytes=table.encode())


def _make_ext4(disk: Path, tree: Path, *, offset: int, size: int, fs_uuid: str, label: str) -> None:
    """4 MiB of journal, so that a pass is not mostly journal; nothing left for the kernel to initialise in the background."""
    options = f"offset={offset},hash_seed={fs_uuid},root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0"
    run_program(
        [
            *("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-N", "2048", "-m", "0", "-J", "size=4"),
            *("-O", EXT4_FEATURES, "-U", fs_uuid, "-L", label, "-E", options, "-d", str(tree), str(disk), f"{size // KiB}k"),
        ],
        package="e2fsprogs",
    )


def _make_bootable(disk: Path, folder: Path, root_uuid: str) -> None:
    boot, core, config = GRUB_FOLDER / "boot.img", folder / "core.img", folder / "grub.cfg"
    if not boot.is_file():
        raise LabError(f"{boot} is not there", fix="apt-get install grub-pc-bin")
    config.write_text(
        f"search.fs_uuid {root_uuid} root\nlinux /boot/vmlinuz root=UUID={root_uuid} {KERNEL_WORDS}\n"
        "initrd /boot/initrd.img\nboot\n"
    )
    argv = ["grub-mkimage", "-O", "i386-pc", "-o", str(core), "-p", "(hd0,msdos1)/boot/grub", "-c", str(config)]
    run_program([*argv, *GRUB_MODULES], package="grub-common")
    content = core.read_bytes()
    if len(content) > PARTITION_OFFSET - 512:
        raise LabError(f"GRUB's core image of {len(content)} bytes does not fit before the partition", where=str(disk))
    with disk.open("r+b") as file:
        file.write(boot.read_bytes()[:440])
        file.seek(512)
        file.write(content)
