"""A migrated VM as libvirt's domain XML. Pure: a DomainPlan in, text out.

    <domain type='kvm|qemu'>
      name, uuid, title, description, metadata     names.py; the source's uuid is kept (SMBIOS shows it to the guest)
      memory, vcpu, os, features, cpu, clock       machine: q35 | pc, BIOS | UEFI | kernel, host CPU | TCG's maximum
      devices: disks, NICs                         disks.py, nics.py: in the source's order, type='raw' always said: a guest
                                               could otherwise write a qcow2 header into its disk and have QEMU open any file
      devices: channel, console, rng, video, usb   what every guest can use or ignore

Not in the picture because libvirt adds it: PCI controllers and addresses, emulator, memory balloon.
Format: https://libvirt.org/formatdomain.html. `VirtualMachine.extra` may hold `guest_os`, `timeoffset` (seconds that the RTC is
ahead of UTC), `rtc` (`utc` or `local`: what the guest takes its RTC for) and `cores_per_socket`.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from tokvm.core.errors import DomainError
from tokvm.core.machine import Firmware, VirtualMachine
from tokvm.core.units import KiB, MiB, round_up
from tokvm.domain.base import Accel, DiskFormat, DomainPlan
from tokvm.domain.disks import add_disks, check_disks
from tokvm.domain.elements import add, checked_path
from tokvm.domain.names import is_xml_text, legal_name, one_line, pack, unpack, xml_text
from tokvm.domain.nics import FrameSink, add_nics

METADATA = "urn:tokvm:domain:1"
MACHINES = ("q35", "pc")
# QEMU's q35 needs an interrupt-remapping IOMMU above 255 vCPUs, pc never takes more.
MAX_VCPUS = 255
# What every KVM since Linux 4.20 offers and Windows makes use of; the order is libvirt's. (evmcs and avic need the right CPU.)
ENLIGHTENMENTS = (
    *("relaxed", "vapic", "spinlocks", "vpindex", "runtime", "synic", "stimer", "reset", "frequencies", "tlbflush", "ipi"),
)

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

ET.register_namespace("tokvm", METADATA)


@dataclass(frozen=True, slots=True)
class Stage:
    """What is different about a domain that is tried and thrown away: its disks may be overlays, the serial port goes to the
    file `serial`, each NIC to a sink, a panic leaves it standing. `of` is the uuid of the VM that it plays, `folder` holds its
    files; both are kept in its metadata, for whoever has to remove a left-over."""

    of: str
    folder: str
    serial: str
    sinks: tuple[FrameSink, ...]


def domain_xml(plan: DomainPlan, *, accel: Accel, buffered: AbstractSet[int] = frozenset(), stage: Stage | None = None) -> str:
    """The domain of `plan`. `buffered` holds the indices of disks on file systems without O_DIRECT (tmpfs), which must go
    through the page cache. DomainError when the plan cannot be a domain."""
    vm = plan.vm
    _check(plan, stage)
    root = ET.Element("domain", type=accel.value)
    _identity(root, plan, stage)
    add(root, "memory", str(round_up(vm.memory, MiB) // KiB), unit="KiB")
    add(root, "vcpu", str(vm.vcpus))
    _firmware(root, plan, stage)
    enlightened = accel is Accel.KVM and plan.is_windows
    _features(root, enlightened=enlightened)
    _cpu(root, vm, accel)
    _clock(root, plan, enlightened=enlightened)
    crash = "preserve" if stage else "destroy"
    for event, action in (("poweroff", "destroy"), ("reboot", "restart"), ("crash", crash)):
        add(root, f"on_{event}", action)
    _devices(root, plan, buffered, stage)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def source_name(xml: str) -> str | None:
    """The name that a domain made here had on its source, exactly; None for a domain that tokvm did not make."""
    mark = ET.fromstring(xml).find(f"metadata/{_mark('source')}")
    return None if mark is None else unpack(mark.get("name", '""'))


def rehearsal_folder(xml: str) -> str | None:
    """The folder of a rehearsal's domain; None for any other domain."""
    mark = ET.fromstring(xml).find(f"metadata/{_mark('source')}/{_mark('rehearsal')}")
    return None if mark is None else unpack(mark.get("folder", '""'))


def _mark(name: str) -> str:
    return f"{{{METADATA}}}{name}"


def _check(plan: DomainPlan, stage: Stage | None) -> None:
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
        (bool(plan.nvram) and vm.firmware is not Firmware.UEFI, "UEFI variables for a BIOS", "leave them out"),
        (
            stage is None and any(disk.format is not DiskFormat.RAW for disk in plan.disks),
            "a disk that is not raw",
            "overlays are for rehearsals",
        ),
    )
    for wrong, what, fix in problems:
        if wrong:
            raise DomainError(what, where=repr(vm.name), fix=fix)
    check_disks(plan)


