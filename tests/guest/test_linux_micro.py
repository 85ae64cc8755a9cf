"""The Linux micro-morph of a guest without virtio in its initramfs: planned, refused, applied, broken off; at last booted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.guest.host_guestfs import HostGuestfs

from tokvm.core.units import MiB
from tokvm.guest import linux_micro
from tokvm.guest.appliance import Appliance
from tokvm.guest.base import GuestDisk, GuestError, GuestFacts, InitrdFacts, LinuxFacts, OsFamily
from tokvm.guest.initrd import archive
from tokvm.guest.initrd.modules import Lists
from tokvm.guest.kernel_way import DirectKernelFiles, boot_files, command_line, kernel_way
from tokvm.guest.kernel_way import check as check_kernel
from tokvm.guest.linux_initrd import mounted, stamp
from tokvm.guest.micro_plan import MicroPlan, PlannedFile, link_files
from tokvm.lab.guest_image import build_guest
from tokvm.lab.guest_initrd import INSTALLED, Drivers, make_initrd, modules_tree
from tokvm.lab.kernel import find_kernel
from tokvm.remote import process

MODULES = "/etc/initramfs-tools/modules"
MODULES_BEFORE = "# List of modules: ext4, not virtio_blk\next4 virtio_scsi=1"
LINK = "/etc/systemd/network/10-tokvm-ens192.link"
BOOT_TIMEOUT_S = 250.0
BUSES = {"virtio-blk": ["-device", "virtio-blk-pci,drive=d0"], "ide": ["-device", "ide-hd,drive=d0,bus=ide.0"]}


# --- without an appliance


def test_a_plan_survives_json() -> None:
    plan = MicroPlan({"/": "/dev/sda1"}, (), (PlannedFile("/etc/x", "y\n"),), {"/boot": ("a", "b")}, ("5.0: why",), 1.5)

    assert MicroPlan.parse(json.loads(json.dumps(plan.as_json()))) == plan


@pytest.mark.parametrize(
    "change",
    [{"mounts": None}, {"initrds": [{}]}, {"files": [{"path": "/x", "shell": "rm"}]}, {"seconds": "soon"}, {"folders": 3}],
)
def test_a_plan_that_is_none_is_refused(change: dict[str, Any]) -> None:
    raw = MicroPlan({}, (), (), {}).as_json() | change

    with pytest.raises(GuestError, match="plan of the morph"):
        MicroPlan.parse(raw)


def test_link_files_name_each_card_by_its_address() -> None:
    (first, second) = link_files({"00:50:56:AA:BB:CC": "ens192", "00:15:5d:00:00:01": "eth0"})

    assert [first.path, second.path] == ["/etc/systemd/network/10-tokvm-eth0.link", LINK]
    assert "[Match]\nMACAddress=00:50:56:aa:bb:cc\n\n[Link]\nName=ens192\n" in second.content


@pytest.mark.parametrize(
    "names",
    [
        {"00:50:56:aa:bb": "eth0"},
        {"00:50:56:aa:bb:cc\nx": "eth0"},
        {"00:50:56:aa:bb:cc": "../x"},
        {"00:50:56:aa:bb:cc": "a" * 16},
        {"00:50:56:aa:bb:cc": "eth0\n"},
        {"00:50:56:aa:bb:cc": "eth0", "00:50:56:aa:bb:cd": "eth0"},
    ],
)
def test_names_that_no_card_can_have_are_refused(names: dict[str, str]) -> None:
    with pytest.raises(GuestError):
        link_files(names)


@pytest.mark.parametrize(
    ("line", "root", "text"),
    [
        ("BOOT_IMAGE=/vmlinuz root=UUID=1 ro quiet", "", "root=UUID=1 ro quiet"),
        (r"initrd=\x\initrd root=/dev/vg/root rw", "", "root=/dev/vg/root rw"),
        ("ro quiet", "UUID=1", "root=UUID=1 ro quiet"),
    ],
)
def test_a_direct_kernels_command_line_is_the_boot_entrys(line: str, root: str, text: str) -> None:
    assert command_line(line, root) == text


@pytest.mark.parametrize("line", ["ro quiet", "root=UUID=1 $kernelopts", "root=UUID=1 " + "x" * 2048, "root=UUID=1 \x1b[2J"])
def test_a_command_line_that_cannot_be_used_is_refused(line: str) -> None:
    with pytest.raises(GuestError):
        command_line(line, "")


# --- on a guest's files


def facts_of(version: str, line: str) -> GuestFacts:
    """What inspection finds there, without the minute that it takes an emulated appliance."""
    kernel = InitrdFacts(version, f"/boot/vmlinuz-{version}", f"/boot/initrd.img-{version}", default=True)
    linux = LinuxFacts((kernel,), command_line=line, generator="initramfs-tools")
    return GuestFacts(OsFamily.LINUX, root="/dev/sda1", arch="x86_64", mounts={"/": "/dev/sda1"}, linux=linux)


@dataclasses.dataclass
class Lab:
    """A guest whose initramfs knows IDE only, in a folder, and a store for plans."""

    g: HostGuestfs
    appliance: Appliance
    facts: GuestFacts
    store: Path

    @property
    def root(self) -> Path:
        return self.g.root

    @property
    def linux(self) -> LinuxFacts:
        assert self.facts.linux is not None
        return self.facts.linux

    @property
    def initrd(self) -> Path:
        return self.root / self.linux.kernels[0].initrd.lstrip("/")

    def with_kernels(self, *kernels: InitrdFacts) -> GuestFacts:
        return dataclasses.replace(self.facts, linux=dataclasses.replace(self.linux, kernels=kernels))

    def plan(self) -> MicroPlan:
        return linux_micro.plan(self.appliance, self.facts, self.store, names=NAMES)

    def apply(self, planned: MicroPlan) -> None:
        linux_micro.apply(self.appliance, planned, self.store)


NAMES = {"00:50:56:00:00:01": "ens192"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, kernel = tmp_path_factory.mktemp("tree"), find_kernel()
    modules_tree(kernel, INSTALLED, root)
    for folder in ("boot", "etc/initramfs-tools", "etc/systemd/network"):
        (root / folder).mkdir(parents=True)
    busybox = Path(process.which("busybox"))
    (root / f"boot/vmlinuz-{kernel.version}").write_bytes(b"a kernel")
    (root / f"boot/initrd.img-{kernel.version}").write_bytes(
        make_initrd(kernel, busybox, Drivers.IDE, tmp_path_factory.mktemp("initrd"))
    )
    (root / MODULES.lstrip("/")).write_text(MODULES_BEFORE)
    return root


@pytest.fixture
def lab(tree: Path, tmp_path: Path) -> Iterator[Lab]:
    root, store = tmp_path / "root", tmp_path / "store"
    shutil.copytree(tree, root, symlinks=True)
    store.mkdir()
    g = HostGuestfs(root)
    appliance = Appliance(g, [GuestDisk("/a.raw")], readonly=False, deadline_s=60)
    yield Lab(g, appliance, facts_of(find_kernel().version, "root=UUID=1 ro"), store)
    appliance.abandon()


def test_the_plan_says_what_will_be_done_and_changes_nothing(lab: Lab) -> None:
    before = lab.initrd.read_bytes()
    planned = lab.plan()
    (one,) = planned.initrds

    assert (one.path, one.size) == (f"/{lab.initrd.relative_to(lab.root)}", len(before))
    assert set(one.added) >= {"virtio_blk", "virtio_scsi"}
    assert planned.mounts == {"/": "/dev/sda1"}
    assert [file.path for file in planned.files] == [MODULES, LINK]
    assert (lab.store / one.segment).stat().st_size == one.segment_size
    assert MicroPlan.parse(json.loads(json.dumps(planned.as_json()))) == planned
    assert lab.g.writes == []
    assert lab.g.mounted == {}


def test_applied_twice_is_applied_once(lab: Lab) -> None:
    before, planned = lab.initrd.read_bytes(), lab.plan()
    lab.apply(planned)
    after, writes = lab.initrd.read_bytes(), len(lab.g.writes)
    lab.apply(planned)

    assert lab.initrd.read_bytes() == after
    assert lab.g.writes[writes:] == []
    assert after[: len(before)] == before
    assert len(after) == planned.initrds[0].new_size
    assert (
        archive.modules_in(after) >= {"virtio_pci", "virtio_blk", "virtio_scsi"} - Lists.parse("", builtin=builtin(lab)).builtin
    )
    assert (lab.root / MODULES.lstrip("/")).read_text() == (
        f"{MODULES_BEFORE}\n# added by tokvm: the disks of KVM\nvirtio_pci\nvirtio_blk\nvirtio_scsi\n"
    )
    assert (lab.root / LINK.lstrip("/")).read_text() == planned.files[1].content
    assert lab.g.mounted == {}
    assert lab.plan().initrds == ()


def builtin(lab: Lab) -> str:
    return (lab.root / "lib/modules" / lab.linux.kernels[0].version / "modules.builtin").read_text()


CHANGES: dict[str, Callable[[Lab], object]] = {
    "touched": lambda lab: os.utime(lab.initrd, ns=(0, 1)),
    "longer": lambda lab: lab.initrd.write_bytes(lab.initrd.read_bytes() + b"1234"),
    "another segment's size": lambda lab: os.truncate(lab.initrd, lab.plan().initrds[0].new_size),
    "another kernel": lambda lab: (lab.root / "boot/vmlinuz-9").write_bytes(b"x"),
    "list of modules": lambda lab: (lab.root / MODULES.lstrip("/")).write_text("other\n"),
    "list of modules gone": lambda lab: (lab.root / MODULES.lstrip("/")).unlink(),
    "a link file": lambda lab: (lab.root / LINK.lstrip("/")).write_text("other\n"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.slow
def test_what_changed_since_the_rehearsal_is_refused_before_anything_is_written(
    change: Callable[[Lab], object], lab: Lab
) -> None:
    planned = lab.plan()
    change(lab)

    with pytest.raises(GuestError, match="changed since the rehearsal"):
        linux_micro.check(lab.appliance, planned)
    with pytest.raises(GuestError, match="changed since the rehearsal"):
        lab.apply(planned)

    assert lab.g.writes == []
    assert lab.g.mounted == {}


def test_a_full_file_system_is_seen_before_anything_is_written(lab: Lab) -> None:
    planned = lab.plan()
    one = planned.initrds[0]
    lab.g.free = one.segment_size + MiB - 4096

    with pytest.raises(GuestError, match="needed for the longer initramfs"):
        lab.apply(planned)
    assert lab.g.writes == []

    lab.g.free += 2 * 4096
    lab.apply(planned)


def test_broken_off_anywhere_it_is_said_and_the_next_try_ends_it_or_refuses(lab: Lab) -> None:
    """The overlay that it broke in is thrown away; should somebody go on with it all the same, nothing half is called done."""
    planned = lab.plan()
    files = [planned.initrds[0].path, MODULES, LINK]
    old = contents(lab, files)
    lab.apply(planned)
    new, writes, refused = contents(lab, files), len(lab.g.writes), 0

    for at in range(1, writes + 1):
        for name, content in old.items():
            put(lab, name, content)
        os.utime(lab.initrd, ns=(0, planned.initrds[0].mtime_ns))
        lab.g.writes, lab.g.break_at = [], at
        with pytest.raises(GuestError, match="it broke here"):
            lab.apply(planned)
        assert lab.g.mounted == {}
        lab.g.break_at = 0
        half = any(found not in {old[name], new[name]} for name, found in contents(lab, files).items())
        refused += half
        with pytest.raises(GuestError, match="changed since the rehearsal") if half else contextlib.nullcontext():
            lab.apply(planned)
        assert half or contents(lab, files) == new
    assert 0 < refused < writes


def test_an_initramfs_is_written_where_it_lies_and_nothing_of_it_is_written_again(lab: Lab) -> None:
    planned = lab.plan()
    inode = lab.initrd.stat().st_ino
    lab.apply(planned)

    assert lab.initrd.stat().st_ino == inode
    assert set(lab.g.writes) == {"pwrite", "write", "copy_attributes"}


def contents(lab: Lab, names: list[str]) -> dict[str, bytes | None]:
    paths = {name: lab.root / name.lstrip("/") for name in names}
    return {name: path.read_bytes() if path.exists() else None for name, path in paths.items()}


def put(lab: Lab, name: str, content: bytes | None) -> None:
    path = lab.root / name.lstrip("/")
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)


@pytest.mark.parametrize("content", [b"x", b""])
def test_a_segment_that_is_not_the_planned_one_is_refused(content: bytes, lab: Lab) -> None:
    planned = lab.plan()
    one = planned.initrds[0]
    (lab.store / one.segment).write_bytes(content * one.segment_size)

    with pytest.raises(GuestError, match="not the segment"):
        lab.apply(planned)


def test_a_segment_that_is_gone_is_said(lab: Lab) -> None:
    planned = lab.plan()
    (lab.store / planned.initrds[0].segment).unlink()

    with pytest.raises(GuestError, match="cannot be read"):
        lab.apply(planned)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"measured": True}, "signed or measured"),
        ({"initrd": ""}, "no initramfs"),
        ({"version": "0.0"}, "not in one folder"),
        ({"initrd": MODULES}, "no archive"),
        ({"initrd": "/boot/none"}, "No such file"),
    ],
)
def test_what_cannot_be_changed_is_not_planned(change: dict[str, Any], said: str, lab: Lab) -> None:
    kernel = dataclasses.replace(lab.linux.kernels[0], **change)

    with pytest.raises(GuestError, match=said):
        linux_micro.plan(lab.appliance, lab.with_kernels(kernel), lab.store)

    assert list(lab.store.iterdir()) == []
    assert lab.g.mounted == {}


def test_no_kernel_and_no_linux_are_said(lab: Lab) -> None:
    for facts in (lab.with_kernels(), dataclasses.replace(lab.facts, linux=None)):
        with pytest.raises(GuestError):
            linux_micro.plan(lab.appliance, facts, lab.store)


def test_a_kernel_that_is_not_the_default_may_be_left_out(lab: Lab) -> None:
    good = lab.linux.kernels[0]
    bad = dataclasses.replace(good, version="5.0", default=False)
    planned = linux_micro.plan(lab.appliance, lab.with_kernels(bad, good), lab.store)

    assert [one.version for one in planned.initrds] == [good.version]
    assert planned.left_out[0].startswith("5.0: ")


@pytest.mark.parametrize(
    ("generator", "path", "line"),
    [
        ("dracut", "/etc/dracut.conf.d/tokvm.conf", 'add_drivers+=" virtio_pci virtio_blk virtio_scsi "\n'),
        ("mkinitcpio", "/etc/mkinitcpio.conf.d/tokvm.conf", "MODULES+=(virtio_pci virtio_blk virtio_scsi)\n"),
    ],
)
def test_the_next_build_of_the_initramfs_keeps_virtio(generator: str, path: str, line: str, lab: Lab) -> None:
    facts = dataclasses.replace(lab.facts, linux=dataclasses.replace(lab.linux, generator=generator))
    without = linux_micro.plan(lab.appliance, facts, lab.store)
    (lab.root / path.lstrip("/")).parent.mkdir(parents=True)
    planned = linux_micro.plan(lab.appliance, facts, lab.store)
    lab.apply(planned)

    assert without.files == ()
    assert (lab.root / path.lstrip("/")).read_text() == line


def test_a_file_whose_folder_is_not_there_is_not_planned(lab: Lab) -> None:
    """Nobody would read it; seen on a guest that has initramfs-tools' name and nothing else of it."""
    shutil.rmtree(lab.root / "etc")
    planned = lab.plan()
    lab.apply(planned)

    assert len(planned.initrds) == 1
    assert planned.files == ()


