"""tokvm prestage: a person asks that the running source gets virtio, by its own tools, before the last pass.

    before the cutover? ─► look: is it this VM's guest, can it? ─► note in the journal ─► prepare ─► what came, in the journal

The migration is locked meanwhile: nobody stops the source in the middle of its rebuild. The source's hypervisor is not asked,
and the targets are not touched; the next pass carries what was rebuilt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tokvm.app.ways import newest
from tokvm.core.errors import TokvmError, UsageError
from tokvm.core.machine import VirtualMachine, machine_from
from tokvm.guest.base import GuestError
from tokvm.guest.prestage.checks import refuse_undone, refuse_unfit
from tokvm.guest.prestage.report import Kernel, Report
from tokvm.guest.prestage.talk import WINDOWS, Task, ask
from tokvm.migration.book import Book
from tokvm.migration.doors import Observer
from tokvm.migration.journal import Journal
from tokvm.migration.phases import Phase
from tokvm.migration.records import MigrationRecord
from tokvm.remote.ssh import SshHost

REBUILDS = {
    "initramfs-tools": "update-initramfs -u -k all",
    "dracut": "dracut -f --regenerate-all",
    "mkinitcpio": "mkinitcpio -P",
}


@dataclass(frozen=True, slots=True)
class Prestage:
    """host: the guest itself, over ssh."""

    journal: Journal
    host: SshHost
    observer: Observer

    def run(self, name: str, *, dry_run: bool) -> dict[str, object]:
        """The document: outcome `dry-run`, `prestaged`, or `nothing-to-do`. GuestError: the guest is as it was, or the message
        says what is not."""
        record = self.journal.find(name)
        with self.journal.lock(record.id):
            book = self.journal.book(record.id)
            _refuse_late(book, record)
            found = self._look(record)
            lacking = [one for one in found.before if one.lacks and not one.hopeless]
            if dry_run:
                return _document(record, found, "dry-run", found.before, steps=_steps(found) if lacking else ["nothing"])
            if not lacking:
                return _document(record, found, "nothing-to-do", found.before)
            done = self._prepare(book, found)
            return _document(record, done, "prestaged", done.after)

    def _look(self, record: MigrationRecord) -> Report:
        self.observer.step(f"look at the guest's initramfs at {self.host.where}")
        found = ask(self.host, Task.LOOK, on_said=self.observer.step)
        self._require_same(machine_from(record.vm), found)
        refuse_unfit(found, where=self.host.where)
        return found

    def _require_same(self, vm: VirtualMachine, found: Report) -> None:
        """An address on the command line is soon another machine's: the guest must have one of the VM's cards."""
        macs = {nic.mac.lower() for nic in vm.nics}
        if not macs:
            self.observer.note(f"{vm.name!r} has no NIC by which its guest could be known; {found.host or 'it'} is believed")
        elif not macs & found.macs:
            raise UsageError(
                f"{found.host or 'this guest'} is another machine: it has none of the MAC addresses of {vm.name!r}",
                where=self.host.where,
                fix=f"give the address of the guest that has {', '.join(sorted(macs))}",
            )

    def _prepare(self, book: Book, found: Report) -> Report:
        """What was begun is in the journal before it begins, and how it ended after it."""
        how = f"{found.generator} of {found.host or 'the guest'} ({self.host.where})"
        book.note(f"prestage begins: virtio into {_versions(found.before)} by {how}")
        self.observer.step(f"rebuild the guest's initramfs: {REBUILDS[found.generator]}")
        try:
            done = ask(self.host, Task.PREPARE, on_said=self.observer.step)
            for path, state in done.config:
                self.observer.note(f"{path}: {state}")
            refuse_undone(done, where=self.host.where)
        except TokvmError as failed:
            book.note(f"prestage failed: {failed.what}")
            raise
        book.note(f"prestaged: virtio in the initramfs of {_versions(done.after)} by {how}")
        return done


def _refuse_late(book: Book, record: MigrationRecord) -> None:
    if book.phase not in (Phase.COPY, Phase.ROLLED_BACK) or record.finished is not None:
        raise UsageError(
            f"a cutover is under way or done (phase {book.phase})",
            where=record.name,
            fix="a guest can be prestaged only before its cutover; after it, `tokvm modernise`",
        )
    last = newest(book.rehearsals())
    replay = last.document.get("replay") if last is not None else None
    if machine_from(record.vm).extra.get("guest_os", "").lower().startswith("windows") or (
        isinstance(replay, dict) and replay.get("windows")
    ):
        raise GuestError("this guest is Windows: it cannot be prestaged", where=record.name, fix=WINDOWS)


def _steps(found: Report) -> list[str]:
    names = ", ".join(sorted({name for one in found.before for name in one.lacks}))
    return [
        f"add {names} to the configuration of {found.generator} in the guest",
        f"run `{REBUILDS[found.generator]}` in it, and look again what each initramfs holds",
    ]


def _versions(kernels: Iterable[Kernel]) -> str:
    return ", ".join(one.version for one in kernels if not one.hopeless)


def _document(
    record: MigrationRecord, found: Report, outcome: str, kernels: Iterable[Kernel], *, steps: list[str] | None = None
) -> dict[str, object]:
    return {
        "outcome": outcome,
        "migration": record.id,
        "name": record.name,
        "guest": {
            "host": found.host,
            "distribution": found.distribution,
            "running": found.running,
            "generator": found.generator,
            "unified": list(found.unified),
        },
        "kernels": [_kernel(one) for one in kernels],
        "config": [{"path": path, "state": state} for path, state in found.config],
        "steps": steps or [],
        "next": f"tokvm sync {record.name}, then tokvm rehearse {record.name}" if outcome != "dry-run" else "",
    }


def _kernel(one: Kernel) -> dict[str, object]:
    return {
        "version": one.version,
        "initrd": one.initrd,
        "bytes": one.size,
        "free_bytes": one.free,
        "ready": one.ready,
        "state": one.seen,
        "drivers": dict(one.drivers),
    }
