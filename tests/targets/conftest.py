"""Loop devices that go away again, whatever happens."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tokvm.core.units import MiB

LoopMaker = Callable[..., str]


def _run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[LoopMaker]:
    """make(size=…, content=…, options=(…)) → /dev/loopN over a new file of 0x53 bytes; detached after the test."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    made: list[str] = []

    def make(
        *,
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
        device = _run("losetup", "--find", "--show", *options, str(file))
        made.append(device)
        return device

    yield make
    for device in reversed(made):
        subprocess.run(["losetup", "-d", device], check=False, capture_output=True)


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
