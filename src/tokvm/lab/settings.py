"""What shapes a lab, and how long it waits for guests."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from tokvm.core.units import KiB, MiB
from tokvm.guest.base import Way
from tokvm.lab.errors import LabError
from tokvm.lab.kernel import cache_dir

SOURCES = ("xenserver", "hyperv", "esxi", "esxi-vmfs5", "esxi-locked", "vcenter", "vcenter-api")


class GuestKind(StrEnum):
    """What runs in the lab's VMs. Those without virtio need a morph to boot on KVM's own hardware. WINDOWS_PHONY is looked at
    and morphed as a Windows, but never boots."""

    MINI = "mini"
    MINI_NO_VIRTIO = "mini-no-virtio"
    DEBIAN_NO_VIRTIO = "debian-no-virtio"
    WINDOWS_PHONY = "windows-phony"


DISK_SIZES = {
    GuestKind.MINI: 256 * MiB,
    GuestKind.MINI_NO_VIRTIO: 256 * MiB,
    GuestKind.DEBIAN_NO_VIRTIO: 1200 * MiB,
    GuestKind.WINDOWS_PHONY: 256 * MiB,
}

BOOT_TIMEOUTS_S = {GuestKind.DEBIAN_NO_VIRTIO: 1200.0}
BOOT_TIMEOUT_S = 300.0


def pictures_dir() -> Path:
    return cache_dir() / "pictures"


@dataclass(frozen=True, slots=True, kw_only=True)
class LabSettings:
    """write_rate: bytes/s that each guest's background writer makes. link_rate: bytes/s between source and tokvm, None for as
    fast as loopback; rtt_s: added to each round trip. passes: base and deltas before the cutover's final delta. disk_size and
    boot_timeout_s: 0 for what the guest needs. at_once: how many guests are moved at a time, 0 for all. rehearse: sync,
    rehearse, cut over, instead of migrate; rehearsal_boots: how often a rehearsal boots the guest; way: how the cutover has to
    make the guest boot, None for the rehearsal's best. pictures: a folder for what the rehearsals saw and for the drawn report,
    which outlive the lab.
    """

    source: str = "xenserver"
    guests: int = 1
    guest: GuestKind = GuestKind.MINI
    disk_size: int = 0
    write_rate: int = 256 * KiB
    link_rate: float | None = None
    rtt_s: float = 0.0
    passes: int = 3
    at_once: int = 0
    rehearse: bool = False
    rehearsal_boots: int = 1
    way: Way | None = None
    pictures: Path = field(default_factory=pictures_dir)
    boot_timeout_s: float = 0.0
    migrate_timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise LabError(f"the lab plays no {self.source!r}", fix=f"write --source {' or '.join(SOURCES)}")
        wrong = [
            text
            for text, fine in (
                (f"{self.guests} guests", 1 <= self.guests <= 16),
                (f"{self.passes} passes", 1 <= self.passes <= 16),
                (f"{self.at_once} moves at once", 0 <= self.at_once <= 16),
                (f"{self.rehearsal_boots} boots of a rehearsal", 1 <= self.rehearsal_boots <= 9),
                (f"a link of {self.link_rate} bytes/s", self.link_rate is None or self.link_rate >= 1024),
                (f"a delay of {self.rtt_s} s", 0 <= self.rtt_s <= 10),
            )
            if not fine
        ]
        if wrong:
            raise LabError(f"the lab cannot have {', '.join(wrong)}")
        if not self.disk_size:
            object.__setattr__(self, "disk_size", DISK_SIZES[self.guest])
        if not self.boot_timeout_s:
            object.__setattr__(self, "boot_timeout_s", BOOT_TIMEOUTS_S.get(self.guest, BOOT_TIMEOUT_S))

    @property
    def staged(self) -> bool:
        """Whether guests are moved by sync and cutover, not by migrate."""
        return self.rehearse or self.way is not None

    @property
    def boots(self) -> bool:
        """Whether the guests run."""
        return self.guest is not GuestKind.WINDOWS_PHONY

    @property
    def shaped(self) -> bool:
        """Whether a link has to stand between source and tokvm."""
        return self.link_rate is not None or self.rtt_s > 0
