"""What virt-v2v-in-place has to know of a VM, as libvirt's XML (https://libvirt.org/formatdomain.html): `-i libvirtxml`.

Only what the conversion looks at: the disks in order, with their formats said, and the firmware. It starts no domain. The
source's controllers do not matter, because libguestfs puts the disks on its own.
"""

from __future__ import annotations

import string
import xml.etree.ElementTree as ET
from collections.abc import Sequence

from tokvm.core.machine import Firmware, VirtualMachine
from tokvm.core.units import MiB
from tokvm.guest.base import GuestDisk, GuestError


def conversion_xml(vm: VirtualMachine, disks: Sequence[GuestDisk]) -> bytes:
    """The document. Paths are text, never markup; GuestError for one that XML cannot hold."""
    domain = ET.Element("domain", type="kvm")
    ET.SubElement(domain, "name").text = "morph"  # the VM's own name may be anything, and a conversion makes no use of it
    ET.SubElement(domain, "memory", unit="MiB").text = str(max(1, vm.memory // MiB))
    ET.SubElement(domain, "vcpu").text = str(max(1, vm.vcpus))
    system = ET.SubElement(domain, "os", {"firmware": "efi"} if vm.firmware is Firmware.UEFI else {})
    ET.SubElement(system, "type", arch="x86_64", machine="q35").text = "hvm"
    ET.SubElement(ET.SubElement(domain, "features"), "acpi")
    devices = ET.SubElement(domain, "devices")
    for number, disk in enumerate(disks):
        _disk(devices, disk, _letters(number))
    return bytes(ET.tostring(domain, encoding="utf-8", xml_declaration=True))


def _disk(devices: ET.Element, disk: GuestDisk, letters: str) -> None:
    if any(not (char.isprintable() or char in "\t\n") or char == "\ufffe" for char in disk.path):
        raise GuestError("the path holds characters that XML cannot", where=disk.path, fix="give another state directory")
    found = ET.SubElement(devices, "disk", type="file", device="disk")
    ET.SubElement(found, "driver", name="qemu", type=disk.format)
    ET.SubElement(found, "source", file=disk.path)
    ET.SubElement(found, "target", dev=f"sd{letters}", bus="scsi")


def _letters(number: int) -> str:
    """a … z, aa, ab …: how Linux counts disks."""
    text = ""
    while True:
        text = string.ascii_lowercase[number % 26] + text
        number = number // 26 - 1
        if number < 0:
            return text
