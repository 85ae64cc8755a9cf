"""Migrations begun, found again and wired together: journal, source, targets and libvirt handed to a runner.

Workshop.begin(SOURCE, NAME, request) ─┐
Workshop.resume(NAME) ─────────────────┴─► Job: an open Migration with its doors
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tokvm.app.guests import GuestSide, ModernWishes, with_way
from tokvm.app.inventory import check_targets, reached
from tokvm.app.plan import Plan, Request, domain_plan, merged, new_plan, unmapped
from tokvm.app.rehearsals import RehearsalWishes
from tokvm.app.state import default_state_dir, manifest_path, prepare_state_dir
from tokvm.app.targets import spec_of
from tokvm.core.disk import DiskWriter
from tokvm.core.errors import Blocked, UsageError
from tokvm.core.machine import Finding, Severity, VirtualMachine, machine_from
from tokvm.domain.base import DomainPlan
from tokvm.domain.host import LibvirtHost
from tokvm.guest.base import Way
from tokvm.migration.book import Book
from tokvm.migration.doors import Doors, Observer, Unfailing
from tokvm.migration.journal import Journal
from tokvm.migration.phases import Phase
from tokvm.migration.records import MigrationRecord
from tokvm.migration.reports import CutoverReport, StatusReport, SyncReport, with_prediction
from tokvm.migration.runner import Migration, status_of
from tokvm.sources.base import Source
from tokvm.targets.open import open_target
from tokvm.transfer.checkpoint import PassLimits

if TYPE_CHECKING:
    from tokvm.remote.recording import Recorder


@dataclass(frozen=True, slots=True)
class Outline:
    """What `--dry-run` shows: nothing was changed, on either side."""

    vm: VirtualMachine
    plan: Plan
    findings: tuple[Finding, ...]
    steps: tuple[str, ...]


class Workshop:
    """One state directory, open. recorder: writes down what is sent to sources."""

    def __init__(self, state_dir: Path, journal: Journal, observer: Observer, recorder: Recorder | None = None) -> None:
        self.state_dir = state_dir
        self.journal = journal
        self.observer = observer
        self.recorder = recorder

    @classmethod
    @contextmanager
    def open(cls, state_dir: Path | None, observer: Observer, recorder: Recorder | None = None) -> Iterator[Self]:
        path = prepare_state_dir(state_dir or default_state_dir())
        with Journal.open(path) as journal:
            yield cls(path, journal, observer, recorder)

    def statuses(self) -> list[StatusReport]:
        return [status_of(self.journal, record) for record in self.journal.migrations()]

    def status(self, name: str) -> StatusReport:
        return status_of(self.journal, self.journal.find(name))

    def outline(self, url: str, name: str, request: Request) -> Outline:
        """Everything `begin` and `sync` would check and do, without doing it."""
        with reached(url, request.ssh, self.observer.note, self.recorder) as source:
            vm = source.inspect(source.find(name))
            known = self.journal.open_for(source.url, vm.uuid)
            plan = _plan_of(known, request) if known else new_plan(source.url, vm, request)
            known_owner = known.owner if known else ""
            findings = (*source.check(vm, owner=known_owner), *unmapped(vm, plan.networks))
            if known is None:
                findings += tuple(check_targets(vm, plan.targets))
        return Outline(vm, plan, findings, _sync_steps(plan, known))

    @contextmanager
    def begin(self, url: str, name: str, request: Request) -> Iterator[Job]:
        """The VM's open migration, or a new one when nothing is in its way (Blocked lists what is)."""
        with reached(url, request.ssh, self.observer.note, self.recorder) as source:
            uuid = source.find(name)
            record = self.journal.open_for(source.url, uuid)
            if record is None:
                vm = source.inspect(uuid)
                plan = new_plan(source.url, vm, request)
                self._refuse_blocked(vm, plan, source)
                paths = [choice.path for choice in plan.targets]
                record = self.journal.create(vm=vm, source=source.url, plan=plan.kept().to_json(), targets=paths)
            else:
                plan = _plan_of(record, request)
                self.journal.book(record.id).replan(plan.kept().to_json())
            yield from self._job(record, plan, source)

    @contextmanager
    def resume(self, name: str) -> Iterator[Job]:
        """A migration that was begun, by its id, the VM's name or uuid."""
        record = self.journal.find(name)
        plan = Plan.from_json(record.plan)
        with reached(plan.source, plan.ssh, self.observer.note, self.recorder) as source:
            yield from self._job(record, plan, source)

    def modernise(self, name: str, wishes: ModernWishes) -> dict[str, object]:
        """Virtio for a VM that was cut over without. The source is not asked: it may be gone."""
        found = self.journal.find(name).id
        with self.journal.lock(found):
            book = self.journal.book(found)
            record = book.record()
            if record.phase not in (Phase.STARTED, Phase.COMMITTED):
                raise UsageError(f"it was not cut over (phase {record.phase})", where=record.name, fix="tokvm cutover")
            plan = Plan.from_json(record.plan)

            def opened(index: int, identity: str | None) -> DiskWriter:
                return open_known(book, plan, index, identity)

            with closing(LibvirtHost(plan.libvirt)) as host:
                guest = GuestSide(self.state_dir, book, plan, host, Unfailing(self.observer), opened)
                return guest.modernise(domain_plan(machine_from(record.vm), plan), wishes)

    def _refuse_blocked(self, vm: VirtualMachine, plan: Plan, source: Source) -> None:
        findings = [*source.check(vm), *check_targets(vm, plan.targets), *unmapped(vm, plan.networks)]
        for finding in findings:
            if finding.severity is Severity.WARNING:
                self.observer.note(f"warning: {finding.what}")
        blockers = [finding for finding in findings if finding.severity is Severity.BLOCKER]
        if blockers:
            lines = "\n".join(f"  - {b.what}" + (f" ({b.fix})" if b.fix else "") for b in blockers)
            raise Blocked(f"{vm.name!r} cannot be migrated as it stands:\n{lines}", where=source.url, fix="see `tokvm check`")

    def _job(self, record: MigrationRecord, plan: Plan, source: Source) -> Iterator[Job]:
        host = LibvirtHost(plan.libvirt)
        try:
            yield Job(self, record, plan, source, host)
        finally:
            host.close()


