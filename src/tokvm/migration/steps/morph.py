"""Morph: make the copied disks boot on KVM. Left out when no morpher is configured (the guest has its drivers already)."""

from __future__ import annotations

from tokvm.migration.phases import Event
from tokvm.migration.records import DowntimePart
from tokvm.migration.steps.fence import require_off
from tokvm.migration.steps.start import intend
from tokvm.migration.work import Work


def morph(work: Work) -> None:
    """FINAL: to MORPHED, or, with nothing to do, straight to the commit point."""
    work.check_budget("before the morph")
    if work.doors.morpher is None:
        intend(work, "morph SKIPPED: no morpher is configured")
        return
    if not require_off(work):
        return
    work.step("morph the copy")
    work.doors.morpher.morph(work.plan())
    work.took(DowntimePart.MORPH)
    work.advance(Event.MORPH_DONE)
