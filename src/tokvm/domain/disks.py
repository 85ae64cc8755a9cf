"""The disks of a domain, each on the bus it was given, with the controllers they need.

    bus           libvirt's bus, names   controller                      address                   what a guest needs
    virtio-blk    virtio  vda …          -                               libvirt's                 virtio_blk
    nvme          virtio  vda …          -                               libvirt's                 nvme (see below)
    ide           ide     hda …          machine pc only, 4 disks        by name                   ata_piix
    sata          sata    sda …          AHCI, added by libvirt          by name                   ahci
    virtio-scsi   scsi    sda …          virtio-scsi                     target = place on the bus virtio_scsi
    pvscsi        scsi    sda …          vmpvscsi                        "                         vmw_pvscsi
    sas           scsi    sda …          lsisas1068, 8 disks             "                         mptsas (and a wwn, see below)
    megasas       scsi    sda …          lsisas1078                      "                         megaraid_sas

libvirt 9 has no bus for NVMe. Its disk is a virtio one whose QEMU device gets another driver by <qemu:override>: file access,
labels, locks and boot order stay libvirt's (a drive in <qemu:commandline> would have none of them). Tried with libvirt 9.0 and
QEMU 7.2, which also showed: Linux' mptsas sees no disk without a wwn; pvscsi and mptsas count targets, with LUN 0 only.
"""

from __future__ import annotations

import hashlib
import re
import xml.etree.ElementTree as ET
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from tokvm.core.errors import DomainError
from tokvm.core.machine import DiskBus
from tokvm.domain.base import DiskFormat, DomainPlan, TargetDisk
from tokvm.domain.elements import add, checked_path, override

SERIAL_LENGTH = 20
SECTORS = (512, 4096)


@dataclass(frozen=True, slots=True)
class _Bus:
    """`controller`: the model of a SCSI controller. `limit`: disks that one of them takes."""

    bus: str
    prefix: str
    controller: str = ""
    limit: int = 1000
    big_sectors: bool = True


_BUSES = {
    DiskBus.VIRTIO_BLK: _Bus("virtio", "vd"),
    DiskBus.NVME: _Bus("virtio", "vd"),
    DiskBus.IDE: _Bus("ide", "hd", limit=4, big_sectors=False),
    DiskBus.SATA: _Bus("sata", "sd", big_sectors=False),
    DiskBus.VIRTIO_SCSI: _Bus("scsi", "sd", "virtio-scsi", limit=255),
    DiskBus.PVSCSI: _Bus("scsi", "sd", "vmpvscsi", limit=64),
    DiskBus.SAS: _Bus("scsi", "sd", "lsisas1068", limit=8),
    DiskBus.MEGASAS: _Bus("scsi", "sd", "lsisas1078", limit=64),
}


def check_disks(plan: DomainPlan) -> None:
    """DomainError when a disk cannot be on its bus."""
    for bus, kind in _BUSES.items():
        count = sum(disk.bus is bus for disk in plan.disks)
        if count > kind.limit:
            raise DomainError(
                f"{count} disks on {bus}, which takes {kind.limit}", where=repr(plan.vm.name), fix="choose another bus"
            )
    if plan.machine != "pc" and any(disk.bus is DiskBus.IDE for disk in plan.disks):
        raise DomainError(f"{plan.machine} has no IDE", where=repr(plan.vm.name), fix="choose machine pc, or the bus sata")
    if plan.boot_disk is not None and not 0 <= plan.boot_disk < len(plan.disks):
        raise DomainError(
            f"disk {plan.boot_disk} cannot be booted: there are {len(plan.disks)}",
            where=repr(plan.vm.name),
            fix="disks count from 0",
        )


