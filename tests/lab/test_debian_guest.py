"""The real distribution's guest: how its root is asked for, how its disk is made (of a tiny root); at night, that it boots."""

from __future__ import annotations

import contextlib
import io
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tokvm.core.units import MiB
from tokvm.lab import debian_root
from tokvm.lab.boot_disk import PARTITION_OFFSET
from tokvm.lab.clock import OutsideClock
from tokvm.lab.debian_guest import build_debian
from tokvm.lab.debian_root import Release, host_release, kernel_version, recipe
from tokvm.lab.errors import LabError
from tokvm.lab.guest_image import BiosGuest, GuestSettings
from tokvm.lab.programs import find_program, run_program
from tokvm.lab.qemu_process import QemuProcess
from tokvm.lab.source_vm import SourceVm

BOOT_S = 400.0
SIZE = 640 * MiB
RELEASE = Release("bookworm", "linux-image-cloud-amd64", ("deb http://x bookworm main",))


@pytest.fixture
def tiny_root(tmp_path: Path) -> Path:
    """A tar as mmdebstrap writes it, with a file that is not root's."""
    out = tmp_path / "tiny.tar"
    with tarfile.open(out, "w") as tar:
        for name in ("./", "./boot/", "./etc/", "./dev/", "./home/"):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
        for name, content, owner in (
            ("./boot/initrd.img-6.1.0-1-cloud-amd64", b"initrd", 0),
            ("./boot/vmlinuz-6.1.0-1-cloud-amd64", b"kernel", 0),
            ("./etc/hostname", b"as it was packed\n", 0),
            ("./home/own", b"mine", 1000),
        ):
            entry = tarfile.TarInfo(name)
            entry.size, entry.uid, entry.gid, entry.mode = len(content), owner, owner, 0o640
            tar.addfile(entry, io.BytesIO(content))
    return out


def inside(disk: Path, request: str) -> str:
    said = run_program(["debugfs", "-R", request, f"{disk}?offset={PARTITION_OFFSET}"], package="e2fsprogs")
    return said.decode(errors="replace")


@pytest.mark.slow
def test_its_disk_holds_the_root_and_what_is_its_own(tiny_root: Path, tmp_path: Path) -> None:
    settings = GuestSettings(name="web-1", clock_port=4711)
    guest = build_debian(tmp_path / "web.raw", size=SIZE, settings=settings, root=tiny_root)
    assert inside(guest.disk, "cat /etc/hostname") == "web-1\n"
    assert inside(guest.disk, "cat /etc/fstab").startswith("/dev/sda1 / ext4 ")
    assert "guest=web-1 port=4711" in inside(guest.disk, "cat /etc/lab.conf")
    assert "linux /boot/vmlinuz-6.1.0-1-cloud-amd64 root=UUID=" in inside(guest.disk, "cat /boot/grub/grub.cfg")
    assert "User:  1000" in inside(guest.disk, "stat /home/own")
    assert guest.disk.stat().st_size == SIZE
    assert guest.disk.stat().st_blocks * 512 < 64 * MiB
    partition = tmp_path / "partition"
    with guest.disk.open("rb") as source, partition.open("wb") as target:
        source.seek(PARTITION_OFFSET)
        target.write(source.read())
    assert subprocess.run([find_program("e2fsck", package="e2fsprogs"), "-fn", str(partition)]).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["partition", "tiny.tar", "web.raw"]


@pytest.mark.parametrize("size", [0, 639 * MiB, SIZE + 512])
def test_a_size_that_holds_no_debian_is_refused(tiny_root: Path, tmp_path: Path, size: int) -> None:
    with pytest.raises(LabError):
        build_debian(tmp_path / "x.raw", size=size, root=tiny_root)


def test_the_kernels_version_is_the_tars(tiny_root: Path, tmp_path: Path) -> None:
    assert kernel_version(tiny_root) == "6.1.0-1-cloud-amd64"
    tarfile.open(tmp_path / "none.tar", "w").close()
    with pytest.raises(LabError, match="no kernel"):
        kernel_version(tmp_path / "none.tar")


