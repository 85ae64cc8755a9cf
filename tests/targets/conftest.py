"""Loop devices that go away again, whatever happens."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.loops import attach

from tokvm.core.units import MiB

LoopMaker = Callable[..., str]


def _run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def _remove_node(number: int) -> None:
    """LOOP_CTL_REMOVE of <linux/loop.h>: a node that `losetup` made by name stays otherwise."""
    with open("/dev/loop-control", "rb") as control, contextlib.suppress(OSError):
        fcntl.ioctl(control, 0x4C81, number)


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[LoopMaker]:
    """make(size=…, content=…, options=(…)) → /dev/loopN over a new file of 0x53 bytes; detached after the test."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    made: list[str] = []

    def make(
        *,
        node: str | None = None,
        size: int = 8 * MiB,
        content: dict[int, bytes] | None = None,
        options: tuple[str, ...] = (),
        backing: Path | None = None,
    ) -> str:
        file = backing or tmp_path / f"backing-{len(made)}.img"
        if backing is None:
            with file.open("wb") as out:
                out.write(b"\x53" * size)
                for offset, data in (content or {}).items():
                    out.seek(offset if offset >= 0 else size + offset)
                    out.write(data)
                out.flush()
                os.fsync(out.fileno())
        device = node or attach(file, *options)
        if node is not None:
            _run("losetup", *options, node, str(file))
        made.append(device)
        return device

    yield make
    for device in reversed(made):
        backing = Path("/sys/block") / Path(device).name / "loop" / "backing_file"
        if backing.exists() and backing.read_text().startswith(str(tmp_path)):  # nobody else's, should the number be theirs now
            subprocess.run(["losetup", "-d", device], check=False, capture_output=True)
            if int(device.removeprefix("/dev/loop")) >= 1000:
                _remove_node(int(device.removeprefix("/dev/loop")))


@pytest.fixture
def fingerprint() -> Callable[[str], str]:
    """SHA-256 of a device or file, read past the page cache where that works."""

    def sha(path: str) -> str:
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while block := file.read(MiB):
                digest.update(block)
        return digest.hexdigest()

    return sha
