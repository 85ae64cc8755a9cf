"""Which of KVM's disk buses and network cards a guest drives as it is. Pure.

A bus counts only when everything from the controller to the disk is there: virtio_scsi without sd_mod finds no disk.
Linux: the default kernel's initramfs and built-in drivers. Windows: services that start at boot.
"""

from __future__ import annotations

from tokvm.core.machine import DiskBus, NicModel
from tokvm.guest.base import GuestFacts, InitrdFacts

VIRTIO = (DiskBus.VIRTIO_BLK, DiskBus.VIRTIO_SCSI)
LINUX_BUSES: dict[DiskBus, tuple[str, ...]] = {
    DiskBus.VIRTIO_BLK: ("virtio_pci", "virtio_blk"),
    DiskBus.VIRTIO_SCSI: ("virtio_pci", "virtio_scsi", "sd_mod"),
    DiskBus.PVSCSI: ("vmw_pvscsi", "sd_mod"),
    DiskBus.NVME: ("nvme",),
    DiskBus.SATA: ("ahci", "sd_mod"),
    DiskBus.SAS: ("mptsas", "sd_mod"),
    DiskBus.MEGASAS: ("megaraid_sas", "sd_mod"),
    DiskBus.IDE: ("ata_piix", "sd_mod"),
}
"""Modules that a bus needs at boot, the fastest bus first."""
LINUX_NICS: dict[NicModel, tuple[str, ...]] = {
    NicModel.VIRTIO: ("virtio_net",),
    NicModel.VMXNET3: ("vmxnet3",),
    NicModel.E1000E: ("e1000e",),
    NicModel.E1000: ("e1000",),
    NicModel.RTL8139: ("8139cp", "8139too"),
}
WINDOWS_BUSES: dict[DiskBus, tuple[str, ...]] = {
    DiskBus.VIRTIO_BLK: ("viostor",),
    DiskBus.VIRTIO_SCSI: ("vioscsi",),
    DiskBus.PVSCSI: ("pvscsi", "pvscsii"),
    DiskBus.NVME: ("stornvme",),
    DiskBus.SATA: ("storahci", "msahci"),
    DiskBus.SAS: ("lsi_sas",),
    DiskBus.MEGASAS: ("megasas",),
    DiskBus.IDE: ("intelide",),
}
"""Services of which one must start at boot."""
WINDOWS_NICS: dict[NicModel, tuple[str, ...]] = {
    NicModel.VIRTIO: ("netkvm",),
    NicModel.VMXNET3: ("vmxnet3",),
    NicModel.E1000E: ("e1i6", "e1i5", "e1e6"),
    NicModel.E1000: ("e1g6", "e1000"),
}
"""How the names of driver files start. Windows' own e1i65x64.sys drives the 82574 that QEMU calls e1000e."""


def buses_of(facts: GuestFacts) -> tuple[DiskBus, ...]:
    """The buses from which the guest boots as it is, best first: by its default kernel, or its boot-start services."""
    if facts.windows is not None:
        services = facts.windows.boot_start
        return tuple(bus for bus, names in WINDOWS_BUSES.items() if any(one in services for one in names))
    kernel = facts.linux.default_kernel if facts.linux else None
    return buses_of_kernel(kernel) if kernel else ()


def nics_of(facts: GuestFacts) -> tuple[NicModel, ...]:
    """The cards that the guest drives once its root is mounted, best first."""
    if facts.windows is not None:
        files = facts.windows.drivers
        return tuple(nic for nic, starts in WINDOWS_NICS.items() if any(one.startswith(starts) for one in files))
    kernel = facts.linux.default_kernel if facts.linux else None
    if kernel is None:
        return ()
    known = kernel.modules | kernel.builtin | kernel.available
    return tuple(nic for nic, names in LINUX_NICS.items() if any(one in known for one in names))


def buses_of_kernel(kernel: InitrdFacts) -> tuple[DiskBus, ...]:
    return tuple(bus for bus, needed in LINUX_BUSES.items() if all(kernel.has(one) for one in needed))


def has_virtio_drivers(kernel: InitrdFacts) -> bool:
    known = kernel.available | kernel.builtin | kernel.modules
    return any(all(one in known for one in LINUX_BUSES[bus]) for bus in VIRTIO)


def drives_virtio(kernel: InitrdFacts) -> bool:
    return any(bus in VIRTIO for bus in buses_of_kernel(kernel))
