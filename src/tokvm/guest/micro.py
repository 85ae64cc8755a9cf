"""The micro-morph of whatever family a guest is of, behind one door: plan, check, ready, apply.

plan    before the cutover ─► a plan that is kept as JSON; its files in a folder of ours
check   does the guest still fit it?             (an appliance of its own; writes nothing)
ready   in the appliance that waits              (mounts nothing)
apply   inside the downtime
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokvm.guest import linux_micro
from tokvm.guest.appliance import Appliance
from tokvm.guest.base import GuestError, GuestFacts, OsFamily
from tokvm.guest.micro_plan import MicroPlan as LinuxPlan
from tokvm.guest.windows import micro as windows_micro
from tokvm.guest.windows.micro import Ground
from tokvm.guest.windows.micro_plan import MicroPlan as WindowsPlan

MicroPlan = LinuxPlan | WindowsPlan


def plan(
    appliance: Appliance,
    facts: GuestFacts,
    store: Path,
    *,
    virtio_win: str | None = None,
    macs: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
) -> MicroPlan:
    """What makes this guest boot from virtio. virtio_win: the operator's drivers, macs: of the VM's NICs (both for Windows).
    names: MAC address → name of the NIC (for Linux)."""
    if facts.family is OsFamily.LINUX:
        return linux_micro.plan(appliance, facts, store, names=names)
    if facts.family is OsFamily.WINDOWS:
        return windows_micro.plan(appliance, facts, store, tree=windows_micro.find_tree(virtio_win), macs=macs)
    raise GuestError(
        f"there is no micro-morph for {facts.product or facts.family}", where=appliance.where, fix="choose another --way"
    )


def windows_drivers_at_hand(virtio_win: str | None) -> bool:
    try:
        windows_micro.find_tree(virtio_win)
    except GuestError:
        return False
    return True


def parse(family: str, raw: Mapping[str, Any]) -> MicroPlan:
    """The plan that was kept."""
    return WindowsPlan.parse(raw) if family == OsFamily.WINDOWS else LinuxPlan.parse(raw)


def check(appliance: Appliance, planned: MicroPlan) -> None:
    if isinstance(planned, WindowsPlan):
        windows_micro.check(appliance, planned)
    else:
        linux_micro.check(appliance, planned)


def ready(appliance: Appliance, planned: MicroPlan) -> None:
    if isinstance(planned, WindowsPlan):
        windows_micro.ready(appliance, planned)
    else:
        linux_micro.ready(appliance, planned)


def apply(appliance: Appliance, planned: MicroPlan, store: Path, *, throw_away: bool = False) -> None:
    """throw_away: the overlays are a rehearsal's, over a guest that runs."""
    if isinstance(planned, WindowsPlan):
        windows_micro.apply(appliance, planned, store, Ground.THROW_AWAY if throw_away else Ground.SHUT_DOWN)
    else:
        linux_micro.apply(appliance, planned, store)
