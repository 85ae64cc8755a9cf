"""Hyper-V as a Source, over SSH or over WinRM and SMB. Each method is one line to the module that answers its question."""

from __future__ import annotations

from typing import Protocol, cast, overload

from tokvm.core.disk import DiskReader
from tokvm.core.errors import SourceError, UsageError
from tokvm.core.machine import Disk, Finding, OffEvidence, PowerState, Snapshot, VirtualMachine
from tokvm.core.text import readable
from tokvm.sources.base import MachineSummary, only_one_called
from tokvm.sources.hyperv import check, claims, disks, fence, inventory, power, snapshots
from tokvm.sources.hyperv.answers import is_guid
from tokvm.sources.hyperv.files import Connecting, Lanes
from tokvm.sources.hyperv.frozen_file import Files
from tokvm.sources.hyperv.powershell import Asking, PowerShell
from tokvm.sources.hyperv.powershell import Host as Questioned

DEFAULT_USER = "Administrator"


class Reached(Questioned, Protocol):
    """A host whose PowerShell can be asked."""

    def fingerprint(self) -> str: ...

    def close(self) -> None: ...


class Host(Reached, Connecting, Protocol):
    """What is needed of `remote.ssh.SshHost`."""


class HyperVSource:
    """Implements `sources.base.Source`. Thread-safe, except that one disk's reader belongs to one thread.

    `shell`: who answers scripts, instead of the host's PowerShell. `files`: how its disks are read, instead of over SFTP.
    """

    @overload
    def __init__(self, host: Host, *, shell: Asking | None = None) -> None: ...

    @overload
    def __init__(self, host: Reached, *, shell: Asking | None = None, files: Files) -> None: ...

    def __init__(self, host: Reached, *, shell: Asking | None = None, files: Files | None = None) -> None:
        self._host = host
        self._powershell = PowerShell(host)
        self._shell: Asking = shell or self._powershell
        self._files: Files = files or Lanes(cast("Host", host))
        self._own: set[str] = set()

    @property
    def url(self) -> str:
        return self._host.where.replace("ssh://", "hyperv://", 1)

    def fingerprint(self) -> str:
        """The host key(s), or the certificate, by which we know the host."""
        return self._host.fingerprint()

    def list_machines(self) -> list[MachineSummary]:
        return inventory.list_machines(self._shell)

    def find(self, name_or_uuid: str) -> str:
        machines = self.list_machines()
        wanted = name_or_uuid.lower().strip("{}")
        if any(machine.uuid == wanted for machine in machines):
            return wanted
        absent = (
            "see `tokvm ls`; in a cluster, name the node that owns it, or move a VM whose migration was begun here "
            "back to this node, then run the same command again"
        )
        return only_one_called(name_or_uuid, machines, where=self.url, absent=absent, several="name the VM by its Id")

    def inspect(self, uuid: str) -> VirtualMachine:
        return inventory.inspect(self._shell, self._known(uuid))

    def check(self, vm: VirtualMachine, *, owner: str = "") -> list[Finding]:
        return check.findings(self._shell, vm, self._own | {owner}, unreachable=self._files.problem)

    def claim(self, uuid: str, owner: str) -> str:
        holder = claims.claim(self._shell, self._known(uuid), owner)
        if holder == owner:
            self._own.add(owner)
        return holder

    def release(self, uuid: str, owner: str) -> None:
        if claims.release(self._shell, self._known(uuid), owner):
            snapshots.put_back_if_last(self._shell, uuid)

    def snapshot(self, vm: VirtualMachine, mark: str) -> Snapshot:
        self._known(vm.uuid)
        return snapshots.take(self._shell, vm, mark)

    def snapshots(self, uuid: str, mark_prefix: str) -> list[Snapshot]:
        return snapshots.ours(self._shell, self._known(uuid), mark_prefix)

    def remove_snapshot(self, uuid: str, snapshot: Snapshot) -> None:
        """Waits for the merge too, so no disk of this source may be open: a merge waits for our handles."""
        if self._files.open_files:
            raise SourceError(
                f"{snapshot.mark} cannot be removed while disks are read", where=self.url, fix="close the readers first"
            )
        snapshots.remove(self._shell, self._known(uuid), snapshot)

    def open_disk(self, disk: Disk, at: Snapshot, since: Snapshot | None) -> DiskReader:
        return disks.open_disk(self._shell, self._files, disk, at, since)

    def power(self, uuid: str) -> PowerState:
        return power.power(self._shell, self._known(uuid))

    def shut_down(self, uuid: str, *, deadline_s: float, force: bool) -> None:
        power.shut_down(self._shell, self._known(uuid), deadline_s=deadline_s, force=force)

    def stop_pending(self, uuid: str) -> bool:
        return power.stop_pending(self._shell, self._known(uuid))

    def off_evidence(self, uuid: str) -> OffEvidence:
        return power.off_evidence(self._shell, self._known(uuid))

    def fence(self, uuid: str, reason: str) -> None:
        fence.fence(self._shell, self._known(uuid), reason)

    def is_fenced(self, uuid: str) -> bool:
        return fence.is_fenced(self._shell, self._known(uuid))

    def unfence(self, uuid: str) -> None:
        fence.unfence(self._shell, self._known(uuid))

    def start(self, uuid: str) -> None:
        power.start(self._shell, self._known(uuid))

    def close(self) -> None:
        self._files.close()
        self._powershell.close()
        self._host.close()

    def _known(self, uuid: str) -> str:
        """Only an Id as we wrote it ourselves names a VM below here."""
        if not is_guid(uuid):
            raise UsageError(f"{readable(repr(uuid), limit=80)} is not a VM's Id", where=self.url, fix="see `tokvm ls`")
        return uuid
