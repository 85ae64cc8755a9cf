"""When `tokvm modernise` fails: the VM runs again, or the error says what a person does. The world is asked what is:

    it runs, asked to shut down     it is let run; it may still go off
    it runs on virtio               it is let run, as its copy lived; not proved
    it is off                       the disks as they were, unless the morph is whole; its own definition; start
    it is off, half a morph stays   not started: tokvm modernise puts the disks right first

No power is ever cut: whoever has no guest agent shows no life that we see, and may live all the same.
"""

from __future__ import annotations

import time

from tokvm.app.modern_job import Renewal, runs
from tokvm.core.errors import DomainError, GuestError, NeedsPerson, TokvmError
from tokvm.core.units import format_duration
from tokvm.domain.base import DomainState
from tokvm.guest.morph_record import MorphState
from tokvm.guest.morph_store import HALF

PAUSE_S = 2.0


def see_to_it(job: Renewal, definition: str, failed: BaseException) -> None:
    """definition: the domain's own, from before. Returns when the VM runs as before, for `failed` to be raised on; a TokvmError
    else, which says how it is."""
    try:
        left_running = _put_back(job, definition, failed)
    except BaseException as worse:  # a second Ctrl-C too: somebody must be told that the VM may be off
        raise _left_off(job, failed, worse) from worse
    if not left_running:
        return
    error = _still_runs(job, definition, failed)
    if isinstance(failed, TokvmError):
        raise error from failed
    job.observer.note(f"{error.what}. Next: {error.fix}")


def half(job: Renewal) -> bool:
    """The disks hold half a morph, or nobody can tell."""
    try:
        return job.store.state() in HALF
    except GuestError:
        return True


def runs_on_half(job: Renewal) -> NeedsPerson:
    return NeedsPerson(
        "somebody started it while its disks hold half a morph: what it writes may be torn",
        where=job.name,
        fix=f"save what it holds, shut it down, and run `tokvm modernise {job.name}`, which takes that half out again; "
        "then check its file systems",
    )


def _put_back(job: Renewal, definition: str, failed: BaseException) -> bool:
    """True: it runs, and was left alone. libvirtd may restart just now (an update does that), so it is asked again."""
    until = time.monotonic() + job.rescue_s
    while True:
        try:
            if runs(job):
                return True
            _start_as_before(job, definition, failed)
            return False
        except DomainError as refused:
            if time.monotonic() > until:
                raise
            job.observer.note(f"{refused.what}; trying again in {format_duration(PAUSE_S)}")
            time.sleep(PAUSE_S)


def _start_as_before(job: Renewal, definition: str, failed: BaseException) -> None:
    """A morph that is committed stays: it is whole, and may have been run on."""
    tried = job.ledger.before() is not None
    over = ", over the morphed disks" if tried else ""
    job.observer.note(f"it did not work ({_what(failed)}); the VM is started on the hardware it had{over}")
    if job.store.state() is not MorphState.COMMITTED:
        job.store.undo()
    if job.host.state(job.uuid) is DomainState.ABSENT or job.host.definition(job.uuid) != definition:
        job.host.redefine(definition)
    job.host.start(job.uuid)
    if tried:
        job.ledger.given_back()


def _still_runs(job: Renewal, definition: str, failed: BaseException) -> TokvmError:
    again, virsh = f"tokvm modernise {job.name}", f"virsh -c {job.host.url}"
    if half(job):
        return runs_on_half(job)
    if job.ledger.before() is not None and job.host.definition(job.uuid) != definition:
        return DomainError(
            f"{_what(failed)}; it runs on virtio, where its copy lived, and is let run: it is not proved",
            where=job.name,
            fix=f"look at its console. It lives: `{again} --proof 0`. Wait longer: `{again} --proof 10m`. To have the old "
            f"hardware back: shut it down (`{virsh} shutdown {job.uuid}`), then `{again}`",
        )
    return DomainError(
        f"{_what(failed)}; it was asked to shut down and may still go off",
        where=job.name,
        fix=f"`{virsh} start {job.uuid}` starts it as it was; `{again}` goes on",
    )


def _left_off(job: Renewal, failed: BaseException, worse: BaseException) -> DomainError:
    what = f"it did not work ({_what(failed)}), and starting it as it was failed too: {_what(worse)}"
    again = f"`tokvm modernise {job.name}`"
    if half(job):
        return DomainError(
            f"{what}. Its disks hold half a morph", where=job.name, fix=f"do not start it: {again} puts the disks right first"
        )
    start = f"`virsh -c {job.host.url} start {job.uuid}`"
    return DomainError(what, where=job.name, fix=f"it may be off: {start} starts it as it is; {again} tries again")


def _what(failed: BaseException) -> str:
    if isinstance(failed, KeyboardInterrupt):
        return "interrupted"
    return failed.what if isinstance(failed, TokvmError) else repr(failed)
