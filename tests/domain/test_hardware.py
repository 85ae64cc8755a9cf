"""Every bus, card and slot as QEMU has it: started paused under a real libvirtd, so that no guest costs time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tokvm.core.machine import Disk, DiskBus, Firmware, Nic, NicModel
from tokvm.core.units import MiB
from tokvm.domain.base import Accel, DomainPlan
from tokvm.domain.host import LibvirtHost

pytestmark = pytest.mark.root
NewPlan = Callable[..., DomainPlan]
Started = Callable[[DomainPlan], Any]

DEVICES = {
    DiskBus.VIRTIO_BLK: "virtio-blk-pci",
    DiskBus.VIRTIO_SCSI: "scsi-hd",
    DiskBus.SATA: "ide-hd",
    DiskBus.IDE: "ide-hd",
    DiskBus.NVME: "nvme",
    DiskBus.PVSCSI: "scsi-hd",
    DiskBus.SAS: "scsi-hd",
    DiskBus.MEGASAS: "scsi-hd",
}
CONTROLLERS = {
    DiskBus.VIRTIO_SCSI: "virtio-scsi-pci",
    DiskBus.PVSCSI: "pvscsi",
    DiskBus.SAS: "mptsas1068",
    DiskBus.MEGASAS: "megasas",
}


class Libvirtd(Protocol):
    uri: str


@pytest.fixture
def started(libvirtd: Libvirtd) -> Iterator[Started]:
    """Defines and starts a plan's domain, paused; it is destroyed at the end."""
    import libvirt

    target, connection = LibvirtHost(libvirtd.uri, accel=Accel.TCG), libvirt.open(libvirtd.uri)
    plans: list[DomainPlan] = []

    def start(plan: DomainPlan) -> Any:
        plans.append(plan)
        target.define(plan)
        domain = connection.lookupByUUIDString(plan.vm.uuid)
        domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        return domain

    yield start
    for plan in plans:
        target.stop(plan.vm.uuid)
        target.undefine(plan.vm.uuid)
    target.close()
    connection.close()


def ask(domain: Any, line: str) -> str:
    """An answer of QEMU's own monitor."""
    import libvirt_qemu  # type: ignore[import-untyped]

    return str(libvirt_qemu.qemuMonitorCommand(domain, line, libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP))


def block_devices(domain: Any) -> list[str]:
    """The device behind which each block backend is plugged, as QEMU calls them."""
    import libvirt_qemu

    answer = json.loads(libvirt_qemu.qemuMonitorCommand(domain, '{"execute": "query-block"}', 0))
    return [str(one["qdev"]) for one in answer["return"] if one.get("inserted")]


@pytest.mark.parametrize("bus", DiskBus)
@pytest.mark.slow
def test_qemu_has_each_bus(new_plan: NewPlan, started: Started, bus: DiskBus) -> None:
    machine = "pc" if bus in (DiskBus.IDE, DiskBus.SAS) else "q35"
    domain = started(new_plan(bus=bus, machine=machine, disks=2, memory=32 * MiB, nics=()))
    tree = ask(domain, "info qtree")
    assert len(block_devices(domain)) == 2
    assert tree.count(f"dev: {DEVICES[bus]},") == 2
    if bus in CONTROLLERS:
        assert f"dev: {CONTROLLERS[bus]}," in tree
    if bus is DiskBus.SAS:
        assert tree.count("(0x5525400") == 2  # each disk's wwn, in hexadecimal


@pytest.mark.parametrize(("machine", "model"), [*(("q35", model) for model in NicModel), ("pc", NicModel.E1000E)])
@pytest.mark.slow
def test_qemu_has_each_card(new_plan: NewPlan, started: Started, machine: str, model: NicModel) -> None:
    domain = started(new_plan(machine=machine, memory=32 * MiB, more={"nic_model": model}))
    name = "virtio-net-pci" if model is NicModel.VIRTIO else model.value
    assert ask(domain, "info qtree").count(f"dev: {name},") == 2


@pytest.mark.slow
def test_a_slot_is_what_the_port_announces(new_plan: NewPlan, started: Started) -> None:
    nics = (Nic(0, "00:50:56:00:00:01", slot=192), Nic(1, "00:50:56:00:00:02"), Nic(2, "00:50:56:00:00:03", slot=224))
    domain = started(new_plan(nics=nics, disks=3, memory=32 * MiB, more={"nic_model": NicModel.VMXNET3}))
    ports = ask(domain, "info qtree").split("dev: pcie-root-port")[1:]
    behind = {port.split("slot = ")[1].split()[0]: port for port in ports if "dev: vmxnet3" in port.split("slot = ")[1]}
    assert {"192", "224"} <= set(behind)
    assert "00:50:56:00:00:01" in behind["192"]
    assert "00:50:56:00:00:03" in behind["224"]
    assert "00:50:56:00:00:02" not in behind["192"] + behind["224"]


@pytest.mark.parametrize("bus", [DiskBus.VIRTIO_BLK, DiskBus.VIRTIO_SCSI, DiskBus.NVME])
@pytest.mark.slow
def test_4kn_disks_keep_their_sectors(new_plan: NewPlan, started: Started, bus: DiskBus) -> None:
    disks = (Disk(0, "vdi-0", MiB, sector=4096),)
    domain = started(new_plan(bus=bus, disks=1, memory=32 * MiB, nics=(), vm_disks=disks))
    assert "logical_block_size = 4096" in ask(domain, "info qtree")


@pytest.mark.skipif(not Path("/usr/bin/swtpm").exists(), reason="swtpm is not installed")
@pytest.mark.slow
def test_a_tpm_starts_with_uefi(new_plan: NewPlan, started: Started) -> None:
    domain = started(new_plan(firmware=Firmware.UEFI, tpm=True, memory=64 * MiB))
    assert "model=tpm-crb" in ask(domain, "info tpm")
