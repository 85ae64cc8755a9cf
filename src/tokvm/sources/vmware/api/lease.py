"""The base of a running VM's disk by an export lease: for where its files are locked, or are none (vSAN, vVol).

    ExportSnapshot ─► lease: initializing ─► ready ─► done
                       │                      │  GET https://HOST/nfc/…/disk-0.vmdk       one stream-optimised VMDK
                       └─► error              │  HttpNfcLeaseProgress(percent) every 30 s, else it ends (300 s)
                                              └─ HttpNfcLeaseComplete, or HttpNfcLeaseAbort

Each disk has a lease of its own: with several on one, vCenter was seen to cut the later streams short without an error. The `*`
in a URL is the server that was asked. There is no length and no Range: a stream that breaks is read again from its start, and
only its end-of-stream marker says that it is whole (`images.vmdk.stream`).
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import SplitResult, urlsplit

from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.core.text import readable
from tokvm.core.units import SECTOR
from tokvm.images.base import ByteStream
from tokvm.images.vmdk.stream import VmdkStream
from tokvm.remote.tls import TlsTrust
from tokvm.sources.vmware.api import faults, properties
from tokvm.sources.vmware.api.client import Client
from tokvm.sources.vmware.api.folder import refused
from tokvm.sources.vmware.api.machine import VmDisk
from tokvm.sources.vmware.api.web import Peer, Web
from tokvm.sources.vmware.hardware import Node

log = logging.getLogger(__name__)

READY_S = 300.0
POLL_S = 0.5
KEEP_ALIVE_S = 30.0
_SKIP = 1 << 20
_PLACE = re.compile(r"([A-Za-z]+)Controller([0-9]{1,3}):([0-9]{1,3})\Z")
_KINDS = {"IDE": "ide", "AHCI": "sata", "NVME": "nvme"}


class LeasedDisk(VmdkStream):
    """A disk as an export sends it. Implements `core.disk.DiskReader`.

    Two exports of one frozen disk need not be the same bytes, so a position in one means nothing in another: each has a
    fingerprint of its own, and a pass that was broken off begins again."""

    def __init__(self, open_stream: Callable[[], ByteStream], *, name: str, expect_size: int) -> None:
        self._once = secrets.token_hex(8)
        super().__init__(lambda first: _from_byte(open_stream(), first), name=name, expect_size=expect_size)

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint}-{self._once}"


def _from_byte(stream: ByteStream, first: int) -> ByteStream:
    """The rest of a stream: there is no way to ask for less of it."""
    scratch = memoryview(bytearray(min(first, _SKIP)))
    while first:
        count = stream.read_into(scratch[: min(first, _SKIP)])
        if not count:
            stream.close()
            raise ConnectionLost("the export ended before the place where it is to be gone on with")
        first -= count
    return stream


def open_lease(client: Client, snapshot: Any, disk: VmDisk, *, name: str, expect_size: int) -> LeasedDisk:
    """snapshot: the frozen state's object. name: of the disk, for messages."""
    return LeasedDisk(lambda: LeaseStream(Lease(client, snapshot), disk, name=name), name=name, expect_size=expect_size)


class Lease:
    """One lease, ready to be read from when this returns; ended by `complete` or `abort`."""

    def __init__(self, client: Client, snapshot: Any) -> None:
        self.client = client
        self._failed: SourceError | None = None
        self._over = threading.Event()
        self._percent = 0
        self._ref = client.act(snapshot.ExportSnapshot, "asking for an export of the snapshot")
        try:
            self.info = self._await_ready()
        except BaseException:
            self.abort()
            raise
        self._keeper = threading.Thread(target=self._keep_alive, name="lease", daemon=True)
        self._keeper.start()

    def check(self) -> None:
        """ConnectionLost when the server gave the lease up."""
        if self._failed is not None:
            raise ConnectionLost(
                f"the export lease was lost: {self._failed.what}", where=self.client.where, fix="run the same command again"
            ) from self._failed

    def complete(self) -> None:
        """The server may forget it. What it sends was whole, so that this fails is only told."""
        if self._end():
            self._tell(self._ref.HttpNfcLeaseComplete, "ending the export lease")

    def abort(self) -> None:
        if self._end():
            self._tell(self._ref.HttpNfcLeaseAbort, "giving the export lease up")

    def _end(self) -> bool:
        before, self._percent = self._over.is_set(), 100
        self._over.set()
        return not before

    def _tell(self, what: Callable[[], Any], doing: str) -> None:
        try:
            self.client.act(what, doing)
        except SourceError as failed:
            log.info("%s: %s", self.client.where, failed.what)

    def _await_ready(self) -> Any:
        deadline = time.monotonic() + READY_S
        while True:
            found = properties.read_one(self.client, self._ref, ["state", "info", "error"], doing="reading the lease")
            match str(found.need("state")):
                case "ready":
                    return found.need("info")
                case "error":
                    fault = found.get("error")
                    raise faults.error_of(fault, where=self.client.where, doing="the export of the snapshot")
                case "done":
                    raise SourceError("the export lease was over before it began", where=self.client.where)
            if time.monotonic() > deadline:
                raise SourceError(
                    f"the export lease was not ready within {READY_S:g} s",
                    where=self.client.where,
                    fix="the host serves few exports at a time: let others end, then run the same command again",
                )
            time.sleep(POLL_S)

    def _keep_alive(self) -> None:
        """A lost reply is no harm: there are several tries within one lease's time."""
        failures = 0
        while not self._over.wait(KEEP_ALIVE_S):
            self._percent = min(self._percent + 1, 99)
            try:
                self.client.ask(lambda: self._ref.HttpNfcLeaseProgress(percent=self._percent), "keeping the export lease")
                failures = 0
            except SourceError as failed:
                failures += 1
                log.warning("%s: %s", self.client.where, failed.what)
                if failures > 2 or not isinstance(failed, ConnectionLost):
                    self._failed = failed
                    return


