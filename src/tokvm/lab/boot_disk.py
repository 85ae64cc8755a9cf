"""A guest's disk that a BIOS boots, made without root, loop devices or grub-install.

    sector 0          GRUB boot.img (440 bytes) and the partition table: one partition, active
    sector 1 …        GRUB core.img: finds the file system by its UUID and reads /boot/grub/grub.cfg there
    1 MiB …           ext4

`grub_config` writes that file as update-grub would: one menu entry, so that whoever inspects the disk reads what really boots.
"""

from __future__ import annotations

from pathlib import Path

from tokvm.core.units import KiB, MiB
from tokvm.lab.errors import LabError
from tokvm.lab.programs import run_program

PARTITION_OFFSET = MiB
GRUB_FOLDER = Path("/usr/lib/grub/i386-pc")
GRUB_MODULES = (
    *("biosdisk", "part_msdos", "ext2", "search_fs_uuid", "normal", "linux", "boot", "serial", "terminal"),
    *("test", "echo", "loadenv", "search", "gzio", "all_video"),  # what a grub.cfg of grub-mkconfig asks for
)
# Spelled out, because a newer mke2fs turns on features (orphan_file, metadata_csum_seed) that older GRUBs cannot read.
EXT4_FEATURES = (
    "none,has_journal,ext_attr,dir_index,filetype,extent,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize"
)
PRIVATE_USERS = ("unshare", "--map-root-user", "--map-auto")
"""Before a command: root over the files of a tree that an ordinary user unpacked with other owners (util-linux 2.38)."""


def grub_config(*, title: str, version: str, root_uuid: str, words: str) -> str:
    """/boot/grub/grub.cfg: one entry, booted at once, for /boot/vmlinuz-VERSION and /boot/initrd.img-VERSION."""
    return (
        f"set default=0\nset timeout=0\nsearch.fs_uuid {root_uuid} root\n"
        f"menuentry '{title}' --class gnu-linux $menuentry_id_option 'gnulinux-simple-{root_uuid}' {{\n"
        f"\tlinux /boot/vmlinuz-{version} root=UUID={root_uuid} {words}\n"
        f"\tinitrd /boot/initrd.img-{version}\n}}\n"
    )


def partitioned(disk: Path, size: int) -> None:
    """A sparse file with the partition table in it."""
    with disk.open("wb") as file:
        file.truncate(size)
    table = f"label: dos\nlabel-id: 0x746f6b76\n{PARTITION_OFFSET // 512},,83,*\n"
    run_program(["sfdisk", "-q", str(disk)], package="fdisk", input_bytes=table.encode())


def make_ext4(
    disk: Path,
    tree: Path,
    *,
    offset: int,
    size: int,
    fs_uuid: str,
    label: str,
    inodes: int = 2048,
    journal: int = 4 * MiB,
    owners_kept: bool = False,
) -> None:
    """The file system with what is in `tree`. A small journal, so that a pass is not mostly journal; nothing left for the
    kernel to initialise in the background. owners_kept: the files belong to whom `tree` says, else to root."""
    options = f"offset={offset},hash_seed={fs_uuid},root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0"
    argv = [
        *("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-N", str(inodes), "-m", "0"),
        *("-J", f"size={journal // MiB}", "-O", EXT4_FEATURES, "-U", fs_uuid, "-L", label, "-E", options),
        *("-d", str(tree), str(disk), f"{size // KiB}k"),
    ]
    run_program([*(PRIVATE_USERS if owners_kept else ()), *argv], package="e2fsprogs")


def make_bootable(disk: Path, folder: Path, root_uuid: str) -> None:
    """GRUB before the partition. `folder` is for what is made on the way."""
    boot, core, config = GRUB_FOLDER / "boot.img", folder / "core.img", folder / "early.cfg"
    if not boot.is_file():
        raise LabError(f"{boot} is not there", fix="apt-get install grub-pc-bin")
    config.write_text(f"search.fs_uuid {root_uuid} root\nset prefix=($root)/boot/grub\n")
    argv = ["grub-mkimage", "-O", "i386-pc", "-o", str(core), "-p", "(hd0,msdos1)/boot/grub", "-c", str(config)]
    run_program([*argv, *GRUB_MODULES], package="grub-common")
    content = core.read_bytes()
    if len(content) > PARTITION_OFFSET - 512:
        raise LabError(f"GRUB's core image of {len(content)} bytes does not fit before the partition", where=str(disk))
    with disk.open("r+b") as file:
        file.write(boot.read_bytes()[:440])
        file.seek(512)
        file.write(content)