def test_only_what_is_written_to_is_mounted_in_the_window(lab: Lab) -> None:
    mounts = {
        "/": "/dev/vg/root",
        "/boot": "/dev/sda1",
        "/boot/efi": "/dev/sda2",
        "/usr": "/dev/vg/usr",
        "/home": "/dev/vg/home",
    }
    planned = linux_micro.plan(lab.appliance, dataclasses.replace(lab.facts, mounts=mounts), lab.store)

    assert planned.mounts == {"/": "/dev/vg/root", "/boot": "/dev/sda1"}


def test_the_kernel_way_leaves_the_disk_alone(lab: Lab) -> None:
    direct = kernel_way(lab.appliance, lab.facts, lab.store)

    assert lab.g.writes == []
    assert direct.kernel.read_bytes() == b"a kernel"
    assert direct.cmdline == "root=UUID=1 ro"
    lab.apply(lab.plan())
    assert direct.initrd.read_bytes() == lab.initrd.read_bytes()


def test_a_kernel_beside_the_vm_is_for_the_initramfs_it_was_made_from(lab: Lab) -> None:
    (path,) = boot_files(lab.facts)
    with mounted(lab.appliance, lab.facts.mounts):
        now = list(stamp(lab.appliance, path))
    check_kernel(lab.appliance, lab.facts.mounts, {path: now})
    with pytest.raises(GuestError, match="changed since the rehearsal") as refused:
        check_kernel(lab.appliance, lab.facts.mounts, {path: [1, 2]})
    assert refused.value.where == path
    assert lab.g.writes == []


