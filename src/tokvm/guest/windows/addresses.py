"""IPv4 addresses of a Windows guest's adapters, as its registry has them, for the new adapters on KVM.

    Services\\Tcpip\\Parameters\\Interfaces\\{adapter}       EnableDHCP 0, IPAddress, SubnetMask, DefaultGateway, NameServer
    Control\\NetworkSetup2\\Interfaces\\{adapter}\\Kernel     PermanentAddress: the MAC, six bytes (Windows 10, Server 2016 …)

The new adapter has the old one's MAC, and is another adapter for Windows all the same: its settings start empty. Where the
registry does not say the MAC, one adapter with an address of its own and one NIC of the VM belong together; more are a finding.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address

from tokvm.core.machine import Finding, Severity
from tokvm.guest.windows.registry import Hive, control_set, text, texts

MAX_ADAPTERS = 64
MAX_PER_ADAPTER = 32
HEADER = ("mac", "addresses", "masks", "gateways", "dns")


@dataclass(frozen=True, slots=True)
class Adapter:
    """mac: lower case, with colons, "" when unknown. Every other text is a dotted IPv4 address or mask, checked."""

    mac: str
    addresses: tuple[str, ...]
    masks: tuple[str, ...]
    gateways: tuple[str, ...]
    dns: tuple[str, ...]


def static_adapters(hive: Hive, macs: Sequence[str]) -> tuple[tuple[Adapter, ...], tuple[Finding, ...]]:
    """The SYSTEM hive's adapters with addresses of their own, each with the NIC of the VM (`macs`) that it will be."""
    current = control_set(hive)
    found = [one for one in _adapters(hive, current) if one.addresses]
    known = {mac.lower() for mac in macs}
    placed = [one for one in found if one.mac in known]
    rest = [one for one in found if not one.mac]
    free = sorted(known - {one.mac for one in placed})
    if len(rest) == 1 and len(free) == 1:
        placed.append(_with_mac(rest[0], free[0]))
        rest = []
    return tuple(placed), tuple(_lost(one) for one in (*rest, *(one for one in found if one.mac and one.mac not in known)))


def as_csv(adapters: Iterable[Adapter]) -> bytes:
    """What the first boot reads (Import-Csv): lists are separated by spaces. Nothing in it but addresses."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(HEADER)
    for one in adapters:
        writer.writerow([one.mac, *(" ".join(part) for part in (one.addresses, one.masks, one.gateways, one.dns))])
    return out.getvalue().encode("ascii")


def _adapters(hive: Hive, current: str) -> list[Adapter]:
    interfaces = hive.find((current, "Services", "Tcpip", "Parameters", "Interfaces"))
    names = hive.children(interfaces)[:MAX_ADAPTERS] if interfaces else []
    return [_adapter(hive, node, _mac(hive, current, guid)) for guid, node in names if hive.number(node, "EnableDHCP") == 0]


def _adapter(hive: Hive, node: int, mac: str) -> Adapter:
    pairs = [
        (address, mask)
        for address, mask in zip(_list(hive, node, "IPAddress"), _list(hive, node, "SubnetMask"), strict=False)
        if _is_address(address) and _is_address(mask) and address != "0.0.0.0"
    ]
    dns = text(hive.value(node, "NameServer") or b"").replace(",", " ").split()
    return Adapter(
        mac=mac,
        addresses=tuple(address for address, _ in pairs),
        masks=tuple(mask for _, mask in pairs),
        gateways=_addresses(_list(hive, node, "DefaultGateway")),
        dns=_addresses(dns),
    )


def _list(hive: Hive, node: int, name: str) -> list[str]:
    return texts(hive.value(node, name) or b"")[:MAX_PER_ADAPTER]


def _addresses(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(word for word in list(words)[:MAX_PER_ADAPTER] if _is_address(word))


def _is_address(word: str) -> bool:
    try:
        return str(IPv4Address(word)) == word
    except AddressValueError:
        return False


def _mac(hive: Hive, current: str, guid: str) -> str:
    node = hive.find((current, "Control", "NetworkSetup2", "Interfaces", guid, "Kernel"))
    raw = (hive.value(node, "PermanentAddress") if node else None) or b""
    return raw.hex(":") if len(raw) == 6 else ""


def _with_mac(one: Adapter, mac: str) -> Adapter:
    return Adapter(mac, one.addresses, one.masks, one.gateways, one.dns)


def _lost(one: Adapter) -> Finding:
    what = f"nothing says which NIC had the address {one.addresses[0]}; it is not carried over"
    return Finding(Severity.WARNING, what, "set it in the guest after the move, or use a DHCP reservation for the old MAC")
