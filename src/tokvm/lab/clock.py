"""The clock outside: guests report to it over TCP, and its times are the only ones the lab believes.

    guest ── 10.0.2.2:port (QEMU user networking) ──► 127.0.0.1:port ─► one thread ─► Message(at, …) ─► record.jsonl

Lines are `WORD key=value …`; data/guest_init.sh lists them. `at` is CLOCK_MONOTONIC, which all processes of a host share until
it restarts; `wall` is for people. A guest that lost its connection sends its last lines again: only the first arrival of an
acknowledgement counts, and only HEARTBEAT lines, which are never sent twice, show that a guest lives.

A write counts as acknowledged when its ACK arrived here. It was sent after fsync returned, so who loses it lost data.
"""

from __future__ import annotations

import json
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tokvm.lab.errors import LabError

log = logging.getLogger(__name__)

MAX_LINE = 4096
MAX_FIELDS = 32
NUMBERS = {"ACK": ("n", "sum"), "READY": ("last", "sum", "count", "missing", "bad")}


@dataclass(frozen=True, slots=True)
class Message:
    at: float
    wall: float
    word: str
    fields: dict[str, str]

    def number(self, key: str) -> int:
        """A field as a number; -1 when it is not there or is none."""
        text = self.fields.get(key, "")
        return int(text) if text.isdigit() and len(text) < 20 else -1


@dataclass(frozen=True, slots=True)
class Boot:
    """One run of a guest, from power-on to the end, as seen from outside. Times are CLOCK_MONOTONIC seconds."""

    id: str
    guest: str
    first_heartbeat: float | None = None
    last_heartbeat: float | None = None
    first_acknowledgement: float | None = None
    last_acknowledgement: float | None = None
    ready: Message | None = None
    stopping: float | None = None

    @property
    def root(self) -> str:
        """The root device as the guest named it (`sda1`, `vda1`); empty before it is ready."""
        return self.ready.fields.get("root", "") if self.ready else ""


@dataclass(frozen=True, slots=True)
class LedgerReport:
    """What a guest's ledger holds against what its writes were acknowledged for.

    `acknowledged`: records whose ACK arrived before this boot. `present`: sound records the guest found when it booted. `lost`:
    acknowledged ones it did not find. `missing` and `bad`: gaps and damaged records, as the guest counted them.
    `same_history` is False when the last record both know has another sum: the ledger is of another copy of the guest.
    """

    acknowledged: int
    present: int
    lost: int
    missing: int
    bad: int
    same_history: bool

    @property
    def intact(self) -> bool:
        return self.lost == 0 and self.missing == 0 and self.bad == 0 and self.same_history


@dataclass(slots=True)
class _Connection:
    rest: bytearray = field(default_factory=bytearray)


