"""The door of a source hypervisor. Every answer is read from the hypervisor when asked, never remembered.

All methods may raise SourceError (refused, not understood) or ConnectionLost (try again later). VMs are named by their
uuid everywhere below `find`, because names are any text and need not be unique.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from tokvm.core.disk import DiskReader
from tokvm.core.errors import SourceError, UsageError
from tokvm.core.machine import Disk, Finding, OffEvidence, PowerState, Snapshot, VirtualMachine
from tokvm.core.text import readable


class NoLiveDelta(SourceError):
    """What changed since the base can be read only when the VM is off, so the last delta waits for the stop. From `snapshot`
    it means that none was made."""

    meaning: ClassVar[str] = "this source gives no delta of a VM that runs; what changed is copied when it is stopped"


@dataclass(frozen=True, slots=True)
class MachineSummary:
    """A row of `tokvm ls`."""

    uuid: str
    name: str
    power: PowerState


def only_one_called(name: str, machines: Sequence[MachineSummary], *, where: str, absent: str, several: str) -> str:
    """Its uuid. UsageError, with what to do in `absent` or `several`, when there is none or when the name is not unique."""
    found = [machine for machine in machines if machine.name == name]
    if not found:
        raise UsageError(f"there is no VM {name!r}", where=where, fix=absent)
    if len(found) > 1:
        listed = ", ".join(f"{machine.uuid} ({machine.power})" for machine in found)
        raise UsageError(f"{len(found)} VMs are called {readable(name)!r}: {listed}", where=where, fix=several)
    return found[0].uuid


@runtime_checkable
class Source(Protocol):
    """A place VMs come from."""

    @property
    def url(self) -> str:
        """What the operator typed to reach it, without secrets."""
        ...

    def list_machines(self) -> list[MachineSummary]: ...

    def find(self, name_or_uuid: str) -> str:
        """The uuid of the VM. UsageError when there is none or when the name is not unique (the message lists uuids)."""
        ...

    def inspect(self, uuid: str) -> VirtualMachine: ...

    def check(self, vm: VirtualMachine, *, owner: str = "") -> list[Finding]:
        """Every blocker and warning, before the first byte is copied. A claim by `owner` is none."""
        ...

    def claim(self, uuid: str, owner: str) -> str:
        """Mark the VM as ours if nobody did (compare, write, read back); returns the owner that holds it now."""
        ...

    def release(self, uuid: str, owner: str) -> None:
        """Take our own mark away; another's stays."""
        ...

    def snapshot(self, vm: VirtualMachine, mark: str) -> Snapshot:
        """Freeze all disks at one moment. `mark` is unique: called again with the same mark after a lost reply, it returns the
        snapshot that was made rather than a second one."""
        ...

    def snapshots(self, uuid: str, mark_prefix: str) -> list[Snapshot]:
        """The snapshots whose mark begins with our prefix, oldest first. Other people's are never listed."""
        ...

    def remove_snapshot(self, uuid: str, snapshot: Snapshot) -> None:
        """Remove one snapshot that we made, with its disks; already gone is success. Waits while it is in use."""
        ...

    def open_disk(self, disk: Disk, at: Snapshot, since: Snapshot | None) -> DiskReader:
        """The disk's bytes as frozen in `at`: all of it, or only what changed since the snapshot `since`."""
        ...

    def power(self, uuid: str) -> PowerState: ...

    def shut_down(self, uuid: str, *, deadline_s: float, force: bool) -> None:
        """Ask the guest to stop; at the deadline cut its power if `force`, else NotOff. Already off is success."""
        ...

    def stop_pending(self, uuid: str) -> bool:
        """True while a power-off that was asked for may still land (the hypervisor has the operation in hand)."""
        ...

    def off_evidence(self, uuid: str) -> OffEvidence:
        """What two independent witnesses say now."""
        ...

    def fence(self, uuid: str, reason: str) -> None:
        """Nobody can start the VM any more (HA, a person, auto-start), or SourceError. Read back. Idempotent; what it changes
        is saved on the hypervisor so that `unfence` can restore it after any crash."""
        ...

    def is_fenced(self, uuid: str) -> bool: ...

    def unfence(self, uuid: str) -> None:
        """Back to what it was before `fence`. Idempotent."""
        ...

    def start(self, uuid: str) -> None:
        """Start the VM; already running is success."""
        ...

    def close(self) -> None: ...
