"""Morph: make the copied disks boot on KVM. Left out when the guest boots from the disks as they are."""

from __future__ import annotations

from tokvm.migration.phases import Event
from tokvm.migration.records import DowntimePart
from tokvm.migration.steps.fence import require_off
from tokvm.migration.steps.start import intend
from tokvm.migration.work import Work


def morph(work: Work) -> None:
    """FINAL: to MORPHED, or, with nothing to do, straight to the commit point."""
    work.check_budget("before the morph")
    morpher = work.doors.morpher
    if morpher is None or not morpher.changes_disks:
        intend(work, "morph SKIPPED: the disks stay as they are" if morpher else "morph SKIPPED: no morpher is configured")
        return
    if not require_off(work):
        return
    work.step("morph the copy")
    morpher.morph(work.plan())
    work.took(DowntimePart.MORPH)
    work.advance(Event.MORPH_DONE)
