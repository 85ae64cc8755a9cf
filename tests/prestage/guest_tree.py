"""A folder tree that a real shell takes for a Linux guest: it is the root (chroot), so the script's own paths are used.

TREE/bin           a shell as `sh`, and the tools it needs: the machine's own, or busybox' applets
TREE/usr/sbin      stand-ins for update-initramfs, lsinitramfs, dracut, mkinitcpio, sudo …: they read the real configuration
TREE/boot/initrd…  a text file with the paths that the lister is to show
TREE/log           what the stand-ins were called with
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

TOOLS = (
    *("cat", "chmod", "cp", "cut", "df", "env", "grep", "head", "id", "ln", "mkdir", "mv", "readlink", "rm", "rmdir", "sed"),
    *("sleep", "sync", "tail", "tr", "uname", "wc"),
)
SHELLS = ("dash", "bash", "busybox")
VERSION = "6.1.0-18-amd64"
PATH = "/usr/sbin:/bin"
"""The stand-ins first."""
MAC = "02:16:3e:00:00:01"

LISTER = 'read -r first <"$1"\n[ "$first" != BROKEN ] || { echo "premature end of archive" >&2; exit 2; }\ncat "$1"\n'
ADD = """
echo "$0 $*" >>/log
for image in /boot/init*; do
    echo "Generating $image"
    for driver in $drivers; do echo "usr/lib/modules/V/kernel/drivers/x/$driver.ko.xz" >>"$image"; done
done
"""
PROGRAMS = {
    "initramfs-tools": {
        "update-initramfs": 'drivers=$(grep -v "^#" /etc/initramfs-tools/modules)' + ADD,
        "lsinitramfs": LISTER,
    },
    "dracut": {
        "dracut": "drivers=$(cat /etc/dracut.conf.d/*.conf | sed -n 's/^add_drivers+=\"\\(.*\\)\"$/\\1/p')" + ADD,
        "lsinitrd": "echo 'Image: x'\n" + LISTER,
    },
    "mkinitcpio": {
        "mkinitcpio": "drivers=$(cat /etc/mkinitcpio.conf.d/*.conf | sed -n 's/^MODULES+=(\\(.*\\))$/\\1/p')" + ADD,
        "lsinitcpio": LISTER,
    },
}
FOLDERS = {"initramfs-tools": "initramfs-tools", "dracut": "dracut.conf.d", "mkinitcpio": "mkinitcpio.conf.d"}


@dataclass(frozen=True)
class GuestTree:
    root: Path

    @classmethod
    def make(cls, toolbox: Path, root: Path, generator: str = "initramfs-tools") -> GuestTree:
        """toolbox: what `make_toolbox` made; it is not copied, but linked."""
        shutil.copytree(toolbox, root, symlinks=True, copy_function=os.link)
        tree = cls(root)
        for folder in ("usr/sbin", "run", "proc", "dev", "boot", "etc", "lib/modules"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        _make_null(root / "dev/null")
        tree.write("proc/mounts", "disk / ext4 rw 0 0\n")  # busybox' df looks there
        for name, text in PROGRAMS[generator].items():
            tree.program(name, text)
        (root / "etc" / FOLDERS[generator]).mkdir()
        if generator == "initramfs-tools":
            tree.write("etc/initramfs-tools/modules", "# list of modules\n")
        tree.write("etc/os-release", 'NAME="Debian GNU/Linux"\nVERSION_ID="12"\nID=debian\nEVIL=$(reboot)\n')
        tree.card("ens192", MAC)
        tree.kernel()
        tree.program("reboot", "echo reboot >>/log\n")
        return tree

    def write(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def read(self, path: str) -> str:
        return (self.root / path).read_text()

    def program(self, name: str, text: str) -> None:
        self.write(f"usr/sbin/{name}", f"#!/bin/sh\n{text}").chmod(0o755)

    def card(self, name: str, mac: str) -> None:
        self.write(f"sys/class/net/{name}/address", f"{mac}\n")
        (self.root / f"sys/class/net/{name}/device").mkdir()

    def kernel(self, version: str = VERSION, initrd: str = "", *, builtin: str = "", has: str = "ext4") -> Path:
        """Its modules but those built in, and an initramfs that has `has`."""
        names = [name for name in ("virtio_pci", "virtio_blk", "virtio_scsi", "ext4") if name not in builtin.split()]
        dep = "".join(f"kernel/drivers/x/{name}.ko.xz: kernel/drivers/x/virtio.ko.xz\n" for name in names)
        self.write(f"lib/modules/{version}/modules.dep", dep)
        self.write(f"lib/modules/{version}/modules.builtin", "".join(f"kernel/y/{name}.ko\n" for name in builtin.split()))
        listed = "".join(f"usr/lib/modules/{version}/kernel/drivers/x/{name}.ko.xz\n" for name in has.split())
        return self.write(initrd or f"boot/initrd.img-{version}", f"usr/bin/sh\n{listed}")

    @property
    def calls(self) -> list[str]:
        log = self.root / "log"
        return log.read_text().splitlines() if log.exists() else []

    @property
    def left_over(self) -> list[str]:
        """What a run must not leave."""
        return [str(one.relative_to(self.root)) for one in self.root.rglob("*tokvm-*") if one.is_file() or one.is_dir()]

    @property
    def enter(self) -> list[str]:
        """The start of a command line whose root is the tree; as another user than root in a namespace of his own."""
        own = [] if os.geteuid() == 0 else ["unshare", "--map-root-user"]
        return [*own, "chroot", str(self.root)]

    def run(self, script: bytes, task: str) -> subprocess.CompletedProcess[bytes]:
        """The script without ssh."""
        return subprocess.run(
            [*self.enter, "/bin/env", f"PATH={PATH}", "/bin/sh", "-s", task], input=script, capture_output=True, timeout=60
        )

    @property
    def login(self) -> str:
        """A script for sshd: whatever is asked for runs in the tree."""
        chroot = shlex.join([*self.enter, "/bin/env", f"PATH={PATH}", "/bin/sh", "-c"])
        return f'PATH=$PATH:/usr/sbin:/sbin\nexec {chroot} "$SSH_ORIGINAL_COMMAND"\n'


def make_toolbox(root: Path, shell: str) -> Path:
    """A shell as `sh`, and its tools: the machine's own, or busybox' applets."""
    folder = root / "bin"
    folder.mkdir(parents=True)
    if shell == "busybox":
        _copy(root, "busybox", "busybox")
        for name in ("sh", *TOOLS):
            (folder / name).symlink_to("busybox")
        return root
    _copy(root, shell, "sh")
    for name in TOOLS:
        _copy(root, name, name)
    return root


def _make_null(path: Path) -> None:
    """A device only root may make; a plain file keeps what is written to it, which no test here reads again."""
    with contextlib.suppress(PermissionError):
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        path.chmod(0o666)
        return
    path.write_text("")
    path.chmod(0o666)


def _copy(root: Path, program: str, name: str) -> None:
    path = Path(str(shutil.which(program)))
    shutil.copy(path, root / "bin" / name)
    said = subprocess.run(["ldd", str(path)], capture_output=True, text=True).stdout
    for library in [word for word in said.split() if word.startswith("/")]:
        there = root / library.lstrip("/")
        if not there.exists():
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, there)
