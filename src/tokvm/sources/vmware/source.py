"""ESXi as a Source, over SSH alone. Each method is one line to the module that answers its question."""

from __future__ import annotations

from tokvm.core.disk import DiskReader
from tokvm.core.errors import SourceError, UsageError
from tokvm.core.machine import Disk, Finding, OffEvidence, PowerState, Snapshot, VirtualMachine
from tokvm.core.text import readable
from tokvm.sources.base import MachineSummary
from tokvm.sources.lanes import Lanes
from tokvm.sources.vmware import check, claims, fence, inventory, power, snapshots
from tokvm.sources.vmware.clones import Clones
from tokvm.sources.vmware.disks import Disks
from tokvm.sources.vmware.layers import HABITS
from tokvm.sources.vmware.machines import Machines
from tokvm.sources.vmware.marks import is_uuid
from tokvm.sources.vmware.shell import Host, Shell


class EsxSource:
    """Implements `sources.base.Source`. Thread-safe, except that one disk's reader belongs to one thread.

    clone_base: a base that is locked may be cloned on the host first.
    """

    def __init__(self, host: Host, *, clone_base: bool = False) -> None:
        self._host = host
        self._shell = Shell(host)
        self._machines = Machines(self._shell)
        self._lanes = Lanes(host, HABITS)
        self._clones = Clones(self._machines, self._shell, self._lanes, allowed=clone_base)
        self._disks = Disks(self._machines, self._shell, self._lanes, self._clones)
        self._own: set[str] = set()

    @property
    def url(self) -> str:
        return self._host.where.replace("ssh://", "esx://", 1)

    def fingerprint(self) -> str:
        """The host key(s) by which we know the host."""
        return self._host.fingerprint()

    def list_machines(self) -> list[MachineSummary]:
        return inventory.list_machines(self._machines)

    def find(self, name_or_uuid: str) -> str:
        machines = self.list_machines()
        found = [machine for machine in machines if machine.uuid == name_or_uuid.lower()]
        found = found or [machine for machine in machines if machine.name == name_or_uuid]
        if not found:
            raise UsageError(
                f"there is no VM {readable(repr(name_or_uuid))}",
                where=self.url,
                fix="see `tokvm ls`; in a cluster, name the host that runs it; templates do not count",
            )
        if len(found) > 1:
            listed = ", ".join(f"{machine.uuid} ({readable(machine.name)}, {machine.power})" for machine in found)
            raise UsageError(
                f"{len(found)} VMs are called {readable(name_or_uuid)!r}: {listed}",
                where=self.url,
                fix="name the VM by its uuid; when that is the same, too, one is a copy: change uuid.bios in its .vmx",
            )
        return found[0].uuid

    def inspect(self, uuid: str) -> VirtualMachine:
        return inventory.inspect(self._machines, self._known(uuid))

    def check(self, vm: VirtualMachine, *, owner: str = "") -> list[Finding]:
        return check.findings(self._machines, self._shell, vm, self._own | {owner})

    def claim(self, uuid: str, owner: str) -> str:
        holder = claims.claim(self._machines, self._shell, self._known(uuid), owner)
        if holder == owner:
            self._own.add(owner)
        return holder

    def release(self, uuid: str, owner: str) -> None:
        if claims.release(self._machines, self._shell, self._known(uuid), owner):
            self._clones.remove(uuid, None)

    def snapshot(self, vm: VirtualMachine, mark: str) -> Snapshot:
        self._known(vm.uuid)
        return snapshots.take(self._machines, self._shell, vm, mark)

    def snapshots(self, uuid: str, mark_prefix: str) -> list[Snapshot]:
        return snapshots.ours(self._machines, self._shell, self._known(uuid), mark_prefix)

    def remove_snapshot(self, uuid: str, snapshot: Snapshot) -> None:
        """Waits for the consolidation too, so no disk of this source may be open: an open file stops it."""
        if self._lanes.open_files:
            raise SourceError(
                f"{snapshot.mark} cannot be removed while disks are read", where=self.url, fix="close the readers first"
            )
        snapshots.remove(self._machines, self._shell, self._known(uuid), snapshot)
        self._clones.remove(uuid, snapshot.mark)

    def open_disk(self, disk: Disk, at: Snapshot, since: Snapshot | None) -> DiskReader:
        return self._disks.open(disk, at, since)

    def power(self, uuid: str) -> PowerState:
        return power.power(self._machines, self._known(uuid))

    def shut_down(self, uuid: str, *, deadline_s: float, force: bool) -> None:
        power.shut_down(self._machines, self._shell, self._known(uuid), deadline_s=deadline_s, force=force)

    def stop_pending(self, uuid: str) -> bool:
        return power.stop_pending(self._machines, self._shell, self._known(uuid))

    def off_evidence(self, uuid: str) -> OffEvidence:
        return power.off_evidence(self._machines, self._shell, self._lanes, self._known(uuid))

    def fence(self, uuid: str, reason: str) -> None:
        fence.fence(self._machines, self._shell, self._known(uuid), reason)

    def is_fenced(self, uuid: str) -> bool:
        return fence.is_fenced(self._machines, self._shell, self._known(uuid))

    def unfence(self, uuid: str) -> None:
        fence.unfence(self._machines, self._shell, self._known(uuid))

    def start(self, uuid: str) -> None:
        power.start(self._machines, self._shell, self._known(uuid))

    def close(self) -> None:
        self._lanes.close()
        self._host.close()

    def _known(self, uuid: str) -> str:
        """Only a uuid names a VM below here."""
        if not is_uuid(uuid):
            raise UsageError(f"{readable(repr(uuid), limit=80)} is not a VM's uuid", where=self.url, fix="see `tokvm ls`")
        return uuid
