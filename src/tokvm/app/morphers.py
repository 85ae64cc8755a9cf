"""The morph of a cutover: what a rehearsal planned, replayed on the synced disks through a MorphStore.

prepare   the source runs: does the guest still fit the plan? then an appliance is launched over empty overlays
morph     the last delta is on the disks: the plan into the overlays, undo log, commit
undo      the exact last synced bytes again
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tokvm.app.ways import Replay
from tokvm.core.errors import TokvmError
from tokvm.domain.base import DomainPlan
from tokvm.guest import kernel_way, micro
from tokvm.guest.appliance import Appliance
from tokvm.guest.base import TOUCHES_DISK, GuestDisk, GuestError, Way
from tokvm.guest.morph_record import MorphState
from tokvm.guest.morph_store import MorphStore, Undone

log = logging.getLogger(__name__)

WAITING_S = 6 * 3600.0
"""The life of an appliance that waits for the last delta: longer than any shutdown."""
APPLYING_S = 300.0
"""Of the replay in the downtime: some seconds, ten times as many on a busy emulated processor."""

Convert = Callable[[tuple[GuestDisk, ...]], object]
"""virt-v2v-in-place on these overlays."""


@dataclass(slots=True)
class WayMorpher:
    """A Morpher for the ways that look at, or change, the guest's disks.

    store: over the target's disks. folder: where the rehearsal kept the segment, the kernel, the drivers. tcg: KVM does not
    work here. convert: for VIRT_V2V.
    """

    replay: Replay
    store: MorphStore
    folder: Path
    tcg: bool
    convert: Convert | None = None
    _appliance: Appliance | None = field(default=None, init=False)

    @property
    def changes_disks(self) -> bool:
        return self.replay.way in TOUCHES_DISK

    def prepare(self, plan: DomainPlan) -> None:
        self.release()
        if self.replay.micro is not None or self.replay.boot_files:
            self._refuse_changed()
        if self.replay.way is Way.MICRO:
            self._launch_ahead()

    def morph(self, plan: DomainPlan) -> None:
        if self.replay.way is Way.MICRO:
            self._micro()
        elif self.replay.way is Way.VIRT_V2V:
            self._convert()

    def undo(self) -> bool:
        if self._appliance is not None and self.store.state() is MorphState.OVERLAYS:
            return True  # nothing was written: the appliance waits for the last delta
        return self.store.undo() is not Undone.TOUCHED

    def release(self) -> None:
        appliance, self._appliance = self._appliance, None
        if appliance is not None:
            with suppress(TokvmError):
                appliance.abandon()
            with suppress(TokvmError):
                self.store.undo()
        self.store.close()

    def forget(self) -> None:
        with closing(self.store):
            self.store.forget()

    def _refuse_changed(self) -> None:
        """The guest as of the last pass, in an appliance of its own that keeps nothing: a kernel that was installed since the
        rehearsal is found while the source runs, not in the downtime."""
        with Appliance.launch(self.store.disks, readonly=True, tcg=self.tcg) as appliance:
            if self.replay.micro is not None:
                micro.check(appliance, self._plan())
            if self.replay.boot_files:
                kernel_way.check(appliance, self.replay.mounts, self.replay.boot_files)

    def _launch_ahead(self) -> None:
        """Booting the appliance is most of a micro-morph's time, so it is done before the stop. Its overlays stay empty until
        the last delta has gone below them."""
        overlays = self.store.begin(shared=True)
        appliance = Appliance.launch(overlays, readonly=False, tcg=self.tcg, deadline_s=WAITING_S)
        self._appliance = appliance
        micro.ready(appliance, self._plan())
        appliance.note_layout()

    def _micro(self) -> None:
        begun = time.monotonic()
        with self._appliance_now() as appliance:
            micro.apply(appliance, self._plan(), self.folder)
        applied = time.monotonic()
        self.store.commit()
        log.info("micro-morph: %.2f s in the appliance, %.2f s to commit", applied - begun, time.monotonic() - applied)

    def _appliance_now(self) -> Appliance:
        """The one that waits, made to see the last delta; where there is none, or it cannot, another."""
        appliance, self._appliance = self._appliance, None
        if appliance is not None:
            appliance.give(APPLYING_S)
            try:
                self.store.renew()
                appliance.forget()
            except GuestError as unfit:
                log.warning("the appliance that waited is no use (%s): another is started", unfit)
                appliance.abandon()
            else:
                return appliance
        return Appliance.launch(self.store.begin(), readonly=False, tcg=self.tcg)

    def _plan(self) -> micro.MicroPlan:
        if self.replay.micro is None:
            raise GuestError("the rehearsal left no plan of a micro-morph", fix="rehearse again")
        return micro.parse(self.replay.family, self.replay.micro)

    def _convert(self) -> None:
        if self.convert is None:
            raise GuestError("virt-v2v was not set up for this cutover", fix="rehearse by --way virt-v2v first")
        self.convert(self.store.begin())
        self.store.commit()