class Job:
    """One migration with everything it needs, ready to be told what to do."""

    def __init__(self, shop: Workshop, record: MigrationRecord, plan: Plan, source: Source, host: LibvirtHost) -> None:
        self._shop = shop
        self._plan = plan
        self._host = host
        self._book = shop.journal.book(record.id)
        self._source = source
        self._domain: DomainPlan | None = None
        self.record = record
        self.guest = self._guest_side()
        self.migration = self._migration()

    def sync_unless_cutting(self, *, passes: int | None, budget_s: float | None) -> SyncReport | None:
        """More passes, unless the cutover has begun already (an interrupted `migrate`): that goes on by itself."""
        if self._book.phase not in (Phase.COPY, Phase.ROLLED_BACK):
            return None
        return self.migration.sync(passes=passes, budget_s=budget_s)

    def cut_over(
        self,
        *,
        budget_s: float | None,
        force_off: bool,
        deadline_s: float,
        proof_s: float,
        sign: Callable[[], bool] | None = None,
        despite_rehearsal: bool = False,
    ) -> CutoverReport:
        """The cutover, after libvirt was asked whether it could run the VM: better now than with the source off."""
        if self._book.phase not in (Phase.STARTED, Phase.COMMITTED):
            self.guest.require_way()
        if self._book.phase in (Phase.COPY, Phase.ROLLED_BACK) and self.migration.status().passes_done:
            self.guest.refuse_failed_rehearsal(forced=despite_rehearsal)
            self._refuse_unrunnable()
        return self._migration(sign).cutover(budget_s=budget_s, force_off=force_off, deadline_s=deadline_s, proof_s=proof_s)

    def choose_way(self, way: Way | None, virtio_win: str | None, root: str | None) -> None:
        """How the guest is made to boot, kept for later commands. Before the cutover only: after it the way was gone. Blocked,
        and nothing kept, when the way was not rehearsed and must be."""
        plan = with_way(self._plan, way, virtio_win, root)
        if plan == self._plan:
            return
        with self._shop.journal.lock(self.record.id):
            if self._book.phase not in (Phase.COPY, Phase.ROLLED_BACK):
                raise UsageError(f"a cutover is under way or done (phase {self._book.phase})", where=self.record.name)
            guest = replace(self.guest, plan=plan)
            guest.require_way()
            self._book.replan(plan.kept().to_json())
            self._plan, self.guest = plan, guest

    def rehearse(self, wishes: RehearsalWishes) -> dict[str, object]:
        """Boot a throw-away copy of the last pass. The migration is locked meanwhile. What was asked for and worked is kept for
        the cutover; what did not work bars nothing but itself."""
        with self._shop.journal.lock(self.record.id):
            document = self.guest.rehearse(self._bare_domain_plan(), wishes)
            if document["works"]:
                self.choose_way(wishes.way, wishes.virtio_win, wishes.root)
            return with_prediction(document, self._migration().status().prediction)

    def cutover_steps(self, way: Way | None = None) -> list[str]:
        """way: as if it had been chosen; it is not kept."""
        self.guest = replace(self.guest, plan=with_way(self._plan, way, None, None))
        self.guest.require_way()
        self._refuse_unrunnable()
        return [
            f"stop {self.record.name!r} on {self._plan.source}, and wait until two witnesses say it is off",
            "fence it: start, start_on and resume blocked, no HA restart, no automatic start",
            "snapshot the halted VM and copy the last delta",
            f"define {self._domain_name()!r} on {self._plan.libvirt} and start it",
            "wait until it shows life; whatever fails before the start rolls back, and the source runs again",
        ]

    def rollback_steps(self) -> list[str]:
        return [
            f"stop and undefine {self._domain_name()!r} on {self._plan.libvirt} (its disks stay)",
            f"unfence and start {self.record.name!r} on {self._plan.source}",
        ]

    def finish_steps(self) -> list[str]:
        marks = [snapshot.mark for snapshot in self._source.snapshots(self.record.vm_uuid, self.record.mark_prefix)]
        return [f"remove the snapshot {mark} from {self._plan.source}" for mark in marks] or [
            "nothing: no snapshot of ours is left"
        ]

    def _guest_side(self) -> GuestSide:
        return GuestSide(self._shop.state_dir, self._book, self._plan, self._host, self._shop.observer, self._open_same)

    def _migration(self, sign: Callable[[], bool] | None = None) -> Migration:
        doors = Doors(
            source=self._source,
            open_target=self._open_target,
            host=self._host,
            plan=self._domain_plan,
            manifest_path=self._manifest_path,
            observer=self._shop.observer,
            proof=sign,
            morpher=self.guest.morpher(self._bare_domain_plan),
            limits=PassLimits(rate_limit=self._plan.rate_limit),
        )
        return Migration(self._shop.journal, self.record, doors)

    def _open_target(self, index: int) -> DiskWriter:
        return self._open_same(index, None)

    def _open_same(self, index: int, identity: str | None) -> DiskWriter:
        return open_known(self._book, self._plan, index, identity)

    def _manifest_path(self, number: int, disk: int) -> Path:
        path = manifest_path(self._shop.state_dir, self.record.id, number, disk)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    def _domain_name(self) -> str:
        return self._plan.domain or self.record.name

    def _bare_domain_plan(self) -> DomainPlan:
        """Made from the VM as it is now, asked for once; whatever the way."""
        if self._domain is None:
            self._domain = domain_plan(self._source.inspect(self.record.vm_uuid), self._plan)
        return self._domain

    def _domain_plan(self) -> DomainPlan:
        return self.guest.domain(self._bare_domain_plan())

    def _refuse_unrunnable(self) -> None:
        for finding in self._host.check(self._domain_plan()):
            if finding.severity is Severity.WARNING:
                self._shop.observer.note(f"warning: {finding.what}")
                continue
            raise Blocked(f"the target could not run the VM: {finding.what}", where=finding.where, fix=finding.fix)


