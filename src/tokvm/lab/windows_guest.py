"""The lab's phony Windows: NTFS with real registry hives, which libguestfs and virt-v2v take for a Windows. It never boots.

    BIOS   MBR; 1 MiB …: NTFS with /Windows, /Boot/BCD, /bootmgr
    UEFI   GPT; EFI system partition with \\EFI\\Microsoft\\Boot\\bootmgfw.efi; NTFS with /Windows

sfdisk and mkntfs write the table and the empty file system into a plain file (parted inside an emulated appliance: 9 s of CPU);
the rest is done inside libguestfs' appliance (ntfs-3g, hivex), so that neither root nor FUSE is needed. An appliance takes 20 s
of CPU to start without KVM: one makes any number of guests (`build_all`), and a guest of the same recipe comes from the lab's
cache.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tokvm.core.units import MiB
from tokvm.domain.accel import kvm_works
from tokvm.guest.appliance import Appliance
from tokvm.guest.base import GuestDisk
from tokvm.guest.windows import registry
from tokvm.guest.windows.registry import Hive
from tokvm.lab import windows_hives
from tokvm.lab.errors import LabError
from tokvm.lab.kernel import cache_dir
from tokvm.lab.programs import run_program
from tokvm.lab.windows_hives import RELEASES, TOOLS
from tokvm.testing import pe_writer

SMALLEST = 96 * MiB
CONFIG = "/Windows/System32/config"
DRIVERS = "/Windows/System32/drivers"
FOLDERS = (CONFIG, DRIVERS, "/Windows/TEMP", "/Windows/inf", "/Program Files", "/Users", "/ProgramData")
SECTORS_PER_MIB = MiB // 512
ESP_END = 34 * SECTORS_PER_MIB
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
BASIC_DATA = "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7"


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowsSettings:
    """version: a key of RELEASES. hibernated: hiberfil.sys holds a session (`hibr`), as after Fast Startup's shutdown too.
    dirty: NTFS' own flag. fast_startup: HiberbootEnabled. tools: "vmware", "xen" or ""."""

    version: str = "win2k22"
    hibernated: bool = False
    dirty: bool = False
    fast_startup: bool = False
    static_ip: bool = False
    tools: str = ""
    uefi: bool = False
    size: int = 160 * MiB

    def __post_init__(self) -> None:
        if self.version not in RELEASES:
            raise LabError(f"no phony Windows {self.version!r}", fix=f"choose one of {', '.join(RELEASES)}")
        if self.tools not in ("", *TOOLS):
            raise LabError(f"no phony tools {self.tools!r}", fix=f"choose one of {', '.join(TOOLS)}")
        if self.size < SMALLEST or self.size % MiB:
            raise LabError(f"a Windows disk of {self.size} bytes", fix=f"give whole MiB, at least {SMALLEST // MiB}")

    def recipe(self) -> str:
        """What the disk is made from: these settings and the code that makes it."""
        parts = [repr(sorted(asdict(self).items())).encode()]
        parts += [Path(module.__file__ or "").read_bytes() for module in (windows_hives, pe_writer, registry)]
        return hashlib.sha256(b"\0".join([*parts, Path(__file__).read_bytes()])).hexdigest()[:24]


def build_windows(
    path: Path,
    *,
    version: str = "win2k22",
    hibernated: bool = False,
    dirty: bool = False,
    fast_startup: bool = False,
    static_ip: bool = False,
    tools: str = "",
    uefi: bool = False,
    size: int = 160 * MiB,
    tcg: bool | None = None,
) -> Path:
    """A phony Windows at `path` (raw, sparse; replaced when it is there). tcg: None asks whether KVM works."""
    settings = WindowsSettings(
        version=version,
        hibernated=hibernated,
        dirty=dirty,
        fast_startup=fast_startup,
        static_ip=static_ip,
        tools=tools,
        uefi=uefi,
        size=size,
    )
    build_all({path: settings}, tcg=tcg)
    return path


def build_all(wanted: Mapping[Path, WindowsSettings], *, tcg: bool | None = None, cache: Path | None = None) -> None:
    """Several at once, with at most one appliance."""
    folder = (cache or cache_dir()) / "windows"
    folder.mkdir(parents=True, exist_ok=True)
    kept = {settings: folder / f"{settings.recipe()}.raw" for settings in wanted.values()}
    missing = {settings: file for settings, file in kept.items() if not file.is_file()}
    if missing:
        _make(missing, folder, tcg=not kvm_works() if tcg is None else tcg)
    for path, settings in wanted.items():
        run_program(["cp", "--sparse=always", "--reflink=auto", str(kept[settings]), str(path)], package="coreutils")


