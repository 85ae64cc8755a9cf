"""A migrated VM in doubles, all but its disk and its morph: what `tokvm modernise` is tried on."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.guest.disks import change

from tokvm.app.modernise import Renewal, modernise
from tokvm.core.errors import DomainError
from tokvm.core.machine import DiskBus
from tokvm.core.units import MiB
from tokvm.domain.base import DomainPlan, DomainState, LifeSigns, Outcome
from tokvm.guest.base import GuestDisk, GuestError, Way
from tokvm.guest.engines import MorphReport
from tokvm.guest.morph_store import MorphStore
from tokvm.migration.doors import Observer, Silent

OLD_BYTES = bytes(2 * MiB)
WRITTEN_SINCE = b"\x09" * 4096 + bytes(MiB - 4096) + b"\x05" * 4096 + bytes(MiB - 4096)


OLD = "<domain>on old hardware, and edited by hand</domain>"
NEW = "<domain>on virtio</domain>"


@dataclass
class Host:
    """A libvirt with one domain. lives_on: definitions on which the guest's agent answers; dies_on: on which it goes off."""

    defined: str = OLD
    on: bool = True
    obeys: bool = True
    lives_on: frozenset[str] = frozenset({OLD, NEW})
    dies_on: frozenset[str] = frozenset()
    began: list[str] = field(default_factory=list)
    refusals: int = 0
    url: str = "qemu:///system"

    def definition(self, uuid: str) -> str:
        return self.defined

    def redefine(self, xml: str) -> None:
        assert not self.on
        self.defined = xml

    def define(self, plan: DomainPlan) -> None:
        assert not self.on
        assert {disk.bus for disk in plan.disks} == {DiskBus.VIRTIO_BLK}
        self.defined = NEW

    def state(self, uuid: str) -> DomainState:
        return DomainState.RUNNING if self.on else DomainState.OFF

    def start(self, uuid: str) -> None:
        if self.refusals:
            self.refusals -= 1
            raise DomainError("libvirt does not start it", where="web")
        self.began.append(self.defined)
        self.on = self.defined not in self.dies_on

    def shut_down(self, uuid: str, deadline_s: float) -> bool:
        self.on = self.on and not self.obeys
        return self.obeys

    def alive(self, uuid: str) -> bool:
        return self.on and self.defined in self.lives_on


@dataclass
class Ledger:
    """What outlives a run; each run gets the same one."""

    kept: str | None = None
    proved: bool = False
    replaced: str = "/state/replaced.xml"

    def before(self) -> str | None:
        return self.kept

    def trying(self, definition: str) -> None:
        self.kept = definition

    def given_back(self) -> None:
        self.kept = None

    def done(self, downtime_s: float | None) -> None:
        self.kept, self.proved = None, True


class Told(Silent):
    """What people read."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str, /) -> None:
        self.notes.append(text)


class Engine:
    """Writes 9s at the disk's beginning; `fails` afterwards."""

    fails = False

    def morph(self, disks: tuple[GuestDisk, ...]) -> MorphReport:
        change(disks[0], "write -P 9 0 4096")
        if self.fails:
            raise GuestError("no kernel is there", where="guest")
        return MorphReport(Way.MICRO)


class Trial:
    """What became of the copy."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.seen: list[tuple[DomainPlan, tuple[str, ...]]] = []

    def __call__(self, plan: DomainPlan, overlays: tuple[str, ...], /) -> LifeSigns:
        self.seen.append((plan, overlays))
        return LifeSigns(self.outcome, 1.0, "the kernel panicked" if self.outcome is Outcome.FAILED else "it answers")


@dataclass
class Bench:
    """A VM that runs on the hardware it was cut over to, and the job to change that."""

    host: Host
    ledger: Ledger
    engine: Engine
    trial: Trial
    told: Told
    disk: Path
    store: MorphStore
    plan: DomainPlan
    observer: Observer
    answers: bool = False

    def job(self, *, proof_s: float = 0.05, rescue_s: float = 0.0) -> Renewal:
        return Renewal(
            self.plan.vm.uuid,
            "web",
            self.plan,
            self.host,
            self.store,
            self.ledger,
            self.engine,
            self.trial,
            self.observer,
            proof=lambda: self.answers,
            proof_s=proof_s,
            rescue_s=rescue_s,
        )

    def run(self, *, proof_s: float = 0.05) -> dict[str, object]:
        with self.store:
            return modernise(self.job(proof_s=proof_s))

    def fails(self, error: type[BaseException], match: str | None = None) -> str:
        """The whole text of the error."""
        with pytest.raises(error, match=match) as caught:
            self.run()
        return str(caught.value)

    def morphed(self) -> bool:
        return self.disk.read_bytes()[:4096] == b"\x09" * 4096

    def guest_writes(self) -> None:
        with self.disk.open("r+b") as file:
            file.seek(MiB)
            file.write(b"\x05" * 4096)


class HungUp(Silent):
    """The terminal of an SSH session that broke off."""

    def step(self, name: str, /) -> None:
        raise BrokenPipeError

    def note(self, text: str, /) -> None:
        raise OSError(errno.EIO, "Input/output error")