def add_disks(root: ET.Element, devices: ET.Element, plan: DomainPlan, buffered: AbstractSet[int]) -> None:
    """Disks in the guest's order, then their SCSI controllers."""
    order = _boot_order(plan)
    controllers = list(dict.fromkeys(model for disk in plan.disks if (model := _BUSES[disk.bus].controller)))
    names = {"vd": 0, "sd": 0, "hd": 0}
    places = dict.fromkeys(controllers, 0)
    for index, disk in enumerate(plan.disks):
        kind = _BUSES[disk.bus]
        element = _disk(devices, disk, f"{kind.prefix}{_letters(names[kind.prefix])}", direct=index not in buffered)
        names[kind.prefix] += 1
        _sector(element, plan, index)
        _identity(element, plan, index)
        add(element, "boot", order=str(order[index]))
        if kind.controller:
            place, controller = places[kind.controller], controllers.index(kind.controller)
            places[kind.controller] += 1
            add(element, "address", type="drive", controller=str(controller), bus="0", target=str(place), unit="0")
        if disk.bus is DiskBus.NVME:
            alias = f"ua-nvme{index}"
            add(element, "alias", name=alias)
            override(root, alias, "driver", "nvme")
    for number, model in enumerate(controllers):
        add(devices, "controller", type="scsi", index=str(number), model=model)


def _boot_order(plan: DomainPlan) -> list[int]:
    """Boot place (from 1) of each disk: the one that inspection found, then those the source calls bootable, each group in the
    guest's order."""
    disks = plan.vm.disks
    ranked = sorted(range(len(disks)), key=lambda index: (index != plan.boot_disk, not disks[index].bootable, index))
    return [ranked.index(index) + 1 for index in range(len(disks))]


def _letters(index: int) -> str:
    """a … z, aa … az, ba …: how Linux and libvirt count disks."""
    head, last = divmod(index, 26)
    return (_letters(head - 1) if head else "") + chr(ord("a") + last)


def _disk(devices: ET.Element, disk: TargetDisk, name: str, *, direct: bool) -> ET.Element:
    """`native` asynchronous I/O needs O_DIRECT; without it QEMU's threads and the page cache do the work. An overlay is thrown
    away, so its flushes may wait for nothing."""
    kind, attribute = ("block", "dev") if disk.block else ("file", "file")
    cache, io = ("none", "native") if direct else ("writeback", "threads")
    if disk.format is DiskFormat.QCOW2:
        cache, io = "unsafe", "threads"
    element = add(devices, "disk", type=kind, device="disk")
    add(element, "driver", name="qemu", type=disk.format.value, cache=cache, io=io, discard="unmap")
    ET.SubElement(element, "source", {attribute: checked_path(disk.path, "a target disk")})
    add(element, "target", dev=name, bus=_BUSES[disk.bus].bus)
    return element


def _sector(element: ET.Element, plan: DomainPlan, index: int) -> None:
    sector = plan.vm.disks[index].sector
    where = f"disk {index} of {plan.vm.name!r}"
    if sector not in SECTORS:
        raise DomainError(f"sectors of {sector} bytes", where=where, fix="look at the disk on the source: 512 or 4096")
    if sector == 512:
        return
    if not _BUSES[plan.disks[index].bus].big_sectors:
        raise DomainError(
            f"QEMU's {plan.disks[index].bus} disks have sectors of 512 bytes, this one has {sector}",
            where=where,
            fix="choose virtio-blk, virtio-scsi or nvme",
        )
    add(element, "blockio", logical_block_size=str(sector), physical_block_size=str(sector))


def _identity(element: ET.Element, plan: DomainPlan, index: int) -> None:
    """Serial, and where the guest needs one a world-wide name that stays the same: NAA 5 with QEMU's OUI, then a hash."""
    disk = plan.disks[index]
    serial = re.sub(r"[^A-Za-z0-9_.+-]", "", disk.serial)[:SERIAL_LENGTH]
    if disk.bus is DiskBus.NVME:
        serial = serial or f"tokvm-{index}"  # QEMU's nvme refuses to be without one
    if serial:
        add(element, "serial", serial)
    if disk.bus is DiskBus.SAS:
        add(element, "wwn", "5525400" + hashlib.sha256(f"{plan.vm.uuid} {index}".encode()).hexdigest()[:9])