def open_known(book: Book, plan: Plan, index: int, identity: str | None) -> DiskWriter:
    """The target of a disk, if it is still the one that `identity` (or else the journal) says."""
    disk = next(disk for disk in book.disks() if disk.index == index)
    return open_target(spec_of(plan.targets[index]), size=disk.size, expect=identity or disk.identity or None)


def _plan_of(record: MigrationRecord, request: Request) -> Plan:
    """What the migration began with, with what was said anew. Its targets are fixed: they hold its passes."""
    plan = Plan.from_json(record.plan)
    if request.to and not _same_targets(plan, request.to):
        raise UsageError(
            f"this migration ({record.id}) copies to {', '.join(choice.path for choice in plan.targets)}",
            fix="leave --to out to go on with it; to copy elsewhere, finish or roll back this one first",
        )
    return replace(
        plan,
        ssh=merged(plan.ssh, request.ssh),
        networks=request.networks or plan.networks,
        libvirt=request.libvirt or plan.libvirt,
        machine=request.machine or plan.machine,
        bus=request.bus or plan.bus,
        domain=request.domain or plan.domain,
        rate_limit=request.rate_limit or plan.rate_limit,
    )


def _same_targets(plan: Plan, to: list[str]) -> bool:
    known = [choice.path for choice in plan.targets]
    given = [str(Path(path).absolute()) for path in to]
    return given == known or (len(given) == 1 and {str(Path(path).parent) for path in known} == set(given))


def _sync_steps(plan: Plan, known: MigrationRecord | None) -> tuple[str, ...]:
    targets = ", ".join(choice.path for choice in plan.targets)
    begin = f"go on with migration {known.id}" if known else "claim the VM and begin a migration"
    what = "copy what changed since the last pass" if known else f"copy the disks to {targets}"
    return (begin, "snapshot the VM", what, "repeat with deltas until they get no smaller")
