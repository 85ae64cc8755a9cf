"""A migrated VM as libvirt's domain XML. Pure: a DomainPlan in, text out.

    <domain type='kvm|qemu'>
      name, uuid, title, description, metadata     names.py; the source's uuid is kept (SMBIOS shows it to the guest)
      memory, vcpu, os, features, cpu, clock       machine: q35 | pc, BIOS | UEFI, host CPU | TCG's maximum
      devices: disks, NICs                         in the source's order, type='raw' always said: a guest could otherwise write
                                               a qcow2 header into its disk and have QEMU open any file of the host
      devices: channel, console, rng, video, usb   what every guest can use or ignore

Not in the picture because libvirt adds it: PCI controllers and addresses, emulator, memory balloon.
Format: https://libvirt.org/formatdomain.html. `VirtualMachine.extra` may hold `guest_os` (starts with `windows`: Hyper-V
enlightenments on KVM), `timeoffset` (seconds that the guest's RTC is ahead of UTC) and `cores_per_socket`.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Set as AbstractSet

from tokvm.core.errors import DomainError
from tokvm.core.machine import DiskBus, Firmware, Nic, VirtualMachine
from tokvm.core.units import KiB, MiB, round_up
from tokvm.domain.base import Accel, DomainPlan, TargetDisk
from tokvm.domain.names import is_xml_text, legal_name, one_line, pack, unpack, xml_text

METADATA = "urn:tokvm:domain:1"
MACHINES = ("q35", "pc")
# QEMU's q35 needs an interrupt-remapping IOMMU above 255 vCPUs, pc never takes more.
MAX_VCPUS = 255
SERIAL_LENGTH = 20

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")
_BUSES = {DiskBus.VIRTIO_BLK: ("virtio", "vd"), DiskBus.VIRTIO_SCSI: ("scsi", "sd"), DiskBus.SATA: ("sata", "sd")}

ET.register_namespace("tokvm", METADATA)


def domain_xml(plan: DomainPlan, *, accel: Accel, buffered: AbstractSet[int] = frozenset()) -> str:
    """The domain of `plan`. `buffered` holds the indices of disks on file systems without O_DIRECT (tmpfs), which must go
    through the page cache. DomainError when the plan cannot be a domain."""
    vm = plan.vm
    _check(plan)
    root = ET.Element("domain", type=accel.value)
    _identity(root, plan)
    _add(root, "memory", str(round_up(vm.memory, MiB) // KiB), unit="KiB")
    _add(root, "vcpu", str(vm.vcpus))
    _firmware(root, plan)
    windows = accel is Accel.KVM and vm.extra.get("guest_os", "").lower().startswith("windows")
    _features(root, windows=windows)
    _cpu(root, vm, accel)
    _clock(root, vm, windows=windows)
    for event, action in (("poweroff", "destroy"), ("reboot", "restart"), ("crash", "destroy")):
        _add(root, f"on_{event}", action)
    _devices(_add(root, "devices"), plan, buffered)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def source_name(xml: str) -> str | None:
    """The name that a domain made here had on its source, exactly; None for a domain that tokvm did not make."""
    mark = ET.fromstring(xml).find(f"metadata/{{{METADATA}}}source")
    return None if mark is None else unpack(mark.get("name", '""'))


def with_link_down(interface: ET.Element) -> str:
    """The <interface> as `virDomainUpdateDeviceFlags` wants it, its cable pulled."""
    for link in interface.findall("link"):
        interface.remove(link)
    ET.SubElement(interface, "link", state="down")
    return ET.tostring(interface, encoding="unicode")


def _check(plan: DomainPlan) -> None:
    vm = plan.vm
    problems = (
        (plan.machine not in MACHINES, f"machine {plan.machine!r} is not one of {', '.join(MACHINES)}", "choose q35 or pc"),
        (not _UUID.fullmatch(vm.uuid), f"{vm.uuid!r} is no uuid", "the source must name the VM by a uuid"),
        (not 1 <= vm.vcpus <= MAX_VCPUS, f"{vm.vcpus} vCPUs", f"a domain takes 1 to {MAX_VCPUS}: change it on the source"),
        (vm.memory < MiB, f"{vm.memory} bytes of memory", "a domain takes at least 1 MiB: change it on the source"),
        (not plan.disks, "no disks", "a domain without a disk cannot boot"),
        (
            len(plan.disks) != len(vm.disks),
            f"{len(plan.disks)} target disks for {len(vm.disks)}",
            "give one target for each disk",
        ),
        (vm.secure_boot and plan.machine != "q35", "secure boot needs q35", "choose machine q35"),
        (
            vm.secure_boot and vm.firmware is not Firmware.UEFI,
            "secure boot without UEFI",
            "the source's description of the VM contradicts itself: look at its firmware settings",
        ),
    )
    for wrong, what, fix in problems:
        if wrong:
            raise DomainError(what, where=repr(vm.name), fix=fix)


def _add(parent: ET.Element, tag: str, text: str | None = None, **attributes: str) -> ET.Element:
    child = ET.SubElement(parent, tag, attributes)
    child.text = text
    return child


def _identity(root: ET.Element, plan: DomainPlan) -> None:
    vm = plan.vm
    _add(root, "name", legal_name(plan.name, vm.uuid))
    _add(root, "uuid", vm.uuid)
    if title := one_line(vm.name):
        _add(root, "title", title)
    if vm.description:
        _add(root, "description", xml_text(vm.description))
    ET.SubElement(
        _add(root, "metadata"), f"{{{METADATA}}}source", name=pack(vm.name), hypervisor=xml_text(vm.hypervisor), uuid=vm.uuid
    )


def _firmware(root: ET.Element, plan: DomainPlan) -> None:
    uefi = plan.vm.firmware is Firmware.UEFI
    os = _add(root, "os", **({"firmware": "efi"} if uefi else {}))
    _add(os, "type", "hvm", arch="x86_64", machine=plan.machine)
    if uefi:
        enabled = "yes" if plan.vm.secure_boot else "no"
        firmware = _add(os, "firmware")
        _add(firmware, "feature", enabled=enabled, name="enrolled-keys")
        _add(firmware, "feature", enabled=enabled, name="secure-boot")


def _features(root: ET.Element, *, windows: bool) -> None:
    features = _add(root, "features")
    for name in ("acpi", "apic", "pae"):
        _add(features, name)
    if windows:
        hyperv = _add(features, "hyperv", mode="custom")
        for name in ("relaxed", "vapic"):
            _add(hyperv, name, state="on")
        _add(hyperv, "spinlocks", state="on", retries="8191")


def _cpu(root: ET.Element, vm: VirtualMachine, accel: Accel) -> None:
    """One socket unless the source says otherwise: Windows client editions use no more than one or two."""
    if accel is Accel.KVM:
        cpu = _add(root, "cpu", mode="host-passthrough", check="none", migratable="on")
    else:
        cpu = _add(root, "cpu", mode="maximum")
    given = vm.extra.get("cores_per_socket", "")
    cores = int(given) if re.fullmatch(r"[1-9]\d{0,2}", given) else vm.vcpus
    if vm.vcpus % cores:
        cores = vm.vcpus
    _add(cpu, "topology", sockets=str(vm.vcpus // cores), dies="1", cores=str(cores), threads="1")


def _clock(root: ET.Element, vm: VirtualMachine, *, windows: bool) -> None:
    """The timers that virt-install gives every x86 guest: Windows keeps time with them, Linux does not mind."""
    ahead = vm.extra.get("timeoffset", "")
    if re.fullmatch(r"-?\d{1,6}", ahead) and int(ahead):
        clock = _add(root, "clock", offset="variable", adjustment=str(int(ahead)), basis="utc")
    else:
        clock = _add(root, "clock", offset="utc")
    _add(clock, "timer", name="rtc", tickpolicy="catchup")
    _add(clock, "timer", name="pit", tickpolicy="delay")
    _add(clock, "timer", name="hpet", present="no")
    if windows:
        _add(clock, "timer", name="hypervclock", present="yes")


def _devices(devices: ET.Element, plan: DomainPlan, buffered: AbstractSet[int]) -> None:
    order = _boot_order(plan.vm)
    letters = {"vd": 0, "sd": 0}
    for index, disk in enumerate(plan.disks):
        prefix = _BUSES[disk.bus][1]
        _disk(devices, disk, f"{prefix}{_letters(letters[prefix])}", boot=order[index], direct=index not in buffered)
        letters[prefix] += 1
    if any(disk.bus is DiskBus.VIRTIO_SCSI for disk in plan.disks):
        _add(devices, "controller", type="scsi", index="0", model="virtio-scsi")
    _add(devices, "controller", type="usb", index="0", model="qemu-xhci")
    for nic in plan.vm.nics:
        _nic(devices, nic, plan)
    _add(_add(devices, "serial", type="pty"), "target", port="0")
    _add(_add(devices, "console", type="pty"), "target", type="serial", port="0")
    _add(_add(devices, "channel", type="unix"), "target", type="virtio", name="org.qemu.guest_agent.0")
    _add(devices, "input", type="tablet", bus="usb")
    _add(devices, "graphics", type="vnc", port="-1", autoport="yes", listen="127.0.0.1")
    _add(_add(devices, "video"), "model", type="vga")
    _add(_add(devices, "rng", model="virtio"), "backend", "/dev/urandom", model="random")
    if plan.vm.tpm:
        _add(_add(devices, "tpm", model="tpm-crb"), "backend", type="emulator", version="2.0")


def _boot_order(vm: VirtualMachine) -> list[int]:
    """Boot place (from 1) of each disk: those the source calls bootable first, each group in the guest's order."""
    ranked = sorted(range(len(vm.disks)), key=lambda index: (not vm.disks[index].bootable, index))
    return [ranked.index(index) + 1 for index in range(len(vm.disks))]


