"""The guest of one migration: its rehearsals, the way it will cut over by, and what morphs it then.

<state>/guests/<id>/            segment-*.cpio, kernel, initrd, nvram.fd: what a cutover replays
                   /morph/      the cutover's overlays and undo logs (guest.morph_store)
                   /trial/      a rehearsal's overlays; gone when it ends
                   /modern-N/   those of `tokvm modernise` after cutover number N, and before.xml (app/modern_ledger.py)
                   /rehearsal-N-WAY.png
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from tokvm.app.modern_ledger import ModernLedger, modern_of
from tokvm.app.modernise import Renewal, modernise
from tokvm.app.morphers import Convert, WayMorpher
from tokvm.app.plan import Plan
from tokvm.app.rehearsals import Boots, RehearsalWishes, Rehearser, Stage
from tokvm.app.ways import Replay, by_way, newest, refuse_failed, rehearsed
from tokvm.core.disk import DiskWriter
from tokvm.core.errors import Blocked, UsageError
from tokvm.core.machine import Firmware
from tokvm.domain.base import Accel, DomainPlan, LifeSigns
from tokvm.domain.host import LibvirtHost
from tokvm.domain.nvram import find_template, write_variables
from tokvm.domain.rehearsal import RehearsalPlan
from tokvm.domain.serial import LOGIN
from tokvm.guest import micro
from tokvm.guest.base import GuestDisk, Way
from tokvm.guest.engines import Conversion, Engine, Micro
from tokvm.guest.morph_advice import Advice, of_cutover, of_modernise
from tokvm.guest.morph_store import MorphStore
from tokvm.guest.virt_v2v import VirtV2v, find_virt_v2v
from tokvm.migration.book import Book
from tokvm.migration.doors import Morpher, Observer

log = logging.getLogger(__name__)

MORPHED_BY = (Way.MICRO, Way.VIRT_V2V, Way.KERNEL)
"""Ways whose cutover looks at, or changes, the guest's disks."""


DEFAULT_PROOF_S = 300.0


@dataclass(frozen=True, slots=True)
class ModernWishes:
    """way: MICRO or VIRT_V2V, None for the first. serial: the line that proves life in the trial boot. deadline_s: for the
    guest's shutdown; proof_s: for its signs of life. virtio_win: the operator's drivers for Windows, None for those of earlier
    commands."""

    way: Way | None = None
    serial: str | None = None
    proof: Callable[[], bool] | None = None
    deadline_s: float = 300.0
    proof_s: float = DEFAULT_PROOF_S
    virtio_win: str | None = None


