"""Frames as guests send them, and as nobody should."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokvm.domain.frames import MAX_FRAMES_AT_ONCE, Frame, FrameKind, Listener, parse_frame

MAC = bytes.fromhex("005056123456")
SHOWN = "00:50:56:12:34:56"


def ethernet(kind: int, payload: bytes, *, mac: bytes = MAC) -> bytes:
    return b"\xff" * 6 + mac + struct.pack(">H", kind) + payload


def dhcp(options: bytes, *, chaddr: bytes = MAC, op: int = 1, fragment: int = 0, ports: tuple[int, int] = (68, 67)) -> bytes:
    message = struct.pack(">BBBB24x", op, 1, 6, 0) + chaddr.ljust(16, b"\0") + bytes(192) + b"\x63\x82\x53\x63" + options
    udp = struct.pack(">HHHH", *ports, 8 + len(message), 0) + message
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, fragment, 64, 17, 0, bytes(4), b"\xff" * 4)
    return ip + udp


DISCOVER = b"\x35\x01\x01"
REQUEST = b"\x35\x01\x03"
END = b"\xff"
ARP = bytes(28)
SOLICITATION = bytes([0x60, 0, 0, 0, 0, 8, 58, 255]) + bytes(32) + b"\x85" + bytes(7)


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (ethernet(0x0800, dhcp(DISCOVER + END)), Frame(FrameKind.DHCP, SHOWN, "discover")),
        (ethernet(0x0800, dhcp(REQUEST + END)), Frame(FrameKind.DHCP, SHOWN, "request")),
        (ethernet(0x0800, dhcp(b"\0\0" + DISCOVER + b"\x0c\x03web" + END)), Frame(FrameKind.DHCP, SHOWN, "discover as 'web'")),
        (ethernet(0x0800, dhcp(DISCOVER + b"\x0c\x04a\x1b[\xff" + END)), Frame(FrameKind.DHCP, SHOWN, "discover as 'a?[?'")),
        (ethernet(0x0800, dhcp(DISCOVER + b"\x3c\x08MSFT 5.0")), Frame(FrameKind.DHCP, SHOWN, "discover")),
        (ethernet(0x8100, b"\0\x07" + struct.pack(">H", 0x0806) + ARP), Frame(FrameKind.ARP, SHOWN)),
        (ethernet(0x0806, ARP), Frame(FrameKind.ARP, SHOWN)),
        (ethernet(0x86DD, SOLICITATION), Frame(FrameKind.ROUTER_SOLICITATION, SHOWN)),
    ],
)
def test_signs(frame: bytes, expected: Frame) -> None:
    assert parse_frame(frame) == expected


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        ethernet(0x0800, b""),
        ethernet(0x0806, ARP[:-1]),
        ethernet(0x86DD, SOLICITATION[:40]),
        ethernet(0x86DD, SOLICITATION.replace(b"\x85", b"\x87")),
        ethernet(0x88CC, bytes(100)),
        ethernet(0x0800, dhcp(DISCOVER, chaddr=b"\x02" * 6)),  # a relay, or another card
        ethernet(0x0800, dhcp(DISCOVER, op=2)),
        ethernet(0x0800, dhcp(DISCOVER, ports=(67, 68))),
        ethernet(0x0800, dhcp(DISCOVER, fragment=0x2000)),
        ethernet(0x0800, dhcp(b"\x35\x01\x05" + END)),
        ethernet(0x0800, dhcp(END + DISCOVER)),
        ethernet(0x0800, dhcp(b"\x35")),
        ethernet(0x0800, b"\x4f" + dhcp(DISCOVER)[1:]),
        *(
            ethernet(0x0800, dhcp(DISCOVER + bytes([60, len(early)]) + early))
            for early in (b"PXEClient:Arch:00000:UNDI:002001", b"HTTPClient:Arch:00016", b"Linux ipconfig")
        ),
    ],
)
def test_what_proves_nothing(frame: bytes) -> None:
    assert parse_frame(frame) is None


WHOLE = ethernet(0x0800, dhcp(DISCOVER + b"\x0c\x03web" + END))


@given(st.one_of(st.binary(max_size=400), st.binary(max_size=300).map(lambda raw: WHOLE[:14] + raw)))
def test_any_bytes_are_looked_at(data: bytes) -> None:
    parse_frame(data)


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
def test_any_damage_is_looked_at(at: int, value: int) -> None:
    parse_frame(WHOLE[:at])
    parse_frame(WHOLE[:at] + bytes([value]) + WHOLE[at + 1 :])


def test_a_listener_hears_its_card_only_and_answers_nothing() -> None:
    with Listener(SHOWN.upper()) as listener, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as guest:
        guest.connect((listener.sink.address, listener.sink.port))
        assert listener.frames() == []
        for frame in (ethernet(0x0806, ARP, mac=b"\x02" * 6), b"junk", ethernet(0x0806, ARP)):
            guest.send(frame)
        assert listener.frames() == [Frame(FrameKind.ARP, SHOWN)]
        for _ in range(MAX_FRAMES_AT_ONCE + 8):
            guest.send(ethernet(0x0806, ARP))
        assert len(listener.frames()) <= MAX_FRAMES_AT_ONCE
        guest.setblocking(False)
        with pytest.raises(BlockingIOError):
            guest.recv(1)