class LeaseStream:
    """One disk of a lease, front to back. Implements `images.base.ByteStream`."""

    def __init__(self, lease: Lease, disk: VmDisk, *, name: str) -> None:
        self._lease = lease
        self._name = name
        self._tail = b""
        self._open = contextlib.ExitStack()
        try:
            self._web, target = _address(lease, disk)
            self._open.callback(self._web.close)
            self._answer: HTTPResponse = self._open.enter_context(self._web.get(target))
            if self._answer.status != 200:
                raise refused(self._answer, name)
        except BaseException:
            self.close()
            raise

    def read_into(self, buffer: memoryview) -> int:
        self._lease.check()
        try:
            count = self._answer.readinto(buffer)
        except (OSError, HTTPException) as exc:
            raise faults.lost(exc, where=self._name, doing="reading the export") from exc
        self._tail = (self._tail + bytes(buffer[max(0, count - SECTOR) : count]))[-SECTOR:]
        return count

    def finish(self) -> None:
        """An end that does not look like an end-of-stream marker (a sector of zeros) is a connection that broke: there is no
        length that would tell."""
        self._lease.check()
        if self._tail != bytes(SECTOR):
            raise ConnectionLost(
                "the export broke off before its end-of-stream marker", where=self._name, fix="run the same command again"
            )
        self._lease.complete()

    def close(self) -> None:
        self._lease.abort()
        self._open.close()


def _address(lease: Lease, disk: VmDisk) -> tuple[Web, str]:
    """The connection for, and the place of, one disk's stream."""
    found = _url_of(lease, disk)
    client = lease.client
    parts, said_port = _parted(str(found.url), client.where)
    host = client.place.host if parts.hostname in ("*", None) else parts.hostname
    port = said_port or (client.place.port if parts.hostname in ("*", None) else 443)
    target = parts.path + (f"?{parts.query}" if parts.query else "")
    if (host, port) == (client.place.host, client.place.port):
        return Web(Peer(host, port, client.trust, client)), target
    return Web(Peer(host, port, _trust(client, found))), target


def _parted(url: str, where: str) -> tuple[SplitResult, int | None]:
    """A URL and its port, if it is one of https."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as exc:
        raise SourceError(f"the lease offers {readable(repr(url), limit=120)}, which is no URL", where=where) from exc
    if parts.scheme != "https":
        raise SourceError(f"the lease offers {readable(parts.scheme)}, not https", where=where)
    return parts, port


def _trust(client: Client, found: Any) -> TlsTrust:
    """How another host is proved: by our CA; or, where certificates are pinned, by what the pinned server says."""
    said = str(getattr(found, "sslThumbprint", None) or "")
    if not client.trust.pins or not said:
        return client.trust
    try:
        return client.trust.with_pin(said)
    except ValueError:
        return client.trust


def _url_of(lease: Lease, disk: VmDisk) -> Any:
    urls = [one for one in lease.info.deviceUrl or () if one.disk]
    found = [one for one in urls if _node_of(str(one.key)) == disk.node]
    if not found and len(urls) == 1 and _node_of(str(urls[0].key)) is None:
        found = urls
    if len(found) != 1:
        keys = ", ".join(readable(str(one.key), limit=60) for one in urls) or "none"
        raise SourceError(
            f"the export offers {len(found)} streams for the disk at {disk.node} (it has {keys})", where=lease.client.where
        )
    return found[0]


def _node_of(key: str) -> Node | None:
    """The place of a key like `/vm-7/ParaVirtualSCSIController0:1`; None when it is another kind of key."""
    match = _PLACE.search(key)
    if match is None:
        return None
    kind = next((kind for sign, kind in _KINDS.items() if sign in match[1]), "scsi")
    return Node(kind, int(match[2]), int(match[3]))
