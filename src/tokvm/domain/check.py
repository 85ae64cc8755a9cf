"""What would keep a domain from being defined or started here: asked of libvirt before the first byte is copied."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

from tokvm.core.errors import DomainError
from tokvm.core.machine import DiskBus, Finding, Firmware, Severity
from tokvm.core.units import format_bytes
from tokvm.domain.base import Accel, DomainPlan
from tokvm.domain.connection import Connection
from tokvm.domain.names import legal_name
from tokvm.domain.schema import validate
from tokvm.domain.xml import domain_xml, source_name

# <qemu:override>, by which NVMe disks and slots are made: libvirt's version as its API counts it.
OVERRIDES_SINCE = 8_002_000

Question = Callable[[Connection, DomainPlan, Accel], Iterator[Finding]]


def find_obstacles(connection: Connection, plan: DomainPlan, *, accel: Accel) -> list[Finding]:
    """Every finding, blockers first. Reads only."""
    try:
        validate(domain_xml(plan, accel=accel), where=repr(plan.vm.name))
    except DomainError as exc:
        return [_blocker(exc.what, exc.fix, exc.where)]
    questions: tuple[Question, ...] = (_holders, _networks, _capabilities, _hardware, _kernel, _memory, _speed)
    findings = [finding for question in questions for finding in question(connection, plan, accel)]
    return sorted(findings, key=lambda finding: finding.severity is not Severity.BLOCKER)


def _blocker(what: str, fix: str, where: str) -> Finding:
    return Finding(Severity.BLOCKER, what, fix, where)


def _holders(connection: Connection, plan: DomainPlan, _accel: Accel) -> Iterator[Finding]:
    name = legal_name(plan.name, plan.vm.uuid)
    namesake = connection.look_up_name(name)
    if namesake is not None and namesake.UUIDString() != plan.vm.uuid:
        yield _blocker(f"another VM already has the name {name!r}", "give another --name", connection.uri)
    twin = connection.look_up(plan.vm.uuid)
    if twin is not None and source_name(twin.XMLDesc(0)) is None:
        yield _blocker(
            f"{twin.name()!r} has this VM's uuid and was not made by tokvm", "undefine it if it is a left-over", connection.uri
        )


def _networks(connection: Connection, plan: DomainPlan, _accel: Accel) -> Iterator[Finding]:
    for choice in sorted({plan.networks.get(nic.network, plan.networks.get("*", "")) for nic in plan.vm.nics}):
        kind, _, name = choice.partition(":")
        if kind == "network":
            yield from _network(connection, name)
        elif kind == "bridge" and connection.is_local and not Path("/sys/class/net", name, "bridge").exists():
            yield _blocker(f"there is no bridge {name!r} here", "create it, or map the network to another", connection.uri)


def _network(connection: Connection, name: str) -> Iterator[Finding]:
    libvirt = connection.libvirt
    try:
        active = connection.handle().networkLookupByName(name).isActive()
    except libvirt.libvirtError as exc:
        yield _blocker(
            f"libvirt has no network {name!r} ({exc.get_error_message()})",
            "define it, or map the network to another",
            connection.uri,
        )
        return
    if not active:
        yield _blocker(
            f"libvirt's network {name!r} is not started", f"virsh -c {connection.uri} net-start {name}", connection.uri
        )


def _capabilities(connection: Connection, plan: DomainPlan, accel: Accel) -> Iterator[Finding]:
    """Machine type, UEFI, secure boot and TPM, as far as libvirt knows its QEMU to have them."""
    try:
        text = connection.handle().getDomainCapabilities(None, "x86_64", plan.machine, accel.value, 0)
    except connection.libvirt.libvirtError as exc:
        yield _blocker(f"libvirt runs no such machine: {exc.get_error_message()}", "install qemu-system-x86", connection.uri)
        return
    known = ET.fromstring(text)
    if plan.vm.firmware is Firmware.UEFI and not _offers(known, "os/enum[@name='firmware']/value", "efi"):
        yield _blocker("the VM boots by UEFI, which is not installed here", "install ovmf (RHEL: edk2-ovmf)", connection.uri)
    elif plan.vm.secure_boot and not _offers(known, "os/loader/enum[@name='secure']/value", "yes"):
        yield _blocker("no firmware with secure boot is installed here", "install ovmf (RHEL: edk2-ovmf)", connection.uri)
    if plan.vm.tpm and not _offers(known, "devices/tpm/enum[@name='backendModel']/value", "emulator"):
        yield _blocker("the VM has a TPM, which nothing here can play", "install swtpm and swtpm-tools", connection.uri)


def _hardware(connection: Connection, plan: DomainPlan, _accel: Accel) -> Iterator[Finding]:
    """What libvirt's capabilities do not tell of."""
    slots = any(nic.slot is not None for nic in plan.vm.nics)
    if slots and plan.machine != "q35":
        yield Finding(
            Severity.WARNING,
            f"machine {plan.machine} keeps no PCI slots: the guest may give its network cards other names",
            "choose machine q35, or look at the guest's network configuration",
            repr(plan.vm.name),
        )
    if not any(disk.bus is DiskBus.NVME for disk in plan.disks) and not (slots and plan.machine == "q35"):
        return
    with connection.translated("cannot ask for libvirt's version", where=connection.uri):
        version = int(connection.handle().getLibVersion())
    if version < OVERRIDES_SINCE:
        yield _blocker("this libvirt is too old for NVMe disks and PCI slots (8.2)", "choose another --bus", connection.uri)


def _kernel(connection: Connection, plan: DomainPlan, _accel: Accel) -> Iterator[Finding]:
    if plan.kernel is None or not connection.is_local:
        return
    for path in (plan.kernel.image, plan.kernel.initrd):
        if not Path(path).is_file():
            yield _blocker(f"{path!r}, which the VM boots, is not there", "rehearse again", connection.uri)


def _offers(capabilities: ET.Element, path: str, value: str) -> bool:
    return any(element.text == value for element in capabilities.findall(path))


def _memory(connection: Connection, plan: DomainPlan, _accel: Accel) -> Iterator[Finding]:
    with connection.translated("cannot ask for the host's memory", where=connection.uri):
        there = int(connection.handle().getInfo()[1]) << 20
    if plan.vm.memory > there:
        yield _blocker(
            f"the VM has {format_bytes(plan.vm.memory)} of memory, the host {format_bytes(there)}",
            "choose another host, or give the VM less",
            connection.uri,
        )


def _speed(connection: Connection, _plan: DomainPlan, accel: Accel) -> Iterator[Finding]:
    if accel is Accel.TCG:
        yield Finding(
            Severity.WARNING,
            "KVM does not work here: the VM would run under TCG, which is much slower",
            "enable virtualisation in the firmware or the outer hypervisor",
            connection.uri,
        )
