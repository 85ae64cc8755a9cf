"""Random disk content for the VMDK writers, what it means by a naive model, and QEMU's opinion of a file."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

SECTOR = 512
Run = tuple[int, bytes]
Range = tuple[int, int]

needs_qemu = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img (qemu-utils)")


@dataclass(frozen=True)
class Case:
    """What is written to a disk: data, zeros, trims; ascending and disjoint."""

    size: int
    runs: list[Run]
    zeros: list[Range]
    unmapped: list[Range]

    def over(self, under: bytes = b"") -> bytes:
        """The disk's content when `under` lies below."""
        raw = bytearray(under[: self.size].ljust(self.size, b"\0"))
        for offset, data in self.runs:
            raw[offset : offset + len(data)] = data
        for offset, length in [*self.zeros, *self.unmapped]:
            raw[offset : offset + length] = bytes(length)
        return bytes(raw)

    def kinds(self, grain_size: int, *, explicit_zeros: bool) -> list[str]:
        """What each grain has to be: absent, zero or data. Sector by sector, with no idea how a writer does it."""
        sectors = ["absent"] * (self.size // SECTOR)
        for offset, data in self.runs:
            sectors[offset // SECTOR : (offset + len(data)) // SECTOR] = ["data"] * (len(data) // SECTOR)
        for word, ranges in (("zero", self.zeros), ("unmapped", self.unmapped)):
            for offset, length in ranges:
                sectors[offset // SECTOR : (offset + length) // SECTOR] = [word] * (length // SECTOR)
        found = []
        for start in range(0, len(sectors), grain_size // SECTOR):
            inside = set(sectors[start : start + grain_size // SECTOR])
            word = inside.pop() if len(inside) == 1 else "data"
            if word in ("zero", "unmapped"):
                word = "zero" if explicit_zeros else "data"
            found.append(word)
        return found


def random_case(seed: int, size: int, *, step: int = SECTOR, longest: int = 256, trims: bool = False) -> Case:
    """Multiples of `step`, side by side or apart; the disk's last `step` bytes are among them."""
    rng = random.Random(seed)
    runs: list[Run] = []
    zeros: list[Range] = []
    unmapped: list[Range] = []
    total, at = -(-size // step), 0
    while at < total:
        count = min(rng.choice((1, 2, 7, rng.randrange(1, longest))), total - at)
        offset, length = at * step, min(count * step, size - at * step)
        choice = "data" if at + count == total else rng.choice(["absent", "data", "data", "zero", "unmapped"])
        if choice == "data":
            runs.append((offset, rng.randbytes(length)))
        elif choice == "zero" or (choice == "unmapped" and not trims):
            zeros.append((offset, length))
        elif choice == "unmapped":
            unmapped.append((offset, length))
        at += count
    return Case(size, runs, zeros, unmapped)


def reader_of(content: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: content[offset : offset + length].ljust(length, b"\0")


def qemu_content(path: Path) -> bytes:
    """The disk as qemu-img reads it, with its backing files if the descriptor names one."""
    out = path.parent / f"{path.stem}.by-qemu.raw"
    done = subprocess.run(
        ["qemu-img", "convert", "-f", "vmdk", "-O", "raw", str(path), str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    content = out.read_bytes()
    out.unlink()
    return content


def qemu_refusal(path: Path) -> str:
    out = path.parent / f"{path.stem}.refused.raw"
    done = subprocess.run(
        ["qemu-img", "convert", "-f", "vmdk", "-O", "raw", str(path), str(out)], capture_output=True, text=True
    )
    assert done.returncode != 0
    return done.stderr


def qemu_kinds(path: Path, size: int, grain_size: int) -> list[str]:
    """Per grain, what QEMU finds in this layer alone."""
    file = {"driver": "vmdk", "backing": None, "file": {"driver": "file", "filename": str(path)}}
    done = subprocess.run(
        ["qemu-img", "map", "--output=json", f"json:{json.dumps(file)}"], capture_output=True, text=True, check=True
    )
    found = ["?"] * -(-size // grain_size)
    for row in json.loads(done.stdout):
        word = "absent" if not row["present"] else "zero" if row["zero"] else "data"
        first, stop = row["start"] // grain_size, -(-(row["start"] + row["length"]) // grain_size)
        found[first:stop] = [word] * (stop - first)
    return found


def dissect_content(extents: list[Path]) -> bytes:
    """The disk of these extent files as dissect.hypervisor reads it, without a parent. It fails to read past a disk's end."""
    vmdk = pytest.importorskip("dissect.hypervisor.disk.vmdk")
    with ExitStack() as files:
        disk = vmdk.VMDK([files.enter_context(path.open("rb")) for path in extents])
        content: bytes = disk.read_sectors(0, disk.sector_count)
    return content
