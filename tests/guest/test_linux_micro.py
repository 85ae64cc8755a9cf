"""The Linux micro-morph on a real guest without virtio in its initramfs: planned, refused, applied, broken off, booted."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.units import MiB
from tokvm.guest import linux_micro
from tokvm.guest.appliance import Appliance
from tokvm.guest.base import GuestDisk, GuestError, GuestFacts, InitrdFacts, LinuxFacts, OsFamily
from tokvm.guest.initrd import archive
from tokvm.guest.kernel_way import DirectKernelFiles, command_line, kernel_way
from tokvm.guest.linux_initrd import mounted
from tokvm.guest.micro_plan import MicroPlan, PlannedFile, link_files
from tokvm.lab.guest_image import GuestImage, build_guest
from tokvm.lab.kernel import find_kernel
from tokvm.remote import process

slow = pytest.mark.slow
VIRTIO = {"virtio_pci", "virtio_blk", "virtio_scsi"}
MODULES = "/etc/initramfs-tools/modules"
MODULES_BEFORE = "# List of modules\next4"
LINK = "/etc/systemd/network/10-tokvm-ens192.link"
BUSES = {
    "virtio-blk": ["-device", "virtio-blk-pci,drive=d0"],
    "virtio-scsi": ["-device", "virtio-scsi-pci,id=s0", "-device", "scsi-hd,drive=d0,bus=s0.0"],
    "ide": ["-device", "ide-hd,drive=d0,bus=ide.0"],
}


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


# --- in an appliance


@dataclasses.dataclass
class Lab:
    """A launched appliance over a guest whose initramfs knows IDE only."""

    appliance: Appliance
    disk: Path
    facts: GuestFacts
    initrd: str

    @property
    def linux(self) -> LinuxFacts:
        assert self.facts.linux is not None
        return self.facts.linux

    def changed(self, **kernel: Any) -> GuestFacts:
        """The facts with another first kernel."""
        first = dataclasses.replace(self.linux.kernels[0], **kernel)
        return dataclasses.replace(self.facts, linux=dataclasses.replace(self.linux, kernels=(first,)))

    def read(self, path: str) -> bytes:
        with mounted(self.appliance, self.facts.mounts):
            return self.appliance.read(path)


def facts_of(image: GuestImage) -> GuestFacts:
    """What inspection finds there, without the minute that it takes an emulated appliance."""
    version = find_kernel().version
    modules = archive.modules_in(image.initrd.read_bytes())
    assert not VIRTIO & modules
    kernel = InitrdFacts(version, f"/boot/vmlinuz-{version}", f"/boot/initrd.img-{version}", modules=modules, default=True)
    linux = LinuxFacts((kernel,), command_line=image.command_line, generator="initramfs-tools")
    return GuestFacts(OsFamily.LINUX, root="/dev/sda1", arch="x86_64", mounts={"/": "/dev/sda1"}, linux=linux)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tcg: bool) -> Iterator[Lab]:
    image = build_guest(tmp_path_factory.mktemp("micro") / "guest.raw", size=128 * MiB, drivers="ide")
    disk = image.disk
    with Appliance.launch([GuestDisk(str(disk))], readonly=False, tcg=tcg) as appliance:
        facts = facts_of(image)
        assert facts.linux is not None
        kernel = facts.linux.kernels[0]
        with mounted(appliance, facts.mounts):
            for file in (MODULES, LINK):
                appliance.g.mkdir_p(file.rpartition("/")[0])
            appliance.g.write(MODULES, MODULES_BEFORE.encode())
            appliance.g.mkdir("/keep")
            appliance.g.cp_a(kernel.initrd, "/keep/initrd")
            appliance.g.cp_a(MODULES, "/keep/modules")
        yield Lab(appliance, disk, facts, kernel.initrd)


@pytest.fixture
def lab(made: Lab) -> Lab:
    """As it was at first."""
    with mounted(made.appliance, made.facts.mounts):
        made.appliance.g.cp_a("/keep/initrd", made.initrd)
        made.appliance.g.cp_a("/keep/modules", MODULES)
        made.appliance.g.rm_f(LINK)
        for pattern in ("/boot/fill", "/boot/vmlinuz-9", f"{made.initrd}{linux_micro.BESIDE}"):
            made.appliance.g.rm_f(pattern)
    return made


NAMES = {"00:50:56:00:00:01": "ens192"}


@pytest.fixture
def planned(lab: Lab, tmp_path: Path) -> MicroPlan:
    return linux_micro.plan(lab.appliance, lab.facts, tmp_path, names=NAMES)


@slow
def test_the_plan_says_what_will_be_done_and_writes_nothing_to_the_guest(lab: Lab, planned: MicroPlan, tmp_path: Path) -> None:
    before = lab.read(lab.initrd)
    (one,) = planned.initrds

    assert (one.path, one.size) == (lab.initrd, len(before))
    assert set(one.added) >= VIRTIO - lab.linux.kernels[0].builtin
    assert planned.mounts == {"/": lab.facts.mounts["/"]}
    assert {file.path for file in planned.files} == {MODULES, LINK}
    assert (tmp_path / one.segment).stat().st_size == one.segment_size
    assert MicroPlan.parse(json.loads(json.dumps(planned.as_json()))) == planned
    assert before == lab.read("/keep/initrd")


@slow
def test_applied_twice_is_applied_once(lab: Lab, planned: MicroPlan, tmp_path: Path) -> None:
    before = lab.read(lab.initrd)
    for _ in range(2):
        linux_micro.apply(lab.appliance, planned, tmp_path)
    after = lab.read(lab.initrd)

    assert after[: len(before)] == before
    assert len(after) == planned.initrds[0].new_size
    assert archive.modules_in(after) >= VIRTIO - lab.linux.kernels[0].builtin
    assert lab.read(MODULES).decode() == (
        f"{MODULES_BEFORE}\n# added by tokvm: the disks of KVM\nvirtio_pci\nvirtio_blk\nvirtio_scsi\n"
    )
    assert lab.read(LINK).decode() == planned.files[1].content
    with mounted(lab.appliance, lab.facts.mounts):
        stat = lab.appliance.g.statns(lab.initrd)
        assert (stat["st_mode"] & 0o7777, stat["st_uid"]) == (0o644, 0)
        assert not [name for name in lab.appliance.g.find("/") if name.endswith(linux_micro.BESIDE)]
    assert linux_micro.plan(lab.appliance, lab.facts, tmp_path, names=NAMES).initrds == ()


@slow
def test_what_changed_since_the_rehearsal_is_refused_before_anything_is_written(
    lab: Lab, planned: MicroPlan, tmp_path: Path
) -> None:
    g = lab.appliance.g
    changes: dict[str, Callable[[], object]] = {
        "touched": lambda: g.touch(lab.initrd),
        "longer": lambda: g.write_append(lab.initrd, b"1234"),
        "another kernel": lambda: g.write("/boot/vmlinuz-9", b"x"),
        "list of modules": lambda: g.write(MODULES, b"other\n"),
        "a link file": lambda: g.write(LINK, b"other\n"),
    }
    for change in changes.values():
        with mounted(lab.appliance, lab.facts.mounts):
            change()
        with pytest.raises(GuestError, match="changed since the rehearsal"):
            linux_micro.apply(lab.appliance, planned, tmp_path)
        with mounted(lab.appliance, lab.facts.mounts):
            assert not [name for name in g.find("/") if name.endswith(linux_micro.BESIDE)]
            g.cp_a("/keep/initrd", lab.initrd)
            g.cp_a("/keep/modules", MODULES)
            g.rm_f("/boot/vmlinuz-9")
            g.rm_f(LINK)
    linux_micro.apply(lab.appliance, planned, tmp_path)


@slow
def test_a_full_file_system_is_seen_before_anything_is_written(lab: Lab, planned: MicroPlan, tmp_path: Path) -> None:
    with mounted(lab.appliance, lab.facts.mounts):
        free = lab.appliance.g.statvfs("/boot")
        lab.appliance.g.fallocate64("/boot/fill", free["bavail"] * free["frsize"] - 2 * MiB)
    planned = dataclasses.replace(planned, folders={})  # it is the filling that is new there

    with pytest.raises(GuestError, match="needed for the new initramfs"):
        linux_micro.apply(lab.appliance, planned, tmp_path)

    assert lab.read(lab.initrd) == lab.read("/keep/initrd")


CALLS = 13  # that write, in one morph


class Breaking:
    """guestfs' handle, that fails at the n-th call of a kind that writes."""

    def __init__(self, g: Any, at: int) -> None:
        self._g = g
        self._left = at
        self.broke = False

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._g, name)
        if name not in {"cp_a", "pwrite", "write", "sync", "rename", "copy_attributes"}:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                self.broke = True
                raise RuntimeError("it broke here")
            return real(*arguments, **options)

        return call


