"""Would this target be taken? Every interlock, without writing a byte: for `tokvm check` and before a migration begins."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tokvm.core.errors import TargetError, UnsafeTarget
from tokvm.core.units import format_bytes
from tokvm.targets.blockdev import BlockDevice
from tokvm.targets.interlocks import refuse_kind
from tokvm.targets.open import TargetSpec, refuse_image_on_device
from tokvm.targets.qcow2 import Qcow2File
from tokvm.targets.rawfile import RawFile, refuse_pseudo


def probe_target(spec: TargetSpec, *, size: int) -> None:
    """UnsafeTarget or TargetError when `open_target` would refuse it now."""
    try:
        mode = Path(spec.path).stat().st_mode
    except FileNotFoundError:
        if spec.format == "qcow2":
            Qcow2File.probe_new(spec.path, size=size)
        _probe_missing(spec.path, size)
        return
    except OSError as exc:
        raise TargetError(f"the target cannot be looked at: {exc.strerror}", where=spec.path, fix="check the path") from exc
    if stat.S_ISBLK(mode):
        refuse_image_on_device(spec)
        BlockDevice.open(spec.path, size=size, expect=None, consent=spec.consent).close()
    elif stat.S_ISREG(mode):
        kind = Qcow2File if spec.format == "qcow2" else RawFile
        kind.probe(spec.path, size=size, consent=spec.consent)
    else:
        raise refuse_kind(spec.path, mode)


def _probe_missing(path: str, size: int) -> None:
    """A file that will be made: its directory must take it."""
    folder = Path(path).parent
    if Path(path).is_symlink():
        raise UnsafeTarget("the target is a link that leads nowhere", where=path, fix="check the device's name")
    refuse_pseudo(path)
    try:
        free = os.statvfs(folder)
    except OSError as exc:
        raise TargetError(f"its directory cannot be used: {exc.strerror}", where=path, fix="make the directory first") from exc
    if not os.access(folder, os.W_OK | os.X_OK):
        raise TargetError(
            "its directory cannot be written", where=path, fix="check its mode, and whether it is mounted read-only"
        )
    if free.f_bavail * free.f_frsize < min(size, 1 << 20):
        there = format_bytes(free.f_bavail * free.f_frsize)
        raise TargetError(f"its filesystem is full ({there} free)", where=path, fix="make room, or give another directory")
