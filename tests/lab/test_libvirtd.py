"""Our own libvirtd: it answers, runs a domain on the lab's guest, and leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tokvm.core.machine import Disk, Nic, VirtualMachine
from tokvm.core.units import MiB
from tokvm.domain.base import Accel, DomainPlan, DomainState, TargetDisk
from tokvm.domain.host import LibvirtHost
from tokvm.lab.clock import OutsideClock
from tokvm.lab.guest_image import GuestSettings, build_guest
from tokvm.lab.kernel import GuestKernel
from tokvm.lab.libvirtd import LabLibvirt, Owner, ensure_libvirt, existing_libvirt

pytestmark = [pytest.mark.root, pytest.mark.slow]

UUID = "5f0c2f8e-63b5-4a53-9d5e-1b1f0a7c9d11"


@pytest.fixture
def libvirt_of_the_lab(tmp_path: Path) -> Iterator[LabLibvirt]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    # A long name: sockets must not depend on where the lab lies.
    folder = tmp_path / ("deep" * 25)
    service = ensure_libvirt(folder)
    yield service
    service.stop()


def processes() -> str:
    """The arguments of everything that runs."""
    seen = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # ended meanwhile
            seen.append(path.read_bytes().decode(errors="replace"))
    return " ".join(seen)


def test_it_answers_and_starts_only_once(libvirt_of_the_lab: LabLibvirt, tmp_path: Path) -> None:
    assert libvirt_of_the_lab.owner is Owner.LAB
    pid = (libvirt_of_the_lab.folder / "run/libvirtd.pid").read_text()
    assert ensure_libvirt(tmp_path / ("deep" * 25)) == libvirt_of_the_lab
    assert (libvirt_of_the_lab.folder / "run/libvirtd.pid").read_text() == pid
    assert LibvirtHost(libvirt_of_the_lab.uri, accel=Accel.TCG).state(UUID) is DomainState.ABSENT


def test_a_guest_runs_on_it_and_nothing_is_left(
    libvirt_of_the_lab: LabLibvirt, clock: OutsideClock, kernel: GuestKernel, tmp_path: Path
) -> None:
    disk = build_guest(
        tmp_path / "guest.raw", size=64 * MiB, settings=GuestSettings(name="dom", clock_port=clock.port), kernel=kernel
    ).disk
    vm = VirtualMachine(
        uuid=UUID,
        name="dom",
        vcpus=1,
        memory=256 * MiB,
        disks=(Disk(0, "d", 64 * MiB),),
        nics=(Nic(0, "52:54:00:01:02:03", "n"),),
    )
    plan = DomainPlan(vm, "dom", (TargetDisk(str(disk), block=False),), {"*": "user"})
    host = LibvirtHost(libvirt_of_the_lab.uri, accel=Accel.TCG)
    host.define(plan)
    host.start(UUID)
    boot = clock.wait_ready("dom", timeout_s=120)
    assert boot.root == "vda1"
    clock.wait_acknowledged("dom", 3, timeout_s=30)
    assert host.state(UUID) is DomainState.RUNNING
    host.close()
    assert not Path("/etc/libvirt/qemu/dom.xml").exists()
    existing_libvirt(tmp_path / ("deep" * 25)).stop()
    assert UUID not in processes()
    assert not libvirt_of_the_lab.folder.exists()


def test_stopping_what_never_ran_is_fine(tmp_path: Path) -> None:
    existing_libvirt(tmp_path).stop()
    assert not existing_libvirt(tmp_path).folder.exists()