def _letters(index: int) -> str:
    """a … z, aa … az, ba …: how Linux and libvirt count disks."""
    head, last = divmod(index, 26)
    return (_letters(head - 1) if head else "") + chr(ord("a") + last)


def _disk(devices: ET.Element, disk: TargetDisk, name: str, *, boot: int, direct: bool) -> None:
    """`native` asynchronous I/O needs O_DIRECT; without it QEMU's threads and the page cache do the work."""
    if not disk.path.startswith("/") or not is_xml_text(disk.path):
        raise DomainError(
            "a target disk needs an absolute path of printable text", where=repr(disk.path), fix="choose another path"
        )
    kind, attribute = ("block", "dev") if disk.block else ("file", "file")
    cache, io = ("none", "native") if direct else ("writeback", "threads")
    element = _add(devices, "disk", type=kind, device="disk")
    _add(element, "driver", name="qemu", type="raw", cache=cache, io=io, discard="unmap")
    ET.SubElement(element, "source", {attribute: disk.path})
    _add(element, "target", dev=name, bus=_BUSES[disk.bus][0])
    if serial := re.sub(r"[^A-Za-z0-9_.+-]", "", disk.serial)[:SERIAL_LENGTH]:
        _add(element, "serial", serial)
    _add(element, "boot", order=str(boot))