class OutsideClock:
    """Listens until `stop`. With `record`, every message is appended there, and what an earlier clock wrote is read first."""

    def __init__(self, record: Path | None = None, *, port: int = 0, host: str = "127.0.0.1") -> None:
        self._boots: dict[str, Boot] = {}
        self._acks: dict[str, dict[int, Message]] = {}
        self._troubles: list[Message] = []
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if record is not None and record.exists():
            for message in read_record(record):
                self._note(message)
        self._record: TextIO | None = record.open("a", buffering=1) if record is not None else None
        self._listener = _listen(host, port)
        self.port: int = self._listener.getsockname()[1]

    def start(self) -> OutsideClock:
        self._thread = threading.Thread(target=self._serve, name="outside-clock", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._listener.close()
        if self._record is not None:
            self._record.close()

    def __enter__(self) -> OutsideClock:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def boots(self, guest: str) -> list[Boot]:
        """The runs of `guest`, oldest first. One still in its first milliseconds may not have spoken yet."""
        with self._changed:
            return [boot for boot in self._boots.values() if boot.guest == guest]

    def acknowledged(self, guest: str) -> dict[int, int]:
        """Record number → sum of all that were acknowledged."""
        with self._changed:
            return {number: message.number("sum") for number, message in self._acks.get(guest, {}).items()}

    def troubles(self, guest: str) -> list[str]:
        """What a guest complained of: writes that failed, disks not found, two histories under one number."""
        with self._changed:
            return [message.fields.get("what", "?") for message in self._troubles if message.fields.get("guest") == guest]

    def first_heartbeat(self, boot: str) -> float | None:
        with self._changed:
            return self._boots[boot].first_heartbeat if boot in self._boots else None

    def last_heartbeat(self, boot: str) -> float | None:
        with self._changed:
            return self._boots[boot].last_heartbeat if boot in self._boots else None

    def ledger_report(self, guest: str, boot: str | None = None) -> LedgerReport:
        """The ledger as `boot` (default: the latest that is ready) found it, against what was acknowledged before that."""
        with self._changed:
            ready = [
                found for found in self._boots.values() if found.guest == guest and found.ready and boot in {None, found.id}
            ]
            if not ready or ready[-1].ready is None:
                raise LabError(f"guest {guest} has not reported its ledger{f' in boot {boot}' if boot else ''}")
            found, seen = ready[-1], ready[-1].ready
            acks = {n: ack for n, ack in self._acks.get(guest, {}).items() if ack.fields.get("boot") != found.id}
        last, missing, bad = seen.number("last"), seen.number("missing"), seen.number("bad")
        gone = sum(1 for number in acks if number > last)
        ack = acks.get(last)
        return LedgerReport(
            acknowledged=len(acks),
            present=seen.number("count"),
            lost=min(len(acks), gone + missing + bad),
            missing=missing,
            bad=bad,
            same_history=ack is None or ack.number("sum") == seen.number("sum"),
        )

    def wait(self, condition: Callable[[OutsideClock], bool], *, timeout_s: float, what: str) -> None:
        """Until `condition`, looked at after every message; LabError saying `what` did not happen."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not condition(self):
                left = deadline - time.monotonic()
                if left <= 0 or self._stop.is_set():
                    raise LabError(
                        f"{what} did not happen within {timeout_s:g} s", where=f"the outside clock, port {self.port}"
                    )
                self._changed.wait(min(left, 1.0))

    def wait_ready(self, guest: str, *, timeout_s: float, known: frozenset[str] = frozenset()) -> Boot:
        """The first run of `guest` beyond `known` boot ids that has verified its ledger."""

        def ready() -> list[Boot]:
            return [boot for boot in self.boots(guest) if boot.ready and boot.first_heartbeat and boot.id not in known]

        self.wait(lambda _: bool(ready()), timeout_s=timeout_s, what=f"the boot of {guest}")
        return ready()[0]

    def wait_acknowledged(self, guest: str, count: int, *, timeout_s: float) -> None:
        """Until at least `count` records were acknowledged."""
        self.wait(lambda _: len(self.acknowledged(guest)) >= count, timeout_s=timeout_s, what=f"record {count} of {guest}")

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            self._listener.setblocking(False)
            selector.register(self._listener, selectors.EVENT_READ, None)
            while not self._stop.is_set():
                for key, _ in selector.select(0.2):
                    if key.data is None:
                        self._accept(selector)
                    elif not self._receive(key.fileobj, key.data):
                        selector.unregister(key.fileobj)
                        _socket_of(key.fileobj).close()
            for key in list(selector.get_map().values()):
                if key.data is not None:
                    _socket_of(key.fileobj).close()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            link, _ = self._listener.accept()
        except OSError:  # the guest hung up between the event and the accept
            return
        link.setblocking(False)
        selector.register(link, selectors.EVENT_READ, _Connection())

    def _receive(self, link: object, connection: _Connection) -> bool:
        """Take what has arrived; False when the connection is over."""
        try:
            data = _socket_of(link).recv(65536)
        except BlockingIOError:
            return True
        except OSError:
            return False
        at, wall = time.monotonic(), time.time()
        connection.rest += data
        *lines, rest = connection.rest.split(b"\n")
        connection.rest = bytearray(rest)
        for line in lines:
            message = parse_line(bytes(line), at=at, wall=wall)
            if message is None:
                log.warning("a line that is no message: %r", bytes(line[:80]))
                continue
            self._keep(message)
        return bool(data) and len(rest) <= MAX_LINE

    def _keep(self, message: Message) -> None:
        if self._record is not None:
            self._record.write(json.dumps(asdict(message)) + "\n")
        with self._changed:
            self._note(message)
            self._changed.notify_all()

    def _note(self, message: Message) -> None:
        guest, boot_id = message.fields["guest"], message.fields["boot"]
        boot = self._boots.get(boot_id) or Boot(boot_id, guest)
        match message.word:
            case "HEARTBEAT":
                boot = replace(boot, first_heartbeat=boot.first_heartbeat or message.at, last_heartbeat=message.at)
            case "READY" if boot.ready is None:
                boot = replace(boot, ready=message)
            case "STOPPING" if boot.stopping is None:
                boot = replace(boot, stopping=message.at)
            case "TROUBLE":
                self._troubles.append(message)
            case "ACK":
                boot = self._acknowledge(boot, message)
        self._boots[boot_id] = boot

    def _acknowledge(self, boot: Boot, message: Message) -> Boot:
        acks, number = self._acks.setdefault(boot.guest, {}), message.number("n")
        known = acks.get(number)
        if known is not None:
            if known.number("sum") != message.number("sum"):
                what = (
                    f"record {number} acknowledged twice, with different content, by boots {known.fields['boot']} and {boot.id}"
                )
                self._troubles.append(replace(message, word="TROUBLE", fields={"guest": boot.guest, "what": what}))
            return boot
        acks[number] = message
        return replace(boot, first_acknowledgement=boot.first_acknowledgement or message.at, last_acknowledgement=message.at)


def parse_line(line: bytes, *, at: float, wall: float) -> Message | None:
    """A message; None for anything that is not `WORD key=value …` with a guest, a boot and the word's numbers."""
    word, *pairs = line.decode("ascii", "replace").split()[: MAX_FIELDS + 1] or [""]
    fields = dict(pair.partition("=")[::2] for pair in pairs)
    if not word.isupper() or not fields.get("guest") or not fields.get("boot"):
        return None
    message = Message(at, wall, word, fields)
    return message if all(message.number(key) >= 0 for key in NUMBERS.get(word, ())) else None


def read_record(record: Path) -> list[Message]:
    """The messages an earlier clock wrote; a last line cut short by a crash is left out."""
    messages = []
    for line in record.read_text(errors="replace").splitlines():
        try:
            kept = json.loads(line)
            messages.append(Message(float(kept["at"]), float(kept["wall"]), str(kept["word"]), dict(kept["fields"])))
        except (ValueError, KeyError, TypeError):
            log.warning("%s: a line that is no message was left out", record)
    return messages


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), reuse_port=False)
    except OSError as exc:
        raise LabError(
            f"cannot listen on {host}:{port}: {exc.strerror}", fix="free the port, or let the lab choose one"
        ) from exc


def _socket_of(link: object) -> socket.socket:
    if not isinstance(link, socket.socket):
        raise TypeError(link)
    return link