def test_the_cache_knows_what_a_root_was_made_from(monkeypatch: pytest.MonkeyPatch) -> None:
    first = recipe(RELEASE)
    assert recipe(replace(RELEASE, sources=("deb http://another bookworm main",))) == first
    assert recipe(replace(RELEASE, kernel="linux-image-amd64")) != first
    monkeypatch.setattr(debian_root, "INITRAMFS_MODULES", ("virtio_blk",))
    assert recipe(RELEASE) != first


@pytest.fixture
def apt_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def say(lines: str) -> None:
        (tmp_path / "said").write_text(lines)
        (tmp_path / "apt-get").write_text(f'#!/bin/sh\ncat "{tmp_path}/said"\n')
        (tmp_path / "apt-get").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return say


def own_codename() -> str:
    return host_release().codename


@pytest.mark.slow
def test_only_the_hosts_own_release_is_asked(apt_says: Callable[[str], None]) -> None:
    name = own_codename()
    apt_says(
        f"http://mirror/debian {name} main\nhttp://mirror/security {name}-security main\nhttp://mirror/debian {name} main\n"
        f"http://vendor/ {name} stable\nhttp://vendor/ nodistro main\nhttp://mirror/debian {name} contrib\n"
    )
    found = host_release()
    assert found.sources == (f"deb http://mirror/debian {name} main", f"deb http://mirror/security {name}-security main")
    apt_says("http://vendor/ nodistro main\n")
    with pytest.raises(LabError, match="no source"):
        host_release()


# --- booted: the root takes minutes to make where no cache has it


@pytest.fixture(scope="module")
def debian_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_debian(tmp_path_factory.mktemp("debian") / "debian.raw", settings=GuestSettings(name="real")).disk


@contextlib.contextmanager
def machine(folder: Path, disk: Path, *devices: str) -> Iterator[QemuProcess]:
    """Boots what is on `disk` by BIOS, over a throw-away layer; its serial port goes to serial.log."""
    qemu = QemuProcess(folder, mark=f"tokvm-test-{folder.name}")
    options = ["-machine", "pc,accel=tcg", "-cpu", "max", "-m", "384", "-nodefaults", "-no-user-config", "-display", "none"]
    options += ["-vga", "none", "-no-reboot", "-drive", f"file={disk},format=raw,if=none,id=root,snapshot=on", *devices]
    qemu.start([*options, "-chardev", "file,id=serial,path=serial.log", "-serial", "chardev:serial"])
    try:
        yield qemu
    finally:
        qemu.end()


def wait_for(text: str, log: Path) -> None:
    until = time.monotonic() + BOOT_S
    while text not in log.read_text(errors="replace"):
        assert time.monotonic() < until, log.read_text(errors="replace")[-2000:]
        time.sleep(0.2)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_it_writes_its_ledger_from_ide_and_goes_down_by_the_power_button(debian_disk: Path, tmp_path: Path) -> None:
    with OutsideClock() as clock:
        guest = build_debian(tmp_path / "d.raw", settings=GuestSettings(name="real", clock_port=clock.port))
        assert guest == BiosGuest(tmp_path / "d.raw")
        assert debian_disk.stat().st_size == guest.disk.stat().st_size
        vm = SourceVm.create(tmp_path / "vm", name="real", guest=guest)
        try:
            vm.power_on()
            assert clock.wait_ready("real", timeout_s=BOOT_S).root == "sda1"
            clock.wait_acknowledged("real", 5, timeout_s=60)
            vm.freeze("while it writes")
            assert vm.shutdown(deadline_s=120)
        finally:
            vm.destroy()
        assert clock.boots("real")[-1].stopping is not None
        assert clock.troubles("real") == []


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("devices", "says"),
    [
        (("-device", "pvscsi,id=s", "-device", "scsi-hd,drive=root,bus=s.0"), "LAB-GUEST READY"),
        (("-device", "virtio-blk-pci,drive=root"), "does not exist"),
    ],
)
def test_it_boots_from_pvscsi_and_stops_in_its_initramfs_on_virtio(
    debian_disk: Path, tmp_path: Path, devices: tuple[str, ...], says: str
) -> None:
    with machine(tmp_path, debian_disk, *devices):
        wait_for(says, tmp_path / "serial.log")
    assert ("LAB-GUEST READY" in (tmp_path / "serial.log").read_text(errors="replace")) == (says == "LAB-GUEST READY")
