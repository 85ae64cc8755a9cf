"""Names of btrfs subvolumes where the appliance's kernel found the disks in another order, on a double of libguestfs."""

from __future__ import annotations

import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from tokvm.guest.inspection.roots import choose_root
from tokvm.guest.inspection.tree import Tree
from tokvm.guest.inspection.volumes import VolumeNames


class Handle:
    """kernel: for each disk, in the order they were given, what the appliance's kernel calls it. It translates as libguestfs
    1.48 does (daemon/device-name-translation.c): all that is given to it, and nothing within the `btrfsvol:…` that it gives,
    unless it is one that `translates` those as well."""

    def __init__(self, kernel: list[str], roots: list[str], *, translates: bool = False) -> None:
        self.kernel = kernel
        self.roots = roots
        self.translates = translates
        self.asked: list[str] = []

    def is_ready(self) -> bool:
        return True

    def list_devices(self) -> list[str]:
        return [f"/dev/sd{chr(ord('a') + index)}" for index in range(len(self.kernel))]

    def blkid(self, device: str) -> dict[str, str]:
        self.asked.append(device)
        found = self._given(device)
        if "empty" in found:
            raise RuntimeError("blkid: no content")
        return {"DEVNAME": found, "PTTYPE": "gpt"}

    def inspect_os(self) -> list[str]:
        return [self._told(one) if self.translates or one.startswith("/dev/") else one for one in self.roots]

    def inspect_get_type(self, root: str) -> str:
        if self._given(root) not in self.roots:
            raise RuntimeError("root device not found")
        return "linux"

    def inspect_get_product_name(self, root: str) -> str:
        return "Fedora"

    def _given(self, name: str) -> str:
        """A name of libguestfs' → the kernel's. One beyond the disks it has stays as it is."""
        return self._each(name, dict(zip(self.list_devices(), self.kernel, strict=True)))

    def _told(self, name: str) -> str:
        return self._each(name, dict(zip(self.kernel, self.list_devices(), strict=True)))

    @staticmethod
    def _each(name: str, names: dict[str, str]) -> str:
        return re.sub(r"/dev/sd[a-z]", lambda match: names.get(match[0], match[0]), name, count=1)


def tree(handle: Handle) -> Tree:
    appliance: Any = SimpleNamespace(
        g=handle, block_devices=handle.list_devices, where="a.raw", translated=lambda _what: nullcontext()
    )
    return Tree(appliance)


def chosen(handle: Handle, wanted: str | None = None) -> str:
    made = tree(handle)
    found = choose_root(made, wanted, VolumeNames(made))
    assert handle._given(found) in handle.roots  # so it mounts what it names
    return found


@pytest.mark.parametrize("translates", [False, True])
@pytest.mark.parametrize(
    ("kernel", "root", "named"),
    [
        (["/dev/sda"], "btrfsvol:/dev/sda3/root", "btrfsvol:/dev/sda3/root"),
        (["/dev/sdb"], "btrfsvol:/dev/sdb3/root", "btrfsvol:/dev/sda3/root"),
        (["/dev/sdb"], "btrfsvol:/dev/sdb/@", "btrfsvol:/dev/sda/@"),
        (["/dev/sdb", "/dev/sda"], "btrfsvol:/dev/sda2/@", "btrfsvol:/dev/sdb2/@"),
        (["/dev/sdc", "/dev/sda", "/dev/sdb"], "btrfsvol:/dev/sdb1/a\n/dev/sdc", "btrfsvol:/dev/sdc1/a\n/dev/sdc"),
        (["/dev/sdb", "/dev/empty"], "btrfsvol:/dev/sdb3/root", "btrfsvol:/dev/sda3/root"),
    ],
)
def test_a_subvolume_has_the_name_that_holds_in_the_next_appliance(
    kernel: list[str], root: str, named: str, *, translates: bool
) -> None:
    assert chosen(Handle(kernel, [root], translates=translates)) == named


def test_the_system_that_is_asked_for_is_the_one_on_that_disk() -> None:
    """A VM with a clone of its system disk: both have the subvolume."""
    handle = Handle(["/dev/sdb", "/dev/sda"], ["btrfsvol:/dev/sda3/root", "btrfsvol:/dev/sdb3/root"])
    for wanted in ("btrfsvol:/dev/sda3/root", "btrfsvol:/dev/sdb3/root"):
        assert chosen(handle, wanted) == wanted


@pytest.mark.parametrize("translates", [False, True])
def test_beside_a_system_on_a_plain_partition(*, translates: bool) -> None:
    handle = Handle(["/dev/sdb", "/dev/sdc"], ["/dev/sdb1", "btrfsvol:/dev/sdc2/@"], translates=translates)
    assert chosen(handle, "btrfsvol:/dev/sdb2/@") == "btrfsvol:/dev/sdb2/@"


def test_other_names_stay_and_nothing_is_asked_for_them() -> None:
    handle = Handle(["/dev/sdb"], [])
    names = VolumeNames(tree(handle))
    for name in (
        "/dev/sda3",
        "/dev/vg/lv",
        "btrfsvol:/dev/vg/lv/@",
        "btrfsvol:/dev/mapper/luks-1/@",
        "btrfsvol:/dev/md0/@",
        "",
    ):
        assert names.lasting(name) == name
    assert handle.asked == []
    assert names.lasting("btrfsvol:/dev/sdb3/home") == "btrfsvol:/dev/sda3/home"
    assert names.lasting("btrfsvol:/dev/sdb3/root") == "btrfsvol:/dev/sda3/root"
    assert handle.asked == ["/dev/sda"]
