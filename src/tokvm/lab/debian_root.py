"""The root file system of the lab's real distribution: mmdebstrap's tar, cached under what it is made from.

    <cache>/debian/<recipe>.tar     files with their owners, in order, with times no later than SOURCE_DATE_EPOCH

Made from the host's own release and apt sources (Debian, or Ubuntu with its names): `apt-get indextargets` says which. An
initramfs with an explicit list of modules (`MODULES=list`) stands for what `MODULES=dep` leaves on IDE or pvscsi: no virtio.
With root or without (mmdebstrap then makes a user namespace).

mmdebstrap takes four minutes, the only slow part; the tar is about 300 MB.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shlex
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tokvm.lab.errors import LabError
from tokvm.lab.guest_initrd import script
from tokvm.lab.kernel import META_PACKAGES, cache_dir
from tokvm.lab.programs import run_program

log = logging.getLogger(__name__)

EPOCH = 1_700_000_000
BOOTSTRAP_TIMEOUT_S = 3600.0
PACKAGES = (
    *("initramfs-tools", "udev", "systemd-sysv", "kmod", "zstd", "e2fsprogs", "busybox-static", "qemu-guest-agent"),
    "grub2-common",  # virt-v2v refuses a guest that cannot make its own grub.cfg
)
COMPONENTS = frozenset({"main", "universe"})
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/i18n/*", "/usr/share/info/*")
INITRAMFS_MODULES = ("ata_piix", "sd_mod", "vmw_pvscsi", "nvme", "ext4", "crc32c")
# What a lab guest needs no minute of an emulated CPU for.
MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer"),
    *("dpkg-db-backup.timer", "systemd-binfmt.service", "systemd-firstboot.service", "systemd-pstore.service"),
)
# IgnoreSIGPIPE: a client whose connection broke has to end, so that the next one is begun.
UNIT = """[Unit]
Description=The lab's ledger: numbered, acknowledged writes

[Service]
Environment=APPLETS=/opt/ledger/bin
ExecStart=/opt/ledger/ledger-client
IgnoreSIGPIPE=no
TimeoutStopSec=30

[Install]
WantedBy=multi-user.target
"""
NETWORK = "[Match]\nName=en* eth*\n\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\n"
MULTI_USER = "etc/systemd/system/multi-user.target.wants"

Tree = dict[str, bytes | str]
"""Path → content (bytes), or where a link points (str)."""


@dataclass(frozen=True, slots=True)
class Release:
    """`codename`: bookworm, noble; `kernel`: its package for virtual machines; `sources`: lines of sources.list."""

    codename: str
    kernel: str
    sources: tuple[str, ...]


def debian_root(cache: Path | None = None) -> Path:
    """The tar, from the cache or made now. LabError when the host is no Debian or Ubuntu, or its archive cannot be reached."""
    folder = (cache or cache_dir()) / "debian"
    release = host_release()
    kept = folder / f"{recipe(release)}.tar"
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as work:
            _bootstrap(release, Path(work), Path(work) / "root.tar")
            (Path(work) / "root.tar").rename(kept)
        for older in folder.glob("*.tar"):
            if older != kept:
                older.unlink(missing_ok=True)
    return kept


def kernel_version(root: Path) -> str:
    """Of the one kernel in the tar."""
    with tarfile.open(root) as tar:
        for entry in tar:
            if entry.name.startswith("./boot/vmlinuz-"):
                return entry.name.removeprefix("./boot/vmlinuz-")
    raise LabError("there is no kernel in it", where=str(root), fix="remove it: it is made again")


def recipe(release: Release) -> str:
    """A name for all that the tar is made from, except the day's packages."""
    parts = [release.codename, release.kernel, *PACKAGES, *LEFT_OUT, str(EPOCH)]
    parts += [f"{path}={content!r}" for path, content in _early_tree().items()]
    return f"{release.codename}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


def host_release() -> Release:
    """This host's, as its os-release and apt say."""
    try:
        words = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    except OSError as exc:
        raise LabError("this host does not say what it is", where="/etc/os-release") from exc
    codename = words.get("VERSION_CODENAME", "").strip('"')
    said = run_program(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"], package="apt"
    )
    ours = {codename, f"{codename}-updates", f"{codename}-security"}
    found = [line.split() for line in said.decode().splitlines()]
    lines = [f"deb {row[0]} {row[1]} {row[2]}" for row in found if len(row) == 3 and row[1] in ours and row[2] in COMPONENTS]
    if not codename or not lines:
        raise LabError("apt has no source of this host's own release", where=codename or "/etc/os-release")
    kernel = META_PACKAGES[0] if words.get("ID") == "debian" else META_PACKAGES[1]
    return Release(codename, kernel, tuple(dict.fromkeys(lines)))


def _bootstrap(release: Release, work: Path, out: Path) -> None:
    """The early files are there before the kernel's package makes its initramfs."""
    early, sources = work / "early.tar", work / "sources.list"
    pack(_early_tree(), early)
    sources.write_text("".join(f"{line}\n" for line in release.sources))
    argv = [
        *("mmdebstrap", "--quiet", "--variant=minbase", "--mode=auto", "--format=tar"),
        f"--include={','.join((release.kernel, *PACKAGES))}",
        *('--aptopt=Apt::Install-Recommends "false"', '--aptopt=Acquire::Languages "none"', "--dpkgopt=force-unsafe-io"),
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT),
        f"--setup-hook=tar-in {shlex.quote(str(early))} /",
        *(release.codename, str(out), str(sources)),
    ]
    log.info("making the root file system of a real %s; this takes minutes, once", release.codename)
    run_program(argv, package="mmdebstrap", timeout_s=BOOTSTRAP_TIMEOUT_S, env={**os.environ, "SOURCE_DATE_EPOCH": str(EPOCH)})


def _early_tree() -> Tree:
    return {
        "etc/initramfs-tools/conf.d/tokvm-lab": b"MODULES=list\n",
        "etc/initramfs-tools/modules": "".join(f"{name}\n" for name in INITRAMFS_MODULES).encode(),
    }


def ledger_tree() -> Tree:
    """The ledger client and its surroundings: unpacked over the cached root, so that a change of them needs no new one."""
    return {
        "etc/hosts": b"127.0.0.1 localhost\n",
        "etc/ledger.awk": script("ledger.awk"),
        "etc/systemd/network/10-lab.network": NETWORK.encode(),
        "etc/systemd/system/ledger.service": UNIT.encode(),
        f"{MULTI_USER}/ledger.service": "../ledger.service",
        f"{MULTI_USER}/systemd-networkd.service": "/lib/systemd/system/systemd-networkd.service",
        "opt/ledger/ledger-client": script("ledger_client.sh"),
        **{f"etc/systemd/system/{name}": "/dev/null" for name in MASKED},
        **{f"opt/ledger/bin/{name}": "/bin/busybox" for name in _applets()},
    }


def _applets() -> list[str]:
    return run_program(["busybox", "--list"], package="busybox-static").decode().split()


def pack(tree: Tree, out: Path) -> None:
    """The folders above are those of the packages, or made by whoever unpacks."""
    with tarfile.open(out, "w") as tar:
        for path, content in tree.items():
            entry = tarfile.TarInfo(path)
            entry.mtime = EPOCH
            if isinstance(content, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, content
                tar.addfile(entry)
            else:
                entry.size, entry.mode = len(content), 0o755 if content.startswith(b"#!") else 0o644
                tar.addfile(entry, io.BytesIO(content))