@slow
def test_broken_off_anywhere_the_initramfs_is_old_or_new_and_the_next_try_goes_on(
    lab: Lab, planned: MicroPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, old, new = lab.appliance.g, lab.read(lab.initrd), planned.initrds[0].new_size
    for at in range(1, CALLS + 2):
        breaking = Breaking(real, at)
        with monkeypatch.context() as patch:
            patch.setattr(lab.appliance, "g", breaking)
            with nullcontext() if at > CALLS else pytest.raises(GuestError, match="it broke here"):
                linux_micro.apply(lab.appliance, planned, tmp_path)
        assert breaking.broke is (at <= CALLS)
        found = lab.read(lab.initrd)
        assert found == old or (len(found) == new and found.startswith(old))
        linux_micro.apply(lab.appliance, planned, tmp_path)
        assert len(lab.read(lab.initrd)) == new
        with mounted(lab.appliance, lab.facts.mounts):
            real.cp_a("/keep/initrd", lab.initrd)
            real.cp_a("/keep/modules", MODULES)
            real.rm_f(LINK)


@slow
def test_a_segment_that_is_not_the_planned_one_is_refused(lab: Lab, planned: MicroPlan, tmp_path: Path) -> None:
    file = tmp_path / planned.initrds[0].segment
    for content in (b"x" * planned.initrds[0].segment_size, b""):
        file.write_bytes(content)
        with pytest.raises(GuestError, match="not the segment"):
            linux_micro.apply(lab.appliance, planned, tmp_path)
    file.unlink()
    with pytest.raises(GuestError, match="cannot be read"):
        linux_micro.apply(lab.appliance, planned, tmp_path)


@slow
def test_what_must_not_be_changed_is_not_planned(lab: Lab, tmp_path: Path) -> None:
    for change, said in (
        ({"measured": True}, "signed or measured"),
        ({"initrd": ""}, "no initramfs"),
        ({"version": "0.0"}, "not in one folder"),
        ({"initrd": "/etc/fstab"}, "no archive"),
    ):
        with pytest.raises(GuestError, match=said):
            linux_micro.plan(lab.appliance, lab.changed(**change), tmp_path)
    assert list(tmp_path.iterdir()) == []


@slow
def test_a_kernel_that_is_not_the_default_may_be_left_out(lab: Lab, tmp_path: Path) -> None:
    good = dataclasses.replace(lab.linux.kernels[0], default=True)
    bad = dataclasses.replace(good, version="5.0", default=False)
    facts = dataclasses.replace(lab.facts, linux=dataclasses.replace(lab.linux, kernels=(bad, good)))
    planned = linux_micro.plan(lab.appliance, facts, tmp_path)

    assert [one.version for one in planned.initrds] == [good.version]
    assert planned.left_out[0].startswith("5.0: ")


# --- booted


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
        said, deadline = b"", time.monotonic() + 200
        while time.monotonic() < deadline and (piece := os.read(qemu.stdout, 65536)):
            said += piece
            if match := re.search(rb"LAB-GUEST (READY|ALERT)[^\n]*\n", said):
                return match[0].decode().strip()
    raise AssertionError(f"nothing on {bus}: {said[-600:]!r} {qemu.stderr_tail()[-300:]!r}")


@slow
def test_it_boots_on_virtio_only_after_the_morph_and_still_on_ide(lab: Lab, planned: MicroPlan, tmp_path: Path) -> None:
    """Through BIOS and GRUB; the kernel way directly, with the disk as it was."""
    before, after = tmp_path / "before.raw", tmp_path / "after.raw"
    direct = kernel_way(lab.appliance, lab.facts, tmp_path)
    shutil.copyfile(lab.disk, before)
    linux_micro.ready(lab.appliance, planned)
    lab.appliance.forget()
    started = time.monotonic()
    linux_micro.apply(lab.appliance, planned, tmp_path)
    print(f"apply: {time.monotonic() - started:.2f} s")
    shutil.copyfile(lab.disk, after)

    assert "ALERT! UUID=" in boot(before, "virtio-blk")
    assert "root=vda1" in boot(before, "virtio-blk", direct)
    assert "root=vda1" in boot(after, "virtio-blk")
    assert "root=sda1" in boot(after, "ide")
