"""qemu-img, for the qcow2 files that we make: create, grow, check, and overlays: create, map.

The file is always one that the caller holds open, named by `held(fd)`, so no path can come between a look and an act, and no
path is ever read as `json:…`, `nbd:…` or an option. `where` is what messages call it. The format is always said, never probed.
"""

from __future__ import annotations

import json
import os
from enum import Enum

from tokvm.core.text import readable
from tokvm.remote import process
from tokvm.remote.process import ProgramError

PACKAGE = "install the package qemu-utils"
ENVIRONMENT = {"LC_ALL": "C"}
# 64 KiB is QEMU's default. No preallocation: sparse. No lazy refcounts: after a crash some clusters are leaked, none is wrong.
_OPTIONS = "compat=1.1,cluster_size=65536,lazy_refcounts=off,preallocation=off"
# qcow2 version 2 knows no clusters of zeros, so QEMU drops discards over a base (qcow2_co_pdiscard: ENOTSUP) and writes zeros
# out: a guest's fstrim must not turn all of its free space into changes of the overlay.
_OVERLAY_OPTIONS = "compat=0.10,cluster_size=65536"
_WAIT_S = 60.0
# A check reads all metadata: 128 MiB of L2 tables for each TiB.
_CHECK_S = 1800.0


class Health(Enum):
    CLEAN = "clean"
    DAMAGED = "damaged"


def held(fd: int) -> str:
    """A name under which our children open the very file that we hold open."""
    return f"/proc/{os.getpid()}/fd/{fd}"


def create_qcow2(fd: int, *, size: int, where: str) -> None:
    """Make the file an empty qcow2 of `size` bytes. What it held is gone."""
    _run(["create", "-q", "-f", "qcow2", "-o", _OPTIONS, "--", held(fd), str(size)], fd, where=where)


def create_overlay(fd: int, *, size: int, backing: str, backing_format: str, where: str) -> None:
    """Make the file an empty qcow2 over the image or device `backing` (absolute), as whose format `backing_format` is taken."""
    base = ["-F", backing_format, "-b", backing]
    _run(["create", "-q", "-f", "qcow2", "-o", _OVERLAY_OPTIONS, *base, "--", held(fd), str(size)], fd, where=where)


def map_alone(fd: int, *, where: str) -> str:
    """`qemu-img map` of a qcow2 without what lies below it, JSON: `present` is what the file itself holds, `offset` where."""
    file = {"driver": "file", "filename": held(fd)}
    name = "json:" + json.dumps({"driver": "qcow2", "backing": None, "file": file})
    argv = ["qemu-img", "map", "--output=json", "--", name]
    done = process.run(argv, timeout_s=_CHECK_S, where=where, env=ENVIRONMENT)
    if done.code != 0:
        raise ProgramError(f"qemu-img map failed: {shown(done.stderr, fd, where)}", where=where)
    return done.text


def grow_qcow2(fd: int, *, size: int, where: str) -> None:
    """What is new reads as zeros."""
    _run(["resize", "-q", "-f", "qcow2", "--", held(fd), str(size)], fd, where=where)


def repair_leaks(fd: int, *, where: str) -> Health:
    """Give back clusters that nothing points to, as a crash leaves them. DAMAGED: it has more wrong than that."""
    done = process.run(
        ["qemu-img", "check", "-q", "-f", "qcow2", "-r", "leaks", "--", held(fd)],
        timeout_s=_CHECK_S,
        where=where,
        env=ENVIRONMENT,
    )
    if done.code in (0, 3):
        return Health.CLEAN
    if done.code == 2:
        return Health.DAMAGED
    raise ProgramError(f"qemu-img check failed: {shown(done.stderr, fd, where)}", where=where)


def shown(stderr: bytes, fd: int, where: str) -> str:
    """The end of a message (QEMU's have up to two lines), with the file's name instead of the one we gave."""
    lines = [line for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
    return readable(" ".join(lines[-2:]).replace(held(fd), where))


def _run(arguments: list[str], fd: int, *, where: str) -> None:
    done = process.run(["qemu-img", *arguments], timeout_s=_WAIT_S, where=where, env=ENVIRONMENT)
    if done.code != 0:
        raise ProgramError(f"qemu-img {arguments[0]} failed: {shown(done.stderr, fd, where)}", where=where)
