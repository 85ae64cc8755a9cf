"""What `tokvm modernise` works with, handed in: the target's libvirt, the morph, the trial boot, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tokvm.app.rehearsals import Boots
from tokvm.domain.base import DomainPlan, DomainState
from tokvm.guest.engines import Engine
from tokvm.guest.morph_store import MorphStore
from tokvm.migration.doors import Observer


class RunningHost(Protocol):
    """What is asked of the target's libvirt. Nothing here cuts a guest's power."""

    @property
    def url(self) -> str: ...

    def definition(self, uuid: str) -> str: ...

    def redefine(self, xml: str) -> None: ...

    def define(self, plan: DomainPlan) -> None: ...

    def state(self, uuid: str) -> DomainState: ...

    def start(self, uuid: str) -> None: ...

    def shut_down(self, uuid: str, deadline_s: float) -> bool: ...

    def alive(self, uuid: str) -> bool: ...


class Ledger(Protocol):
    """Which hardware the domain is on, kept over the death of a run: app/modern_ledger.py."""

    @property
    def replaced(self) -> str: ...

    def before(self) -> str | None: ...

    def trying(self, definition: str) -> None: ...

    def given_back(self) -> None: ...

    def done(self, downtime_s: float | None) -> None: ...


@dataclass(frozen=True, slots=True)
class Renewal:
    """new: the domain with virtio. proof: a sign of life besides the guest agent's. deadline_s: for the shutdown; proof_s: for
    signs of life, 0 asks for none; rescue_s: how long a libvirt that refuses to start the VM again is asked."""

    uuid: str
    name: str
    new: DomainPlan
    host: RunningHost
    store: MorphStore
    ledger: Ledger
    engine: Engine
    boots: Boots
    observer: Observer
    proof: Callable[[], bool] | None = None
    deadline_s: float = 300.0
    proof_s: float = 300.0
    rescue_s: float = 60.0


def runs(job: Renewal) -> bool:
    return job.host.state(job.uuid) is DomainState.RUNNING
