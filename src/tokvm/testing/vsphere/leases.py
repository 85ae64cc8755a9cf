"""Export leases: a snapshot's disks as stream-optimised VMDKs, each at a URL, for as long as somebody says that it goes on.

    initializing ─► ready ─► done | error        error: aborted, or nobody reported progress for `lease_s`

A stream has no Content-Length and knows no Range: 200 from the start, whatever was asked. [C] With several disks fetched on one
lease vCenter cut the later streams short and said nothing (`lease_truncates`); only the end-of-stream marker tells.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyVmomi import vim

from tokvm.core.units import SECTOR
from tokvm.testing.esxi.state import Disk, Layer
from tokvm.testing.hyperv.backend import DATA
from tokvm.testing.persona.store import new_uuid
from tokvm.testing.vmdk_stream_writer import write_stream
from tokvm.testing.vsphere.listener import Cut, Exchange
from tokvm.testing.vsphere.options import CHUNKED

if TYPE_CHECKING:
    from tokvm.testing.vsphere.endpoint import Endpoint, Hit

INITIALIZING, READY, DONE, ERROR = "initializing", "ready", "done", "error"


@dataclass(slots=True)
class Item:
    """One disk of a lease. freeze: the moment, "" for the VM as it is (off)."""

    name: str
    disk: Disk
    layer: Layer
    freeze: str


@dataclass(slots=True)
class Lease:
    """Times are the clock's. fetched: what was asked for, in order; sent: bytes of all streams together."""

    moid: str
    ticket: str
    entity: Any
    snapshot: str
    items: list[Item]
    ready_at: float
    touched: float
    state: str = INITIALIZING
    percent: int = 0
    error: Any = None
    fetched: list[str] = field(default_factory=list)


class Leases:
    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._leases: dict[str, Lease] = {}

    def open(self, entity: Any, snapshot: str, items: list[Item]) -> Lease:
        now = self._endpoint.clock.now()
        ticket = new_uuid()
        moid = f"session[{new_uuid()}]{ticket}"
        ready_at = now + self._endpoint.options["lease_ready_s"]
        lease = Lease(moid, f"52{ticket[2:]}", entity, snapshot, items, ready_at, now)
        with self._lock:
            self._leases[moid] = lease
        return lease

    def find(self, moid: str) -> Lease | None:
        """As it is now."""
        with self._lock:
            lease = self._leases.get(moid)
            if lease is not None:
                self._age(lease)
            return lease

    def _age(self, lease: Lease) -> None:
        now, options = self._endpoint.clock.now(), self._endpoint.options
        if lease.state == INITIALIZING and now >= lease.ready_at:
            lease.state = READY
        if lease.state in (INITIALIZING, READY) and now > lease.touched + options["lease_s"]:
            lease.state = ERROR
            lease.error = vim.fault.Timedout(msg="Operation timed out.")

    def report(self, lease: Lease, percent: int) -> None:
        with self._lock:
            lease.percent, lease.touched = percent, self._endpoint.clock.now()

    def end(self, lease: Lease, state: str, error: Any = None) -> None:
        with self._lock:
            lease.state, lease.error = state, error

    def reads(self, snapshot: str) -> bool:
        """Whether a lease is open on that snapshot."""
        return any((one := self.find(moid)) and one.snapshot == snapshot and one.state == READY for moid in list(self._leases))

    # Streams

    def answer(self, exchange: Exchange, hit: Hit) -> None:
        """GET /nfc/<ticket>/disk-0.vmdk"""
        found = self._item(exchange.path)
        self._endpoint.log(request="nfc", path=exchange.path, range=exchange.headers.get("Range", ""), found=found is not None)
        if found is None:
            exchange.send(404, b"<html><body>404 Not Found</body></html>", {"Content-Type": "text/html"})
            return
        lease, item = found
        later = bool(lease.fetched) and item.name != lease.fetched[0]
        lease.fetched.append(item.name)
        self._stream(exchange, lease, item, hit, truncated=later and self._endpoint.options["lease_truncates"])

    def _item(self, path: str) -> tuple[Lease, Item] | None:
        _, _, ticket, name = path.split("/", 3) if path.count("/") == 3 else ("", "", "", "")
        for moid in list(self._leases):
            lease = self.find(moid)
            if lease is not None and lease.ticket == ticket and lease.state == READY:
                return next(((lease, item) for item in lease.items if item.name == name), None)
        return None

    def _stream(self, exchange: Exchange, lease: Lease, item: Item, hit: Hit, *, truncated: bool) -> None:
        options = self._endpoint.options
        chunked = options["lease_encoding"] == CHUNKED
        headers = {"Content-Type": "application/x-vnd.vmware-streamVmdk"}
        exchange.begin(200, {**headers, **({"Transfer-Encoding": "chunked"} if chunked else {})})
        limit = hit["cut_answer"].get("bytes", 1 << 17) if "cut_answer" in hit else -1
        out = _Stream(exchange, chunked=chunked, limit=limit)
        try:
            write_stream(out, size=item.layer["size"], runs=self._runs(lease, item, truncated=truncated))  # type: ignore[arg-type]
        except _Truncated:
            out.drop_marker()
        if not options["end_marker"]:
            out.drop_marker()
        if "lost_reply" in hit:
            raise Cut
        out.end()

    def _runs(self, lease: Lease, item: Item, *, truncated: bool) -> Iterator[tuple[int, bytes]]:
        backend = self._endpoint.ground.backend()
        guest, number = item.layer["guest"], item.layer["disk"]
        changes = [one for one in backend.changes(guest, number, "", item.freeze) if one.kind == DATA]
        rest = sum(one.length for one in changes) // 2
        for offset, data in backend.data(guest, number, item.freeze, changes):
            if self._endpoint.ending.is_set() or self.find(lease.moid) is None or lease.state != READY:
                raise Cut  # the lease ended under the stream
            yield offset, data
            rest -= len(data)
            if truncated and rest <= 0:
                raise _Truncated


class _Truncated(Exception):
    """The stream ends here and says nothing."""


class _Stream:
    """What the VMDK writer writes to. The last sector is held back: it is the end-of-stream marker."""

    def __init__(self, exchange: Exchange, *, chunked: bool, limit: int) -> None:
        self._exchange = exchange
        self._chunked = chunked
        self._limit = limit
        self._held = b""
        self._sent = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        whole = self._held + bytes(data)
        cut = max(0, len(whole) - SECTOR)
        self._held = whole[cut:]
        self._send(whole[:cut])
        return len(data)

    def drop_marker(self) -> None:
        self._held = b""

    def end(self) -> None:
        self._send(self._held)
        if self._chunked:
            self._exchange.write(b"0\r\n\r\n")

    def _send(self, data: bytes) -> None:
        if not data:
            return
        short = 0 <= self._limit < self._sent + len(data)
        if short:
            data = data[: self._limit - self._sent]
        self._exchange.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked and data else data)
        self._sent += len(data)
        if short:
            raise Cut
