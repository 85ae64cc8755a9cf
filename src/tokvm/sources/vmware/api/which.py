"""Which files are one disk's frozen layers, asked anew each time: snapshots move them, and so do merges and reverts."""

from __future__ import annotations

from dataclasses import dataclass

from tokvm.core.errors import SourceError
from tokvm.core.machine import Disk, Snapshot
from tokvm.sources.vmware.api import snapshots
from tokvm.sources.vmware.api.client import Client
from tokvm.sources.vmware.api.inventory import Facts, Machines
from tokvm.sources.vmware.api.machine import VmDisk


@dataclass(frozen=True, slots=True)
class Wanted:
    """layers: descriptors, base first. below: what `since` froze; "" for a base. chain: from what `at` froze down to the base.
    at, since: the disk as it was then."""

    uuid: str
    layers: tuple[str, ...]
    below: str
    chain: tuple[str, ...]
    at: VmDisk
    since: VmDisk | None
    snapshot: str


class Which:
    """Asks the server. A snapshot's own settings need name the file that it froze alone, not those below it."""

    def __init__(self, client: Client, machines: Machines) -> None:
        self._client = client
        self._machines = machines

    def find(self, facts: Facts, disk: Disk, at: Snapshot, since: Snapshot | None) -> Wanted:
        running = facts.disk(disk.key)
        if running is None:
            raise self._error(disk, "the VM has no such disk any more", "a disk was moved or replaced; see `tokvm check`")
        frozen_at = self._frozen(facts, disk, running, at)
        frozen_since = None if since is None else self._frozen(facts, disk, running, since)
        top = running.depth_of(frozen_at.layers[0]) or 0
        end = len(running.layers) if frozen_since is None else running.depth_of(frozen_since.layers[0]) or 0
        if not 0 < top < end:
            raise self._error(
                disk, f"the snapshot {at.mark} is not younger than the one before it", "somebody reverted the VM; sync again"
            )
        uuid, moid = snapshots.ids_of(at, self._client.where)
        return Wanted(
            uuid=uuid,
            layers=tuple(reversed(running.layers[top:end])),
            below="" if frozen_since is None else frozen_since.layers[0],
            chain=running.layers[top:],
            at=frozen_at,
            since=frozen_since,
            snapshot=moid,
        )

    def _frozen(self, facts: Facts, disk: Disk, running: VmDisk, snapshot: Snapshot) -> VmDisk:
        _, moid = snapshots.ids_of(snapshot, self._client.where)
        there = next((one for one in facts.snapshots if one.moid == moid), None)
        found = None
        if there is not None and there.name == snapshot.mark:
            found = snapshots.frozen_disk(self._client, snapshot, running.number)
        if found is None:
            raise self._error(disk, f"the snapshot {snapshot.mark} is gone", "run the same command again; it takes a new one")
        if not found.layers or running.depth_of(found.layers[0]) in (None, 0):
            raise self._error(
                disk,
                f"the snapshot {snapshot.mark} holds no frozen image that the VM still builds upon",
                "a disk was added, or somebody reverted the VM; run the same command again for a new snapshot",
            )
        return found

    def still(self, disk: Disk, wanted: Wanted) -> bool:
        """Nothing was merged meanwhile: the snapshot is there, over the same files; asked when no such task is at work."""
        snapshots.await_tasks(self._client, self._machines, wanted.uuid)
        facts = self._machines.facts(wanted.uuid)
        at = Snapshot(snapshots.key_of(wanted.uuid, wanted.snapshot), "", {})
        running, found = facts.disk(disk.key), snapshots.frozen_disk(self._client, at, wanted.at.number)
        if running is None or found is None:
            return False
        top = running.depth_of(wanted.chain[0])
        return bool(top) and running.layers[top:] == wanted.chain and found.layers[:1] == wanted.chain[:1]

    def _error(self, disk: Disk, what: str, fix: str) -> SourceError:
        return SourceError(what, where=f"{self._client.where} disk {disk.key}", fix=fix)
