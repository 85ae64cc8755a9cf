"""The Windows micro-morph on phony guests, in one appliance, judged by hivex on the host and by libguestfs' own inspection."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import operator
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tests.guest.ntfs_log import mark_in_use
from tests.guest.signing import new_signing
from tests.guest.virtio_win import make_tree

from tokvm.guest.appliance import Appliance
from tokvm.guest.base import GuestDisk, GuestError, GuestFacts, OsFamily, WindowsFacts
from tokvm.guest.windows import micro
from tokvm.guest.windows.micro import Ground
from tokvm.guest.windows.micro_plan import MicroPlan
from tokvm.lab.windows_guest import WindowsSettings, build_all
from tokvm.lab.windows_hives import RELEASES

pytestmark = pytest.mark.slow

DEVICES = {"viostor": "VEN_1AF4&DEV_1042&SUBSYS_11001AF4&REV_01", "vioscsi": "VEN_1AF4&DEV_1004&SUBSYS_00081AF4&REV_00"}
"""virtio-blk, modern; virtio-scsi, legacy."""
MAC = "00:50:56:a1:b2:c3"
SYSTEM = "/Windows/System32/config/SYSTEM"
GUESTS = {
    "modern": WindowsSettings(version="win2k22", static_ip=True, tools="vmware"),
    "old": WindowsSettings(version="win2k8r2", static_ip=True, uefi=True),
    "asleep": WindowsSettings(version="win10", hibernated=True, fast_startup=True),
    "running": WindowsSettings(version="win2k22", static_ip=True, tools="vmware"),
}


@dataclass(slots=True)
class Bench:
    """One appliance over overlays of all guests; `devices`: guest → root file system."""

    appliance: Appliance
    bases: dict[str, Path]
    devices: dict[str, str]
    tree: Path
    store: Path

    def facts(self, name: str) -> GuestFacts:
        release = RELEASES[GUESTS[name].version]
        windows = WindowsFacts(systemroot="/Windows", build=release.build, edition=release.edition)
        return GuestFacts(OsFamily.WINDOWS, root=self.devices[name], product=release.product, arch="x86_64", windows=windows)

    def plan(self, name: str) -> MicroPlan:
        return micro.plan(self.appliance, self.facts(name), self.store, tree=self.tree, macs=(MAC,))

    def system_hive(self, name: str, out: Path) -> Any:
        """The guest's SYSTEM hive, opened by the host's own hivex."""
        self.appliance.mount({"/": self.devices[name]})
        out.write_bytes(self.appliance.read(SYSTEM))
        self.appliance.unmount()
        return importlib.import_module("hivex").Hivex(str(out))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tcg: bool) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("windows")
    bases = {name: folder / f"{name}.raw" for name in GUESTS}
    build_all({bases[name]: settings for name, settings in GUESTS.items()}, tcg=tcg)
    tree = make_tree(folder / "tree", new_signing(folder / "signing"), versions=("2k22", "2k8R2", "w10"))
    (folder / "store").mkdir()
    disks = []
    for name, base in bases.items():
        overlay = folder / f"{name}.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), str(overlay)], check=True)
        disks.append(GuestDisk(str(overlay), "qcow2"))
    with Appliance.launch(disks, readonly=False, tcg=tcg) as appliance:
        devices = {}
        for name, device in zip(GUESTS, appliance.g.list_devices(), strict=True):
            devices[name] = f"{device}{2 if GUESTS[name].uefi else 1}"
        yield Bench(appliance, bases, devices, tree, folder / "store")


def look(hive: Any, *path: str) -> Any:
    node = hive.root()
    for name in path:
        node = hive.node_get_child(node, name)
        if node is None:
            return None
    return node


def value(hive: Any, node: Any, name: str) -> tuple[int, bytes]:
    kind, data = hive.value_value(hive.node_get_value(node, name))
    return int(kind), bytes(data)


@pytest.mark.parametrize("name", ["modern", "old"])
def test_virtio_starts_at_boot_after_the_morph(bench: Bench, tmp_path: Path, name: str) -> None:
    before = hashlib.sha256(bench.bases[name].read_bytes()).hexdigest()
    plan = MicroPlan.parse(json.loads(json.dumps(bench.plan(name).as_json())))
    micro.ready(bench.appliance, plan)
    micro.check(bench.appliance, plan)
    micro.apply(bench.appliance, plan, bench.store)
    micro.apply(bench.appliance, plan, bench.store)
    hive = bench.system_hive(name, tmp_path / "SYSTEM")
    for driver, device in DEVICES.items():
        service = look(hive, "ControlSet001", "Services", driver)
        assert value(hive, service, "Start") == (4, struct.pack("<I", 0))
        assert value(hive, service, "ImagePath") == (2, f"system32\\drivers\\{driver}.sys\0".encode("utf-16-le"))
        if name == "old":
            key = look(hive, "ControlSet001", "Control", "CriticalDeviceDatabase", f"PCI#{device}")
            assert value(hive, key, "Service") == (1, f"{driver}\0".encode("utf-16-le"))
            assert look(hive, "DriverDatabase") is None
        else:
            assert value(hive, look(hive, "DriverDatabase", "DeviceIds", "PCI", device), f"tokvm_{driver}.inf") == (
                3,
                b"\x01\xff\0\0",
            )
            package = look(hive, "DriverDatabase", "DriverPackages", f"tokvm_{driver}.inf_tmp")
            assert len(value(hive, package, "Version")[1]) == 48
            conf = look(
                hive, "DriverDatabase", "DriverPackages", f"tokvm_{driver}.inf_tmp", "Configurations", f"tokvm_{driver}_conf"
            )
            assert value(hive, conf, "Service") == (1, f"{driver}\0".encode("utf-16-le"))
    storahci = look(hive, "ControlSet001", "Services", "storahci")
    assert value(hive, storahci, "Start")[1] == bytes(4)
    assert look(hive, "ControlSet001", "Services", "storahci", "StartOverride") is None
    first = look(hive, "ControlSet001", "Services", "tokvm-firstboot")
    assert value(hive, first, "Start") == (4, struct.pack("<I", 2))
    assert "first-boot.cmd" in value(hive, first, "ImagePath")[1].decode("utf-16-le")
    assert hashlib.sha256(bench.bases[name].read_bytes()).hexdigest() == before, "the base below the overlay was written to"


def test_the_guest_holds_the_drivers_and_the_first_boots_files(bench: Bench) -> None:
    plan = bench.plan("modern")
    micro.apply(bench.appliance, plan, bench.store)
    bench.appliance.mount({"/": bench.devices["modern"]})
    try:
        wanted = (bench.tree / "viostor/2k22/amd64/viostor.sys").read_bytes()
        assert bench.appliance.read("/Windows/System32/drivers/viostor.sys") == wanted
        folder = "/Windows/tokvm-firstboot"
        assert b"192.0.2.10" in bench.appliance.read(f"{folder}/addresses.csv")
        assert MAC.encode() in bench.appliance.read(f"{folder}/addresses.csv")
        assert bench.appliance.read(f"{folder}/drivers/netkvm/netkvm.sys")
        assert bench.appliance.read(f"{folder}/qemu-ga.msi") == b"msi 64"
        names = bench.appliance.g.find("/")
        assert not [one for one in names if "tokvm-new" in one]
    finally:
        bench.appliance.unmount()


@pytest.mark.nightly
def test_libguestfs_still_takes_it_for_the_same_windows(bench: Bench) -> None:
    micro.apply(bench.appliance, bench.plan("modern"), bench.store)
    g = bench.appliance.g
    assert bench.devices["modern"] in g.inspect_os()
    assert g.inspect_get_osinfo(bench.devices["modern"]) == "win2k22"
    assert g.inspect_get_windows_current_control_set(bench.devices["modern"]) == "ControlSet001"


@pytest.mark.nightly
def test_a_hibernated_windows_is_not_written_to(bench: Bench) -> None:
    plan = bench.plan("asleep")  # the facts that the bench makes up do not know of hiberfil.sys
    with pytest.raises(GuestError, match="hibernated"):
        micro.apply(bench.appliance, plan, bench.store)
    facts = bench.facts("asleep")
    assert facts.windows is not None
    asleep, dirty = replace(facts.windows, hibernated=True), replace(facts.windows, dirty=True)
    for state, windows in {"hibernated": asleep, "dirty": dirty}.items():
        with pytest.raises(GuestError, match=state):
            micro.plan(bench.appliance, replace(facts, windows=windows), bench.store, tree=bench.tree)


@pytest.mark.nightly
def test_another_guest_than_the_planned_one_is_refused(bench: Bench) -> None:
    plan = bench.plan("modern")
    for other in (replace(plan, control_set="ControlSet002"), replace(plan, database=False)):
        with pytest.raises(GuestError, match="changed since the rehearsal"):
            micro.check(bench.appliance, other)
        with pytest.raises(GuestError, match="changed since the rehearsal"):
            micro.apply(bench.appliance, other, bench.store)


@pytest.mark.nightly
def test_a_changed_file_in_the_store_is_refused(bench: Bench) -> None:
    plan = bench.plan("modern")
    stored = plan.drivers[0].stored.path(bench.store)
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1] + b"!")
    try:
        with pytest.raises(GuestError, match="not the file that was planned"):
            micro.apply(bench.appliance, plan, bench.store)
    finally:
        stored.write_bytes(whole)


@pytest.mark.nightly
@pytest.mark.parametrize("version", [(1, 1), (2, 0)], ids=["before Windows 8", "since"])
def test_a_copy_of_a_running_guest_is_morphed_only_where_it_is_thrown_away(
    version: tuple[int, int], bench: Bench, tmp_path: Path
) -> None:
    """Its NTFS is in use, so that it cannot be written to before the journal is reset, and its registry is half written out."""
    appliance, g, device = bench.appliance, bench.appliance.g, bench.devices["running"]
    write_head(bench, "running", half_out(bench, "running"))
    mark_in_use(
        lambda count, offset: bytes(g.pread_device(device, count, offset)),
        lambda data, offset: g.pwrite_device(device, data, offset),
        version,
    )
    plan = bench.plan("running")
    micro.check(appliance, plan)
    with pytest.raises(GuestError, match="not shut down cleanly"):
        micro.apply(appliance, plan, bench.store)
    appliance.forget()
    micro.apply(appliance, plan, bench.store, Ground.THROW_AWAY)
    hive = bench.system_hive("running", tmp_path / "SYSTEM")
    for driver in DEVICES:
        assert value(hive, look(hive, "ControlSet001", "Services", driver), "Start") == (4, bytes(4))
    appliance.mount({"/": device})
    try:
        assert g.is_file("/Windows/System32/drivers/vioscsi.sys")
        assert b"192.0.2.10" in appliance.read("/Windows/tokvm-firstboot/addresses.csv")
    finally:
        appliance.unmount()


@pytest.mark.nightly
def test_a_registry_that_is_half_written_out_is_refused_although_the_volume_is_clean(bench: Bench) -> None:
    plan, whole = bench.plan("modern"), head_of(bench, "modern")
    write_head(bench, "modern", half_out(bench, "modern"))
    try:
        with pytest.raises(GuestError, match="has not written its registry out"):
            micro.apply(bench.appliance, plan, bench.store)
    finally:
        write_head(bench, "modern", whole)


def half_out(bench: Bench, name: str) -> bytes:
    """The SYSTEM hive's base block as it is while Windows writes: its first number is one ahead."""
    words = list(struct.unpack("<127I", head_of(bench, name)[:508]))
    words[1] += 1
    return struct.pack("<128I", *words, functools.reduce(operator.xor, words))


def head_of(bench: Bench, name: str) -> bytes:
    bench.appliance.mount({"/": bench.devices[name]})
    head = bytes(bench.appliance.g.pread(SYSTEM, 512, 0))
    bench.appliance.unmount()
    return head


def write_head(bench: Bench, name: str, head: bytes) -> None:
    bench.appliance.mount({"/": bench.devices[name]})
    bench.appliance.g.pwrite(SYSTEM, head, 0)
    bench.appliance.unmount()