def _nic(devices: ET.Element, nic: Nic, plan: DomainPlan) -> None:
    where = f"NIC {nic.index} of {plan.vm.name!r}"
    choice = plan.networks.get(nic.network, plan.networks.get("*"))
    if choice is None:
        raise DomainError(
            f"nothing says where the source's network {nic.network!r} is here",
            where=where,
            fix="give --network 'NAME=network:default', =bridge:br0, =user or =none (NAME * is every other network)",
        )
    mac = nic.mac.lower()
    if not _MAC.fullmatch(mac):
        raise DomainError(f"{nic.mac!r} is no unicast MAC address", where=where, fix="look at the NIC on the source")
    kind, _, name = choice.partition(":")
    if (kind, bool(name)) not in {("network", True), ("bridge", True), ("user", False), ("none", False)} or not is_xml_text(
        name
    ):
        raise DomainError(f"{choice!r} is no network", where=where, fix="write network:NAME, bridge:NAME, user or none")
    # `none` keeps the NIC, for the guest's configuration of it, with the cable pulled.
    interface = _add(devices, "interface", type=kind if name else "user")
    _add(interface, "mac", address=mac)
    if name:
        ET.SubElement(interface, "source", {kind: name})
    _add(interface, "model", type="virtio")
    _add(interface, "link", state="down" if kind == "none" else "up")
