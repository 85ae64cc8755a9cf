"""The words of guest/: what was found on a VM's disks, what that means for KVM, and the ways to cut over.

    disks ─► inspection/ ─► GuestFacts ─► verdict ─► Verdict + Ways in order of preference

Text that comes from a guest (names, versions) is bounded and printable; everything else of it stays in the appliance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from tokvm.core.errors import GuestError
from tokvm.core.machine import DiskBus, Finding, Firmware

__all__ = [
    "TOUCHES_DISK",
    "GuestDisk",
    "GuestError",
    "GuestFacts",
    "InitrdFacts",
    "Judgement",
    "LinuxFacts",
    "OsFamily",
    "Verdict",
    "Way",
    "WindowsFacts",
]


class Verdict(StrEnum):
    """What a VM's disks need to boot on KVM's own hardware."""

    READY = "ready for virtio"
    MICRO = "micro-morph"
    NEEDS_VIRT_V2V = "needs virt-v2v"
    COMPATIBLE = "boots only on compatible hardware"
    CANNOT = "cannot"


class Way(StrEnum):
    """How a cutover makes the guest boot.

    NONE: virtio is there. MICRO: one initramfs segment (Linux) or boot-start drivers (Windows), planned before and replayed.
    KERNEL: kernel and an extended initramfs beside the VM, the disk untouched. COMPATIBLE: hardware that the guest drives
    already. VIRT_V2V: the whole conversion. PRESTAGE: the running source was prepared, so nothing is left to do.
    """

    NONE = "none"
    MICRO = "micro"
    KERNEL = "kernel"
    COMPATIBLE = "compatible"
    VIRT_V2V = "virt-v2v"
    PRESTAGE = "prestage"


TOUCHES_DISK = frozenset({Way.MICRO, Way.VIRT_V2V})
"""Ways that change the synced disks (through an overlay and an undo log) inside the downtime."""


class OsFamily(StrEnum):
    LINUX = "linux"
    WINDOWS = "windows"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class GuestDisk:
    """One disk of the VM as a local image, in the VM's order. `format` is always said: raw, or qcow2 of our own making."""

    path: str
    format: str = "raw"


@dataclass(frozen=True, slots=True)
class InitrdFacts:
    """One kernel and its initramfs. Paths are the guest's (`/boot/initrd.img-6.1.0-9-amd64`); size in bytes, mtime in
    nanoseconds. modules: names of all modules inside; builtin: those the kernel has built in. packing: how the main archive is
    packed. measured: part of a signed or measured boot (UKI, signed initrd), which must not be changed.
    """

    version: str
    kernel: str
    initrd: str
    size: int = 0
    mtime_ns: int = 0
    sha256: str = ""
    modules: frozenset[str] = frozenset()
    builtin: frozenset[str] = frozenset()
    available: frozenset[str] = frozenset()
    packing: str = ""
    measured: bool = False
    default: bool = False
    problem: str = ""

    def has(self, module: str) -> bool:
        return module in self.modules or module in self.builtin


@dataclass(frozen=True, slots=True)
class LinuxFacts:
    """root: as the boot command line names it. command_line: of the default boot entry, without the image's own path.
    generator: initramfs-tools | dracut | mkinitcpio | "". boot_free: bytes free on the file system that holds /boot.
    by_name: mount points whose fstab line names a device by /dev/sdX or /dev/hdX. tools: guest tools of the old hypervisor.
    """

    kernels: tuple[InitrdFacts, ...] = ()
    root: str = ""
    command_line: str = ""
    boot_loader: str = ""
    generator: str = ""
    boot_free: int = 0
    by_name: tuple[str, ...] = ()
    lvm: bool = False
    luks: bool = False
    btrfs_snapshots: bool = False
    tools: tuple[str, ...] = ()
    interfaces: tuple[str, ...] = ()

    @property
    def default_kernel(self) -> InitrdFacts | None:
        return next((one for one in self.kernels if one.default), self.kernels[0] if self.kernels else None)


@dataclass(frozen=True, slots=True)
class WindowsFacts:
    """systemroot: `/Windows`. control_set: the current one (`ControlSet001`). boot_start: names (lower case) of services with
    Start = 0. drivers: file names in system32/drivers, lower case. static_ip: some adapter has an address of its own.
    """

    systemroot: str = ""
    control_set: str = ""
    version: str = ""
    build: int = 0
    edition: str = ""
    hibernated: bool = False
    fast_startup: bool = False
    dirty: bool = False
    bitlocker: bool = False
    boot_start: frozenset[str] = frozenset()
    drivers: frozenset[str] = frozenset()
    tools: tuple[str, ...] = ()
    static_ip: bool = False
    group_policy: bool = False


@dataclass(frozen=True, slots=True)
class GuestFacts:
    """What inspection found. root: libguestfs' name of the root file system (`/dev/sda1`). boot_disk: index of the disk that
    the firmware boots. efi_loaders: loaders in its ESP as firmware names them (`\\EFI\\debian\\grubx64.efi`).
    mounts: mount point → device. problems: what stands in a morph's way, found while looking."""

    family: OsFamily
    root: str = ""
    product: str = ""
    distro: str = ""
    major: int = 0
    minor: int = 0
    arch: str = ""
    hostname: str = ""
    firmware: Firmware = Firmware.BIOS
    boot_disk: int = 0
    efi_loaders: tuple[str, ...] = ()
    mounts: dict[str, str] = field(default_factory=dict)
    linux: LinuxFacts | None = None
    windows: WindowsFacts | None = None
    problems: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True)
class Judgement:
    """disks: a verdict for each disk of the VM, in order (data disks need no drivers to boot from: READY). verdict: the boot
    disk's. why: one sentence. ways: those that work, best first. buses, nics: what the guest drives as it is, best first."""

    verdict: Verdict
    why: str
    disks: tuple[Verdict, ...]
    ways: tuple[Way, ...]
    buses: tuple[DiskBus, ...] = ()
    nics: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