def _identity(root: ET.Element, plan: DomainPlan, stage: Stage | None) -> None:
    vm = plan.vm
    add(root, "name", legal_name(plan.name, vm.uuid))
    add(root, "uuid", vm.uuid)
    if title := one_line(vm.name):
        add(root, "title", title)
    if vm.description:
        add(root, "description", xml_text(vm.description))
    # One element: of several in one namespace libvirt keeps the first.
    source = ET.SubElement(
        add(root, "metadata"),
        _mark("source"),
        name=pack(vm.name),
        hypervisor=xml_text(vm.hypervisor),
        uuid=stage.of if stage else vm.uuid,
    )
    if stage:
        add(source, _mark("rehearsal"), folder=pack(stage.folder))


def _firmware(root: ET.Element, plan: DomainPlan, stage: Stage | None) -> None:
    uefi = plan.vm.firmware is Firmware.UEFI
    os = add(root, "os", **({"firmware": "efi"} if uefi else {}))
    add(os, "type", "hvm", arch="x86_64", machine=plan.machine)
    if uefi:
        enabled = "yes" if plan.vm.secure_boot else "no"
        firmware = add(os, "firmware")
        add(firmware, "feature", enabled=enabled, name="enrolled-keys")
        add(firmware, "feature", enabled=enabled, name="secure-boot")
    if plan.kernel is not None:
        for tag, path in (("kernel", plan.kernel.image), ("initrd", plan.kernel.initrd)):
            add(os, tag, checked_path(path, f"the {tag} to boot"))
        if not is_xml_text(plan.kernel.cmdline):
            raise DomainError("a kernel command line that is no text", where=repr(plan.vm.name), fix="look at the boot entry")
        add(os, "cmdline", plan.kernel.cmdline)
    if stage and not uefi:
        add(os, "bios", useserial="yes")  # SeaBIOS and what draws through it (GRUB) are then heard as UEFI is
    if plan.nvram:
        add(os, "nvram", checked_path(plan.nvram, "the file of UEFI variables"))


def _features(root: ET.Element, *, enlightened: bool) -> None:
    features = add(root, "features")
    for name in ("acpi", "apic", "pae"):
        add(features, name)
    if enlightened:
        hyperv = add(features, "hyperv", mode="custom")
        for name in ENLIGHTENMENTS:
            more = {"retries": "8191"} if name == "spinlocks" else {}
            add(hyperv, name, state="on", **more)


def _cpu(root: ET.Element, vm: VirtualMachine, accel: Accel) -> None:
    """One socket unless the source says otherwise: Windows client editions use no more than one or two."""
    if accel is Accel.KVM:
        cpu = add(root, "cpu", mode="host-passthrough", check="none", migratable="on")
    else:
        cpu = add(root, "cpu", mode="maximum")
    given = vm.extra.get("cores_per_socket", "")
    cores = int(given) if re.fullmatch(r"[1-9]\d{0,2}", given) else vm.vcpus
    if vm.vcpus % cores:
        cores = vm.vcpus
    add(cpu, "topology", sockets=str(vm.vcpus // cores), dies="1", cores=str(cores), threads="1")


def _clock(root: ET.Element, plan: DomainPlan, *, enlightened: bool) -> None:
    """Linux takes its RTC for UTC, Windows for local time unless its registry says RealTimeIsUniversal; a source that knows the
    distance is believed. The timers are those that virt-install gives every x86 guest."""
    ahead = plan.vm.extra.get("timeoffset", "")
    if re.fullmatch(r"-?\d{1,6}", ahead) and int(ahead):
        clock = add(root, "clock", offset="variable", adjustment=str(int(ahead)), basis="utc")
    else:
        told = plan.vm.extra.get("rtc", "local" if plan.is_windows and not ahead else "utc")
        clock = add(root, "clock", offset="localtime" if told == "local" else "utc")
    add(clock, "timer", name="rtc", tickpolicy="catchup")
    add(clock, "timer", name="pit", tickpolicy="delay")
    add(clock, "timer", name="hpet", present="no")
    if enlightened:
        add(clock, "timer", name="hypervclock", present="yes")


def _devices(root: ET.Element, plan: DomainPlan, buffered: AbstractSet[int], stage: Stage | None) -> None:
    devices = add(root, "devices")
    add_disks(root, devices, plan, buffered)
    add(devices, "controller", type="usb", index="0", model="qemu-xhci")
    add_nics(root, devices, plan, stage.sinks if stage else None)
    _console(devices, stage)
    add(add(devices, "channel", type="unix"), "target", type="virtio", name="org.qemu.guest_agent.0")
    add(devices, "input", type="tablet", bus="usb")
    add(devices, "graphics", type="vnc", port="-1", autoport="yes", listen="127.0.0.1")
    add(add(devices, "video"), "model", type="vga")
    add(add(devices, "rng", model="virtio"), "backend", "/dev/urandom", model="random")
    if plan.vm.tpm:
        add(add(devices, "tpm", model="tpm-crb"), "backend", type="emulator", version="2.0")
    if stage:
        add(devices, "panic", model="isa")


def _console(devices: ET.Element, stage: Stage | None) -> None:
    """`append`: what trims the file is not undone by QEMU's place in it."""
    if stage is None:
        add(add(devices, "serial", type="pty"), "target", port="0")
        add(add(devices, "console", type="pty"), "target", type="serial", port="0")
        return
    serial = add(devices, "serial", type="file")
    add(serial, "source", path=checked_path(stage.serial, "the serial port"), append="on")
    add(serial, "target", port="0")
