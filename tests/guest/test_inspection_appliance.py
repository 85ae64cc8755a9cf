"""Inspection of real disks in a real appliance, one for all tests: a test hides the disks that it does not want to see."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.guest import disk_trees
from tests.guest.disk_trees import NEWER, UUID, VERSION

from tokvm.core.machine import DiskBus, Firmware, Severity
from tokvm.core.units import GiB, KiB, MiB
from tokvm.guest.appliance import Appliance
from tokvm.guest.base import GuestDisk, GuestError, OsFamily, Verdict, Way
from tokvm.guest.inspection import inspect
from tokvm.guest.verdict import judge
from tokvm.lab.programs import run_program
from tokvm.lab.windows_guest import WindowsSettings, build_all

pytestmark = [pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(900)]

HEAD = 64 * KiB
BLS = """\
title Red Hat Enterprise Linux (5.14.0-362.el9.x86_64) 9.3 (Plow)
version 5.14.0-362.el9.x86_64
linux /boot/vmlinuz-5.14.0-362.el9.x86_64
initrd /boot/initramfs-5.14.0-362.el9.x86_64.img $tuned_initrd
options root=UUID=9 ro $kernelopts $tuned_params
grub_class rhel
"""


class Bench:
    """Disks by name in one read-only appliance: what is hidden is an empty disk, in the appliance's overlay only.

    libguestfs looks for operating systems once, on all of them: that is what takes long without KVM. Afterwards its answer is
    kept, and a test gets the part of it that is about the disks it sees.
    """

    def __init__(self, appliance: Appliance, disks: dict[str, Path]) -> None:
        self.appliance = appliance
        self.devices = dict(zip(disks, appliance.g.list_devices(), strict=True))
        self.heads = {name: path.read_bytes()[:HEAD] for name, path in disks.items()}
        self.shown = set(disks)
        self.roots = list(appliance.g.inspect_os())
        appliance.g.inspect_os = self._roots_shown

    def _roots_shown(self) -> list[str]:
        return [root for root in self.roots if any(root.startswith(self.devices[name]) for name in self.shown)]

    def show(self, *names: str) -> Appliance:
        for name, device in self.devices.items():
            if (name in names) != (name in self.shown):
                self.appliance.g.pwrite_device(device, self.heads[name] if name in names else bytes(HEAD), 0)
                self.appliance.g.blockdev_rereadpt(device)
        self.shown = set(names)
        return self.appliance


def debian(work: Path) -> Path:
    root = disk_trees.system(work / "debian-tree", ident="debian", title="Debian GNU/Linux", version="12")
    disk_trees.write(
        root,
        {
            "etc/fstab": f"UUID={UUID} / ext4 defaults 0 1\n/dev/sdb1 /srv/my\\040data ext4 defaults 0 2\n",
            "boot/grub/grub.cfg": disk_trees.DEBIAN_GRUB,
            "etc/network/interfaces": "auto lo ens192\niface lo inet loopback\niface ens192 inet static\n",
            "etc/systemd/network/10-lan.network": "[Match]\nName=eth1\n",
            "usr/sbin/update-initramfs": "#!/bin/sh\n",
            "usr/bin/vmtoolsd": b"\x7fELF",
        },
    )
    lacking = disk_trees.initrd("ata_piix", "ahci", "sd_mod", "vmw_pvscsi")
    drivers = ("virtio_blk", "virtio_scsi", "virtio_net", "sd_mod", "vmxnet3", "e1000")
    disk_trees.kernel(root, VERSION, f"initrd.img-{VERSION}", lacking, available=drivers)
    disk_trees.kernel(root, NEWER, f"initrd.img-{NEWER}", disk_trees.initrd("virtio_blk"), available=drivers)
    return disk_trees.with_mbr(disk_trees.ext4(root, work / "debian.raw", 32 * MiB, offset=MiB))


def rhel(work: Path) -> Path:
    """GPT, an ESP (filled in the appliance), a root whose grub.cfg reads BLS entries."""
    root = disk_trees.system(work / "rhel-tree", ident="rhel", title="Red Hat Enterprise Linux", version="9.3")
    version = "5.14.0-362.el9.x86_64"
    disk_trees.write(
        root,
        {
            "boot/grub2/grub.cfg": 'set default="${saved_entry}"\nset kernelopts="quiet crashkernel=256M"\nblscfg\n',
            "boot/grub2/grubenv": f"# GRUB Environment Block\nsaved_entry=abc-{version}\n" + "#" * 900,
            f"boot/loader/entries/abc-{version}.conf": BLS,
            "boot/loader/entries/abc-0-rescue.conf": BLS.replace(version, "0-rescue-abc"),
            "usr/bin/dracut": "#!/bin/sh\n",
            "etc/NetworkManager/system-connections/lan.nmconnection": "[connection]\ntype=ethernet\ninterface-name=eth0\n",
        },
    )
    disk_trees.kernel(root, version, f"initramfs-{version}.img", disk_trees.initrd("hv_storvsc"), available=("xfs",))
    out = disk_trees.ext4(root, work / "rhel.raw", 24 * MiB, offset=8 * MiB)
    os.truncate(out, 34 * MiB)
    table = "label: gpt\nstart=2048,size=12288,type=U\nstart=16384,size=49152,type=L\n"
    run_program(["sfdisk", "-q", str(out)], package="fdisk", input_bytes=table.encode())
    return out


def hostile(work: Path) -> Path:
    root = disk_trees.system(work / "hostile-tree", ident="debian", title="\x1b]0;owned\x07Linux", version="12")
    disk_trees.write(
        root,
        {
            "etc/hostname": b"\xff\xfe\x00\x80binary\x1b[2J\n",
            "boot/grub/grub.cfg": "submenu 'x' {\n" * 30_000 + "menuentry 'deep' {\nlinux /vmlinuz root=/dev/sda1\n",
            f"boot/initrd.img-{VERSION}": b"\x1f\x8b" + os.urandom(4096),
            f"boot/vmlinuz-{VERSION}": b"no kernel",
            f"lib/modules/{VERSION}/modules.dep": "kernel/virtio_blk.ko:\n" * 10,
        },
    )
    (root / "boot/loader").symlink_to("loader")
    (root / "etc/netplan").symlink_to("../etc/netplan")
    (root / "etc/NetworkManager").symlink_to("/dev/zero")
    (root / "etc/network").mkdir()
    os.mkfifo(root / "etc/network/interfaces")
    with (root / "etc/kernel").open("wb"):
        pass
    (root / "etc/systemd/network").mkdir(parents=True)
    os.close(os.open(os.fsencode(root) + b"/etc/systemd/network/\xff\xfe.network", os.O_CREAT))
    with (root / "boot/grub/grubenv").open("wb") as giant:
        giant.truncate(GiB)
    return disk_trees.with_mbr(disk_trees.ext4(root, work / "hostile.raw", 48 * MiB, offset=MiB))


def raw_volume(work: Path, name: str, start: bytes) -> Path:
    out = work / f"{name}.raw"
    out.write_bytes(bytes(MiB) + start.ljust(MiB, b"\0"))
    return disk_trees.with_mbr(out, boot_code=b"")


def fill_esp(appliance: Appliance, esp: str) -> None:
    appliance.g.mkfs("vfat", esp)
    appliance.g.mount(esp, "/")
    appliance.g.mkdir_p("/EFI/redhat")
    appliance.g.write("/EFI/redhat/shimx64.efi", b"MZ")
    appliance.unmount()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tcg: bool) -> Iterator[Bench]:
    work = tmp_path_factory.mktemp("inspection")
    disks = {
        "debian": debian(work),
        "rhel": rhel(work),
        "hostile": hostile(work),
        "luks": raw_volume(work, "luks", b"LUKS\xba\xbe\0\x01"),
        "bitlocker": raw_volume(work, "bitlocker", b"\xebX\x90-FVE-FS-"),
    }
    disks["windows"] = work / "windows.raw"
    build_all({disks["windows"]: WindowsSettings(tools="vmware", static_ip=True)}, tcg=tcg)
    with Appliance.launch([GuestDisk(str(path)) for path in disks.values()], readonly=True, tcg=tcg) as appliance:
        made = Bench(appliance, disks)
        fill_esp(appliance, made.devices["rhel"] + "1")
        yield made


def test_a_debian_on_bios_without_virtio_in_its_default_initramfs(bench: Bench) -> None:
    facts = inspect(bench.show("debian"))
    linux = facts.linux
    assert linux is not None
    assert (facts.family, facts.distro, facts.major, facts.arch) == (OsFamily.LINUX, "debian", 12, "x86_64")
    assert (facts.firmware, facts.boot_disk, facts.hostname) == (Firmware.BIOS, 0, "debian-1")
    assert (linux.boot_loader, linux.generator, linux.tools) == ("grub-bios", "initramfs-tools", ("open-vm-tools",))
    assert linux.command_line == f"root=UUID={UUID} ro console=ttyS0"
    assert (linux.root, linux.by_name) == (f"UUID={UUID}", ("/srv/my data",))
    assert linux.interfaces == ("ens192", "eth1")
    assert [one.version for one in linux.kernels] == [NEWER, VERSION]
    default = linux.default_kernel
    assert default is not None
    assert (default.version, default.initrd, default.packing) == (VERSION, f"/boot/initrd.img-{VERSION}", "gzip")
    assert default.has("virtio_pci")
    assert not default.has("virtio_blk")
    assert default.size > 0
    assert len(default.sha256) == 64
    assert 0 < linux.boot_free < 32 * MiB
    assert not linux.lvm
    assert not linux.luks
    judgement = judge(facts, 2)
    assert (judgement.verdict, judgement.ways[0]) == (Verdict.MICRO, Way.MICRO)
    assert judgement.buses[:2] == (DiskBus.PVSCSI, DiskBus.SATA)
    assert bench.appliance.g.mounts() == []


def test_a_rhel_on_uefi_boots_what_its_bls_entry_says(bench: Bench) -> None:
    facts = inspect(bench.show("rhel"))
    linux = facts.linux
    assert linux is not None
    assert (facts.firmware, facts.boot_disk, facts.efi_loaders) == (Firmware.UEFI, 1, ("\\EFI\\redhat\\shimx64.efi",))
    assert (linux.boot_loader, linux.generator, linux.interfaces) == ("grub-efi", "dracut", ("eth0",))
    assert linux.command_line == "root=UUID=9 ro quiet crashkernel=256M"
    assert [(one.version, one.default) for one in linux.kernels] == [("5.14.0-362.el9.x86_64", True)]
    assert any("boot entry" in one.fix for one in facts.problems)
    assert judge(facts, 1).verdict is Verdict.CANNOT


def test_several_systems_are_listed_and_one_must_be_named(bench: Bench) -> None:
    appliance = bench.show("debian", "rhel")
    with pytest.raises(GuestError, match="2 operating systems") as refused:
        inspect(appliance)
    device = bench.devices["debian"] + "1"
    assert f"--root with one of: {device} (Debian GNU/Linux 12)" in refused.value.fix
    assert inspect(appliance, root=device).distro == "debian"
    with pytest.raises(GuestError, match="no operating system on /dev/sdz1"):
        inspect(appliance, root="/dev/sdz1")


@pytest.mark.parametrize(("disk", "said"), [("luks", "LUKS"), ("bitlocker", "BitLocker")])
def test_an_encrypted_disk_has_no_system_and_says_why(bench: Bench, disk: str, said: str) -> None:
    facts = inspect(bench.show(disk))
    assert facts.family is OsFamily.OTHER
    (problem,) = facts.problems
    assert (problem.severity, said in problem.what) == (Severity.BLOCKER, True)
    assert judge(facts, 1).verdict is Verdict.CANNOT


def test_a_hostile_guest_costs_no_memory_and_shows_no_escapes(bench: Bench) -> None:
    facts = inspect(bench.show("hostile"))
    linux = facts.linux
    assert linux is not None
    assert (facts.product + facts.hostname).isprintable()
    assert any("grubenv" in one.where and "1 GiB" in one.what for one in facts.problems)
    assert linux.interfaces == ()
    (kernel,) = linux.kernels
    assert kernel.problem
    assert judge(facts, 1).verdict is Verdict.CANNOT


def test_a_windows_with_vmware_tools_and_then_hibernated_and_dirty(bench: Bench) -> None:
    facts = inspect(bench.show("windows"))
    windows = facts.windows
    assert windows is not None
    assert (facts.family, facts.distro, facts.arch) == (OsFamily.WINDOWS, "windows", "x86_64")
    assert (windows.control_set, windows.version, windows.build) == ("ControlSet001", "10.0", 20348)
    assert windows.tools
    assert windows.tools[0].startswith("VMware Tools")
    assert windows.static_ip
    assert not windows.hibernated
    assert not windows.dirty
    assert not windows.fast_startup
    assert {"lsi_sas.sys", "storahci.sys"} <= windows.drivers
    assert "lsi_sas" in windows.boot_start
    assert "storahci" not in windows.boot_start  # its StartOverride says 3
    judgement = judge(facts, 1)
    assert (judgement.verdict, DiskBus.SAS in judgement.buses) == (Verdict.MICRO, True)
    make_unfit(bench.appliance, bench.devices["windows"] + "1")
    facts = inspect(bench.appliance)
    windows = facts.windows
    assert windows is not None
    assert (windows.hibernated, windows.dirty) == (True, True)
    assert judge(facts, 1).verdict is Verdict.CANNOT


def make_unfit(appliance: Appliance, volume: str) -> None:
    """Dirty, then hibernated, in the overlay. ntfs-3g writes to no hibernated volume, so in this order."""
    appliance.g.ntfsfix(volume)
    appliance.g.mount(volume, "/")
    appliance.g.write("/hiberfil.sys", b"hibr" + bytes(4092))
    appliance.unmount()
