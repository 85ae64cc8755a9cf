"""Open a target, whatever it is: the one place that decides between file and device.

path ─ lstat ─► nothing there        ─► RawFile.create      (sparse, O_EXCL)                or Qcow2File.create
                regular file         ─► RawFile.open        (ours, empty, or given up)      or Qcow2File.open
                block device         ─► BlockDevice.open    (every interlock)
                link → block device  ─► BlockDevice.open    (by-id links are welcome)
                anything else        ─► UnsafeTarget
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from tokvm.core.errors import TargetError, UnsafeTarget, UsageError
from tokvm.targets.base import Target
from tokvm.targets.blockdev import BlockDevice
from tokvm.targets.interlocks import Consent, refuse_kind
from tokvm.targets.qcow2 import Qcow2File
from tokvm.targets.rawfile import RawFile

FORMATS = ("raw", "qcow2")


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """What the operator said about one target.

    path: a raw file or a block device. create: make the file when it is missing. force: its content may be lost; for a device
    with content `confirm` must repeat its size (bytes, or `10G`) or its serial, for a file its size if it is given at all.
    previous: the identity an earlier run recorded. format: what a file is made as; it is never guessed from what is there, and
    no qcow2 is put on a device.
    """

    path: str
    create: bool = True
    force: bool = False
    confirm: str | None = None
    previous: str | None = None
    format: str = "raw"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"{self.format!r} is no format of a target", where=self.path, fix=f"one of {', '.join(FORMATS)}")

    @property
    def consent(self) -> Consent:
        return Consent(self.force, self.confirm)


def open_target(spec: TargetSpec, *, size: int, expect: str | None = None) -> Target:
    """The target, held exclusively, of at least `size` bytes; or UnsafeTarget with not one byte written.

    expect (or `spec.previous`): the identity that an earlier run recorded. The target must still be that one, and may then hold
    anything; without it, content needs the operator's consent.
    """
    expect = expect or spec.previous
    if size <= 0:
        raise UnsafeTarget(f"a disk of {size} bytes cannot be copied", where=spec.path, fix="check the source disk")
    try:
        mode = os.lstat(spec.path).st_mode
        if stat.S_ISLNK(mode):
            mode = _behind_link(spec.path)
    except FileNotFoundError:
        return _create(spec, size=size, expect=expect)
    except (OSError, ValueError) as exc:
        raise TargetError(f"the target cannot be looked at: {exc}", where=spec.path, fix="check the path") from exc
    if stat.S_ISBLK(mode):
        refuse_image_on_device(spec)
        return BlockDevice.open(spec.path, size=size, expect=expect, consent=spec.consent)
    if stat.S_ISREG(mode):
        kind = Qcow2File if spec.format == "qcow2" else RawFile
        return kind.open(spec.path, size=size, expect=expect, consent=spec.consent)
    raise refuse_kind(spec.path, mode)


def refuse_image_on_device(spec: TargetSpec) -> None:
    """A qcow2 on a device could not grow, and QEMU, libvirt and people take a device for raw."""
    if spec.format != "raw":
        raise UnsafeTarget(
            f"a {spec.format} is a file, and this is a block device",
            where=spec.path,
            fix="give a file's path, or the format raw",
        )


def _behind_link(path: str) -> int:
    """A link to a block device is how devices are best named; a link to a file may be somebody's trap."""
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError as exc:
        raise UnsafeTarget("the target is a link that leads nowhere", where=path, fix="check the device's name") from exc
    return mode if stat.S_ISBLK(mode) else stat.S_IFLNK


def _create(spec: TargetSpec, *, size: int, expect: str | None) -> Target:
    if expect is not None:
        raise UnsafeTarget(
            "the target of the earlier run is gone",
            where=spec.path,
            fix="bring it back, or start over with a new state directory",
        )
    if not spec.create:
        raise UnsafeTarget("there is no such target", where=spec.path, fix="check the path")
    kind = Qcow2File if spec.format == "qcow2" else RawFile
    return kind.create(spec.path, size=size)
