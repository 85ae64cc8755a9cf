"""Which network card of the VM each name in a Linux guest's network configuration was, and which names KVM would not give.

    interfaces of the configuration ─► those of cards ─► the machine gives them (slots, net.ifnames=0)   nothing to do
                                                      ─► known which card: a .link file by MAC           by_mac
                                                      ─► not known                                       unsure

A PCI card is called after its place (systemd.net-naming-scheme(7)), a Xen vif or a Hyper-V card is no PCI card: eth0 or enX0
there is enp1s0 on KVM, and what is configured for eth0 stays down. A wrong name would plug a guest into the wrong network, so
a card is only said to be known when the source's order is the kernel's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokvm.core.machine import Nic
from tokvm.guest.base import LinuxFacts

_CARD = re.compile(r"eth\d+|en[ospxbX][a-zA-Z0-9]+|em\d+|p\d+p\d+")
"""The kernel's names, systemd's, biosdevname's; not bonds, bridges, VLANs."""
_XEN = re.compile(r"enX(\d+)")
_KERNEL = re.compile(r"eth(\d+)")


@dataclass(frozen=True, slots=True)
class NicNames:
    """by_mac: MAC address → the name it had and would lose. unsure: names whose card is not known."""

    by_mac: dict[str, str] = field(default_factory=dict)
    unsure: tuple[str, ...] = ()


def names_to_keep(linux: LinuxFacts, nics: Sequence[Nic], *, slots_kept: bool, in_order: bool) -> NicNames:
    """slots_kept: the target puts NICs into the slots that the source named (domain/nics.py). in_order: on this source the
    kernel counts the cards as the VM's configuration does (XenServer: by the vif's device number)."""
    names = dict.fromkeys(_card(name) for name in linux.interfaces if _CARD.fullmatch(_card(name)))
    if "net.ifnames=0" in linux.command_line.split():
        names = {name: None for name in names if not _KERNEL.fullmatch(name)}
    left = {nic.mac: nic for nic in nics}
    for nic in nics if slots_kept else ():
        if nic.slot is not None and f"ens{nic.slot}" in names:
            del names[f"ens{nic.slot}"], left[nic.mac]
    known = {
        nic.mac: name
        for at, nic in enumerate(nics)
        if nic.mac in left
        for name in names
        if _is(name, nic, at if in_order else -1)
    }
    others = [name for name in names if name not in known.values()]
    if len(nics) == 1 and len(others) == 1 and not known:
        known, others = dict.fromkeys(left, others[0]), []
    return NicNames(known, tuple(others) if left else ())


def _card(name: str) -> str:
    """Without a VLAN (`eth0.5`) and an alias (`eth0:1`)."""
    return re.split(r"[.:@]", name, maxsplit=1)[0]


def _is(name: str, nic: Nic, place: int) -> bool:
    """systemd counts a Xen card by its device number, the kernel counts cards as they come (place; -1: not known)."""
    xen, kernel = _XEN.fullmatch(name), _KERNEL.fullmatch(name)
    return (xen is not None and int(xen[1]) == nic.index) or (kernel is not None and int(kernel[1]) == place)
