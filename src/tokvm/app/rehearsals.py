"""tokvm rehearse: morph and boot a throw-away overlay of the synced disks while the source runs.

    last whole pass ─► overlays ─► inspect ─► judge ─► for each way, best first:
        morph on the overlays (timed) ─► boot on an isolated network (timed, --boots times) ─► sign of life? ─► picture
    ─► everything removed, the result and what a cutover replays in the journal

The migration is locked meanwhile: the disks below the overlays stand still, and the next sync pass goes on afterwards.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Protocol

from tokvm.app.morphers import Convert
from tokvm.app.rehearsal_answer import Attempt, answer, unknown
from tokvm.app.ways import Replay, hardware_of, loader_of
from tokvm.core.errors import ImageError, UsageError
from tokvm.core.machine import Severity
from tokvm.core.units import seconds_since
from tokvm.domain.base import PROOFS, DomainPlan, LifeSigns, Outcome
from tokvm.guest import micro
from tokvm.guest.appliance import Appliance
from tokvm.guest.base import GuestDisk, GuestError, GuestFacts, Judgement, OsFamily, Way
from tokvm.guest.inspection import inspect
from tokvm.guest.kernel_way import boot_files, kernel_way
from tokvm.guest.morph_store import MorphStore
from tokvm.guest.nic_names import NicNames, names_to_keep
from tokvm.guest.verdict import judge, with_names
from tokvm.migration.book import Book
from tokvm.migration.doors import Observer
from tokvm.migration.phases import Phase
from tokvm.migration.rounds import newest_done, rounds_of, unfinished

log = logging.getLogger(__name__)

LASTING = (".png", ".log")
REHEARSED = (Way.NONE, Way.MICRO, Way.KERNEL, Way.COMPATIBLE, Way.VIRT_V2V)


class Boots(Protocol):
    """Boots the overlays once, in isolation, and takes everything away again."""

    def __call__(self, plan: DomainPlan, overlays: tuple[str, ...], /) -> LifeSigns: ...


@dataclass(frozen=True, slots=True)
class RehearsalWishes:
    """way: this one only. root: libguestfs' name of the system meant. virtio_win: the operator's drivers for Windows. serial: a
    line that proves life (regular expression; None: a login prompt). deadline_s: how long a boot may take to show it. boots:
    how often it is booted, from the same state each time: the typical one is foretold, and each has to show life."""

    way: Way | None = None
    root: str | None = None
    virtio_win: str | None = None
    serial: str | None = None
    deadline_s: float = 300.0
    boots: int = 1


@dataclass(frozen=True, slots=True)
class Stage:
    """What a rehearsal works with. folder: of this migration's rehearsals, kept; store: the throw-away overlays."""

    book: Book
    plan: DomainPlan
    store: MorphStore
    folder: Path
    tcg: bool
    observer: Observer
    boots: Boots
    by_way: Callable[[Replay], DomainPlan]
    convert: Convert | None = None


def require_frozen(book: Book) -> None:
    """Between passes only: in the middle of one the disks are of two moments."""
    phase, rounds = book.phase, rounds_of(book)
    if phase not in (Phase.COPY, Phase.ROLLED_BACK):
        raise UsageError(f"a cutover is under way or done (phase {phase})", where=book.id, fix="rehearse before the cutover")
    if newest_done(rounds) is None or unfinished(rounds) is not None:
        raise UsageError(
            "its disks are not all of one moment: no pass is whole yet, or one was interrupted",
            where=book.id,
            fix="run `tokvm sync` until it is done, then rehearse",
        )


