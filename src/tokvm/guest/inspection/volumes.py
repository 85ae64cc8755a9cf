"""libguestfs' names of btrfs subvolumes, as they hold in any appliance: `btrfsvol:/dev/sda2/@`.

libguestfs numbers disks in the order they were given; the appliance's kernel finds them in any order, the appliance's own disk
among them (with several emulated at once, 3 of 8 times otherwise than given). It translates the names it is given and most of
those it gives, but not within `btrfsvol:…` (1.48): there the disk has the kernel's name, which given back means another disk.
"""

from __future__ import annotations

import re

from tokvm.guest.inspection.tree import Tree

_VOLUME = re.compile(r"btrfsvol:(?P<disk>/dev/sd[a-z]+)(?P<rest>\d*/.*)", re.DOTALL)


class VolumeNames:
    """The names that one appliance gives, made to hold everywhere. Asks only when there are such names."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._disks: dict[str, str] | None = None

    def lasting(self, name: str) -> str:
        """Names of anything else stay as they are."""
        found = _VOLUME.fullmatch(name)
        if found is None:
            return name
        return f"btrfsvol:{self._by_kernel().get(found['disk'], found['disk'])}{found['rest']}"

    def lasting_roots(self, names: list[str]) -> list[str]:
        """Of what `inspect_os` gave. A libguestfs that translates them itself would not know a root by the name made here."""
        found = [self.lasting(one) for one in names]
        changed = next((one for one in found if one not in names), None)
        if changed is not None and not self._tree.ask(self._tree.appliance.g.inspect_get_type, changed, default=""):
            self._disks = {}
            return names
        return found

    def _by_kernel(self) -> dict[str, str]:
        """The kernel's name of a disk → libguestfs'. blkid(8) says what it was told to open, after the translation."""
        if self._disks is None:
            g = self._tree.appliance.g
            self._disks = {}
            for device in self._tree.ask(self._tree.appliance.block_devices, default=[]):
                said: dict[str, str] = self._tree.ask(g.blkid, device, default={})
                if "DEVNAME" in said:
                    self._disks[said["DEVNAME"]] = device
        return self._disks
