"""The ways that change disks, each behind one door, and what is done with any of them.

morph_disks(store, engine):  begin ─► engine.morph(overlays) ─► commit
                                          └── anything goes wrong ─► undo: the disks hold what they held
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from tokvm.core.errors import TokvmError
from tokvm.guest import micro
from tokvm.guest.appliance import Appliance
from tokvm.guest.base import GuestDisk, GuestError, Way
from tokvm.guest.inspection import inspect
from tokvm.guest.morph_store import MorphStore
from tokvm.guest.virt_v2v import VirtV2v

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MorphReport:
    """seconds: by part, in order. changed: bytes of the disks that are others now. warnings: what the engine said."""

    way: Way
    seconds: dict[str, float] = field(default_factory=dict)
    changed: int = 0
    warnings: tuple[str, ...] = ()


class Engine(Protocol):
    """Changes the guest on overlays. GuestError: it did not work, and the overlays are good for nothing."""

    def morph(self, disks: tuple[GuestDisk, ...]) -> MorphReport: ...


def morph_disks(store: MorphStore, engine: Engine) -> MorphReport:
    """Morph and commit; or nothing at all, whatever went wrong, Ctrl-C too. An undo that fails as well is the error then.

    What `begin` refuses is not undone: a guest may have run on the disks of an earlier morph, and would be torn apart."""
    begun = time.monotonic()
    overlays = store.begin()
    try:
        prepared = time.monotonic()
        report = engine.morph(overlays)
        morphed = time.monotonic()
        changed = store.commit()
    except BaseException as failed:
        _undo(store, failed)
        raise
    around = {"prepare": prepared - begun, **report.seconds, "commit": time.monotonic() - morphed}
    return replace(report, changed=changed, seconds={part: round(seconds, 3) for part, seconds in around.items()})


def _undo(store: MorphStore, failed: BaseException) -> None:
    try:
        store.undo()
    except TokvmError as worse:
        log.error("the morph failed: %s", failed)
        raise GuestError(
            f"the morph failed ({failed}), and so did putting the disks back: {worse.what}",
            where=worse.where,
            fix=f"{worse.fix or 'look into it'}; then run `tokvm unmorph` (or `tokvm rollback`), which tries that again",
        ) from worse


@dataclass(frozen=True, slots=True)
class Micro:
    """The micro-morph of whatever guest is found: looked at, planned and applied in one appliance.

    store: a folder of ours for the plan's files. root: which system, where there are several. virtio_win: the operator's
    drivers for Windows; macs: of the VM's NICs, as far as they are known."""

    store: Path
    tcg: bool
    root: str | None = None
    virtio_win: str | None = None
    macs: Sequence[str] = ()
    deadline_s: float = 900.0
    on_step: Callable[[str], None] = log.info

    def morph(self, disks: tuple[GuestDisk, ...]) -> MorphReport:
        watch = _Parts(self.on_step)
        watch.begins("launch")
        with Appliance.launch(disks, readonly=False, tcg=self.tcg, deadline_s=self.deadline_s) as appliance:
            watch.begins("inspect")
            facts = inspect(appliance, root=self.root)
            watch.begins("plan")
            plan = micro.plan(appliance, facts, self.store, virtio_win=self.virtio_win, macs=self.macs)
            watch.begins("apply")
            micro.apply(appliance, plan, self.store)
            watch.begins("close")
        watch.begins("")
        return MorphReport(Way.MICRO, watch.seconds, warnings=plan.left_out)


@dataclass(frozen=True, slots=True)
class Conversion:
    """virt-v2v-in-place."""

    program: VirtV2v

    def morph(self, disks: tuple[GuestDisk, ...]) -> MorphReport:
        found = self.program.convert(disks)
        return MorphReport(Way.VIRT_V2V, found.seconds, warnings=found.warnings)


class _Parts:
    """How long each part takes."""

    def __init__(self, on_step: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._on_step = on_step
        self._part = ""
        self._since = time.monotonic()

    def begins(self, part: str) -> None:
        now = time.monotonic()
        if self._part:
            self.seconds[self._part] = now - self._since
        self._part, self._since = part, now
        if part:
            self._on_step(part)
