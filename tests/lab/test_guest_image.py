"""The guest's disk, looked into with e2fsprogs and cpio, without booting it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tokvm.core.units import MiB
from tokvm.lab.errors import LabError
from tokvm.lab.guest_image import (
    MODULES,
    PARTITION_OFFSET,
    GuestImage,
    GuestSettings,
    build_data_disk,
    build_guest,
    cpio,
)
from tokvm.lab.kernel import GuestKernel
from tokvm.lab.programs import find_program, run_program


def inside(disk: Path, request: str) -> str:
    return run_program(["debugfs", "-R", request, f"{disk}?offset={PARTITION_OFFSET}"], package="e2fsprogs").decode()


def test_the_disk_holds_what_boots_it(guest: GuestImage) -> None:
    with guest.disk.open("rb") as file:
        mbr = file.read(512)
    assert mbr[510:] == b"\x55\xaa"
    assert b"GRUB" in mbr
    assert mbr[446] == 0x80
    assert {"vmlinuz", "initrd.img"} <= set(inside(guest.disk, "ls -p /boot").replace("/", " ").split())
    assert guest.kernel.stat().st_size > MiB
    assert guest.command_line.startswith("root=UUID=")


def test_the_file_system_is_clean(guest: GuestImage, tmp_path: Path, data_disk: Path) -> None:
    partition = tmp_path / "partition"
    partition.write_bytes(guest.disk.read_bytes()[PARTITION_OFFSET:])
    for file_system in (partition, data_disk):
        e2fsck = find_program("e2fsck", package="e2fsprogs")
        done = subprocess.run([e2fsck, "-fn", str(file_system)], capture_output=True)
        assert done.returncode == 0, done.stdout


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


def test_the_initrd_is_an_archive_with_drivers_for_both_worlds(guest: GuestImage, kernel: GuestKernel, tmp_path: Path) -> None:
    with guest.initrd.open("rb") as file:
        subprocess.run(["cpio", "-id", "--quiet"], stdin=file, cwd=tmp_path, check=True)
    listed = (tmp_path / "modules.list").read_text().split()
    assert sorted(listed) == sorted(path.name for path in (tmp_path / "modules").iterdir())
    assert len(listed) == len(kernel.files_of(MODULES))
    built_in = (kernel.modules / "modules.builtin").read_text().replace("-", "_")
    for name in ("ata_piix", "sd_mod", "virtio_blk", "virtio_net", "evdev"):
        assert f"{name}.ko" in listed or f"/{name}.ko" in built_in


def test_cpio_keeps_names_modes_and_content(tmp_path: Path) -> None:
    archive = cpio([("d", 0o040755, b""), ("d/odd", 0o100640, b"12345"), ("d/empty", 0o100755, b"")])
    subprocess.run(["cpio", "-id", "--quiet"], input=archive, cwd=tmp_path, check=True)
    assert (tmp_path / "d/odd").read_bytes() == b"12345"
    assert (tmp_path / "d/odd").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "d/empty").read_bytes() == b""


def test_a_module_comes_after_those_it_needs(kernel: GuestKernel) -> None:
    names = [file.name.split(".ko")[0].replace("-", "_") for file in kernel.files_of(MODULES)]
    assert len(names) == len(set(names))
    if "ata_piix" in names:
        assert names.index("libata") < names.index("ata_piix")
    if "virtio_blk" in names:
        assert names.index("virtio") < names.index("virtio_blk")
