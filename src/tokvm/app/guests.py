"""The guest of one migration: its rehearsals, the way it will cut over by, and what morphs it then.

<state>/guests/<id>/            segment-*.cpio, kernel, initrd, nvram.fd: what a cutover replays
                   /morph/      the cutover's overlays and undo logs (guest.morph_store)
                   /trial/      a rehearsal's overlays; gone when it ends
                   /rehearsal-N-WAY.png
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

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
from tokvm.guest.base import GuestDisk, Way
from tokvm.guest.engines import Conversion, Engine, Micro
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
    guest's shutdown; proof_s: for its signs of life."""

    way: Way | None = None
    serial: str | None = None
    proof: Callable[[], bool] | None = None
    deadline_s: float = 300.0
    proof_s: float = DEFAULT_PROOF_S


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

    def refuse_failed_rehearsal(self, *, forced: bool) -> None:
        records = self.book.rehearsals()
        refuse_failed(records, where=self.book.record().name, forced=forced)
        if newest(records) is None:
            self.observer.note("this guest's boot on KVM was not rehearsed; `tokvm rehearse` does it while the source runs")

    def domain(self, domain: DomainPlan) -> DomainPlan:
        replay = self.replay()
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
        """What the cutover's steps call; None when the way leaves the disks alone, and nothing was ever morphed."""
        replay = self.replay()
        if replay is None or replay.way not in MORPHED_BY:
            if not (self.folder / "morph").exists():
                return None
            replay = replay or Replay(Way.NONE)
        convert: Convert | None = None
        if replay.way is Way.VIRT_V2V:
            convert = self._converter_later(domain, replay.root)
        return WayMorpher(replay, self._store("morph"), self.folder, self.tcg, self.observer.note, convert)

    def modernise(self, domain: DomainPlan, wishes: ModernWishes) -> dict[str, object]:
        """From compatible hardware, or a kernel beside the VM, to virtio. `domain`: the plan without any way."""
        replay = self.replay()
        if replay is None or replay.way not in (Way.COMPATIBLE, Way.KERNEL):
            raise UsageError(
                f"it was cut over by the way {replay.way if replay else Way.NONE}: there is nothing to modernise",
                where=self.book.record().name,
                fix="only after the ways compatible and kernel something is left to do",
            )
        self._make_reachable(self.folder / "modern")
        way = wishes.way or Way.MICRO
        with closing(self._store("modern")) as store:
            return modernise(
                Renewal(
                    uuid=domain.vm.uuid,
                    name=self.book.record().name,
                    old=self._by_way(domain, replay),
                    new=self._by_way(domain, replace(replay, way=way)),
                    host=self.host,
                    store=store,
                    engine=self._engine(way, domain, replay.root or None),
                    boots=self._boots(wishes.serial, wishes.proof_s or DEFAULT_PROOF_S),
                    observer=self.observer,
                    proof=wishes.proof,
                    deadline_s=wishes.deadline_s,
                    proof_s=wishes.proof_s,
                )
            )

    def _engine(self, way: Way, domain: DomainPlan, root: str | None) -> Engine:
        if way is Way.MICRO:
            return Micro(self.folder, tcg=self.tcg, root=root, on_step=self.observer.step)
        program = find_virt_v2v()
        if program is None or way is not Way.VIRT_V2V:
            raise UsageError(f"a guest cannot be modernised by the way {way} here", fix="give --way micro, or install virt-v2v")
        log_file = self.folder / "virt-v2v.log"
        return Conversion(VirtV2v(program, domain.vm, log_file, tcg=self.tcg, root=root, on_step=self.observer.step))

    def _boots(self, serial: str | None, deadline_s: float) -> Boots:
        def boots(plan: DomainPlan, overlays: tuple[str, ...], /) -> LifeSigns:
            trial = RehearsalPlan(plan=plan, overlays=overlays, folder=self.folder, login=serial or LOGIN)
            return self.host.rehearse(trial, deadline_s=deadline_s)

        return boots

    def _store(self, name: str) -> MorphStore:
        disks = self.book.disks()
        numbers = {disk.path: disk.index for disk in disks}

        def opened(disk: GuestDisk, identity: str | None) -> DiskWriter:
            return self.open_disk(numbers[disk.path], identity)

        return MorphStore(self.folder / name, [GuestDisk(disk.path) for disk in disks], opened)

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
            made = self._converter(domain(), root or None, self.plan.virtio_win or None)
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
    return replace(plan, way=way or plan.way, virtio_win=virtio_win or plan.virtio_win, guest_root=root or plan.guest_root)
