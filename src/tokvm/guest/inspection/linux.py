"""A mounted Linux guest → LinuxFacts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tokvm.guest.appliance import READ_LIMIT
from tokvm.guest.base import InitrdFacts, LinuxFacts
from tokvm.guest.inspection import interfaces
from tokvm.guest.inspection.default_entry import Menu, find_menu
from tokvm.guest.inspection.disks import BootPlace
from tokvm.guest.inspection.fstab import FstabLine, parse_fstab
from tokvm.guest.inspection.kernels import find_kernels, look_at
from tokvm.guest.inspection.tree import SHORT_LIMIT, Tree, word
from tokvm.guest.inspection.uki import section_text, sections_of

GENERATORS = {
    "initramfs-tools": ("/usr/sbin/update-initramfs",),
    "dracut": ("/usr/bin/dracut", "/usr/sbin/dracut"),
    "mkinitcpio": ("/usr/bin/mkinitcpio", "/usr/sbin/mkinitcpio"),
}
TOOLS = {
    "open-vm-tools": ("/usr/bin/vmtoolsd", "/usr/sbin/vmtoolsd"),
    "VMware Tools": ("/etc/vmware-tools/locations",),
    "hyperv-daemons": ("/usr/sbin/hv_kvp_daemon", "/usr/sbin/hypervkvpd"),
    "azure agent": ("/usr/sbin/waagent",),
    "xe-guest-utilities": ("/usr/sbin/xe-daemon", "/usr/bin/xe-daemon", "/usr/sbin/xe-linux-distribution"),
    "VirtualBox Guest Additions": ("/usr/sbin/VBoxService",),
}


def look_at_linux(tree: Tree, place: BootPlace, root_device: str) -> LinuxFacts:
    """root_device: libguestfs' name of the root file system."""
    menu = find_menu(tree, systemd_boot=place.loader == "systemd-boot")
    files = find_kernels(tree)
    kernels = _one_default(tuple(look_at(tree, one, menu.entry, signed=menu.signed) for one in files))
    fstab = parse_fstab(tree.text("/etc/fstab"))
    options = menu.entry.options if menu.entry else _uki_options(tree, kernels)
    return LinuxFacts(
        kernels=kernels,
        root=_root(options, fstab),
        command_line=word(options, 4096),
        boot_loader=_loader(place, menu),
        generator=next(iter(_installed(tree, GENERATORS)), ""),
        boot_free=_free(tree, "/boot" if tree.is_folder("/boot") else "/"),
        by_name=tuple(word(line.point) for line in fstab if line.by_name)[:64],
        lvm=_is_lvm(tree, root_device),
        luks=place.luks,
        btrfs_snapshots=_has_snapshots(tree),
        tools=_installed(tree, TOOLS),
        interfaces=_interfaces(tree),
    )


def _one_default(kernels: tuple[InitrdFacts, ...]) -> tuple[InitrdFacts, ...]:
    """Exactly one default: what the menu starts, else the newest."""
    at = next((index for index, one in enumerate(kernels) if one.default), 0)
    return tuple(replace(one, default=index == at) for index, one in enumerate(kernels))


def _root(options: str, fstab: tuple[FstabLine, ...]) -> str:
    given = [one.removeprefix("root=") for one in options.split() if one.startswith("root=")]
    in_fstab = [line.spec for line in fstab if line.point == "/"]
    return word((given[-1:] or in_fstab or [""])[0], 512)


def _uki_options(tree: Tree, kernels: tuple[InitrdFacts, ...]) -> str:
    """The command line of a guest without a menu: the unified kernel's own, or what its next one would get."""
    default = next((one for one in kernels if one.default and one.kernel.endswith(".efi")), None)
    inside = section_text(sections_of(tree.content(default.kernel, READ_LIMIT)), ".cmdline") if default else ""
    return inside or " ".join(tree.text("/etc/kernel/cmdline").split())[:4096]


def _loader(place: BootPlace, menu: Menu) -> str:
    """grub-efi, grub-bios, systemd-boot, extlinux, …: what the firmware starts, else whose menu there is."""
    if place.loader:
        return place.loader
    return f"grub-{place.firmware}".replace("uefi", "efi") if menu.loader == "grub" else menu.loader


def _installed(tree: Tree, known: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Those of which a program is there; a folder with programs is listed once, not asked for each of them."""
    folders = {path.rpartition("/")[0] for paths in known.values() for path in paths}
    there = {f"{folder}/{name}" for folder in folders for name in tree.names(folder)}
    return tuple(name for name, paths in known.items() if there.intersection(paths))


def _free(tree: Tree, path: str) -> int:
    """Bytes that root may still write there (what is reserved for root counts as free)."""
    found = tree.ask(tree.appliance.g.statvfs, path, default=None)
    return int(found["bfree"]) * int(found["frsize"] or found["bsize"]) if found else 0


def _is_lvm(tree: Tree, root_device: str) -> bool:
    return bool(tree.ask(tree.appliance.g.is_lv, root_device, default=False))


def _has_snapshots(tree: Tree) -> bool:
    """Snapper's or Timeshift's btrfs snapshots: each holds the initramfs of its day."""
    return bool(tree.names("/.snapshots", "[0-9]*")) or tree.is_folder("/timeshift-btrfs/snapshots")


def _interfaces(tree: Tree) -> tuple[str, ...]:
    readers = (
        ("/etc/network/interfaces.d", "*", interfaces.from_ifupdown),
        ("/etc/netplan", "*.yaml", interfaces.from_netplan),
        ("/etc/NetworkManager/system-connections", "*.nmconnection", interfaces.from_keyfile),
        ("/etc/systemd/network", "*.network", interfaces.from_networkd),
    )
    found = interfaces.from_ifupdown(tree.text("/etc/network/interfaces", SHORT_LIMIT))
    for folder, pattern, read in readers:
        found += [name for text in tree.texts(folder, pattern, most=64).values() for name in read(text)]
    for folder in ("/etc/sysconfig/network-scripts", "/etc/sysconfig/network"):
        found += interfaces.from_ifcfgs(tree.texts(folder, "ifcfg-*", most=64))
    return interfaces.chosen(found)
