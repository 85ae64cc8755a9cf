"""(a) A VHD chain to a raw file and to a loop device, against qemu-img and against the kernel's own copy.

qemu-img cannot read VHD chains; it gets the same content as one flat dynamic VHD. The kernel copies that flat VHD's bytes (the
data and 0.1 % of tables) without looking at them: what moving them costs at least. Every way ends with an fsync.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from benchmarks.inputs import Chain
from benchmarks.measure import BenchmarkError, Result, Variant, alternate, evict, worker

KERNEL = "kernel: copy_file_range + fsync"
KERNEL_DEVICE = "kernel: sendfile + fsync"
CP = "kernel: cp --sparse=never + fsync"
QEMU = "qemu-img convert + fsync"
PASS = "tokvm pass"
PASS_ALONE = "tokvm pass, no manifest"
TUNED = ("-t", "none", "-T", "none", "-W", "-m", "16")


def to_file(chain: Chain, folder: Path, *, repeats: int, tell: Callable[[str], None]) -> list[Result]:
    """Each variant writes a new sparse file."""
    target, manifest = folder / "target.raw", folder / "target.manifest"
    before = both(evict(*chain.paths, Path(chain.flat_vhd)), lambda: target.unlink(missing_ok=True))
    once = Once(lambda: compare(target, Path(chain.flat_raw), chain.size))
    sync, convert = ("sync", str(target)), ("qemu-img", "convert", "-f", "vpc", "-O", "raw")
    variants = [
        Variant(KERNEL, (worker("kernel", str(target), chain.flat_vhd),), before),
        Variant(CP, (cp(chain.flat_vhd, target), sync), before),
        Variant("kernel: O_DIRECT read and write, 4 MiB", (worker("direct", str(target), chain.flat_vhd),), before),
        Variant(QEMU, ((*convert, "-t", "writeback", chain.flat_vhd, str(target)), sync), before),
        Variant("qemu-img convert, tuned + fsync", ((*convert, *TUNED, chain.flat_vhd, str(target)), sync), before),
        Variant(PASS, (worker("pass", str(target), str(manifest), *chain.layers),), before, once),
        Variant(PASS_ALONE, (worker("pass", str(target), "-", *chain.layers),), before),
    ]
    try:
        return alternate(variants, repeats=repeats, payload=chain.payload, tell=tell)
    finally:
        target.unlink(missing_ok=True)
        manifest.unlink(missing_ok=True)


def to_device(chain: Chain, folder: Path, *, repeats: int, tell: Callable[[str], None]) -> list[Result]:
    """Each variant gets a loop device over a new sparse file. Needs root."""
    manifest = folder / "target.manifest"
    with_loop = _Loop(folder / "loop.img", chain.size)
    device = with_loop.path
    before = both(evict(*chain.paths, Path(chain.flat_vhd)), with_loop.renew)
    once = Once(lambda: compare(Path(device), Path(chain.flat_raw), chain.size))
    convert = ("qemu-img", "convert", "-n", "-f", "vpc", "-O", "raw")
    variants = [
        Variant(KERNEL_DEVICE, (worker("kernel", device, chain.flat_vhd),), before),
        Variant(CP, (cp(chain.flat_vhd, Path(device)), ("sync", device)), before),
        Variant("kernel: O_DIRECT read and write, 4 MiB", (worker("direct", device, chain.flat_vhd),), before),
        Variant(QEMU, ((*convert, "-t", "writeback", chain.flat_vhd, device), ("sync", device)), before),
        Variant("qemu-img convert, tuned + fsync", ((*convert, *TUNED, chain.flat_vhd, device), ("sync", device)), before),
        Variant(PASS, (worker("pass", device, str(manifest), *chain.layers),), before, once),
        Variant(PASS_ALONE, (worker("pass", device, "-", *chain.layers),), before),
    ]
    try:
        return alternate(variants, repeats=repeats, payload=chain.payload, tell=tell)
    finally:
        with_loop.close()
        manifest.unlink(missing_ok=True)


def cp(source: str, target: Path) -> tuple[str, ...]:
    return ("cp", "--sparse=never", "--reflink=never", source, str(target))


def both(*acts: Callable[[], None]) -> Callable[[], None]:
    def act() -> None:
        for each in acts:
            each()

    return act


class Once:
    """Acts at the first call only: figures of a wrong copy are worth nothing, and comparing takes long."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act: Callable[[], None] | None = act

    def __call__(self) -> None:
        act, self._act = self._act, None
        if act is not None:
            act()


def compare(target: Path, expected: Path, size: int) -> None:
    done = subprocess.run(["cmp", "--bytes", str(size), str(target), str(expected)], check=False)
    if done.returncode:
        raise BenchmarkError(f"{target} does not hold what {expected} does")


class _Loop:
    """One loop device, whose backing file is emptied for each run. It stays attached: others may want the number."""

    def __init__(self, backing: Path, size: int) -> None:
        self._backing = backing
        backing.unlink(missing_ok=True)
        with backing.open("wb") as file:
            file.truncate(size)
        done = subprocess.run(["losetup", "--find", "--show", str(backing)], check=True, capture_output=True, text=True)
        self.path = done.stdout.strip()

    def renew(self) -> None:
        subprocess.run(["blkdiscard", "--force", self.path], check=True, capture_output=True)
        subprocess.run(["sync", str(self._backing)], check=True)

    def close(self) -> None:
        subprocess.run(["losetup", "--detach", self.path], check=False)
        self._backing.unlink(missing_ok=True)