# --- for good


def boot(disk: Path, bus: str, direct: DirectKernelFiles | None = None) -> str:
    """The line on which the guest says that it is up, or that it found no disk. Nothing is written to the disk."""
    extra = ["-kernel", str(direct.kernel), "-initrd", str(direct.initrd), "-append", direct.cmdline] if direct else []
    argv = [
        *(
            "qemu-system-x86_64",
            "-accel",
            "tcg",
            "-machine",
            "pc",
            "-cpu",
            "max",
            "-m",
            "256",
            "-nodefaults",
            "-no-user-config",
        ),
        *("-display", "none", "-no-reboot", "-serial", "stdio", "-snapshot", "-monitor", "none"),
        *("-drive", f"file={disk},format=raw,if=none,id=d0,cache=unsafe", *BUSES[bus], *extra),
    ]
    with process.start(argv, where="qemu") as qemu:
        said, deadline = b"", time.monotonic() + BOOT_TIMEOUT_S
        while time.monotonic() < deadline and (piece := os.read(qemu.stdout, 65536)):
            said += piece
            if match := re.search(rb"LAB-GUEST (READY|ALERT)[^\n]*\n", said):
                return match[0].decode().strip()
    raise AssertionError(f"nothing on {bus}: {said[-600:]!r} {qemu.stderr_tail()[-300:]!r}")


