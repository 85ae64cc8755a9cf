"""What a guest's first Ethernet frames prove. Untrusted bytes: each frame is looked at only as far as it is long.

    Ethernet   destination 6 | source 6 | type 2 (0x8100 and 0x88A8: a VLAN tag of 4 bytes goes before it)
    IPv4       version and header words 1 | … | protocol at 9 | options up to 60 bytes | UDP 8: ports, length, checksum
    DHCP       op 1 = request | htype 1 | hlen 1 | … | chaddr at 28 | … | magic 63 82 53 63 at 236 | options: code, length, …
    IPv6       header 40, next header at 6 | ICMPv6: type 1, 133 = router solicitation

A guest that asks for an address has run its own user land. Firmware and an initramfs ask too; they say so in option 60 (vendor
class): `PXEClient` and `HTTPClient` (UEFI 2.10, 24.3 and 24.7; iPXE), `Linux ipconfig` (klibc, used by Debian's initramfs).
Those prove nothing. ARP and router solicitations come from the kernel as soon as a link is up, so they are the weaker sign.
Standards: RFC 2131 and 2132, RFC 826, RFC 4861.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from enum import Enum, StrEnum
from types import TracebackType
from typing import Self

from tokvm.domain.nics import FrameSink

MAX_FRAME = 9216
# A guest that floods the link must not keep us from looking at anything else.
MAX_FRAMES_AT_ONCE = 512
EARLY = (b"PXEClient", b"HTTPClient", b"Linux ipconfig")

_VLAN = (0x8100, 0x88A8)
_DHCP_MAGIC = b"\x63\x82\x53\x63"
_ASKING = {1: "discover", 3: "request"}


class FrameKind(StrEnum):
    DHCP = "dhcp"
    ARP = "arp"
    ROUTER_SOLICITATION = "ipv6"


class _Option(Enum):
    PAD = 0
    HOST_NAME = 12
    MESSAGE = 53
    VENDOR_CLASS = 60
    END = 255


@dataclass(frozen=True, slots=True)
class Frame:
    """Something that the guest with this `mac` sent. `detail` is for people: the DHCP message and the name it asked under."""

    kind: FrameKind
    mac: str
    detail: str = ""


def parse_frame(data: bytes) -> Frame | None:
    """What this frame says about its sender; None when that is nothing, or when it is cut short."""
    if len(data) < 14:
        return None
    mac, kind, rest = data[6:12].hex(":"), int.from_bytes(data[12:14], "big"), data[14:]
    if kind in _VLAN and len(rest) >= 4:
        kind, rest = int.from_bytes(rest[2:4], "big"), rest[4:]
    match kind:
        case 0x0800:
            return _dhcp(mac, data[6:12], _udp(rest, source=68, destination=67))
        case 0x0806 if len(rest) >= 28:
            return Frame(FrameKind.ARP, mac)
        case 0x86DD if len(rest) > 40 and rest[6] == 58 and rest[40] == 133:
            return Frame(FrameKind.ROUTER_SOLICITATION, mac)
        case _:
            return None


def _udp(packet: bytes, *, source: int, destination: int) -> bytes:
    """The payload of an unfragmented IPv4 packet between these ports; b"" for any other."""
    if len(packet) < 20 or packet[0] >> 4 != 4 or packet[9] != 17 or int.from_bytes(packet[6:8], "big") & 0x3FFF:
        return b""
    header = (packet[0] & 15) * 4
    udp = packet[header : int.from_bytes(packet[2:4], "big")]
    if header < 20 or len(udp) < 8 or udp[:4] != source.to_bytes(2, "big") + destination.to_bytes(2, "big"):
        return b""
    return udp[8 : int.from_bytes(udp[4:6], "big")]


def _dhcp(mac: str, sender: bytes, message: bytes) -> Frame | None:
    if message[:3] != b"\x01\x01\x06" or message[28:34] != sender or message[236:240] != _DHCP_MAGIC:
        return None
    options = _options(message[240:])
    asked = _ASKING.get(int.from_bytes(options.get(_Option.MESSAGE.value, b""), "big"))
    if asked is None or options.get(_Option.VENDOR_CLASS.value, b"").startswith(EARLY):
        return None
    name = options.get(_Option.HOST_NAME.value, b"").decode("ascii", errors="replace")
    shown = "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in name)
    return Frame(FrameKind.DHCP, mac, f"{asked} as {shown!r}" if shown else asked)


def _options(data: bytes) -> dict[int, bytes]:
    """Option code → value; the first one counts. Ends where the bytes do."""
    found: dict[int, bytes] = {}
    at = 0
    while at < len(data) and data[at] != _Option.END.value:
        if data[at] == _Option.PAD.value:
            at += 1
            continue
        length = data[at + 1] if at + 1 < len(data) else 0
        found.setdefault(data[at], data[at + 2 : at + 2 + length])
        at += 2 + length
    return found


class Listener:
    """The end of a NIC's cable on 127.0.0.1. Hears the guest and never answers, so nothing of it leaves this host.

    Any process of this host can send to the port; only frames of `mac` are believed, which another user here could imitate:
    a rehearsal proves something to its operator, it does not defend against him."""

    def __init__(self, mac: str) -> None:
        self.mac = mac.lower()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.bind(("127.0.0.1", 0))
            self._socket.setblocking(False)
        except OSError:
            self._socket.close()
            raise

    @property
    def sink(self) -> FrameSink:
        return FrameSink(self._socket.getsockname()[1])

    def fileno(self) -> int:
        return self._socket.fileno()

    def frames(self) -> list[Frame]:
        """What arrived since the last call and says something. Does not wait."""
        found = []
        for _ in range(MAX_FRAMES_AT_ONCE):
            try:
                data = self._socket.recv(MAX_FRAME)
            except BlockingIOError:
                break
            frame = parse_frame(data)
            if frame is not None and frame.mac == self.mac:
                found.append(frame)
        return found

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
