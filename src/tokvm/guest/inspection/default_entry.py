"""Which menu a Linux guest's boot loader reads, and what it starts by default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokvm.guest.inspection import menus
from tokvm.guest.inspection.boot_entry import BootEntry
from tokvm.guest.inspection.grub_cfg import GrubMenu, parse_grub_cfg, parse_grubenv
from tokvm.guest.inspection.tree import Tree

ESP_POINTS = ("/boot/efi", "/efi", "/boot")
GRUB_FOLDERS = ("/boot/grub2", "/boot/grub")
LEGACY_MENUS = ("/boot/grub/menu.lst", "/boot/grub/grub.conf")
EXTLINUX_MENUS = ("/boot/extlinux/extlinux.conf", "/boot/extlinux.conf", "/extlinux.conf", "/boot/syslinux/syslinux.cfg")


@dataclass(frozen=True, slots=True)
class Menu:
    """loader: grub | systemd-boot | grub-legacy | extlinux | "" (none known). signed: it checks signatures of what it loads."""

    loader: str = ""
    entry: BootEntry | None = None
    signed: bool = False


def find_menu(tree: Tree, *, systemd_boot: bool) -> Menu:
    """The menu in use. `systemd_boot`: that loader is in the ESP, so its entries come before a left-over grub.cfg."""
    order: list[Callable[[Tree], Menu | None]] = [_grub, _systemd_boot, _legacy, _extlinux]
    if systemd_boot:
        order.insert(0, _systemd_boot)
    return next((menu for look in order if (menu := look(tree))), Menu())


def _grub(tree: Tree) -> Menu | None:
    folders = [*GRUB_FOLDERS, *(f"/boot/efi/EFI/{name}" for name in tree.names("/boot/efi/EFI")[:32])]
    environment: dict[str, str] = {}
    chosen: GrubMenu | None = None
    for folder in folders:
        environment = environment or parse_grubenv(tree.text(f"{folder}/grubenv"))
        text = tree.text(f"{folder}/grub.cfg")
        menu = parse_grub_cfg(text, environment) if text else None
        # RHEL 9's and Debian's grub.cfg in the ESP only leads to the one in /boot.
        if menu and (chosen is None or (not chosen.items and not chosen.uses_bls)):
            chosen = menu
    if chosen is None:
        return None
    return Menu("grub", _bls_of(tree, chosen) or chosen.default_entry(), chosen.enforces_signatures)


def _bls_of(tree: Tree, menu: GrubMenu) -> BootEntry | None:
    if not menu.uses_bls:
        return None
    entries = menus.bls_entries(tree.texts("/boot/loader/entries", "*.conf"), menu.variables)
    return menus.grub_bls_default(entries, menu.default or menu.variables.get("saved_entry", ""))


def _systemd_boot(tree: Tree) -> Menu | None:
    for point in ESP_POINTS:
        files = tree.texts(f"{point}/loader/entries", "*.conf")
        conf = tree.text(f"{point}/loader/loader.conf")
        if files or conf:
            return Menu("systemd-boot", menus.systemd_boot_default(menus.bls_entries(files, {}), conf))
    return None


def _legacy(tree: Tree) -> Menu | None:
    text = next((text for path in LEGACY_MENUS if (text := tree.text(path))), "")
    return Menu("grub-legacy", menus.legacy_grub_default(text)) if text else None


def _extlinux(tree: Tree) -> Menu | None:
    text = next((text for path in EXTLINUX_MENUS if (text := tree.text(path))), "")
    return Menu("extlinux", menus.extlinux_default(text)) if text else None
