"""Loop devices for tests, of which several processes make some at once."""

from __future__ import annotations

import fcntl
import subprocess
from pathlib import Path

import pytest


def attach(file: Path, *options: str) -> str:
    """/dev/loopN over `file`. CalledProcessError where there are none; `detach` it.

    `losetup --find` opens a free device before it takes it. Two at once find the same one, and while the second learns that
    it is too late, the device looks as if a program had it open for writing: which is what tokvm refuses.
    """
    with open("/dev/loop-control", "rb") as control:
        fcntl.flock(control, fcntl.LOCK_EX)
        argv = ["losetup", "--find", "--show", *options, str(file)]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def attach_or_skip(file: Path) -> str:
    """`attach`, for tests that are of use only where there are loop devices."""
    try:
        return attach(file)
    except (OSError, subprocess.CalledProcessError) as exc:
        pytest.skip(f"no loop device: {exc}")


def detach(device: str) -> None:
    subprocess.run(["losetup", "--detach", device], check=True, capture_output=True)