@dataclass(frozen=True, slots=True)
class GuestSide:
    """book: the migration's. open_disk: disk number and the identity it must have → the target, held."""

    state_dir: Path
    book: Book
    plan: Plan
    host: LibvirtHost
    observer: Observer
    open_disk: Callable[[int, str | None], DiskWriter]

    @property
    def folder(self) -> Path:
        return self.state_dir.absolute() / "guests" / self.book.id

    @property
    def tcg(self) -> bool:
        return self.host.accel() is Accel.TCG

    def rehearse(self, domain: DomainPlan, wishes: RehearsalWishes) -> dict[str, object]:
        """What is not wished anew is as earlier commands said it."""
        root, virtio_win = wishes.root or self.plan.guest_root, self._virtio_win(wishes.virtio_win)
        wishes = replace(wishes, root=root or None, virtio_win=virtio_win)
        self._make_reachable(self.folder / "trial")
        stage = Stage(
            book=self.book,
            plan=domain,
            store=self._store("trial"),
            folder=self.folder,
            tcg=self.tcg,
            observer=self.observer,
            boots=self._boots(wishes.serial, wishes.deadline_s),
            by_way=lambda replay: self._by_way(domain, replay),
            convert=self._converter(domain, wishes.root, wishes.virtio_win),
        )
        return Rehearser(stage, wishes).run()

    def replay(self) -> Replay | None:
        """The way of the cutover: the one that was asked for, else the newest rehearsal's that worked. None: nothing is known
        of the guest, and it is started as it is."""
        asked = self.plan.way
        found = rehearsed(self.book.rehearsals(), asked)
        if found is not None or asked is None:
            return found
        if asked in (Way.NONE, Way.PRESTAGE, Way.VIRT_V2V):
            return Replay(asked, root=self.plan.guest_root)
        raise Blocked(
            f"the way {asked} was not rehearsed, or did not work then",
            where=self.book.id,
            fix=f"tokvm rehearse {self.book.id} --way {asked}",
        )

    def require_way(self) -> None:
        """Blocked when the way that was asked for cannot be gone: better before the stop than after it."""
        replay = self.replay()
        if replay is not None and replay.way is Way.VIRT_V2V and find_virt_v2v() is None:
            raise Blocked("virt-v2v-in-place is not installed here", where=self.book.id, fix="install virt-v2v")

    def refuse_failed_rehearsal(self, *, forced: bool) -> None:
        records = self.book.rehearsals()
        refuse_failed(records, where=self.book.record().name, forced=forced)
        if newest(records) is None:
            self.observer.note("this guest's boot on KVM was not rehearsed; `tokvm rehearse` does it while the source runs")

    def domain(self, domain: DomainPlan) -> DomainPlan:
        """As the cutover makes it, and as `modernise` made it since: a `cutover` that goes on gives no old hardware back."""
        replay, modern = self.replay(), modern_of(self.plan, self.book.record())
        if replay is not None and modern is not None:
            replay = replace(replay, way=modern.way)
        return domain if replay is None else self._by_way(domain, replay)

    def _by_way(self, domain: DomainPlan, replay: Replay) -> DomainPlan:
        """The domain, and what UEFI must be told: its boot entries lay in the old host's NVRAM."""
        if domain.vm.firmware is not Firmware.UEFI or not replay.loader:
            return by_way(domain, replay)
        nvram = self.folder / "nvram.fd"
        if not nvram.exists():
            self._make_reachable(self.folder)
            template = find_template(machine=domain.machine, secure_boot=domain.vm.secure_boot)
            write_variables(nvram, template, loader=replay.loader, description=self.book.record().name)
        return by_way(domain, replay, nvram=str(nvram))

    def morpher(self, domain: Callable[[], DomainPlan]) -> Morpher | None:
        """What the cutover's steps call; None when the way leaves the disks alone, and nothing was ever morphed. It never
        refuses: a rollback or another pass needs no way, only what undoes a morph."""
        try:
            replay = self.replay()
        except Blocked:
            replay = None
        if replay is None or replay.way not in MORPHED_BY:
            if not (self.folder / "morph").exists():
                return None
            replay = replay or Replay(Way.NONE)
        convert: Convert | None = None
        if replay.way is Way.VIRT_V2V:
            convert = self._converter_later(domain, replay.root)
        return WayMorpher(replay, self._store("morph"), self.folder, self.tcg, convert)

    def modernise(self, domain: DomainPlan, wishes: ModernWishes) -> dict[str, object]:
        """From compatible hardware, or a kernel beside the VM, to virtio; once. `domain`: the plan without any way."""
        replay = self.replay()
        if replay is None or replay.way not in (Way.COMPATIBLE, Way.KERNEL):
            raise UsageError(
                f"it was cut over by the way {replay.way if replay else Way.NONE}: there is nothing to modernise",
                where=self.book.record().name,
                fix="only after the ways compatible and kernel something is left to do",
            )
        record = self.book.record()
        modern = modern_of(self.plan, record)
        if modern is not None and modern.proved:
            return {"outcome": f"already on virtio (by the way {modern.way}): nothing to do", "downtime_s": {}}
        way, virtio_win = wishes.way or Way.MICRO, self._virtio_win(wishes.virtio_win)
        if way is Way.MICRO and replay.windows and not micro.windows_drivers_at_hand(virtio_win):
            raise Blocked(
                "there are no virtio drivers for Windows on this host",
                where=virtio_win or self.book.record().name,
                fix="get the virtio-win ISO and name it by --virtio-win",
            )
        name = f"modern-{record.attempt}"  # what is left of another cutover's must not reach these disks
        self._make_reachable(self.folder / name)
        with closing(self._store(name, of_modernise(self.book.id))) as store:
            return modernise(
                Renewal(
                    uuid=domain.vm.uuid,
                    name=record.name,
                    new=self._by_way(domain, replace(replay, way=way)),
                    host=self.host,
                    store=store,
                    ledger=ModernLedger(self.book, self.plan, self.folder / name, way),
                    engine=self._engine(way, domain, replay.root or None, virtio_win),
                    boots=self._boots(wishes.serial, wishes.proof_s or DEFAULT_PROOF_S),
                    observer=self.observer,
                    proof=wishes.proof,
                    deadline_s=wishes.deadline_s,
                    proof_s=wishes.proof_s,
                )
            )

    def _virtio_win(self, wished: str | None) -> str | None:
        return wished or self.plan.virtio_win or None

    def _engine(self, way: Way, domain: DomainPlan, root: str | None, virtio_win: str | None) -> Engine:
        if way is Way.MICRO:
            macs = tuple(nic.mac for nic in domain.vm.nics)
            return Micro(self.folder, tcg=self.tcg, root=root, virtio_win=virtio_win, macs=macs, on_step=self.observer.step)
        program = find_virt_v2v()
        if program is None or way is not Way.VIRT_V2V:
            raise UsageError(f"a guest cannot be modernised by the way {way} here", fix="give --way micro, or install virt-v2v")
        log_file, step = self.folder / "virt-v2v.log", self.observer.step
        return Conversion(VirtV2v(program, domain.vm, log_file, tcg=self.tcg, root=root, virtio_win=virtio_win, on_step=step))

    def _boots(self, serial: str | None, deadline_s: float) -> Boots:
        def boots(plan: DomainPlan, overlays: tuple[str, ...], /) -> LifeSigns:
            trial = RehearsalPlan(plan=plan, overlays=overlays, folder=self.folder, login=serial or LOGIN)
            return self.host.rehearse(trial, deadline_s=deadline_s)

        return boots

    def _store(self, name: str, advice: Advice | None = None) -> MorphStore:
        disks = self.book.disks()
        numbers = {disk.path: disk.index for disk in disks}

        def opened(disk: GuestDisk, identity: str | None) -> DiskWriter:
            return self.open_disk(numbers[disk.path], identity)

        advice = advice or of_cutover(self.book.id)
        return MorphStore(self.folder / name, [GuestDisk(disk.path) for disk in disks], opened, advice=advice)

    def _converter(self, domain: DomainPlan, root: str | None, virtio_win: str | None) -> Convert | None:
        program = find_virt_v2v()
        if program is None:
            return None
        run = VirtV2v(
            program,
            domain.vm,
            self.folder / "virt-v2v.log",
            tcg=self.tcg,
            root=root,
            virtio_win=virtio_win,
            on_step=lambda step: self.observer.step(f"virt-v2v: {step}"),
        )

        def convert(disks: tuple[GuestDisk, ...]) -> None:
            for warning in run.convert(disks).warnings:
                self.observer.note(f"virt-v2v: {warning}")

        return convert

    def _converter_later(self, domain: Callable[[], DomainPlan], root: str) -> Convert:
        def convert(disks: tuple[GuestDisk, ...]) -> None:
            made = self._converter(domain(), root or None, self._virtio_win(None))
            if made is None:
                raise Blocked("virt-v2v-in-place is not installed here", fix="install virt-v2v")
            made(disks)

        return convert

    def _make_reachable(self, path: Path) -> None:
        """libvirt's QEMU runs as a user of its own and must be able to pass through to the overlays, without looking around."""
        state = self.state_dir.absolute()
        for place in (state, state / "guests", self.folder, path):
            place.mkdir(mode=0o711, exist_ok=True)
            place.chmod(0o711 if place != state else (place.stat().st_mode & 0o7777) | 0o011)


def with_way(plan: Plan, way: Way | None, virtio_win: str | None, root: str | None) -> Plan:
    """What the operator said anew about how the guest is made to boot."""
    drivers = str(Path(virtio_win).absolute()) if virtio_win else plan.virtio_win  # later commands may run elsewhere
    return replace(plan, way=way or plan.way, virtio_win=drivers, guest_root=root or plan.guest_root)
