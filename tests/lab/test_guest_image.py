"""The guest's disk, looked into with e2fsprogs and cpio, without booting it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.units import MiB
from tokvm.lab.boot_disk import PARTITION_OFFSET
from tokvm.lab.errors import LabError
from tokvm.lab.guest_image import GuestImage, GuestSettings, build_data_disk, build_guest
from tokvm.lab.guest_initrd import FORCED, INSTALLED, Drivers, cpio
from tokvm.lab.kernel import GuestKernel
from tokvm.lab.programs import find_program, run_program


def inside(disk: Path, request: str) -> str:
    said = run_program(["debugfs", "-R", request, f"{disk}?offset={PARTITION_OFFSET}"], package="e2fsprogs")
    return said.decode(errors="replace")


@pytest.mark.slow
def test_the_disk_holds_what_boots_it(guest: GuestImage, kernel: GuestKernel) -> None:
    with guest.disk.open("rb") as file:
        mbr = file.read(512)
    assert mbr[510:] == b"\x55\xaa"
    assert b"GRUB" in mbr
    assert mbr[446] == 0x80
    version = kernel.version
    assert {f"vmlinuz-{version}", f"initrd.img-{version}"} <= set(inside(guest.disk, "ls -p /boot").replace("/", " ").split())
    entry = inside(guest.disk, "cat /boot/grub/grub.cfg")
    assert f"linux /boot/vmlinuz-{version} {guest.command_line}\n" in entry
    assert f"initrd /boot/initrd.img-{version}\n" in entry
    assert inside(guest.disk, "cat /etc/fstab").split()[0] == guest.command_line.split()[0].removeprefix("root=")
    assert guest.kernel.stat().st_size > MiB
    assert guest.command_line.startswith("root=UUID=")


@pytest.mark.slow
def test_the_file_system_is_clean(guest: GuestImage, tmp_path: Path, data_disk: Path) -> None:
    partition = tmp_path / "partition"
    partition.write_bytes(guest.disk.read_bytes()[PARTITION_OFFSET:])
    for file_system in (partition, data_disk):
        e2fsck = find_program("e2fsck", package="e2fsprogs")
        done = subprocess.run([e2fsck, "-fn", str(file_system)], capture_output=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_settings_are_on_the_disk(tmp_path: Path, kernel: GuestKernel) -> None:
    settings = GuestSettings(name="web-1", clock_port=4711, write_rate=1000, ledger_s=0.25, heartbeat_s=0.5, data_disks=2)
    image = build_guest(tmp_path / "web.raw", size=64 * MiB, settings=settings, kernel=kernel)
    conf = inside(image.disk, "cat /etc/lab.conf")
    assert "guest=web-1 port=4711 write_rate=1000 ledger_s=0.25 heartbeat_s=0.5 data_disks=2" in conf
    assert image.disk.stat().st_size == 64 * MiB
    assert image.disk.stat().st_blocks * 512 < 48 * MiB
    assert sorted(path.name for path in tmp_path.iterdir()) == ["web.initrd", "web.raw", "web.vmlinuz"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "a b"},
        {"name": "$(id)"},
        {"name": "-x"},
        {"name": ""},
        {"name": "x" * 33},
        {"name": "a\n"},
        {"clock_port": 65536},
        {"write_rate": -1},
        {"ledger_s": 0},
        {"heartbeat_s": 0},
        {"data_disks": 4},
    ],
)
def test_settings_that_a_guest_cannot_have_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LabError):
        GuestSettings(**wrong)


@pytest.mark.parametrize("size", [0, MiB, 64 * MiB + 512])
def test_a_size_that_is_no_disk_is_refused(tmp_path: Path, kernel: GuestKernel, size: int) -> None:
    with pytest.raises(LabError):
        build_guest(tmp_path / "x.raw", size=size, kernel=kernel)
    assert list(tmp_path.iterdir()) == []


def test_a_data_disk_is_found_by_its_label(tmp_path: Path) -> None:
    disk = build_data_disk(tmp_path / "d", index=2, size=16 * MiB)
    assert b"tokvm-data2" in run_program(["dumpe2fs", "-h", str(disk)], package="e2fsprogs")


def names_of(folder: Path) -> set[str]:
    return {file.stem.replace("-", "_") for file in folder.rglob("*.ko")}


def loadable(kernel: GuestKernel, names: tuple[str, ...]) -> set[str]:
    """Those of `names` that this kernel has as modules, and what they need."""
    return {file.name.split(".ko")[0].replace("-", "_") for file in kernel.files_of(names)}


@pytest.mark.parametrize("drivers", Drivers)
@pytest.mark.slow
def test_the_initrd_is_an_archive_laid_out_as_a_distributions(drivers: Drivers, kernel: GuestKernel, tmp_path: Path) -> None:
    image = build_guest(tmp_path / "guest.raw", size=64 * MiB, kernel=kernel, drivers=drivers.value)
    (tmp_path / "initrd").mkdir()
    with image.initrd.open("rb") as file:
        subprocess.run(["cpio", "-id", "--quiet"], stdin=file, cwd=tmp_path / "initrd", check=True)
    modules = tmp_path / "initrd/lib/modules" / kernel.version
    assert names_of(modules) == loadable(kernel, FORCED[drivers])
    assert len((modules / "modules.dep").read_text().splitlines()) == len(names_of(modules))
    assert (tmp_path / "initrd/conf/modules").read_text().split() == [*FORCED[drivers]]
    found = inside(image.disk, f"cat /boot/initrd.img-{kernel.version}")
    assert found.startswith("070701")


@pytest.mark.slow
def test_a_guest_for_ide_lacks_virtio_only_in_its_initrd(kernel: GuestKernel, tmp_path: Path) -> None:
    assert not any(name.startswith("virtio") for name in loadable(kernel, FORCED[Drivers.IDE]))
    image = build_guest(tmp_path / "guest.raw", size=64 * MiB, kernel=kernel, drivers="ide")
    debugfs = ["debugfs", "-R", f"rdump /lib {tmp_path}", f"{image.disk}?offset={PARTITION_OFFSET}"]
    run_program(debugfs, package="e2fsprogs")
    root = tmp_path / "lib/modules" / kernel.version
    assert names_of(root) == loadable(kernel, INSTALLED)
    aliases, built_in = (root / "modules.alias").read_text(), (root / "modules.builtin").read_text()
    for name in ("virtio_blk", "virtio_scsi", "virtio_pci"):
        assert f" {name}\n" in aliases or f"/{name}.ko" in built_in


def test_cpio_keeps_names_modes_and_content(tmp_path: Path) -> None:
    archive = cpio([("d", 0o040755, b""), ("d/odd", 0o100640, b"12345"), ("d/empty", 0o100755, b"")])
    subprocess.run(["cpio", "-id", "--quiet"], input=archive, cwd=tmp_path, check=True)
    assert (tmp_path / "d/odd").read_bytes() == b"12345"
    assert (tmp_path / "d/odd").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "d/empty").read_bytes() == b""


def test_a_module_comes_after_those_it_needs(kernel: GuestKernel) -> None:
    names = [file.name.split(".ko")[0].replace("-", "_") for file in kernel.files_of(FORCED[Drivers.BOTH])]
    assert len(names) == len(set(names))
    if "ata_piix" in names:
        assert names.index("libata") < names.index("ata_piix")
    if "virtio_blk" in names:
        assert names.index("virtio") < names.index("virtio_blk")
