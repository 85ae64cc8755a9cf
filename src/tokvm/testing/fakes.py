"""A world in memory: one VM on a source, its copy on a target, and everything that can go wrong between them.

    FakeSource ─┐                    each call is numbered; a plan says what happens at which number:
    FakeHost   ─┼─► World.call ──►   die before or after it, lose its reply, let it land late, refuse it, let HA act
    FakeReader ─┘        │
                         └─► check(): never two running, never a start on stale bytes, nothing lost unasked

While a copy runs it writes one block at every call, so a copy that is stale is seen to be so. Power loss at a death: what a
target was not asked to flush is gone. The doubles keep to the doors' contracts, no more.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TypeVar

from tokvm.core.disk import Chunk, DiskReader
from tokvm.core.errors import ConnectionLost, DomainError, NotOff, SourceError, TargetError, TokvmError, UsageError
from tokvm.core.extents import Extent, ExtentKind, ExtentMap
from tokvm.core.machine import Disk, Finding, OffEvidence, PowerState, Snapshot, VirtualMachine
from tokvm.domain.base import DomainPlan, DomainState, StartUnknown, TargetDisk
from tokvm.sources.base import MachineSummary

BLOCK = 4096
UUID = "5f1c2a52-0000-4000-8000-000000000001"
T = TypeVar("T")
_MEDIUM = threading.Lock()
_REFUSAL: dict[type[TokvmError], type[TokvmError]] = {ConnectionLost: SourceError, StartUnknown: DomainError}
"""How what may lose its reply says no."""


class Death(BaseException):  # not an error: nothing may catch it but the harness
    """The process is gone at this point."""


class Fault(Enum):
    """LATE: the action is taken in hand, its reply is lost, and it lands `World.late_after` calls later (stops and starts only;
    any other call just loses its reply). HA: before the call, HA or a person starts the source if nothing keeps it from that.
    LIFT, INTERLUDE: the same in spite of the fence, until the target is defined (what a person does after that is a person's to
    answer for). KILL_…: a real SIGKILL to this process."""

    DIE_BEFORE = "die before"
    DIE_AFTER = "die after"
    KILL_BEFORE = "kill before"
    KILL_AFTER = "kill after"
    LOSE_REPLY = "reply lost"
    LOSE_REQUEST = "request lost"
    REFUSE = "refused"
    LATE = "lands late"
    HA = "HA starts the source"
    STALL = "a minute passes"
    LIFT = "a person lifts the fence"
    INTERLUDE = "a person lifts the fence, the source runs for a moment"


@dataclass
class FakeClock:
    """Time passes when somebody sleeps, and a little at every call of the world."""

    seconds: float = 1000.0

    def wall(self) -> float:
        return 1.7e9 + self.seconds

    def monotonic(self) -> float:
        return self.seconds

    def boot(self) -> str:
        return "boot-1"

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@dataclass
class World:
    """All truth. `plan`: call number → what happens there. `always`: call name → what happens at each such call."""

    disks: list[bytearray]
    targets: list[bytearray]
    plan: dict[int, Fault] = field(default_factory=dict)
    always: dict[str, Fault] = field(default_factory=dict)
    clock: FakeClock = field(default_factory=FakeClock)
    late_after: int = 3
    obeys: bool = True
    lives: bool = True
    source_on: bool = True
    paused: bool = False
    held: bool = False
    fenced: bool = False
    owner: str = ""
    pending_stop: int | None = None
    pending_start: int | None = None
    defined: bool = False
    target_on: bool = False
    target_linked: bool = True
    target_ever_ran: bool = False
    loss_accepted: bool = False
    morphed: bool = False
    save_to: Path | None = None
    snapshots: dict[str, tuple[Snapshot, list[bytes], list[dict[int, int]]]] = field(default_factory=dict)
    changed: list[dict[int, int]] = field(default_factory=list)
    unsynced: list[list[tuple[int, bytes]]] = field(default_factory=list)
    calls: int = 0
    writes: int = 0
    log: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)

    @classmethod
    def make(cls, *, disks: int = 1, blocks: int = 16) -> World:
        """Disks of `blocks` blocks, every other one with data; targets full of somebody's old bytes."""
        made = []
        for number in range(disks):
            content = bytearray(blocks * BLOCK)
            for block in range(0, blocks, 2):
                content[block * BLOCK : (block + 1) * BLOCK] = bytes([number * 64 + block + 1]) * BLOCK
            made.append(content)
        targets = [bytearray(b"\x53" * len(content)) for content in made]
        return cls(made, targets, changed=[{} for _ in made], unsynced=[[] for _ in made])

    # ---- what happens at a call

    def call(self, name: str, act: Callable[[], T], *, lost: type[TokvmError] = ConnectionLost) -> T:
        """One numbered call from outside: the environment moves, then the call takes place as planned."""
        number, self.calls = self.calls, self.calls + 1
        fault = self.plan.get(number) or self.always.get(name)
        self.log.append(f"{number} {name}{f' [{fault.value}]' if fault else ''}")
        self.clock.seconds += 0.01
        self._environment(number, fault)
        match fault:
            case Fault.DIE_BEFORE:
                raise Death(name)
            case Fault.KILL_BEFORE:
                self._kill()
            case Fault.LOSE_REQUEST:
                raise lost(f"{name}: the connection broke", where="fake")
            case Fault.REFUSE:
                raise _REFUSAL.get(lost, lost)(f"{name}: refused", where="fake")
            case Fault.LATE if self._defer(name, number):
                raise lost(f"{name}: the connection broke", where="fake")
        result = act()
        self.check(name)
        match fault:
            case Fault.DIE_AFTER:
                raise Death(name)
            case Fault.KILL_AFTER:
                self._kill()
            case Fault.LOSE_REPLY | Fault.LATE:
                raise lost(f"{name}: the reply was lost", where="fake")
        self._save()
        return result

    def _environment(self, number: int, fault: Fault | None) -> None:
        if fault is Fault.HA:
            self.ha_starts_source()
        if fault is Fault.STALL:
            self.clock.seconds += 60
        if fault in (Fault.LIFT, Fault.INTERLUDE) and not self.defined:
            self.a_person_lifts_the_fence(stays=fault is Fault.LIFT)
        if self.pending_stop is not None and number >= self.pending_stop:
            self.pending_stop, self.source_on = None, False
        if self.pending_start is not None and number >= self.pending_start:
            self.pending_start = None
            if self.defined:
                self.target_starts("a late start")
        self.guests_write()
        self.check("the environment")

    def _defer(self, name: str, number: int) -> bool:
        if name == "shut_down" and self.source_on:
            self.pending_stop = number + self.late_after
            return True
        if name == "host.start" and not self.target_on:
            self.pending_start = number + self.late_after
            return True
        return False

    def _kill(self) -> None:
        with _MEDIUM:  # nothing reaches the medium between the picture that is kept of it and the end
            self._save()
            os.kill(os.getpid(), signal.SIGKILL)

    def _save(self) -> None:
        if self.save_to is not None:
            draft = self.save_to.with_suffix(".new")
            draft.write_bytes(pickle.dumps(self))
            draft.replace(self.save_to)

    # ---- the guests, and others who act on their own

    def guests_write(self) -> None:
        """Whoever runs writes a block; the source's writes are what the next delta has to bring."""
        self.writes += 1
        data = self.writes.to_bytes(8, "little") * (BLOCK // 8)
        for number, (disk, target) in enumerate(zip(self.disks, self.targets, strict=True)):
            block = (self.writes * 7 + number) % (len(disk) // BLOCK)
            place = slice(block * BLOCK, (block + 1) * BLOCK)
            if self.source_on:
                disk[place] = data
                self.changed[number][block] = self.writes
            if self.target_on:
                target[place] = b"T" * BLOCK

    def ha_starts_source(self) -> None:
        if not self.source_on and not self.fenced:
            self.source_on = True

    def a_person_lifts_the_fence(self, *, stays: bool) -> None:
        self.fenced = False
        if not self.source_on:
            self.source_on = True
            self.guests_write()
            self.source_on = stays

    def target_starts(self, how: str) -> None:
        """The target's first instruction: what its disks hold then is what counts."""
        self.settle()
        if not self.target_ever_ran and any(a != b for a, b in zip(self.disks, self.targets, strict=True)):
            self.violations.append(f"{how} started the target on stale bytes ({self.log[-1]})")
        self.target_on = self.target_ever_ran = True

    def settle(self) -> None:
        """The page cache is written out."""
        for target, waiting in zip(self.targets, self.unsynced, strict=True):
            for offset, data in waiting:
                target[offset : offset + len(data)] = data
            waiting.clear()

    def lose_power(self) -> None:
        """What was not flushed is gone, and so is everybody's open file."""
        for waiting in self.unsynced:
            waiting.clear()

    def check(self, when: str) -> None:
        if self.source_on and self.target_on:
            self.violations.append(f"both run after {when} ({self.log[-1] if self.log else ''})")
        if self.source_on and self.target_ever_ran and not self.loss_accepted:
            self.violations.append(f"the source runs after {when}: what the target wrote is lost, and nobody accepted that")

    def machine(self) -> VirtualMachine:
        disks = tuple(Disk(n, f"vdi-{n}", len(content), bootable=n == 0) for n, content in enumerate(self.disks))
        return VirtualMachine(UUID, "guest", 2, 1 << 30, disks, hypervisor="fake", power=self.power())

    def power(self) -> PowerState:
        if not self.source_on:
            return PowerState.OFF
        return PowerState.PAUSED if self.paused else PowerState.RUNNING


class FakeSource:
    """A Source over a World."""

    def __init__(self, world: World) -> None:
        self.world = world

    @property
    def url(self) -> str:
        return "fake://source"

    def list_machines(self) -> list[MachineSummary]:
        return self.world.call("list_machines", lambda: [MachineSummary(UUID, "guest", self.world.power())])

    def find(self, name_or_uuid: str) -> str:
        if name_or_uuid not in (UUID, "guest"):
            raise UsageError(f"no VM {name_or_uuid!r}", where=self.url, fix="it is called guest")
        return self.world.call("find", lambda: UUID)

    def inspect(self, uuid: str) -> VirtualMachine:
        self._known(uuid)
        return self.world.call("inspect", self.world.machine)

    def check(self, vm: VirtualMachine, *, owner: str = "") -> list[Finding]:
        self._known(vm.uuid)
        return self.world.call("check", list)

    def claim(self, uuid: str, owner: str) -> str:
        self._known(uuid)

        def act() -> str:
            self.world.owner = self.world.owner or owner
            return self.world.owner

        return self.world.call("claim", act)

    def release(self, uuid: str, owner: str) -> None:
        self._known(uuid)

        def act() -> None:
            if self.world.owner == owner:
                self.world.owner = ""

        self.world.call("release", act)

    def snapshot(self, vm: VirtualMachine, mark: str) -> Snapshot:
        def act() -> Snapshot:
            if mark not in self.world.snapshots:
                made = Snapshot(f"snap-{mark}", mark, {disk.key: f"{disk.key}@{mark}" for disk in vm.disks})
                changed = [dict(blocks) for blocks in self.world.changed]
                self.world.snapshots[mark] = (made, [bytes(content) for content in self.world.disks], changed)
            return self.world.snapshots[mark][0]

        return self.world.call("snapshot", act)

    def snapshots(self, uuid: str, mark_prefix: str) -> list[Snapshot]:
        self._known(uuid)
        return self.world.call(
            "snapshots", lambda: [made for mark, (made, _, _) in self.world.snapshots.items() if mark.startswith(mark_prefix)]
        )

    def remove_snapshot(self, uuid: str, snapshot: Snapshot) -> None:
        self._known(uuid)

        def act() -> None:
            if self.world.snapshots.pop(snapshot.mark, None) is not None:
                self.world.removed.append(snapshot.mark)

        self.world.call("remove_snapshot", act)

    def open_disk(self, disk: Disk, at: Snapshot, since: Snapshot | None) -> DiskReader:
        return self.world.call("open_disk", lambda: FakeReader(self.world, disk, at, since))

    def power(self, uuid: str) -> PowerState:
        self._known(uuid)
        return self.world.call("power", self.world.power)

    def shut_down(self, uuid: str, *, deadline_s: float, force: bool) -> None:
        self._known(uuid)

        def act() -> None:
            if not self.world.source_on:
                return
            if not self.world.obeys:
                self.world.clock.sleep(deadline_s)
                if not force:
                    raise NotOff("the guest does not stop", where="guest", fix="--force-off")
            self.world.source_on = False

        self.world.call("shut_down", act)

    def stop_pending(self, uuid: str) -> bool:
        self._known(uuid)
        return self.world.call("stop_pending", lambda: self.world.pending_stop is not None)

    def off_evidence(self, uuid: str) -> OffEvidence:
        self._known(uuid)
        released = not self.world.source_on and not self.world.held
        return self.world.call("off_evidence", lambda: OffEvidence(self.world.power(), released))

    def fence(self, uuid: str, reason: str) -> None:
        self._known(uuid)
        self.world.call("fence", lambda: setattr(self.world, "fenced", True))

    def is_fenced(self, uuid: str) -> bool:
        self._known(uuid)
        return self.world.call("is_fenced", lambda: self.world.fenced)

    def unfence(self, uuid: str) -> None:
        self._known(uuid)
        self.world.call("unfence", lambda: setattr(self.world, "fenced", False))

    def start(self, uuid: str) -> None:
        self._known(uuid)

        def act() -> None:
            if self.world.fenced and not self.world.source_on:
                raise SourceError("start is blocked", where="guest", fix="unfence it")
            self.world.source_on = True

        self.world.call("start", act)

    def close(self) -> None: ...

    @staticmethod
    def _known(uuid: str) -> None:
        if uuid != UUID:
            raise SourceError(f"no VM has the uuid {uuid}", where="fake", fix="look at `tokvm ls`")


class FakeReader:
    """A base (blocks of zeros are ABSENT) or a delta (what was written since). One chunk for each block, each one a call."""

    def __init__(self, world: World, disk: Disk, at: Snapshot, since: Snapshot | None) -> None:
        missing = [one.mark for one in (at, since) if one is not None and one.mark not in world.snapshots]
        if missing:
            raise SourceError(f"the snapshot {missing[0]} is gone", where="fake", fix="sync again")
        _, contents, changed = world.snapshots[at.mark]
        self._world = world
        self._content = contents[disk.index]
        blocks = range(len(self._content) // BLOCK)
        if since is None:
            self._blocks = [b for b in blocks if any(self._block(b))]
        else:
            before = world.snapshots[since.mark][2][disk.index]
            now = changed[disk.index]
            self._blocks = [b for b in blocks if now.get(b) != before.get(b)]
        self.size = len(self._content)
        self.fingerprint = f"{at.mark}:{since.mark if since else ''}:{disk.index}"
        self.total = len(self._blocks) * BLOCK

    def _block(self, number: int) -> bytes:
        return self._content[number * BLOCK : (number + 1) * BLOCK]

    def covered(self) -> Iterator[ExtentMap]:
        yield ExtentMap.of(0, self.size, [Extent(b * BLOCK, BLOCK, ExtentKind.DATA) for b in self._blocks])

    def chunks(self, position: int = 0) -> Iterator[Chunk]:
        for number, block in enumerate(self._blocks):
            if number < position:
                continue
            data = self._world.call("chunk", lambda at=block: self._block(at))  # type: ignore[misc]
            yield Chunk(block * BLOCK, BLOCK, ExtentKind.DATA, number + 1, memoryview(data))

    def close(self) -> None: ...


class FakeTarget:
    """A DiskWriter over a World: what is not flushed is lost with the power. `broken`: every flush fails."""

    broken = False

    def __init__(self, world: World, index: int) -> None:
        if world.target_on:
            raise TargetError("the target is in use by a running VM", where=f"target-{index}", fix="stop it")
        if world.morphed:
            world.violations.append("a pass was written over a morphed disk")
        self._world = world
        self._index = index
        self.size = len(world.targets[index])
        self.identity = f"target-{index}"
        self.known_zero = False

    def write(self, offset: int, data: memoryview) -> None:
        with _MEDIUM:
            self._world.unsynced[self._index].append((offset, bytes(data)))

    def zero(self, offset: int, length: int) -> None:
        self.write(offset, memoryview(bytes(length)))

    def flush(self) -> None:
        if self.broken:
            raise TargetError("Input/output error", where=self.identity, fix="see the storage")
        with _MEDIUM:
            target, waiting = self._world.targets[self._index], self._world.unsynced[self._index]
            for offset, data in waiting:
                target[offset : offset + len(data)] = data
            waiting.clear()

    def read_back(self, offset: int, length: int) -> memoryview:
        with _MEDIUM:
            content = bytearray(self._world.targets[self._index])
            for at, data in self._world.unsynced[self._index]:
                content[at : at + len(data)] = data
            return memoryview(bytes(content[offset : offset + length]))

    def close(self) -> None: ...


class FakeHost:
    """A DomainHost over a World."""

    def __init__(self, world: World) -> None:
        self.world = world

    @property
    def url(self) -> str:
        return "fake://target"

    def domain_xml(self, plan: DomainPlan) -> str:
        return self._call("host.domain_xml", lambda: f"<domain><name>{plan.name}</name></domain>")

    def define(self, plan: DomainPlan) -> None:
        self._call("host.define", lambda: setattr(self.world, "defined", True))

    def state(self, uuid: str) -> DomainState:
        def act() -> DomainState:
            if self.world.target_on:
                return DomainState.RUNNING
            return DomainState.OFF if self.world.defined else DomainState.ABSENT

        return self._call("host.state", act)

    def start(self, uuid: str) -> None:
        def act() -> None:
            if not self.world.defined:
                raise DomainError("no such domain", where="guest", fix="define it")
            if not self.world.target_on:
                self.world.target_starts("host.start")

        self.world.call("host.start", act, lost=StartUnknown)

    def stop(self, uuid: str) -> None:
        self._call("host.stop", lambda: setattr(self.world, "target_on", False))

    def undefine(self, uuid: str) -> None:
        self._call("host.undefine", lambda: setattr(self.world, "defined", False))

    def cut_network(self, uuid: str) -> None:
        self._call("host.cut_network", lambda: setattr(self.world, "target_linked", False))

    def alive(self, uuid: str) -> bool:
        return self._call("host.alive", lambda: self.world.target_on and self.world.lives)

    def close(self) -> None: ...

    def _call(self, name: str, act: Callable[[], T]) -> T:
        return self.world.call(name, act, lost=DomainError)


class FakeMorpher:
    """A Morpher that only remembers whether the synced bytes are still what the target holds."""

    def __init__(self, world: World, *, changes_disks: bool = True) -> None:
        self.world = world
        self.changes_disks = changes_disks

    def prepare(self, plan: DomainPlan) -> None:
        self.world.call("morph.prepare", lambda: None, lost=TargetError)

    def morph(self, plan: DomainPlan) -> None:
        self.world.call("morph", lambda: setattr(self.world, "morphed", True), lost=TargetError)

    def undo(self) -> bool:
        self.world.call("morph.undo", lambda: setattr(self.world, "morphed", False), lost=TargetError)
        return True

    def release(self) -> None: ...

    def forget(self) -> None: ...


def fake_plan(world: World) -> DomainPlan:
    """The domain the fakes' migrations make."""
    disks = tuple(TargetDisk(f"/fake/target-{n}", block=False) for n in range(len(world.disks)))
    return DomainPlan(world.machine(), "guest", disks, {})
