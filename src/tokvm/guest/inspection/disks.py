"""Where the firmware starts: which disk, BIOS or UEFI, which loader; and which partitions nobody can read without a key.

UEFI counts when there is an ESP with a loader and no BIOS boot partition: cloud images have both, and boot by BIOS as well
(virt-v2v decides alike). Works on bare partitions, before anything of the guest is mounted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokvm.core.machine import Firmware
from tokvm.core.units import SECTOR
from tokvm.guest.inspection import ntfs
from tokvm.guest.inspection.partitions import HEAD, Table, parse_table
from tokvm.guest.inspection.tree import Tree, word

PARTITIONS_LIMIT = 128
LOADERS_LIMIT = 32
FALLBACK_LOADER = re.compile(r"\\EFI\\BOOT\\BOOT(?:X64|IA32|AA64)\.EFI", re.IGNORECASE)
LUKS_MAGIC = b"LUKS\xba\xbe"


@dataclass(frozen=True, slots=True)
class BootPlace:
    """disk: index. loader: grub-efi | grub-bios | systemd-boot | windows | "" (not told by the firmware's side alone).
    loaders: files in the ESP as firmware names them (`\\EFI\\debian\\grubx64.efi`)."""

    disk: int = 0
    firmware: Firmware = Firmware.BIOS
    loader: str = ""
    loaders: tuple[str, ...] = ()
    luks: bool = False
    bitlocker: tuple[str, ...] = ()

    @property
    def has_fallback_loader(self) -> bool:
        return any(FALLBACK_LOADER.fullmatch(one) for one in self.loaders)


def find_boot_place(tree: Tree) -> BootPlace:
    """Look at every disk's table and every partition's first sector. Nothing may be mounted; nothing is afterwards."""
    g = tree.appliance.g
    devices: list[str] = tree.ask(tree.appliance.block_devices, default=[])
    tables = [parse_table(_head(tree, one, HEAD)) for one in devices]
    partitions = [str(one) for one in tree.ask(g.list_partitions, default=[])][:PARTITIONS_LIMIT]
    sectors = {one: _head(tree, one, SECTOR) for one in [*devices, *partitions]}
    loaders = {index: _loaders(tree, f"{device}{table.esp.number}")
               for index, (device, table) in enumerate(zip(devices, tables, strict=True)) if table.esp}  # fmt: skip
    disk, firmware = _start(tables, loaders)
    found = loaders.get(disk, ()) if firmware is Firmware.UEFI else ()
    return BootPlace(
        disk,
        firmware,
        _efi_loader(found) if found else ("grub-bios" if tables and tables[disk].grub else ""),
        found,
        luks=any(sector.startswith(LUKS_MAGIC) for sector in sectors.values()),
        bitlocker=tuple(one for one, sector in sectors.items() if ntfs.is_bitlocker(sector)),
    )


def _head(tree: Tree, device: str, length: int) -> bytes:
    return bytes(tree.ask(tree.appliance.g.pread_device, device, length, 0, default=b""))


def _start(tables: Sequence[Table], loaders: dict[int, tuple[str, ...]]) -> tuple[int, Firmware]:
    """The first disk that UEFI could start from, else the first that a BIOS could, preferring an active partition."""
    for index, table in enumerate(tables):
        if loaders.get(index) and not table.bios_boot:
            return index, Firmware.UEFI
    bios = [index for index, table in enumerate(tables) if table.boot_code]
    active = [index for index in bios if tables[index].bios_boot or any(one.active for one in tables[index].partitions)]
    return (active or bios or [0])[0], Firmware.BIOS


def _loaders(tree: Tree, esp: str) -> tuple[str, ...]:
    """The .efi files one folder below \\EFI of an ESP; UKIs among them."""
    g = tree.appliance.g
    if tree.ask(g.mount_ro, esp, "/", default=False) is False:
        return ()
    try:
        found = []
        for folder in tree.names("/EFI")[:LOADERS_LIMIT]:
            names = [name for name in tree.names(f"/EFI/{folder}") if name.lower().endswith(".efi")]
            found += [f"\\EFI\\{folder}\\{name}" for name in names]
            if folder.lower() == "microsoft" and tree.is_file(f"/EFI/{folder}/Boot/bootmgfw.efi"):
                found.append(f"\\EFI\\{folder}\\Boot\\bootmgfw.efi")
        return tuple(word(one, 200) for one in found[:LOADERS_LIMIT])
    finally:
        tree.appliance.unmount()


def _efi_loader(loaders: tuple[str, ...]) -> str:
    names = [one.lower() for one in loaders]
    if any("\\systemd-boot" in one for one in names):
        return "systemd-boot"
    if any("\\grub" in one or "\\shim" in one for one in names):
        return "grub-efi"
    if any(one.endswith("\\bootmgfw.efi") for one in names):
        return "windows"
    return "uki" if any(one.startswith("\\efi\\linux\\") for one in names) else "efi"
