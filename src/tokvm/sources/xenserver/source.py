"""XenServer and XCP-ng as a Source, over SSH alone. Each method is one line to the module that answers its question."""

from __future__ import annotations

from tokvm.core.disk import DiskReader
from tokvm.core.errors import UsageError
from tokvm.core.machine import Disk, Finding, OffEvidence, PowerState, Snapshot, VirtualMachine
from tokvm.core.text import readable
from tokvm.sources.base import MachineSummary, only_one_called
from tokvm.sources.xenserver import check, claims, disks, fence, inventory, power, snapshots
from tokvm.sources.xenserver.xe import Host, Xe, is_uuid


class XenServerSource:
    """Implements `sources.base.Source`. Thread-safe, except that one disk's reader belongs to one thread."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._xe = Xe(host)
        self._own: set[str] = set()

    @property
    def url(self) -> str:
        return self._host.where.replace("ssh://", "xenserver://", 1)

    def fingerprint(self) -> str:
        """The host key(s) by which we know the host."""
        return self._host.fingerprint()

    def list_machines(self) -> list[MachineSummary]:
        return inventory.list_machines(self._xe)

    def find(self, name_or_uuid: str) -> str:
        machines = self.list_machines()
        if is_uuid(name_or_uuid.lower()) and any(machine.uuid == name_or_uuid.lower() for machine in machines):
            return name_or_uuid.lower()
        absent = "see `tokvm ls`; templates and snapshots do not count"
        return only_one_called(name_or_uuid, machines, where=self.url, absent=absent, several="name the VM by its uuid")

    def inspect(self, uuid: str) -> VirtualMachine:
        return inventory.inspect(self._xe, self._known(uuid))

    def check(self, vm: VirtualMachine, *, owner: str = "") -> list[Finding]:
        return check.findings(self._xe, vm, self._own | {owner})

    def claim(self, uuid: str, owner: str) -> str:
        holder = claims.claim(self._xe, self._known(uuid), owner)
        if holder == owner:
            self._own.add(owner)
        return holder

    def release(self, uuid: str, owner: str) -> None:
        claims.release(self._xe, self._known(uuid), owner)

    def snapshot(self, vm: VirtualMachine, mark: str) -> Snapshot:
        self._known(vm.uuid)
        return snapshots.take(self._xe, vm, mark)

    def snapshots(self, uuid: str, mark_prefix: str) -> list[Snapshot]:
        return snapshots.ours(self._xe, self._known(uuid), mark_prefix)

    def remove_snapshot(self, uuid: str, snapshot: Snapshot) -> None:
        snapshots.remove(self._xe, self._known(uuid), snapshot)

    def open_disk(self, disk: Disk, at: Snapshot, since: Snapshot | None) -> DiskReader:
        return disks.open_disk(self._host, disk, at, since)

    def power(self, uuid: str) -> PowerState:
        return power.power(self._xe, self._known(uuid))

    def shut_down(self, uuid: str, *, deadline_s: float, force: bool) -> None:
        power.shut_down(self._xe, self._known(uuid), deadline_s=deadline_s, force=force)

    def stop_pending(self, uuid: str) -> bool:
        return power.stop_pending(self._xe, self._known(uuid))

    def off_evidence(self, uuid: str) -> OffEvidence:
        return power.off_evidence(self._xe, self._known(uuid))

    def fence(self, uuid: str, reason: str) -> None:
        fence.fence(self._xe, self._known(uuid), reason)

    def is_fenced(self, uuid: str) -> bool:
        return fence.is_fenced(self._xe, self._known(uuid))

    def unfence(self, uuid: str) -> None:
        fence.unfence(self._xe, self._known(uuid))

    def start(self, uuid: str) -> None:
        power.start(self._xe, self._known(uuid))

    def close(self) -> None:
        self._host.close()

    def _known(self, uuid: str) -> str:
        """Only a uuid becomes part of a command."""
        if not is_uuid(uuid):
            raise UsageError(f"{readable(repr(uuid), limit=80)} is not a VM's uuid", where=self.url, fix="see `tokvm ls`")
        return uuid