def _make(missing: Mapping[WindowsSettings, Path], folder: Path, *, tcg: bool) -> None:
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as work:
        new = [Path(work) / f"{number}.raw" for number in range(len(missing))]
        for settings, file in zip(missing, new, strict=True):
            _empty_disk(file, settings, Path(work))
        with Appliance.launch([GuestDisk(str(file)) for file in new], readonly=False, tcg=tcg) as appliance:
            for settings, device in zip(missing, appliance.g.list_devices(), strict=True):
                with appliance.translated("cannot make a phony Windows"):
                    _fill_disk(appliance, device, settings, Path(work))
        for file, place in zip(new, missing.values(), strict=True):
            shutil.move(file, place)


def _fill_disk(appliance: Appliance, device: str, settings: WindowsSettings, work: Path) -> None:
    windows = _windows_device(appliance, device, settings)
    appliance.mount({"/": windows})
    g = appliance.g
    for folder in FOLDERS:
        g.mkdir_p(folder)
    g.write("/Windows/System32/cmd.exe", pe_writer.program())
    for driver in ("disk", "lsi_sas", "storahci", *(("pvscsi",) if settings.tools == "vmware" else ())):
        g.write(f"{DRIVERS}/{driver}.sys", pe_writer.program(native=True))
    _write_hives(appliance, settings, work)
    if not settings.uefi:
        _boot_files(appliance, "/Boot", "/bootmgr")
    if settings.hibernated:
        g.write("/hiberfil.sys", b"hibr" + bytes(4 * MiB // 64 - 4))
    appliance.unmount()
    if settings.dirty:
        g.ntfsfix(windows)  # without -d it marks the volume, so that Windows checks it


def _empty_disk(file: Path, settings: WindowsSettings, work: Path) -> None:
    """A disk with its partition table and an empty NTFS for Windows. The last MiB is left to GPT."""
    start = ESP_END if settings.uefi else SECTORS_PER_MIB
    length = settings.size // 512 - SECTORS_PER_MIB - start
    volume = work / "volume"
    with volume.open("wb") as made:
        made.truncate(length * 512)
    mkntfs = ["mkntfs", "--quiet", "--fast", "--force", "--label", "WINDOWS", "--sector-size", "512"]
    run_program([*mkntfs, "--partition-start", str(start), str(volume)], package="ntfs-3g")
    with file.open("wb") as disk:
        disk.truncate(settings.size)
    if settings.uefi:
        script = f"label: gpt\n{SECTORS_PER_MIB},{ESP_END - SECTORS_PER_MIB},{ESP}\n{start},{length},{BASIC_DATA}\n"
    else:
        script = f"label: dos\nlabel-id: {windows_hives.DISK_ID:#x}\n{start},{length},7,*\n"
    run_program(["sfdisk", "--quiet", str(file)], package="fdisk", input_bytes=script.encode())
    dd = ["dd", f"if={volume}", f"of={file}", "bs=1M", f"seek={start // SECTORS_PER_MIB}", "conv=notrunc,sparse", "status=none"]
    run_program(dd, package="coreutils")
    volume.unlink()


def _windows_device(appliance: Appliance, device: str, settings: WindowsSettings) -> str:
    """The device of the Windows file system; a UEFI guest's system partition is filled on the way."""
    if not settings.uefi:
        return f"{device}1"
    appliance.g.mkfs("vfat", f"{device}1")
    appliance.mount({"/": f"{device}1"})
    _boot_files(appliance, "/EFI/Microsoft/Boot", "/EFI/Microsoft/Boot/bootmgfw.efi")
    appliance.unmount()
    return f"{device}2"


def _boot_files(appliance: Appliance, folder: str, loader: str) -> None:
    appliance.g.mkdir_p(folder)
    appliance.g.write(f"{folder}/BCD", windows_hives.empty_hive())
    appliance.g.write(loader, pe_writer.program())


def _write_hives(appliance: Appliance, settings: WindowsSettings, work: Path) -> None:
    release = RELEASES[settings.version]
    keys = {
        "SOFTWARE": windows_hives.software(release, settings.tools),
        "SYSTEM": windows_hives.system(
            release,
            tools=settings.tools,
            static_ip=settings.static_ip,
            fast_startup=settings.fast_startup,
            uefi=settings.uefi,
        ),
    }
    for name in ("SOFTWARE", "SYSTEM", "SAM", "SECURITY", "DEFAULT"):
        appliance.g.write(f"{CONFIG}/{name}", windows_hives.empty_hive())
        if name in keys:
            with Hive.open(appliance, f"{CONFIG}/{name}", write=True) as hive:
                windows_hives.fill(hive, keys[name])
