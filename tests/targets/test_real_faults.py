"""Faults that are not played by Python: strace makes system calls fail, QEMU's blkdebug makes a block device fail."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.loops import attach_or_skip, detach

from tokvm.core.errors import TargetError
from tokvm.core.units import KiB, MiB
from tokvm.targets.open import TargetSpec, open_target

SIZE = 4 * MiB

WRITER = """
import sys
from tokvm.core.errors import TargetError
from tokvm.targets.open import TargetSpec, open_target
writer = open_target(TargetSpec(sys.argv[1], force=True), size=4 << 20)
try:
    for at in range(0, 4 << 20, 128 << 10):
        writer.write(at, memoryview(bytes([1 + at // (128 << 10)]) * (128 << 10)))
    writer.flush()
except TargetError as exc:
    print(exc)
    sys.exit(exc.exit_code)
print("good")
"""


def _under_strace(path: Path, inject: str) -> subprocess.CompletedProcess[str]:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    argv = [strace, "-f", "-qq", "-o", "/dev/null", "-e", "trace=pwrite64,fdatasync", "-e", f"inject={inject}"]
    done = subprocess.run(
        [*argv, sys.executable, "-c", WRITER, str(path)], check=False, capture_output=True, text=True, timeout=120
    )
    if "Operation not permitted" in done.stderr:
        pytest.skip("ptrace is not allowed here")
    return done


def _expected() -> bytes:
    return b"".join(bytes([1 + piece]) * (128 * KiB) for piece in range(32))


@pytest.mark.slow
@pytest.mark.parametrize("when", [1, 4, 32])
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
def test_a_write_that_the_kernel_fails_is_no_success(error: str, when: int, tmp_path: Path) -> None:
    done = _under_strace(tmp_path / "disk.raw", f"pwrite64:error={error}:when={when}")
    assert done.returncode == 8, done.stderr
    assert "writing failed" in done.stdout


@pytest.mark.slow
def test_a_flush_that_the_kernel_fails_is_no_success(tmp_path: Path) -> None:
    done = _under_strace(tmp_path / "disk.raw", "fdatasync:error=EIO:when=1")
    assert done.returncode == 8, done.stderr
    assert "flushing failed" in done.stdout


@pytest.mark.slow
def test_a_kernel_that_lies_about_a_short_write_is_taken_at_its_word(tmp_path: Path) -> None:
    """`retval=512` writes nothing and says 512: what was not confirmed is written again from there."""
    done = _under_strace(tmp_path / "disk.raw", "pwrite64:retval=512:when=3")
    assert done.returncode == 0, done.stdout + done.stderr
    held, want = (tmp_path / "disk.raw").read_bytes(), _expected()
    differs = [at for at in range(0, SIZE, 512) if held[at : at + 512] != want[at : at + 512]]
    assert len(differs) <= 1  # only the 512 bytes that the kernel was made to claim


@pytest.mark.slow
def test_interrupted_calls_are_repeated(tmp_path: Path) -> None:
    done = _under_strace(tmp_path / "disk.raw", "pwrite64:error=EINTR:when=2..6")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "disk.raw").read_bytes() == _expected()


@pytest.fixture
def failing_device(tmp_path: Path) -> Iterator[Callable[[dict[str, object]], str]]:
    """make(blkdebug rule) → a loop device over a FUSE export of qemu-storage-daemon whose requests fail by that rule."""
    daemon = shutil.which("qemu-storage-daemon")
    if daemon is None or os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("needs qemu-storage-daemon, FUSE and root")
    ended: list[Callable[[], object]] = []

    def make(rule: dict[str, object]) -> str:
        image, mountpoint = tmp_path / "medium.raw", tmp_path / "export"
        image.write_bytes(bytes(SIZE))
        mountpoint.touch()
        nodes = [
            {"driver": "file", "node-name": "f0", "filename": str(image)},
            {"driver": "blkdebug", "node-name": "b0", "image": "f0", "inject-error": [rule]},
        ]
        argv = [daemon, *(word for node in nodes for word in ("--blockdev", json.dumps(node)))]
        argv += ["--export", f"type=fuse,id=e,node-name=b0,mountpoint={mountpoint},writable=on"]
        child = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)

        def end() -> None:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if child.stderr is not None:
                child.stderr.close()

        ended.append(end)
        until = time.monotonic() + 10
        while mountpoint.stat().st_size != SIZE:
            if child.poll() is not None or time.monotonic() > until:
                pytest.skip("the FUSE export does not come up here")
            time.sleep(0.05)
        device = attach_or_skip(mountpoint)
        ended.append(lambda: detach(device))
        return device

    yield make
    for end in reversed(ended):
        end()


@pytest.mark.slow
@pytest.mark.root
def test_a_device_whose_flush_fails_once_is_not_believed_the_second_time(
    failing_device: Callable[[dict[str, object]], str],
) -> None:
    """Flush 1 gives EIO, flush 2 would give OK: the writer must not ask a second time."""
    device = failing_device({"event": "none", "iotype": "flush", "errno": 5, "once": True})
    writer = open_target(TargetSpec(device), size=SIZE)
    try:
        writer.write(0, memoryview(b"x" * MiB))
        with pytest.raises(TargetError, match="flushing failed"):
            writer.flush()
        with pytest.raises(TargetError, match="flushing failed"):
            writer.flush()
    finally:
        identity = writer.identity
        writer.close()
    again = open_target(TargetSpec(device), size=SIZE, expect=identity)
    again.write(0, memoryview(b"x" * MiB))
    again.flush()
    assert bytes(again.read_back(0, MiB)) == b"x" * MiB
    again.close()


@pytest.mark.slow
@pytest.mark.root
def test_a_sector_that_cannot_be_written_is_no_success(failing_device: Callable[[dict[str, object]], str]) -> None:
    device = failing_device({"event": "none", "iotype": "write", "errno": 5, "sector": 4096})
    writer = open_target(TargetSpec(device), size=SIZE)
    try:
        with pytest.raises(TargetError):
            _fill(writer.write, writer.flush)
    finally:
        writer.close()


def _fill(write: Callable[[int, memoryview], None], flush: Callable[[], None]) -> None:
    for at in range(0, SIZE, 128 * KiB):
        write(at, memoryview(b"y" * (128 * KiB)))
    flush()
