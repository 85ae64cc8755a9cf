"""A Windows micro-morph as a value: made in the rehearsal, kept in the journal as JSON, replayed in the cutover.

    drivers     viostor.sys, vioscsi.sys: into System32/drivers; boot-start by the SYSTEM hive
    first_boot  a tar of all that the guest needs at its first boot (first_boot.py), unpacked into the Windows folder

Their bytes lie in the store, a folder of ours on the host, under the names given here. Windows rewrites its SYSTEM hive at
every start and stop, so the hive is never what it was in the rehearsal: the plan says what must still be true of it, and the
edit is made on the hive that is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokvm.guest.base import GuestError
from tokvm.guest.micro_plan import STORE_FIX, sha256


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file in the store. size: bytes."""

    name: str
    size: int
    sha256: str

    def read(self, store: Path) -> bytes:
        """Its bytes, proved to be those that were planned."""
        where = self.path(store)
        try:
            content = where.read_bytes() if where.stat().st_size == self.size else b""
        except OSError as exc:
            raise GuestError(f"a file of the plan cannot be read: {exc.strerror}", where=str(where), fix=STORE_FIX) from exc
        if sha256(content) != self.sha256:
            raise GuestError("this is not the file that was planned", where=str(where), fix=STORE_FIX)
        return content

    def path(self, store: Path) -> Path:
        return store / Path(self.name).name


@dataclass(frozen=True, slots=True)
class PlannedDriver:
    """service: viostor, vioscsi. old_sha256: of a driver file that the guest has already; "" when it has none."""

    service: str
    stored: StoredFile
    old_sha256: str = ""


@dataclass(frozen=True, slots=True)
class MicroPlan:
    """mounts: mount point → device. systemroot, control_set, build, database: what must still be so. runner: the first boot has
    rhsrvany. hive_sha256: the SYSTEM hive's in the rehearsal, for the record. left_out: what the guest will lack, in words.
    seconds: how long it took to make the plan."""

    mounts: dict[str, str]
    systemroot: str
    control_set: str
    build: int
    database: bool
    drivers: tuple[PlannedDriver, ...]
    first_boot: StoredFile
    runner: bool
    hive_sha256: str
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
                systemroot=str(raw["systemroot"]),
                control_set=str(raw["control_set"]),
                build=int(raw["build"]),
                database=bool(raw["database"]),
                drivers=tuple(PlannedDriver(**{**one, "stored": StoredFile(**one["stored"])}) for one in raw["drivers"]),
                first_boot=StoredFile(**raw["first_boot"]),
                runner=bool(raw["runner"]),
                hive_sha256=str(raw["hive_sha256"]),
                left_out=tuple(raw["left_out"]),
                seconds=float(raw["seconds"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise GuestError(f"the plan of the morph cannot be read: {exc}", fix=STORE_FIX) from exc
