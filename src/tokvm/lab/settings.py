"""What shapes a lab, and how long it waits for guests."""

from __future__ import annotations

from dataclasses import dataclass

from tokvm.core.units import KiB, MiB
from tokvm.lab.errors import LabError

SOURCES = ("xenserver", "hyperv", "esxi", "esxi-vmfs5", "esxi-locked", "vcenter", "vcenter-api")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabSettings:
    """write_rate: bytes/s that each guest's background writer makes. link_rate: bytes/s between source and tokvm, None for
    as fast as loopback; rtt_s: added to each round trip. passes: base and deltas before the cutover's final delta."""

    source: str = "xenserver"
    guests: int = 1
    disk_size: int = 256 * MiB
    write_rate: int = 256 * KiB
    link_rate: float | None = None
    rtt_s: float = 0.0
    passes: int = 3
    boot_timeout_s: float = 300.0
    migrate_timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise LabError(f"the lab plays no {self.source!r}", fix=f"write --source {' or '.join(SOURCES)}")
        wrong = [
            text
            for text, fine in (
                (f"{self.guests} guests", 1 <= self.guests <= 16),
                (f"{self.passes} passes", 1 <= self.passes <= 16),
                (f"a link of {self.link_rate} bytes/s", self.link_rate is None or self.link_rate >= 1024),
                (f"a delay of {self.rtt_s} s", 0 <= self.rtt_s <= 10),
            )
            if not fine
        ]
        if wrong:
            raise LabError(f"the lab cannot have {', '.join(wrong)}")

    @property
    def shaped(self) -> bool:
        """Whether a link has to stand between source and tokvm."""
        return self.link_rate is not None or self.rtt_s > 0
