"""What a migration needs from outside, handed in: the two hypervisors, the targets, the clock, and whoever watches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from tokvm.core.disk import DiskWriter
from tokvm.domain.base import DomainHost, DomainPlan
from tokvm.migration.records import Instant
from tokvm.sources.base import Source
from tokvm.transfer.checkpoint import PassLimits

log = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Observer(Protocol):
    """Whoever shows progress. Called in the migration's thread; must not raise."""

    def phase(self, phase: str, /) -> None: ...

    def step(self, name: str, /) -> None: ...

    def pass_begin(self, n: int, kind: str, disk: int, total: int, /) -> None: ...

    def advance(self, disk: int, count: int, /) -> None: ...

    def pass_end(self, n: int, kind: str, moved: int, seconds: float, /) -> None: ...

    def note(self, text: str, /) -> None: ...

    def downtime(self, part: str, seconds: float, /) -> None: ...


class Silent:
    """An observer that shows nothing."""

    def phase(self, phase: str, /) -> None: ...

    def step(self, name: str, /) -> None: ...

    def pass_begin(self, n: int, kind: str, disk: int, total: int, /) -> None: ...

    def advance(self, disk: int, count: int, /) -> None: ...

    def pass_end(self, n: int, kind: str, moved: int, seconds: float, /) -> None: ...

    def note(self, text: str, /) -> None: ...

    def downtime(self, part: str, seconds: float, /) -> None: ...


class Unfailing:
    """An observer that cannot stop a migration: where its display fails (a closed terminal, a full disk under the log), it goes
    silent. A VM must not stay off because nobody could be told about it."""

    def __init__(self, inner: Observer) -> None:
        self._inner = inner

    def _tell(self, show: Callable[[], None]) -> None:
        try:
            show()
        except (OSError, ValueError) as failed:
            log.debug("the display failed (%s); going on without", failed)
            self._inner = Silent()

    def phase(self, phase: str, /) -> None:
        self._tell(lambda: self._inner.phase(phase))

    def step(self, name: str, /) -> None:
        self._tell(lambda: self._inner.step(name))

    def pass_begin(self, n: int, kind: str, disk: int, total: int, /) -> None:
        self._tell(lambda: self._inner.pass_begin(n, kind, disk, total))

    def advance(self, disk: int, count: int, /) -> None:
        self._tell(lambda: self._inner.advance(disk, count))

    def pass_end(self, n: int, kind: str, moved: int, seconds: float, /) -> None:
        self._tell(lambda: self._inner.pass_end(n, kind, moved, seconds))

    def note(self, text: str, /) -> None:
        self._tell(lambda: self._inner.note(text))

    def downtime(self, part: str, seconds: float, /) -> None:
        self._tell(lambda: self._inner.downtime(part, seconds))


class Clock(Protocol):
    """`monotonic` is the same for all processes of one boot of the machine (CLOCK_MONOTONIC is)."""

    def wall(self) -> float: ...

    def monotonic(self) -> float: ...

    def boot(self) -> str: ...

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The machine's own clocks."""

    def wall(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def boot(self) -> str:
        try:
            return BOOT_ID.read_text(encoding="ascii").strip()
        except OSError:
            return ""

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def now(clock: Clock) -> Instant:
    return Instant(clock.wall(), clock.monotonic(), clock.boot())


def seconds_since(clock: Clock, then: Instant) -> float:
    """By the monotonic clock within one boot, else by the wall clock; never negative."""
    if clock.boot() == then.boot:
        return max(0.0, clock.monotonic() - then.monotonic)
    return max(0.0, clock.wall() - then.wall)


class Morpher(Protocol):
    """Makes the synced disks boot on KVM. Each verb may run twice, and after a death in the middle of any."""

    @property
    def changes_disks(self) -> bool:
        """False: `morph` has nothing to do, so the downtime has no such part."""
        ...

    def prepare(self, plan: DomainPlan) -> None:
        """While the source still runs: everything that can fail or wait before the stop. The disks may change after it."""
        ...

    def morph(self, plan: DomainPlan) -> None:
        """Change the target's disks. A second call begins from the synced bytes again."""
        ...

    def undo(self) -> bool:
        """The morph's changes are gone; nothing to undo is success. True: the disks hold exactly the last synced bytes again.
        False: somebody else wrote to them as well, or that cannot be told."""
        ...

    def release(self) -> None:
        """Let go of what `prepare` holds; must not raise."""
        ...

    def forget(self) -> None:
        """The morph will never be undone: drop what undoing needs."""
        ...


@dataclass(frozen=True, slots=True)
class Doors:
    """Everything outside.

    open_target: the exclusively held target of a disk (by its index); closed again after each pass. plan: the domain, made from
    the VM as it is now. manifest_path: where the manifest of (pass, disk) is kept. proof: a sign of life besides the guest
    agent's, for example a port that answers. morpher: None when the guest needs none.
    """

    source: Source
    open_target: Callable[[int], DiskWriter]
    host: DomainHost
    plan: Callable[[], DomainPlan]
    manifest_path: Callable[[int, int], Path]
    observer: Observer = field(default_factory=Silent)
    clock: Clock = field(default_factory=SystemClock)
    proof: Callable[[], bool] | None = None
    morpher: Morpher | None = None
    limits: PassLimits = field(default_factory=PassLimits)