class Rehearser:
    """One rehearsal of one migration."""

    def __init__(self, stage: Stage, wishes: RehearsalWishes) -> None:
        self._stage = stage
        self._wishes = wishes
        self._number = len(stage.book.rehearsals()) + 1
        self._timings: dict[str, float] = {}
        self._launched: Appliance | None = None
        self._names = NicNames()

    def run(self) -> dict[str, object]:
        """The document, as it is kept in the journal. A guest that cannot be inspected is an answer too. TokvmError: it could
        not be tried at all; nothing is kept."""
        require_frozen(self._stage.book)
        self._stage.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _cleared(self._stage.store), ExitStack() as stack:
            facts, judgement, attempts = self._tried(stack)
        document = answer(facts, judgement, attempts, self._timings)
        best = attempts[-1] if attempts else None
        self._stage.book.rehearsed(best.way if best else "", document, works=best is not None and best.works)
        return document

    def _tried(self, stack: ExitStack) -> tuple[GuestFacts, Judgement, list[Attempt]]:
        """Without any attempt where the guest cannot be inspected: it is not known which system, or what, to boot."""
        self._step("inspect the guest")
        begun = time.monotonic()
        appliance = self._launched = Appliance.launch(self._stage.store.begin(), readonly=False, tcg=self._stage.tcg)
        stack.callback(self._abandon)
        try:
            facts, judgement = self._look(appliance)
        except GuestError as refused:
            facts, judgement = unknown(refused, len(self._stage.store.disks))
            self._say(facts, judgement)
            return facts, judgement, []
        self._timings["inspection"] = seconds_since(begun)
        self._say(facts, judgement)
        return facts, judgement, [*self._attempts(facts, judgement)]

    # ---- looking

    def _look(self, appliance: Appliance) -> tuple[GuestFacts, Judgement]:
        """The appliance stays for the first way, which may need it: to boot another would take as long again."""
        facts = inspect(appliance, root=self._wishes.root)
        judgement = judge(
            facts,
            len(self._stage.store.disks),
            firmware=self._stage.plan.vm.firmware,
            windows_drivers=micro.windows_drivers_at_hand(self._wishes.virtio_win),
            virt_v2v=self._stage.convert is not None,
        )
        self._names = self._names_to_keep(facts)
        return facts, with_names(judgement, self._names)

    def _say(self, facts: GuestFacts, judgement: Judgement) -> None:
        self._stage.observer.note(f"{facts.product or facts.family}: {judgement.verdict} ({judgement.why})")
        for finding in judgement.findings:
            self._stage.observer.note(f"{finding.severity}: {finding.what}" + (f" ({finding.fix})" if finding.fix else ""))

    def _names_to_keep(self, facts: GuestFacts) -> NicNames:
        if facts.linux is None:
            return NicNames()
        domain, source = self._stage.plan, self._stage.book.record().source
        return names_to_keep(
            facts.linux, domain.vm.nics, slots_kept=domain.machine == "q35", in_order=source.startswith("xenserver:")
        )

    def _ways(self, judgement: Judgement) -> tuple[Way, ...]:
        """A way that was asked for is tried even where the judgement does not propose it."""
        if self._wishes.way is not None:
            return (self._wishes.way,)
        blocked = any(finding.severity is Severity.BLOCKER for finding in judgement.findings)
        return () if blocked and not judgement.ways else tuple(way for way in judgement.ways if way in REHEARSED)

    def _attempts(self, facts: GuestFacts, judgement: Judgement) -> Iterator[Attempt]:
        """Each way until one works; the last attempt is the result."""
        for way in self._ways(judgement):
            kept = frozenset(self._stage.folder.iterdir())
            attempt = self._try(way, facts, judgement)
            yield attempt
            if attempt.works:
                return
            _forget_prepared(self._stage.folder, kept)
            self._stage.observer.note(f"way {way}: does not work: {attempt.why}")

    # ---- one way

    def _try(self, way: Way, facts: GuestFacts, judgement: Judgement) -> Attempt:
        self._step(f"morph an overlay by the way {way}")
        bus, nic = hardware_of(way, judgement)
        draft = Replay(
            way,
            family=facts.family,
            windows=facts.family is OsFamily.WINDOWS,
            boot_disk=facts.boot_disk,
            bus=bus,
            nic=nic,
            root=facts.root,
            loader=loader_of(facts),
            mounts=facts.mounts,
        )
        timings: dict[str, float] = {}
        try:
            draft, timings["morph"] = self._morph(way, facts, draft)
        except (GuestError, ImageError, UsageError) as failed:
            log.info("rehearsal by %s failed: %s", way, failed)
            return Attempt(way, works=False, why=failed.what, timings=timings, replay=draft, fix=failed.fix)
        # A boot that could not be tried (libvirt is gone) says nothing about the guest: that error is the command's.
        return self._boot(way, draft, timings)

    def _morph(self, way: Way, facts: GuestFacts, draft: Replay) -> tuple[Replay, float]:
        """The overlays as the cutover would leave the disks, and the seconds that it would spend on it in the downtime."""
        if way is Way.COMPATIBLE and not draft.bus:
            raise UsageError("the guest drives no hardware that KVM could give it", fix="choose another --way")
        if way not in (Way.MICRO, Way.KERNEL):
            self._abandon()
            overlays = self._stage.store.begin()
            return draft, self._convert(overlays) if way is Way.VIRT_V2V else 0.0
        with self._appliance() as appliance:
            if way is Way.KERNEL:
                files = kernel_way(appliance, facts, self._stage.folder)
                kernel = {"image": str(files.kernel), "initrd": str(files.initrd), "cmdline": files.cmdline}
                return replace(draft, kernel=kernel, boot_files=boot_files(facts)), 0.0
            macs = [nic.mac for nic in self._stage.plan.vm.nics]
            plan = micro.plan(
                *(appliance, facts, self._stage.folder),
                virtio_win=self._wishes.virtio_win,
                macs=macs,
                names=self._names.by_mac,
            )
            appliance.forget()
            begun = time.monotonic()
            micro.apply(appliance, plan, self._stage.folder, throw_away=True)
        return replace(draft, micro=plan.as_json()), seconds_since(begun)

    def _appliance(self) -> Appliance:
        """The one that looked, while nothing was tried yet; else another, over fresh overlays."""
        launched, self._launched = self._launched, None
        return launched or Appliance.launch(self._stage.store.begin(), readonly=False, tcg=self._stage.tcg)

    def _abandon(self) -> None:
        launched, self._launched = self._launched, None
        if launched is not None:
            launched.abandon()

    def _convert(self, overlays: tuple[GuestDisk, ...]) -> float:
        if self._stage.convert is None:
            raise UsageError("virt-v2v-in-place is not installed here", fix="install virt-v2v, or choose another --way")
        begun = time.monotonic()
        self._stage.convert(overlays)
        return seconds_since(begun)

    def _boot(self, way: Way, replay: Replay, timings: dict[str, float]) -> Attempt:
        plan, boots = self._stage.by_way(replay), self._wishes.boots
        taken: list[float] = []
        for number in range(1, boots + 1):
            self._step("boot the overlay on an isolated network" + (f", {number} of {boots}" if boots > 1 else ""))
            seen = self._stage.boots(plan, tuple(layer.path for layer in self._stage.store.trial()))
            picture = self._keep_picture(seen.picture, way)
            if seen.outcome is not Outcome.ALIVE:
                why = f"boot {number} of {boots}: {seen.why}" if boots > 1 else seen.why
                return Attempt(way, False, why, timings, replay, picture=picture, boots=(*taken,))
            taken.append(round(seen.after_s, 3))
        timings["boot"] = round(median(taken), 3)
        proof = next((one.sign for one in seen.signs if one.sign in PROOFS), "")
        return Attempt(way, True, seen.why, timings, replay, proof, picture, boots=(*taken,))

    def _keep_picture(self, taken: Path | None, way: Way) -> str:
        if taken is None:
            return ""
        return str(taken.replace(self._stage.folder / f"rehearsal-{self._number}-{way}.png"))

    def _step(self, name: str) -> None:
        self._stage.observer.step(name)


@contextmanager
def _cleared(store: MorphStore) -> Iterator[None]:
    """Overlays go, whatever happens; the disks below were never written to."""
    try:
        yield
    finally:
        try:
            store.undo()
            shutil.rmtree(store.folder, ignore_errors=True)
        finally:
            store.close()


def _forget_prepared(folder: Path, kept: frozenset[Path]) -> None:
    """Nobody replays a way that failed, and a kernel with its initramfs is large. Pictures and logs are for people."""
    for file in folder.iterdir():
        if file not in kept and file.is_file() and file.suffix not in LASTING:
            file.unlink()
