"""A kernel for lab guests: the distribution's smallest image, unpacked into a cache and never installed.

    <cache>/kernel/<version>/vmlinuz
                            /root/lib/modules/<version>/…    as the package has them, plus depmod's indexes

Looked for in this order: the cache; `apt-get download` + `dpkg-deb -x` of what the distribution's package for virtual
machines depends on; the host's own /boot and /lib/modules (which works offline).

    Debian   linux-image-cloud-amd64 ─► linux-image-<v>-cloud-amd64           kernel and modules in one package
    Ubuntu   linux-image-virtual ─► linux-image-<v>-generic ─► linux-modules-<v>-generic

Debian's cloud kernel knows IDE (ata_piix), pvscsi, NVMe and virtio, but neither AHCI nor e1000 (Debian 12, 6.1).
"""

from __future__ import annotations

import logging
import lzma
import os
import re
import shutil
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from tokvm.core.errors import TokvmError
from tokvm.lab.errors import LabError
from tokvm.lab.programs import find_program, run_program
from tokvm.remote import process

log = logging.getLogger(__name__)

META_PACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64")
DOWNLOAD_TIMEOUT_S = 600.0
_DEPENDENCY = re.compile(r"^\s*\|?Depends: (linux-(?:image|modules)-\d\S*)$", re.MULTILINE)
_VERSION = re.compile(r"\d[\w.+~-]*")
_GZIP_WINDOW = 31


@dataclass(frozen=True, slots=True)
class GuestKernel:
    """`image` is the bzImage; `modules` is …/lib/modules/<version> with modules.dep in it."""

    version: str
    image: Path
    modules: Path

    def files_of(self, names: tuple[str, ...]) -> list[Path]:
        """The module files that `names` need, each after those it depends on. A name that is built in, or that this kernel
        does not have, needs none."""
        wanted: dict[Path, None] = {}
        table = _dependencies(self.modules)
        for name in names:
            for file in table.get(name, ()):
                wanted.setdefault(self.modules / file)
        return list(wanted)


def find_kernel(cache: Path | None = None) -> GuestKernel:
    """The newest kernel in the cache, else a fresh download, else the host's own. LabError when there is none."""
    folder = (cache or cache_dir()) / "kernel"
    cached = _cached(folder)
    if cached is not None:
        return cached
    try:
        return _download(folder)
    except TokvmError as exc:
        log.info("no guest kernel from the package archive (%s); trying this host's own", exc)
        return _unpack_host_kernel(folder, reason=exc)


