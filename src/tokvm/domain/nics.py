"""The network cards of a domain: on which network, of which model, and in which slot.

Linux names a card after the slot that firmware or the port announces: a VMware guest with `ethernet0.pciSlotNumber = "192"` has
an `ens192` in its configuration. On q35 a root port of our own announces any number as its physical slot; that is only believed
when ACPI does not describe the port too, hence the -global. Tried with Debian 12: virtio-net behind slot 192 is ens192, vmxnet3
behind 224 is ens224; with ACPI hotplug they are enp1s0 and enp2s0. Machine pc has no root ports: slots are not kept.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass

from tokvm.core.errors import DomainError
from tokvm.core.machine import Nic
from tokvm.domain.base import DomainPlan
from tokvm.domain.elements import add, give_qemu, override
from tokvm.domain.names import is_xml_text

# PCI Express Base Specification, Slot Capabilities: the physical slot number has 13 bits; 0 is "none".
MAX_SLOT = 8191

_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}")


@dataclass(frozen=True, slots=True)
class FrameSink:
    """A UDP port of this host that gets each Ethernet frame of a NIC as one datagram, and answers nothing."""

    port: int
    address: str = "127.0.0.1"


def add_nics(root: ET.Element, devices: ET.Element, plan: DomainPlan, sinks: tuple[FrameSink, ...] | None) -> None:
    """NICs in the guest's order. `sinks`: one for each, instead of the networks."""
    for number, nic in enumerate(plan.vm.nics):
        interface = _sunk(devices, sinks[number]) if sinks is not None else _plugged(devices, nic, plan)
        interface.insert(0, ET.Element("mac", address=_mac(nic, plan)))
        link = "down" if sinks is None and _choice(nic, plan) == "none" else "up"
        add(interface, "model", type=plan.nic_model.value)
        add(interface, "link", state=link)
        if sinks is not None:
            add(interface, "rom", enabled="no")  # no network boot: its DHCP would look like the guest's
    if plan.machine == "q35" and any(nic.slot is not None for nic in plan.vm.nics):
        _place(root, devices, plan)


def with_link_down(interface: ET.Element) -> str:
    """The <interface> as `virDomainUpdateDeviceFlags` wants it, its cable pulled."""
    for link in interface.findall("link"):
        interface.remove(link)
    ET.SubElement(interface, "link", state="down")
    return ET.tostring(interface, encoding="unicode")


def _where(nic: Nic, plan: DomainPlan) -> str:
    return f"NIC {nic.index} of {plan.vm.name!r}"


def _mac(nic: Nic, plan: DomainPlan) -> str:
    mac = nic.mac.lower()
    if not _MAC.fullmatch(mac):
        raise DomainError(
            f"{nic.mac!r} is no unicast MAC address", where=_where(nic, plan), fix="look at the NIC on the source"
        )
    return mac


def _choice(nic: Nic, plan: DomainPlan) -> str:
    choice = plan.networks.get(nic.network, plan.networks.get("*"))
    if choice is None:
        raise DomainError(
            f"nothing says where the source's network {nic.network!r} is here",
            where=_where(nic, plan),
            fix="give --network 'NAME=network:default', =bridge:br0, =user or =none (NAME * is every other network)",
        )
    return choice


def _plugged(devices: ET.Element, nic: Nic, plan: DomainPlan) -> ET.Element:
    """`none` keeps the NIC, for the guest's configuration of it, with the cable pulled."""
    choice = _choice(nic, plan)
    kind, _, name = choice.partition(":")
    known = {("network", True), ("bridge", True), ("user", False), ("none", False)}
    if (kind, bool(name)) not in known or not is_xml_text(name):
        raise DomainError(
            f"{choice!r} is no network", where=_where(nic, plan), fix="write network:NAME, bridge:NAME, user or none"
        )
    interface = add(devices, "interface", type=kind if name else "user")
    if name:
        ET.SubElement(interface, "source", {kind: name})
    return interface


def _sunk(devices: ET.Element, sink: FrameSink) -> ET.Element:
    interface = add(devices, "interface", type="udp")
    source = add(interface, "source", address=sink.address, port=str(sink.port))
    add(source, "local", address=sink.address, port="0")  # QEMU's own end: any free port
    return interface


def _place(root: ET.Element, devices: ET.Element, plan: DomainPlan) -> None:
    """A root port for each NIC with a slot. libvirt's alias of the PCI controller with index n is pci.n."""
    slots = [nic.slot for nic in plan.vm.nics if nic.slot is not None]
    if len(set(slots)) != len(slots) or not all(0 < slot <= MAX_SLOT for slot in slots):
        raise DomainError(
            f"NICs in the slots {', '.join(map(str, slots))}",
            where=repr(plan.vm.name),
            fix=f"slots are different numbers from 1 to {MAX_SLOT}: look at the source's configuration of the NICs",
        )
    give_qemu(root, "-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")
    bus = 0
    for nic, interface in zip(plan.vm.nics, devices.findall("interface"), strict=True):
        if nic.slot is not None:
            bus += 1
            add(devices, "controller", type="pci", index=str(bus), model="pcie-root-port")
            override(root, f"pci.{bus}", "slot", str(nic.slot), kind="unsigned")
            add(interface, "address", type="pci", domain="0x0000", bus=f"{bus:#04x}", slot="0x00", function="0x0")
