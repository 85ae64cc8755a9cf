"""The outside clock, spoken to by sockets that play guests."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tokvm.lab.clock import MAX_LINE, OutsideClock
from tokvm.lab.errors import LabError

Say = Callable[[str], None]


@contextmanager
def guest_at(clock: OutsideClock) -> Iterator[Say]:
    with socket.create_connection(("127.0.0.1", clock.port)) as link:
        yield lambda text: link.sendall(text.encode())


def ack(boot: str, number: int, total: int, guest: str = "g") -> str:
    return f"ACK boot={boot} guest={guest} n={number} sum={total}\n"


def ready(boot: str, **numbers: int) -> str:
    found = {"last": 0, "sum": 0, "count": 0, "missing": 0, "bad": 0, "torn": 0} | numbers
    return f"READY boot={boot} guest=g root=vda1 up=1.0 " + " ".join(f"{key}={value}" for key, value in found.items()) + "\n"


def heard(clock: OutsideClock, boot: str) -> None:
    """Until everything a guest said before its last heartbeat has arrived."""
    with guest_at(clock) as say:
        say(f"HEARTBEAT boot={boot} guest=g up=9 last=0\n")
        clock.wait(lambda c: c.first_heartbeat(boot) is not None, timeout_s=5, what="the line")


def test_heartbeats_are_timed_on_arrival(clock: OutsideClock) -> None:
    before = time.monotonic()
    with guest_at(clock) as say:
        say("HEARTBEAT boot=a guest=g up=1.00 last=0\n")
        clock.wait(lambda c: c.first_heartbeat("a") is not None, timeout_s=5, what="a heartbeat")
        say("HEARTBEAT boot=a guest=g up=1.10 last=0\n")
        clock.wait(lambda c: c.last_heartbeat("a") != c.first_heartbeat("a"), timeout_s=5, what="another")
    first, last = clock.first_heartbeat("a"), clock.last_heartbeat("a")
    assert first is not None
    assert last is not None
    assert before < first < last < time.monotonic()
    assert clock.first_heartbeat("never booted") is None


def test_a_line_may_come_in_pieces_and_several_at_once(clock: OutsideClock) -> None:
    with guest_at(clock) as say:
        say("ACK boot=a guest=g n=1 su")
        say("m=11\n" + ack("a", 2, 22) + ack("a", 3, 33))
        clock.wait_acknowledged("g", 3, timeout_s=5)
    assert clock.acknowledged("g") == {1: 11, 2: 22, 3: 33}


def test_a_resent_acknowledgement_counts_once_and_is_no_sign_of_life(clock: OutsideClock) -> None:
    with guest_at(clock) as say:
        say(ack("a", 1, 11))
        clock.wait_acknowledged("g", 1, timeout_s=5)
        first = clock.boots("g")[0].last_acknowledgement
        say(ack("a", 1, 11) + ack("a", 2, 22))
        clock.wait_acknowledged("g", 2, timeout_s=5)
    boot = clock.boots("g")[0]
    assert boot.first_acknowledgement == first
    assert boot.last_heartbeat is None
    assert clock.troubles("g") == []


def test_guests_are_kept_apart(clock: OutsideClock) -> None:
    with guest_at(clock) as say:
        say(ack("a", 1, 11, guest="one") + ack("b", 1, 12, guest="two"))
        clock.wait_acknowledged("two", 1, timeout_s=5)
    assert clock.acknowledged("one") == {1: 11}
    assert clock.acknowledged("two") == {1: 12}
    assert [boot.id for boot in clock.boots("one")] == ["a"]


def test_a_ledger_with_everything_acknowledged_is_intact(clock: OutsideClock) -> None:
    with guest_at(clock) as say:
        say(ack("a", 1, 11) + ack("a", 2, 22) + ready("b", last=3, count=3, sum=33) + ack("b", 4, 44))
    heard(clock, "b")
    report = clock.ledger_report("g")
    assert report.intact
    assert (report.acknowledged, report.present, report.lost) == (2, 3, 0)


@pytest.mark.parametrize(
    ("found", "lost"),
    [
        ({"last": 1, "count": 1, "sum": 11}, 2),
        ({"last": 3, "count": 2, "sum": 33, "missing": 1}, 1),
        ({"last": 3, "count": 2, "sum": 33, "bad": 1}, 1),
        ({"last": 0, "count": 0}, 3),
    ],
)
def test_lost_records_are_counted(clock: OutsideClock, found: dict[str, int], lost: int) -> None:
    with guest_at(clock) as say:
        say(ack("a", 1, 11) + ack("a", 2, 22) + ack("a", 3, 33) + ready("b", **found))
    heard(clock, "b")
    report = clock.ledger_report("g")
    assert report.lost == lost
    assert not report.intact


def test_another_history_under_the_same_numbers_is_seen(clock: OutsideClock) -> None:
    with guest_at(clock) as say:
        say(ack("a", 1, 11) + ready("b", last=1, count=1, sum=12))
    heard(clock, "b")
    assert not clock.ledger_report("g").same_history


def test_two_copies_that_write_the_same_number_are_a_trouble(clock: OutsideClock) -> None:
    with guest_at(clock) as say:
        say(ack("a", 1, 11) + ack("b", 1, 99) + ack("b", 2, 22))
        clock.wait_acknowledged("g", 2, timeout_s=5)
    assert "twice" in clock.troubles("g")[0]
    assert clock.acknowledged("g")[1] == 11


def test_what_is_no_message_is_left_out(clock: OutsideClock) -> None:
    with guest_at(clock) as say:
        say("\n\x00\xff\nlower boot=a guest=g\nACK n=5 sum=5\nACK boot=a guest=g n=x sum=\n" + ack("a", 1, 11))
        clock.wait_acknowledged("g", 1, timeout_s=5)
    assert clock.acknowledged("g")[1] == 11


def test_a_guest_that_never_ends_its_line_is_cut_off(clock: OutsideClock) -> None:
    with socket.create_connection(("127.0.0.1", clock.port)) as link:
        link.settimeout(5)
        link.sendall(b"x" * (2 * MAX_LINE))
        with suppress(ConnectionResetError):
            assert link.recv(1) == b""
    with guest_at(clock) as say:
        say(ack("a", 1, 11))
        clock.wait_acknowledged("g", 1, timeout_s=5)


def test_a_later_clock_knows_what_an_earlier_one_heard(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    with OutsideClock(record) as earlier, guest_at(earlier) as say:
        say(ack("a", 1, 11) + ready("b", last=1, count=1, sum=11))
        earlier.wait(lambda c: bool(c.boots("g")[1:]), timeout_s=5, what="both boots")
    record.write_text(record.read_text() + '{"at": 1.0, "wa')
    with OutsideClock(record) as later:
        assert later.acknowledged("g") == {1: 11}
        assert later.ledger_report("g").intact


def test_waiting_ends_at_its_deadline(clock: OutsideClock) -> None:
    with pytest.raises(LabError, match="did not happen within"):
        clock.wait_ready("g", timeout_s=0.05)
    with pytest.raises(LabError, match="not reported"):
        clock.ledger_report("g")


def test_a_taken_port_is_said(clock: OutsideClock) -> None:
    with pytest.raises(LabError, match=str(clock.port)):
        OutsideClock(port=clock.port)
