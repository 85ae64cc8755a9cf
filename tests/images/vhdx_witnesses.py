"""Who else knows what a VHDX holds: qemu-img, libvhdi, dissect, and a replay of the log in the plainest way."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tokvm.core.units import MiB
from tokvm.testing.vhdx_structs import crc32c
from tokvm.testing.vhdx_writer import Layout, write_vhdx

PAGE = 4096
BASE = UUID(int=0xB)
Run = tuple[int, bytes]


def applied(runs: list[Run], under: bytes) -> bytes:
    raw = bytearray(under)
    for offset, data in runs:
        raw[offset : offset + len(data)] = data
    return bytes(raw)


def write(out: Any, **options: Any) -> Layout:
    defaults: dict[str, Any] = {"data_write_guid": BASE, "kind": "dynamic", "block_size": MiB}
    return write_vhdx(out, **(defaults | options))


def by_qemu(path: Path) -> bytes:
    out = path.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-f", "vhdx", "-O", "raw", str(path), str(out)], check=True, capture_output=True)
    return out.read_bytes()


def by_libvhdi(path: Path, *parents: Path) -> bytes:
    pyvhdi = pytest.importorskip("pyvhdi")
    files: list[Any] = []
    for name in (*parents, path):
        file = pyvhdi.file()
        file.open(str(name))
        if files:
            file.set_parent(files[-1])
        files.append(file)
    raw = bytes(files[-1].read_buffer(files[-1].get_media_size()))
    for file in reversed(files):
        file.close()
    return raw


def by_dissect(path: Path) -> bytes:
    """Whole blocks at a time: its reads are only right inside a block. Parents are found by their relative path."""
    vhdx = pytest.importorskip("dissect.hypervisor.disk.vhdx")
    disk = vhdx.VHDX(path)
    step, total = disk.block_size // disk.sector_size, disk.size // disk.sector_size
    raw = b"".join(disk.read_sectors(at, min(step, total - at)) for at in range(0, total, step))
    while disk is not None:
        disk.fh.close()
        disk = disk.parent
    return raw


def replayed(raw: bytes) -> bytes | None:
    """The file after replay as the specification (2.3) tells it, in the plainest way; None when nothing can be replayed."""
    file = bytearray(raw)
    headers = [struct.unpack_from("<4xIQ16x16x16sHHIQ", raw, at) for at in (64 << 10, 128 << 10)]
    _, _, log_guid, _, _, length, offset = max(headers, key=lambda header: header[1])
    ring = raw[offset : offset + length] * 2
    best: list[tuple[int, int, int]] = []
    for start in range(0, length, PAGE):
        found: list[tuple[int, int, int]] = []
        at = start
        while (entry := valid_entry(ring, at % length, length, log_guid)) and (not found or entry[0] == found[-1][0] + 1):
            found.append((entry[0], at % length, entry[2]))
            at += entry[1]
        if found and found[-1][2] in [place for _, place, _ in found] and (not best or found[-1][0] > best[-1][0]):
            best = found
    if not best:
        return None
    flushed, last = struct.unpack_from("<QQ", ring, best[-1][1] + 48)
    if len(file) < flushed:
        return None
    tail = [place for _, place, _ in best].index(best[-1][2])
    for _, place, _ in best[tail:]:
        replay_entry(file, ring, place)
    return bytes(file.ljust(last, b"\0"))


def valid_entry(ring: bytes, at: int, limit: int, log_guid: bytes) -> tuple[int, int, int] | None:
    """(sequence, length, tail) of the entry at this place, if there is one."""
    signature, checksum, length, tail, sequence, count, _, guid = struct.unpack_from("<4sIIIQII16s", ring, at)
    if signature != b"loge" or guid != log_guid or not 0 < length <= limit or length % PAGE or not sequence:
        return None
    raw = ring[at : at + length]
    if crc32c(raw[:4] + bytes(4) + raw[8:]) != checksum:
        return None
    sectors = -(-(64 + 32 * count) // PAGE)
    for index in range(count):
        kind, own = raw[64 + 32 * index :][:4], struct.unpack_from("<Q", raw, 64 + 32 * index + 24)[0]
        if own != sequence:
            return None
        if kind == b"desc":
            sector = raw[sectors * PAGE : (sectors + 1) * PAGE]
            high, low = struct.unpack_from("<I", sector, 4)[0], struct.unpack_from("<I", sector, 4092)[0]
            if sector[:4] != b"data" or high << 32 | low != sequence:
                return None
            sectors += 1
        elif kind != b"zero":
            return None
    return (sequence, length, tail) if sectors * PAGE == length else None


def replay_entry(file: bytearray, ring: bytes, place: int) -> None:
    (count,) = struct.unpack_from("<I", ring, place + 24)
    sector = place + -(-(64 + 32 * count) // PAGE) * PAGE
    for at in range(place + 64, place + 64 + 32 * count, 32):
        offset = struct.unpack_from("<Q", ring, at + 16)[0]
        if ring[at : at + 4] == b"zero":
            data = bytes(struct.unpack_from("<Q", ring, at + 8)[0])
        else:
            data = ring[at + 8 : at + 16] + ring[sector + 8 : sector + 4092] + ring[at + 4 : at + 8]
            sector += PAGE
        file.extend(bytes(max(0, offset + len(data) - len(file))))
        file[offset : offset + len(data)] = data
