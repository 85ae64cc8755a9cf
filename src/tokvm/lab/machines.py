"""The guests of a lab: their names, and the real VM behind each machine of the played host."""

from __future__ import annotations

import logging
import uuid
from dataclasses import dataclass
from pathlib import Path

from tokvm.core.units import MiB
from tokvm.domain.accel import kvm_works
from tokvm.lab.debian_guest import build_debian
from tokvm.lab.guest_image import BiosGuest, GuestImage, GuestSettings, build_guest
from tokvm.lab.kernel import find_kernel
from tokvm.lab.settings import GuestKind, LabSettings
from tokvm.lab.source_vm import SourceVm, mac_of

log = logging.getLogger(__name__)

MEMORY = 256 * MiB


@dataclass(frozen=True, slots=True)
class LabMachine:
    """A guest of the lab; its VM and its guest bear the same name. mac: lower case, with colons."""

    name: str
    uuid: str
    mac: str


def plan_machines(count: int) -> list[LabMachine]:
    """Names and ids that no other lab on this host has."""
    tag = uuid.uuid4().hex[:4]
    machines = []
    for number in range(1, count + 1):
        identity = str(uuid.uuid4())
        machines.append(LabMachine(f"lab{tag}-{number}", identity, mac_of(identity)))
    return machines


def make_guest(folder: Path, machine: LabMachine, settings: LabSettings, *, clock_port: int) -> None:
    """Build the guest, and the VM that a played host finds in its backend folder, off. `folder` is the lab's."""
    guest_settings = GuestSettings(name=machine.name, clock_port=clock_port, write_rate=settings.write_rate)
    image = folder / "images" / f"{machine.name}.raw"
    guest = _build(image, settings, guest_settings)
    SourceVm.create(
        folder / "host" / "backend" / machine.uuid,
        name=machine.name,
        guest=guest,
        memory=MEMORY,
        accel="kvm" if kvm_works() else "tcg",
        vm_uuid=machine.uuid,
        macs=[machine.mac],
    )
    image.unlink()  # copied; the VM has its own
    log.info("guest %s is built", machine.name)


def _build(image: Path, settings: LabSettings, own: GuestSettings) -> GuestImage | BiosGuest:
    match settings.guest:
        case GuestKind.MINI:
            return build_guest(image, size=settings.disk_size, settings=own, kernel=find_kernel())
        case GuestKind.MINI_NO_VIRTIO:
            return build_guest(image, size=settings.disk_size, settings=own, kernel=find_kernel(), drivers="ide")
        case GuestKind.DEBIAN_NO_VIRTIO:
            return build_debian(image, size=settings.disk_size, settings=own)
        case GuestKind.WINDOWS_PHONY:
            from tokvm.lab.windows_guest import build_windows

            build_windows(image, size=settings.disk_size)
            return BiosGuest(image)
