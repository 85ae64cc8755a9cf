"""A Linux micro-morph as a value: made in the rehearsal, kept in the journal as JSON, replayed in the cutover.

    initrds   path, and size, mtime and sha256 that it must still have ─► segment appended at offset
    files     path, and the sha256 that it must still have ("" = absent) ─► its new content
    folders   what lay beside the initramfs files; another kernel there would be one without virtio

Segments lie in the store, a folder of ours on the host, under the names given here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokvm.guest.base import GuestError

_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")  # IFNAMSIZ 16, with a zero byte
LINK_FOLDER = "/etc/systemd/network"
STORE_FIX = "rehearse again"


@dataclass(frozen=True, slots=True)
class PlannedInitrd:
    """size, offset, segment_size: bytes. The file must have `size`, `mtime_ns` (and had `sha256`) for the segment to fit."""

    version: str
    path: str
    size: int
    mtime_ns: int
    sha256: str
    offset: int
    segment: str
    segment_size: int
    segment_sha256: str
    added: tuple[str, ...]

    @property
    def new_size(self) -> int:
        return self.offset + self.segment_size


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A small text file. old_sha256: of what is replaced; "" when nothing may be there."""

    path: str
    content: str
    old_sha256: str = ""


@dataclass(frozen=True, slots=True)
class MicroPlan:
    """mounts: mount point → device, those that are written to. left_out: kernels that stay without virtio, with the reason.
    seconds: how long it took to make the plan."""

    mounts: dict[str, str]
    initrds: tuple[PlannedInitrd, ...]
    files: tuple[PlannedFile, ...]
    folders: dict[str, tuple[str, ...]]
    left_out: tuple[str, ...] = ()
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> MicroPlan:
        """What `as_json` gave. GuestError when it is anything else."""
        try:
            return cls(
                mounts={str(point): str(device) for point, device in raw["mounts"].items()},
                initrds=tuple(PlannedInitrd(**{**one, "added": tuple(one["added"])}) for one in raw["initrds"]),
                files=tuple(PlannedFile(**one) for one in raw["files"]),
                folders={str(folder): tuple(names) for folder, names in raw["folders"].items()},
                left_out=tuple(raw["left_out"]),
                seconds=float(raw["seconds"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise GuestError(f"the plan of the morph cannot be read: {exc}", fix=STORE_FIX) from exc

    def segments(self, store: Path) -> dict[str, bytes]:
        """The segments by name, each proved to be the one that was planned."""
        found = {}
        for one in self.initrds:
            where = store / Path(one.segment).name
            try:
                content = where.read_bytes() if where.stat().st_size == one.segment_size else b""
            except OSError as exc:
                raise GuestError(
                    f"a segment of the plan cannot be read: {exc.strerror}", where=str(where), fix=STORE_FIX
                ) from exc
            if sha256(content) != one.segment_sha256:
                raise GuestError("this is not the segment that was planned", where=str(where), fix=STORE_FIX)
            found[one.segment] = content
        return found


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def link_files(names: Mapping[str, str]) -> tuple[PlannedFile, ...]:
    """systemd.link files that give each NIC (by its MAC address) its old name: `{"00:50:56:00:00:01": "ens192"}`.

    Checked with Debian 12's udev for ens192 and eth0. udev takes the first file that matches, in the order of names: 10- is
    before the distribution's 99-default.link. GuestError for what is no MAC address or no name of an interface."""
    files = []
    for mac, name in sorted(names.items()):
        if not _MAC.fullmatch(mac.lower()) or not _INTERFACE.fullmatch(name):
            raise GuestError(f"{mac!r} → {name!r} is no MAC address and name of a network interface")
        content = (
            f"# The name that this card had before the move to KVM.\n[Match]\nMACAddress={mac.lower()}\n\n[Link]\nName={name}\n"
        )
        files.append(PlannedFile(f"{LINK_FOLDER}/10-tokvm-{name}.link", content))
    if len({file.path for file in files}) < len(files):
        raise GuestError(f"two network cards cannot have one name: {', '.join(sorted(names.values()))}")
    return tuple(files)
