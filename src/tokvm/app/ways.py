"""A way to cut over, as a domain and as what a cutover needs to go it: pure.

newest rehearsal's document ─► Replay ─► by_way(domain plan) ─► the domain that was rehearsed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tokvm.core.errors import Blocked, UsageError
from tokvm.core.machine import DiskBus, Firmware, NicModel
from tokvm.domain.base import DirectKernel, DomainPlan
from tokvm.domain.nvram import DEFAULT_LOADER
from tokvm.guest.base import GuestFacts, Judgement, Way
from tokvm.guest.drives import VIRTIO
from tokvm.migration.records import RehearsalRecord

ON_PC = (DiskBus.IDE,)
"""Buses that QEMU's q35 does not have."""
LOADERS = ("shim", "bootmgfw", "grub", "systemd-boot")
"""How the names of loaders start, best first."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What a rehearsal leaves for the cutover, as JSON in its document.

    boot_disk: index of the disk that firmware boots. bus, nic: of the domain that was rehearsed ("" for the plan's own). micro:
    the plan of a micro-morph, `family` whose (linux, windows). kernel: DirectKernel beside the VM; boot_files: what it was made
    from, path → [bytes, mtime in ns]. root: the system that was meant, where there are several. loader: the UEFI loader that
    the guest's own boot entry named.
    """

    way: Way
    family: str = ""
    windows: bool = False
    boot_disk: int | None = None
    bus: str = ""
    nic: str = ""
    root: str = ""
    loader: str = ""
    mounts: dict[str, str] = field(default_factory=dict)
    micro: dict[str, Any] | None = None
    kernel: dict[str, str] | None = None
    boot_files: dict[str, list[int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: object) -> Replay:
        if not isinstance(stored, dict):
            raise UsageError("the rehearsal holds nothing to replay", fix="run `tokvm rehearse` again")
        known = dict(stored)
        known["way"] = Way(str(known.get("way", "")))
        try:
            return cls(**known)
        except TypeError as odd:
            raise UsageError("the rehearsal is another version's", fix="run `tokvm rehearse` again") from odd


def by_way(plan: DomainPlan, replay: Replay, *, nvram: str = "") -> DomainPlan:
    """The domain as the way needs it. COMPATIBLE takes its own hardware; every other way the plan's."""
    known = replace(
        plan,
        boot_disk=replay.boot_disk,
        windows=replay.windows if replay.family else plan.windows,
        nvram=nvram,
        kernel=DirectKernel(**replay.kernel) if replay.kernel and replay.way is Way.KERNEL else None,
    )
    if replay.way is not Way.COMPATIBLE or not replay.bus:
        return known
    bus = DiskBus(replay.bus)
    return replace(
        known,
        disks=tuple(replace(disk, bus=bus) for disk in known.disks),
        machine="pc" if bus in ON_PC else known.machine,
        nic_model=NicModel(replay.nic) if replay.nic else known.nic_model,
    )


def hardware_of(way: Way, judgement: Judgement) -> tuple[str, str]:
    """Bus and NIC of the compatible machine: the guest's fastest own. ("", "") for every other way."""
    if way is not Way.COMPATIBLE:
        return "", ""
    bus = next((str(one) for one in judgement.buses if one not in VIRTIO), "")
    return bus, judgement.nics[0] if judgement.nics else NicModel.E1000E.value


def loader_of(facts: GuestFacts) -> str:
    """The UEFI loader that needs a boot entry, because the guest has none where firmware looks by itself; "" when it has.
    What Secure Boot trusts goes first."""
    if facts.firmware is not Firmware.UEFI or any(one.lower() == DEFAULT_LOADER.lower() for one in facts.efi_loaders):
        return ""
    return min(facts.efi_loaders, key=_rank, default="")


def _rank(loader: str) -> int:
    name = loader.lower().rpartition("\\")[2]
    return next((number for number, known in enumerate(LOADERS) if name.startswith(known)), len(LOADERS))


def newest(records: Sequence[RehearsalRecord]) -> RehearsalRecord | None:
    return records[-1] if records else None


def rehearsed(records: Sequence[RehearsalRecord], way: Way | None) -> Replay | None:
    """What to replay: of the newest rehearsal that worked (by `way`, where one is asked for); None when there is none."""
    fit = [one for one in records if one.works and (way is None or one.way == way)]
    return Replay.from_json(fit[-1].document.get("replay")) if fit else None


def refuse_failed(records: Sequence[RehearsalRecord], *, where: str, forced: bool) -> None:
    """A rehearsal that failed stands in a cutover's way until another works, or the operator says that it does not matter."""
    last = newest(records)
    if last is None or last.works or forced:
        return
    mend = last.document.get("fix") or "mend the guest, sync"
    raise Blocked(
        f"the last rehearsal failed: {last.document.get('why', 'the guest showed no life')}",
        where=where,
        fix=f"{mend}; then rehearse again, or cut over all the same with --despite-rehearsal",
    )