def cache_dir() -> Path:
    """Where the lab keeps what it can make again: $TOKVM_LAB_CACHE, else ~/.cache/tokvm-lab."""
    chosen = os.environ.get("TOKVM_LAB_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokvm-lab"


def appliance_environment(cache: Path | None = None) -> dict[str, str]:
    """What supermin must be told to make libguestfs' appliance where no kernel is installed (a container): ours. Empty where
    the host has one of its own, or the operator named one. supermin copies /lib/modules as a folder, so that must exist."""
    if os.environ.get("SUPERMIN_KERNEL") or any(Path("/boot").glob("vmlinuz-*")):
        return {}
    kernel = find_kernel(cache)
    return {"SUPERMIN_KERNEL": str(kernel.image), "SUPERMIN_MODULES": str(kernel.modules)}


def module_bytes(file: Path) -> bytes:
    """A module as the kernel loads it: Ubuntu 24.04 packs modules with zstd, Debian 13 with xz, Debian 12 not at all."""
    match file.suffix:
        case ".xz":
            return lzma.decompress(file.read_bytes())
        case ".gz":
            return zlib.decompress(file.read_bytes(), wbits=_GZIP_WINDOW)
        case ".zst":
            return run_program(["zstd", "-dcq", str(file)], package="zstd")
        case _:
            return file.read_bytes()


def _dependencies(modules: Path) -> dict[str, tuple[str, ...]]:
    """Module name → its file and those it needs, in the order of loading. modules.dep: `a.ko: b.ko c.ko`, needs reversed."""
    table: dict[str, tuple[str, ...]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        file, _, needs = line.partition(":")
        name = Path(file).name.split(".ko")[0].replace("-", "_")
        table[name] = (*reversed(needs.split()), file)
    return table


def _cached(folder: Path) -> GuestKernel | None:
    """The newest complete kernel. A folder gets its name by the last rename, so one that has it is complete."""
    found = sorted(folder.glob("*/vmlinuz"), key=lambda path: path.stat().st_mtime)
    return _at(found[-1].parent) if found else None


def _at(folder: Path) -> GuestKernel:
    return GuestKernel(folder.name, folder / "vmlinuz", folder / "root/lib/modules" / folder.name)


def _download(folder: Path) -> GuestKernel:
    folder.mkdir(parents=True, exist_ok=True)
    packages = _packages() or _refreshed_packages()
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as work:
        where = Path(work)
        try:
            _fetch(packages, where)
        except LabError:
            # The archive drops a version when a newer one is published; a fresh index knows the newer one.
            packages = _refreshed_packages()
            _fetch(packages, where)
        for package in where.glob("*.deb"):
            run_program(["dpkg-deb", "-x", str(package), str(where / "tree")], package="dpkg")
        return _keep(folder, boot=where / "tree/boot", modules=_modules_folder(where / "tree"), work=where)


def _packages() -> list[str]:
    """The packages with a kernel and its modules, resolved by apt; empty when apt knows none."""
    for meta in META_PACKAGES:
        images = _depends(meta)
        if images:
            return [*images, *(name for image in images for name in _depends(image) if name.startswith("linux-modules-"))]
    return []


def _refreshed_packages() -> list[str]:
    if os.geteuid() == 0:
        run_program(["apt-get", "-q", "update"], package="apt", timeout_s=DOWNLOAD_TIMEOUT_S)
    packages = _packages()
    if not packages:
        raise LabError("apt knows no kernel package", fix="run `apt-get update`, or install a kernel on this host")
    return packages


def _depends(package: str) -> list[str]:
    apt = find_program("apt-cache", package="apt")
    done = process.run([apt, "depends", "--no-recommends", package], timeout_s=60, where="apt-cache", env=_plain_language())
    return list(dict.fromkeys(_DEPENDENCY.findall(done.stdout.decode(errors="replace")))) if done.code == 0 else []


def _fetch(packages: list[str], folder: Path) -> None:
    """`apt-get download` writes into its working directory, which `env -C` sets."""
    argv = ["env", "-C", str(folder), find_program("apt-get", package="apt"), "-q", "download", *packages]
    log.info("downloading %s", " ".join(packages))
    run_program(argv, package="coreutils", timeout_s=DOWNLOAD_TIMEOUT_S)


def _plain_language() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C.UTF-8"}


def _modules_folder(tree: Path) -> Path:
    """Debian 13 ships /usr/lib/modules, older ones and Ubuntu 24.04 /lib/modules."""
    return next((found for name in ("lib/modules", "usr/lib/modules") if (found := tree / name).is_dir()), tree / "lib/modules")


def _unpack_host_kernel(folder: Path, *, reason: TokvmError) -> GuestKernel:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".host-", dir=folder) as work:
            return _keep(folder, boot=Path("/boot"), modules=Path("/lib/modules"), work=Path(work))
    except (LabError, OSError) as exc:
        fix = "connect to the package archive, or install a kernel here (apt-get install linux-image-cloud-amd64)"
        raise LabError(f"no kernel for the lab's guests: {reason.what}; this host: {exc}", fix=fix) from exc


def _keep(folder: Path, *, boot: Path, modules: Path, work: Path) -> GuestKernel:
    """Put the kernel of `boot` and its modules in the cache under the kernel's version: complete, or not at all."""
    images = sorted(boot.glob("vmlinuz-*"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    images = [image for image in images if (modules / _version(image) / "kernel").is_dir()]
    if not images:
        raise LabError("no kernel with its modules there", where=str(boot))
    version = _version(images[-1])
    new = work / "new"
    target = new / "root/lib/modules" / version
    shutil.copytree(modules / version, target, symlinks=True, ignore=shutil.ignore_patterns("build", "source"))
    shutil.copyfile(images[-1], new / "vmlinuz")
    run_program(["depmod", "-b", str(new / "root"), version], package="kmod")
    try:
        new.rename(folder / version)
    except OSError:
        if not (folder / version / "vmlinuz").is_file():  # else another process was as fast, with the same files
            raise
    return _at(folder / version)


def _version(image: Path) -> str:
    version = image.name.removeprefix("vmlinuz-")
    if not _VERSION.fullmatch(version):
        raise LabError(f"{version!r} is no kernel version", where=str(image))
    return version
