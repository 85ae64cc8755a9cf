"""tokvm modernise: a VM that was cut over on compatible hardware, or with a kernel beside it, gets virtio for good.

    planned by a person: the guest is asked to shut down ─► morph on overlays ─► trial boot of them, isolated ─► does it live?
        no:  the overlays go, the domain starts as before
        yes: undo log, commit ─► domain with virtio ─► start ─► sign of life

All of it is downtime, so it is counted and told. Once the guest was started on morphed disks nothing is undone any more: its
own writes are among the morph's. A morph is additive, so the hardware it had before is then given back over the morphed disks.
Each part may be killed and run again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tokvm.app.rehearsals import Boots
from tokvm.core.errors import DomainError, TokvmError, UsageError
from tokvm.core.units import format_duration
from tokvm.domain.base import DomainPlan, DomainState, Outcome
from tokvm.guest.engines import Engine
from tokvm.guest.morph_record import MorphState
from tokvm.guest.morph_store import MorphStore
from tokvm.migration.doors import Observer

log = logging.getLogger(__name__)

POLL_S = 0.5


class RunningHost(Protocol):
    """What is asked of the target's libvirt."""

    def define(self, plan: DomainPlan) -> None: ...

    def state(self, uuid: str) -> DomainState: ...

    def start(self, uuid: str) -> None: ...

    def stop(self, uuid: str) -> None: ...

    def shut_down(self, uuid: str, deadline_s: float) -> bool: ...

    def alive(self, uuid: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class Renewal:
    """old: the domain as it runs today; new: with virtio. proof: a sign of life besides the guest agent's."""

    uuid: str
    name: str
    old: DomainPlan
    new: DomainPlan
    host: RunningHost
    store: MorphStore
    engine: Engine
    boots: Boots
    observer: Observer
    proof: Callable[[], bool] | None = None
    deadline_s: float = 300.0
    proof_s: float = 300.0


def modernise(job: Renewal) -> dict[str, object]:
    """The parts of the downtime. TokvmError: it did not work; the VM runs as before, or the message says that it does not."""
    if job.host.state(job.uuid) is DomainState.ABSENT:
        raise UsageError("the domain is not here any more", where=job.name, fix="nothing can be modernised")
    begun = time.monotonic()
    _shut_down(job)
    parts = {"stop": _since(begun)}
    try:
        parts |= _morph(job)
    except BaseException as failed:
        _start_as_before(job, failed)
        raise
    job.store.forget()  # from the start on an undo would tear the guest's own writes apart, in a later run too
    try:
        job.host.define(job.new)
        parts["boot"] = _start(job, "start it with virtio")
    except TokvmError as failed:
        _give_back_hardware(job, failed)
        raise
    return {"outcome": "modernised", "downtime_s": {**parts, "total": _since(begun)}}


def _morph(job: Renewal) -> dict[str, float]:
    """Seconds of morph, trial and commit. Anything wrong before the commit leaves the disks as they are."""
    at = time.monotonic()
    job.engine.morph(job.store.begin())
    parts = {"morph": _since(at)}
    at = time.monotonic()
    job.observer.step("boot a copy on an isolated network")
    seen = job.boots(job.new, tuple(layer.path for layer in job.store.trial()))
    if seen.outcome is not Outcome.ALIVE:
        raise DomainError(f"it does not boot from virtio: {seen.why}", where=job.name, fix="leave it on the hardware it has")
    parts["trial"] = _since(at)
    at = time.monotonic()
    job.store.commit()
    return {**parts, "commit": _since(at)}


def _shut_down(job: Renewal) -> None:
    if job.host.state(job.uuid) is not DomainState.RUNNING:
        return
    job.observer.step("ask the guest to shut down")
    if not job.host.shut_down(job.uuid, job.deadline_s):
        raise DomainError(
            f"the guest did not shut down within {format_duration(job.deadline_s)}; nothing was changed",
            where=job.name,
            fix="shut it down from inside, then run the same command again",
        )


def _start(job: Renewal, step: str) -> float:
    """Seconds until it showed life."""
    begun = time.monotonic()
    job.observer.step(step)
    job.host.start(job.uuid)
    if job.proof_s <= 0:
        return _since(begun)
    while not (job.host.alive(job.uuid) or (job.proof is not None and job.proof())):
        if _since(begun) > job.proof_s:
            raise DomainError(f"it showed no sign of life within {format_duration(job.proof_s)}", where=job.name)
        time.sleep(POLL_S)
    return _since(begun)


def _start_as_before(job: Renewal, failed: BaseException) -> None:
    """The disks are put back exactly, and the domain starts as it was. A morph that is committed stays: it is whole, and a
    guest may have run on it since (an earlier run died before it could forget it)."""
    job.observer.note(f"it did not work ({failed}); the VM is started as it was")
    try:
        if job.store.state() is not MorphState.COMMITTED:
            job.store.undo()
        job.host.define(job.old)
        job.host.start(job.uuid)
    except TokvmError as worse:
        raise DomainError(
            f"it did not work ({failed}), and starting it as it was failed too: {worse.what}",
            where=job.name,
            fix=f"tokvm modernise {job.name} tries again; `virsh start {job.uuid}` starts it as it is",
        ) from worse


def _give_back_hardware(job: Renewal, failed: TokvmError) -> None:
    job.observer.note(f"{failed.what}; it is started on the hardware it had, over the morphed disks")
    job.host.stop(job.uuid)
    job.host.define(job.old)
    job.host.start(job.uuid)


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 3)
