"""tokvm modernise: a VM that was cut over on compatible hardware, or with a kernel beside it, gets virtio for good.

    planned by a person: the guest is asked to shut down ─► morph on overlays ─► trial boot of them, isolated ─► does it live?
        no:  the overlays go, the domain starts as before
        yes: undo log, commit ─► domain with virtio ─► start ─► sign of life ─► the journal says so

All of it is downtime, so it is counted and told. From the moment the shutdown is asked for, whatever goes wrong is seen to
(app/modern_rescue.py): a VM that is off is started as it was, one that runs is let run. Once the guest was started on morphed
disks nothing is undone any more: its own writes are among the morph's. A morph is additive, so only the hardware is given back.
Each part may be killed and run again.
"""

from __future__ import annotations

import time
from dataclasses import replace

from tokvm.app.modern_job import Renewal, runs
from tokvm.app.modern_rescue import runs_on_half, see_to_it
from tokvm.core.errors import DomainError, UsageError
from tokvm.core.units import format_duration, seconds_since
from tokvm.domain.base import DomainState, Outcome
from tokvm.guest.morph_record import MorphState
from tokvm.guest.morph_store import HALF
from tokvm.migration.doors import Unfailing

__all__ = ["Renewal", "modernise"]

POLL_S = 0.5


def modernise(job: Renewal) -> dict[str, object]:
    """The parts of the downtime. TokvmError: it did not work; the VM runs as before, or the message says what else is so."""
    job = replace(job, observer=Unfailing(job.observer))  # the terminal may go while the VM is off
    if job.host.state(job.uuid) is DomainState.ABSENT:
        raise UsageError("the domain is not here any more", where=job.name, fix="nothing can be modernised")
    definition, before = job.host.definition(job.uuid), job.ledger.before()
    if before is not None and before != definition:
        return _go_on(job, before)
    _settle_earlier(job)
    begun = time.monotonic()
    try:
        parts = {"stop": _shut_down(job), **_morph(job), "boot": _renew(job, definition)}
        total = seconds_since(begun)
        _done(job, total)
    except BaseException as failed:
        see_to_it(job, definition, failed)
        raise
    return {"outcome": "modernised", "downtime_s": {**parts, "total": total}}


def _go_on(job: Renewal, before: str) -> dict[str, object]:
    """An earlier run gave it virtio, and nobody saw whether it lives: it is not stopped again."""
    try:
        boot_s = _wait_for_life(job)
        _done(job, None)
    except BaseException as failed:
        see_to_it(job, before, failed)
        raise
    return {"outcome": "modernised", "downtime_s": {"boot": boot_s}}


def _settle_earlier(job: Renewal) -> None:
    """A morph that an earlier run left committed, and that a guest ran on since, is whole and stays. Nothing is stopped yet."""
    state = job.store.state()
    if state in HALF and runs(job):
        raise runs_on_half(job)
    if state is MorphState.COMMITTED and (runs(job) or job.store.touched()):
        job.store.forget()


def _shut_down(job: Renewal) -> float:
    begun = time.monotonic()
    if not runs(job):
        return 0.0
    job.observer.step("ask the guest to shut down")
    if not job.host.shut_down(job.uuid, job.deadline_s):
        raise DomainError(f"the guest did not shut down within {format_duration(job.deadline_s)}", where=job.name)
    return seconds_since(begun)


def _morph(job: Renewal) -> dict[str, float]:
    """Seconds of morph, trial and commit. Anything wrong before the commit leaves the disks as they are."""
    at = time.monotonic()
    job.engine.morph(job.store.begin())
    parts = {"morph": seconds_since(at)}
    at = time.monotonic()
    job.observer.step("boot a copy on an isolated network")
    seen = job.boots(job.new, tuple(layer.path for layer in job.store.trial()))
    if seen.outcome is not Outcome.ALIVE:
        raise DomainError(f"it does not boot from virtio: {seen.why}", where=job.name, fix="leave it on the hardware it has")
    parts["trial"] = seconds_since(at)
    at = time.monotonic()
    job.store.commit()
    job.store.forget()  # from the start on an undo would tear the guest's own writes apart, in a later run too
    return {**parts, "commit": seconds_since(at)}


def _renew(job: Renewal, definition: str) -> float:
    """Seconds until it showed life on virtio."""
    begun = time.monotonic()
    if runs(job):
        raise DomainError("somebody started it meanwhile, on the hardware it had", where=job.name)
    job.ledger.trying(definition)
    job.host.define(job.new)
    job.observer.step("start it with virtio")
    job.host.start(job.uuid)
    _wait_for_life(job)
    return seconds_since(begun)


def _wait_for_life(job: Renewal) -> float:
    """Seconds. DomainError: it is off, or showed no life in time."""
    begun = time.monotonic()
    while True:
        if not runs(job):
            raise DomainError("it went off on virtio before anybody saw it live", where=job.name, fix="see its console's log")
        if job.proof_s <= 0 or job.host.alive(job.uuid) or (job.proof is not None and job.proof()):
            return seconds_since(begun)
        if seconds_since(begun) > job.proof_s:
            raise DomainError(f"it showed no sign of life within {format_duration(job.proof_s)}", where=job.name)
        time.sleep(POLL_S)


def _done(job: Renewal, downtime_s: float | None) -> None:
    job.ledger.done(downtime_s)
    job.observer.note(f"its domain was made anew; what was edited in the old one is in {job.ledger.replaced}")
