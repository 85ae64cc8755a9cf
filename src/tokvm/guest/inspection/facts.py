"""The whole inspection: disks in an appliance → GuestFacts."""

from __future__ import annotations

from collections.abc import Mapping

from tokvm.core.machine import Firmware, Severity
from tokvm.guest.appliance import Appliance
from tokvm.guest.base import GuestError, GuestFacts, OsFamily
from tokvm.guest.inspection.disks import BootPlace, find_boot_place
from tokvm.guest.inspection.linux import look_at_linux
from tokvm.guest.inspection.roots import choose_root
from tokvm.guest.inspection.tree import Tree, word
from tokvm.guest.inspection.volumes import VolumeNames
from tokvm.guest.inspection.windows import look_at_windows

PROBLEMS_LIMIT = 100
_FAMILIES = {"linux": OsFamily.LINUX, "windows": OsFamily.WINDOWS}


def inspect(appliance: Appliance, *, root: str | None = None) -> GuestFacts:
    """What is on the appliance's disks. Nothing may be mounted in it; nothing is afterwards.

    `root`: libguestfs' name of the system that is meant, where there are several. GuestError: several systems and no `root`,
    or the appliance failed. No system that libguestfs knows is an answer: OsFamily.OTHER, with the reason among `problems`.
    """
    tree = Tree(appliance)
    place = find_boot_place(tree)
    names = VolumeNames(tree)
    chosen = choose_root(tree, root, names)
    if not chosen:
        _say_why_none(tree, place)
        problems = tuple(tree.problems)
        return GuestFacts(
            OsFamily.OTHER, firmware=place.firmware, boot_disk=place.disk, efi_loaders=place.loaders, problems=problems
        )
    mounts = _mount_points(tree, chosen, names)
    try:
        _mount(tree, mounts)
        return _facts(tree, place, chosen, mounts)
    finally:
        if appliance.g.is_ready():
            appliance.unmount()


def _facts(tree: Tree, place: BootPlace, root: str, mounts: dict[str, str]) -> GuestFacts:
    g, linux, windows = tree.appliance.g, None, None
    family = _FAMILIES.get(str(tree.ask(g.inspect_get_type, root, default="")), OsFamily.OTHER)
    if family is OsFamily.LINUX:
        linux = look_at_linux(tree, place, root)
    elif family is OsFamily.WINDOWS:
        windows = look_at_windows(tree, place, root)
    _note_firmware(tree, place)
    return GuestFacts(
        family,
        root=word(root, 300),
        product=word(tree.ask(g.inspect_get_product_name, root, default="")),
        distro=word(tree.ask(g.inspect_get_distro, root, default="")),
        major=int(tree.ask(g.inspect_get_major_version, root, default=0)),
        minor=int(tree.ask(g.inspect_get_minor_version, root, default=0)),
        arch=word(tree.ask(g.inspect_get_arch, root, default="")),
        hostname=word(tree.ask(g.inspect_get_hostname, root, default=""), 253),
        firmware=place.firmware,
        boot_disk=place.disk,
        efi_loaders=place.loaders,
        mounts=mounts,
        linux=linux,
        windows=windows,
        problems=tuple(tree.problems[:PROBLEMS_LIMIT]),
    )


def _mount_points(tree: Tree, root: str, names: VolumeNames) -> dict[str, str]:
    with tree.appliance.translated("cannot tell what the guest mounts"):
        found: Mapping[str, str] = tree.appliance.g.inspect_get_mountpoints(root)
    mounts = {point: names.lasting(device) for point, device in sorted(found.items())[:64] if point.startswith("/")}
    # fstab's UUID of / leads to the wrong disk where the VM also has a clone of its system disk.
    return mounts | {"/": root}


def _mount(tree: Tree, mounts: dict[str, str]) -> None:
    """The root must mount; another file system that does not is a problem, and is left out of `mounts`. Read-only, so that
    ntfs-3g does not clear the journal of a Windows that was not shut down: the morph after us has to see it."""
    tree.appliance.mount({"/": mounts["/"]}, "ro")
    for point in sorted(set(mounts) - {"/"}, key=len):
        try:
            tree.appliance.mount({point: mounts[point]}, "ro")
        except GuestError as failed:
            if not tree.appliance.g.is_ready():
                raise
            tree.problem(failed.what, where=f"{mounts[point]} at {point}")
            del mounts[point]


def _say_why_none(tree: Tree, place: BootPlace) -> None:
    if place.bitlocker:
        tree.problem(
            "the Windows volume is encrypted by BitLocker",
            where=", ".join(place.bitlocker),
            fix="in the guest: manage-bde -off C: and wait until it is decrypted, then `tokvm sync` again",
            severity=Severity.BLOCKER,
        )
    elif place.luks:
        tree.problem(
            "the root file system is encrypted by LUKS, so nothing in it can be looked at or changed",
            fix="prepare the running guest itself: add virtio_pci, virtio_blk and virtio_scsi to its initramfs and rebuild it",
            severity=Severity.BLOCKER,
        )
    else:
        tree.problem(
            "no operating system that libguestfs knows is on the disks",
            fix="look with `virt-filesystems --long -a DISK`; are all disks of the VM synced, and in order?",
            severity=Severity.BLOCKER,
        )


def _note_firmware(tree: Tree, place: BootPlace) -> None:
    if place.firmware is Firmware.UEFI and not place.has_fallback_loader:
        tree.problem(
            "UEFI's boot entries stay behind with the old machine, and the ESP has no \\EFI\\BOOT loader to fall back on",
            fix=f"give the new machine a boot entry for {place.loaders[0]}, or copy that loader to \\EFI\\BOOT in the guest",
        )
