"""The link: everything arrives, later and slower."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tokvm.lab.errors import LabError
from tokvm.lab.link import Link

MiB = 1 << 20


@pytest.fixture
def echo() -> Iterator[int]:
    """A server that sends everything back, until the client has no more to say."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                link, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(link,), daemon=True).start()

    def answer(link: socket.socket) -> None:
        with link:
            while data := link.recv(65536):
                link.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def send_all(link: socket.socket, data: bytes) -> None:
    link.sendall(data)
    link.shutdown(socket.SHUT_WR)


def exchange(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
        sender = threading.Thread(target=send_all, args=(link, data))
        sender.start()
        back = bytearray()
        while piece := link.recv(65536):
            back += piece
        sender.join()
    return bytes(back)


def test_everything_arrives_whole_and_in_order(echo: int) -> None:
    data = os.urandom(3 * MiB + 17)
    with Link(echo) as link:
        assert exchange(link.port, data) == data
        assert link.carried == (len(data), len(data))


def test_a_round_trip_takes_the_delay_but_pieces_travel_together(echo: int) -> None:
    with Link(echo, rtt_s=0.1) as link, socket.create_connection(("127.0.0.1", link.port), timeout=20) as client:
        began = time.monotonic()
        client.sendall(b"x")
        client.recv(1)
        assert 0.1 <= time.monotonic() - began < 0.3
        began = time.monotonic()
        for _ in range(20):
            client.sendall(b"x" * 1000)
            time.sleep(0.002)
        got = 0
        while got < 20_000:
            got += len(client.recv(65536))
        assert time.monotonic() - began < 0.6


def test_two_connections_share_the_rate(echo: int) -> None:
    with Link(echo, rate=4 * MiB) as link:
        data = bytes(MiB)
        began = time.monotonic()
        both = [threading.Thread(target=exchange, args=(link.port, data)) for _ in range(2)]
        for one in both:
            one.start()
        for one in both:
            one.join()
        assert 0.45 <= time.monotonic() - began < 2.0


def test_stopping_breaks_connections(echo: int) -> None:
    link = Link(echo).start()
    with socket.create_connection(("127.0.0.1", link.port), timeout=5) as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        link.stop()
        assert client.recv(1) == b""
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", link.port), timeout=1)


def test_a_far_end_that_is_not_there_closes_the_near_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with Link(port) as link, socket.create_connection(("127.0.0.1", link.port), timeout=5) as client:
        assert client.recv(1) == b""


@pytest.mark.parametrize(("rate", "rtt_s"), [(0.0, 0.0), (-1.0, 0.0), (None, -0.1)])
def test_an_impossible_link_is_refused(rate: float | None, rtt_s: float) -> None:
    with pytest.raises(LabError):
        Link(1, rate=rate, rtt_s=rtt_s)
