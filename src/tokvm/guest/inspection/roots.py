"""Which operating system on the disks is meant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tokvm.guest.base import GuestError
from tokvm.guest.inspection.tree import Tree, word
from tokvm.guest.inspection.volumes import VolumeNames

ROOTS_LIMIT = 32
_SNAPSHOT = re.compile(r"(?:^|/)(?:\.snapshots|timeshift-btrfs|snapshots?)(?:/|$)")


def choose_root(tree: Tree, wanted: str | None, names: VolumeNames) -> str:
    """libguestfs' name of the root file system; "" when there is no operating system that it knows.

    GuestError when there are several and `wanted` does not say which, or says one that is not there: never a guess.
    """
    with tree.appliance.translated("cannot look for an operating system on the disks"):
        given = [str(one) for one in tree.appliance.g.inspect_os()][:ROOTS_LIMIT]
    roots = names.lasting_roots(given)
    if wanted is not None:
        if wanted not in roots:
            what = f"there is no operating system on {word(wanted)}"
            raise GuestError(what, where=tree.appliance.where, fix=_offer(tree, roots))
        return wanted
    if len(roots) > 1:
        roots = _without_snapshots(tree, roots)
    if len(roots) > 1:
        raise GuestError(
            f"{len(roots)} operating systems are on the disks: {', '.join(word(one) for one in roots)}",
            where=tree.appliance.where,
            fix=_offer(tree, roots),
        )
    return roots[0] if roots else ""


def _offer(tree: Tree, roots: Sequence[str]) -> str:
    product = tree.appliance.g.inspect_get_product_name
    known = [f"{word(one)} ({word(tree.ask(product, one, default='unknown'))})" for one in roots]
    if not known:
        return "leave out --root, and look with `virt-filesystems --long -a DISK`"
    return "give --root with one of: " + ", ".join(known)


def _without_snapshots(tree: Tree, roots: list[str]) -> list[str]:
    """Snapshots of one btrfs look like so many systems. SUSE boots one of them: the file system's default subvolume.

    Names are `btrfsvol:/dev/sda2/@/.snapshots/1/snapshot`.
    """
    devices = {_btrfs_device(one) for one in roots}
    if len(devices) != 1 or "" in devices:
        return [one for one in roots if not _SNAPSHOT.search(one)] or roots
    (device,) = devices
    default = _default_subvolume(tree, device)
    if default and f"btrfsvol:{device}/{default}" in roots:
        return [f"btrfsvol:{device}/{default}"]
    return [one for one in roots if not _SNAPSHOT.search(one)] or roots


def _btrfs_device(root: str) -> str:
    """The device of a `btrfsvol:` name: `/dev/sda2`, `/dev/vg/lv`; "" for other names."""
    match = re.match(r"btrfsvol:(/dev/(?:mapper/[^/]+|(?:sd|hd|vd|nvme|md)\w+|[^/]+/[^/]+))/", root)
    return match[1] if match else ""


def _default_subvolume(tree: Tree, device: str) -> str:
    """Path of the default subvolume; "" when it is the top level or cannot be told."""
    g = tree.appliance.g
    if tree.ask(g.mount_ro, device, "/", default=False) is False:
        return ""
    try:
        wanted = tree.ask(g.btrfs_subvolume_get_default, "/", default=0)
        subvolumes: list[dict[str, Any]] = tree.ask(g.btrfs_subvolume_list, "/", default=[])
        return next((str(one["btrfssubvolume_path"]) for one in subvolumes if one["btrfssubvolume_id"] == wanted), "")
    finally:
        tree.appliance.unmount()