@pytest.mark.nightly  # tests/lab/test_run_trial.py does this every day, from a source to the target
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_boots_on_virtio_only_after_the_morph_and_still_on_ide(tmp_path: Path, tcg: bool) -> None:
    """Through BIOS and GRUB from the morphed disk; directly with the kernel way's files, which hold the same initramfs."""
    guest = build_guest(tmp_path / "guest.raw", size=128 * MiB, drivers="ide")
    facts = facts_of(find_kernel().version, guest.command_line)
    assert "ALERT! UUID=" in boot(guest.disk, "virtio-blk", DirectKernelFiles(guest.kernel, guest.initrd, guest.command_line))

    with Appliance.launch([GuestDisk(str(guest.disk))], readonly=False, tcg=tcg) as appliance:
        with mounted(appliance, facts.mounts):
            for file in (MODULES, LINK):
                appliance.g.mkdir_p(file.rpartition("/")[0])
            appliance.g.write(MODULES, MODULES_BEFORE.encode())
        planned = linux_micro.plan(appliance, facts, tmp_path, names=NAMES)
        direct = kernel_way(appliance, facts, tmp_path)
        linux_micro.ready(appliance, planned)
        appliance.forget()
        before = cpu_s(appliance)
        linux_micro.apply(appliance, planned, tmp_path)
        print(f"apply: {cpu_s(appliance) - before:.2f} s of CPU")
        linux_micro.apply(appliance, planned, tmp_path)
        with mounted(appliance, facts.mounts):
            path = planned.initrds[0].path
            assert appliance.read(path) == direct.initrd.read_bytes()
            assert appliance.g.statns(path)["st_mode"] & 0o7777 == 0o644
            assert {file.path: appliance.read(file.path).decode() for file in planned.files} == {
                file.path: file.content for file in planned.files
            }
            assert {MODULES, LINK} == {file.path for file in planned.files}

    assert "root=vda1" in boot(guest.disk, "virtio-blk")
    assert "root=sda1" in boot(guest.disk, "ide", direct)


def cpu_s(appliance: Appliance) -> float:
    fields = Path(f"/proc/{appliance.g.get_pid()}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
