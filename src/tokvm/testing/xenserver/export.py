"""`xe vdi-export`: the VHD of a frozen disk, or of what changed since an older one, as a stream with everything that can go
wrong with one."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokvm.testing import pids
from tokvm.testing.persona.connection import wait_for_hangup
from tokvm.testing.xenserver import streams
from tokvm.testing.xenserver.errors import XeError, api_error
from tokvm.testing.xenserver.faults import Fault
from tokvm.testing.xenserver.power import Power
from tokvm.testing.xenserver.records import find_vdi
from tokvm.testing.xenserver.snapshots import readers
from tokvm.testing.xenserver.state import RUNNING, State, Store, Vdi

PIECE = 256 << 10
EPOCH = 946684800  # 2000-01-01, where VHD timestamps begin
HTTP_500 = b"HTTP/1.1 500 Internal Server Error\r\nconnection: close\r\ncache-control: no-cache, no-store\r\n\r\n"


class ConnectionCut(Exception):
    """The fault plan wants the connection dead now."""


class Piece(NamedTuple):
    """What one export sends: bytes [first, end) of a VHD file with patches laid over it."""

    path: Path
    patches: dict[int, bytes]
    first: int
    end: int
    size: int


def export(store: Store, power: Power, vdi: str, base: str | None, first: int, faults: list[Fault], out: int) -> None:
    """Write the stream to the file descriptor `out`; `first`: bytes that `tail -c +N` leaves away."""
    kinds = {fault["kind"]: fault for fault in faults}
    if "http_500" in kinds:
        os.write(out, HTTP_500)
        return
    sent = 0
    ended = "broken"
    with _attached(store, power, vdi, base) as (frozen, since):
        try:
            parent = None if "full" in kinds else since
            path = _vhd_file(store, power, frozen, parent)
            piece = _piece(path, frozen, parent, first, kinds)
            for count in _send(piece, out, kinds):
                sent += count
            ended = "complete" if piece.end == piece.size else "short"
        finally:
            store.append(
                "exports.log",
                {"vdi": vdi, "base": base, "first": first, "sent": sent, "ended": ended, "pid": os.getpid()},
            )
    if "fail" in kinds:
        raise XeError("Error: Connection reset by peer (xapi lost the stream)")


@contextlib.contextmanager
def _attached(store: Store, power: Power, vdi: str, base: str | None) -> Iterator[tuple[Vdi, Vdi | None]]:
    """The VDIs attached to dom0 for reading. They stay so for a while afterwards (xen-api 4339)."""
    me = (os.getpid(), pids.start_tick(os.getpid()) or 0)
    with store.change() as state:
        frozen = find_vdi(state, vdi)
        _refuse_live(state, power, frozen)
        since = find_vdi(state, base) if base is not None else None
        if since is not None and (since["vm"], since["disk"]) != (frozen["vm"], frozen["disk"]):
            raise api_error("VDI_INCOMPATIBLE_TYPE", since["uuid"], "not an ancestor of the VDI")
        for attached in (frozen, since):
            if attached is not None:
                attached["readers"] = [*readers(attached), me]
                attached["busy_until"] = time.time() + state["options"]["in_use_s"]
    try:
        yield frozen, since
    finally:
        with store.change() as state:
            for name in (vdi, base):
                if name in state["vdis"]:
                    again = state["vdis"][name]
                    again["readers"] = [one for one in readers(again) if tuple(one) != me]
                    again["busy_until"] = time.time() + state["options"]["in_use_s"]


def _refuse_live(state: State, power: Power, vdi: Vdi) -> None:
    """The disk of a running VM cannot be attached a second time."""
    vm = state["vms"].get(vdi["vm"])
    if not vdi["frozen"] and vm is not None:
        power.refresh(state)
        if vm["power"] == RUNNING:
            raise api_error("VDI_IN_USE", f"{vdi['uuid']} ({vdi['label']})", "export")
        raise XeError("Error: only frozen disks are exported by the contract")


def _vhd_file(store: Store, power: Power, frozen: Vdi, since: Vdi | None) -> Path:
    """The VHD, made once; a second export of the same reads the file again."""
    name = f"{frozen['uuid']}_{since['uuid'] if since else 'base'}.vhd"
    path = store.path("exports", name)
    with store.locked(f"exports/{name}.lock"):
        if not path.exists():
            fresh = path.with_suffix(".new")
            if since is None:
                power.backend.export_base(frozen["vm"], frozen["disk"], frozen["frozen"], fresh)
            else:
                power.backend.export_delta(frozen["vm"], frozen["disk"], since["frozen"], frozen["frozen"], fresh)
            fresh.replace(path)
    return path


def _piece(path: Path, frozen: Vdi, since: Vdi | None, first: int, kinds: dict[str, Fault]) -> Piece:
    size = end = path.stat().st_size
    fresh = "new_identity" in kinds
    parent = since["uuid"] if since else ""
    if parent and "wrong_parent" in kinds:
        parent = str(uuid.uuid4())
    patches = streams.relabel(
        path,
        unique=str(uuid.uuid4()) if fresh else frozen["uuid"],
        parent=parent,
        timestamp=int(time.time()) - EPOCH if fresh else 1,
    )
    if "flip" in kinds:
        at = kinds["flip"]["at"] % size
        patches = _flipped(path, patches, at)
    for kind in ("short", "fail", "cut", "stall"):
        if kind in kinds:
            end = min(end, max(kinds[kind]["at"], 0))
    return Piece(path, patches, first, end, size)


def _flipped(path: Path, patches: dict[int, bytes], at: int) -> dict[int, bytes]:
    for offset, data in patches.items():
        if offset <= at < offset + len(data):
            turned = bytearray(data)
            turned[at - offset] ^= 1
            return {**patches, offset: bytes(turned)}
    with path.open("rb") as file:
        file.seek(at)
        return {**patches, at: bytes((file.read(1)[0] ^ 1,))}


def _send(piece: Piece, out: int, kinds: dict[str, Fault]) -> Iterator[int]:
    """Send it, yielding how much went out each time."""
    at = piece.first
    rate = kinds["slow"]["rate"] if "slow" in kinds else 0.0
    step = max(4096, min(PIECE, int(rate / 20))) if rate else PIECE
    with piece.path.open("rb", buffering=0) as file:
        while at < piece.end:
            data = _patched(file.fileno(), at, min(at + step, piece.end), piece.patches)
            view = memoryview(data)
            while view:
                count = os.write(out, view)
                view = view[count:]
                yield count
            at += len(data)
            if rate:
                time.sleep(len(data) / rate)
    if "stall" in kinds:
        wait_for_hangup(out)
    if "cut" in kinds:
        time.sleep(0.05)  # let sshd pass on what it has
        raise ConnectionCut


def _patched(file: int, start: int, stop: int, patches: dict[int, bytes]) -> bytes:
    data = os.pread(file, stop - start, start)
    changed: bytearray | None = None
    for offset, patch in patches.items():
        low, high = max(start, offset), min(start + len(data), offset + len(patch))
        if low < high:
            changed = changed if changed is not None else bytearray(data)
            changed[low - start : high - start] = patch[low - offset : high - offset]
    return data if changed is None else bytes(changed)
