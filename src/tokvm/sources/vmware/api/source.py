"""vSphere as a Source: vCenter, or one ESXi, by the API. Each method is one line to the module that answers its question."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tokvm.core.disk import DiskReader
from tokvm.core.errors import ConnectionLost, SourceError, UsageError
from tokvm.core.machine import Disk, Finding, OffEvidence, PowerState, Snapshot, VirtualMachine
from tokvm.core.text import readable
from tokvm.sources.base import MachineSummary, NoLiveDelta, only_one_called
from tokvm.sources.lanes import Connecting, Lanes
from tokvm.sources.vmware.api import check, claims, disks, fence, inventory, nbd, power, properties, snapshots, stores, tracking
from tokvm.sources.vmware.api.channel import FileChannel
from tokvm.sources.vmware.api.client import Client
from tokvm.sources.vmware.api.datastores import beside, split_path
from tokvm.sources.vmware.api.folder import Folder
from tokvm.sources.vmware.api.inventory import Facts, Machines
from tokvm.sources.vmware.api.sftp import SftpFiles
from tokvm.sources.vmware.api.stores import Store
from tokvm.sources.vmware.api.web import Peer, Web
from tokvm.sources.vmware.layers import HABITS
from tokvm.sources.vmware.marks import is_uuid


class Host(Connecting, Protocol):
    """What is needed of `remote.ssh.SshHost`."""

    @property
    def where(self) -> str: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Bytes:
    """How disks are read, as the operator said. ssh: the ESXi host to read them from (`--bytes`); `{host}` in it is the one
    that runs the VM when it is asked. connect: reaches it. nbd: the template of `--nbd`. cbt: `--enable-cbt`."""

    ssh: str = ""
    connect: Callable[[str], Host] | None = None
    nbd: str = ""
    cbt: bool = False


class VsphereSource:
    """Implements `sources.base.Source`. Thread-safe, except that one disk's reader belongs to one thread."""

    def __init__(self, client: Client, how: Bytes | None = None) -> None:
        self._client = client
        self._machines = Machines(client)
        self._how = how or Bytes()
        if self._how.nbd:
            nbd.check_template(self._how.nbd)
        self._hosts: dict[str, tuple[Host, Lanes]] = {}
        self._web: Web | None = None
        self._datacenters: dict[str, str] = {}
        self._lock = threading.Lock()
        self._own: set[str] = set()
        ways = disks.Ways(self._channels, self._how.nbd, self._how.cbt)
        self._opener = disks.Opener(client, self._machines, ways)

    @property
    def url(self) -> str:
        return self._client.where

    def list_machines(self) -> list[MachineSummary]:
        return [MachineSummary(row.uuid, row.name, row.power) for row in self._machines.rows()]

    def find(self, name_or_uuid: str) -> str:
        machines = self.list_machines()
        wanted = name_or_uuid.lower()
        if any(machine.uuid == wanted for machine in machines):
            self._machines.ref(wanted)  # refuses when two have it
            return wanted
        return only_one_called(
            name_or_uuid,
            machines,
            where=self.url,
            absent=inventory.absent(self._client),
            several="name the VM by its uuid",
        )

    def inspect(self, uuid: str) -> VirtualMachine:
        return inventory.inspect(self._client, self._machines, self._known(uuid))

    def check(self, vm: VirtualMachine, *, owner: str = "") -> list[Finding]:
        means = check.Means(bool(self._how.ssh), bool(self._how.nbd), self._how.cbt)
        return check.findings(self._client, self._machines, vm, self._own | {owner}, means, self._beside)

    def claim(self, uuid: str, owner: str) -> str:
        holder = claims.claim(self._client, self._machines, self._known(uuid), owner)
        if holder == owner:
            self._own.add(owner)
        return holder

    def release(self, uuid: str, owner: str) -> None:
        if claims.release(self._client, self._machines, self._known(uuid), owner):
            tracking.put_back_if_last(self._client, self._machines, uuid)

    def snapshot(self, vm: VirtualMachine, mark: str) -> Snapshot:
        """NoLiveDelta, before one is made, when what it would freeze could not be read while the VM runs."""
        self._known(vm.uuid)
        self._refuse_useless(vm.uuid, mark)
        if self._how.cbt and not self.snapshots(vm.uuid, "tokvm-"):
            tracking.enable(self._client, self._machines, vm.uuid)
        return snapshots.take(self._client, self._machines, vm, mark)

    def snapshots(self, uuid: str, mark_prefix: str) -> list[Snapshot]:
        return snapshots.ours(self._client, self._machines, self._known(uuid), mark_prefix)

    def remove_snapshot(self, uuid: str, snapshot: Snapshot) -> None:
        snapshots.remove(self._client, self._machines, self._known(uuid), snapshot)
        tracking.put_back_if_last(self._client, self._machines, uuid)

    def open_disk(self, disk: Disk, at: Snapshot, since: Snapshot | None) -> DiskReader:
        return self._opener.open(disk, at, since)

    def power(self, uuid: str) -> PowerState:
        return power.power(self._machines, self._known(uuid))

    def shut_down(self, uuid: str, *, deadline_s: float, force: bool) -> None:
        power.shut_down(self._client, self._machines, self._known(uuid), deadline_s=deadline_s, force=force)

    def stop_pending(self, uuid: str) -> bool:
        return power.stop_pending(self._client, self._machines, self._known(uuid))

    def off_evidence(self, uuid: str) -> OffEvidence:
        return power.off_evidence(self._machines, self._known(uuid), self._held)

    def fence(self, uuid: str, reason: str) -> None:
        fence.fence(self._client, self._machines, self._known(uuid), reason)

    def is_fenced(self, uuid: str) -> bool:
        return fence.is_fenced(self._client, self._machines, self._known(uuid))

    def unfence(self, uuid: str) -> None:
        fence.unfence(self._client, self._machines, self._known(uuid))

    def start(self, uuid: str) -> None:
        power.start(self._client, self._machines, self._known(uuid))

    def close(self) -> None:
        if self._web is not None:
            self._web.close()
        for host, lanes in self._hosts.values():
            lanes.close()
            host.close()
        self._client.close()

    # ---- inside

    def _known(self, uuid: str) -> str:
        """Only a uuid as we wrote it ourselves names a VM below here."""
        if not is_uuid(uuid):
            raise UsageError(f"{readable(repr(uuid), limit=80)} is not a VM's uuid", where=self.url, fix="see `tokvm ls`")
        return uuid

    def _refuse_useless(self, uuid: str, mark: str) -> None:
        if power.power(self._machines, uuid) is PowerState.OFF:
            return
        prefix = mark.rpartition("-")[0].removesuffix("-final") + "-"
        before = [one for one in self.snapshots(uuid, prefix) if one.mark != mark]
        if not before:
            return
        why = self._opener.why_no_live_delta(self._machines.facts(uuid), before[-1])
        if why:
            raise NoLiveDelta(f"what changed cannot be read while the VM runs ({why})", where=f"{self.url} VM {uuid}")

    def _beside(self, facts: Facts, name: str) -> bytes:
        return self._folder(facts).read_text(beside(str(facts.config.files.vmPathName), name))

    def _channels(self, facts: Facts) -> list[FileChannel]:
        """The ways to the VM's files, best first. Where it is, is asked anew each time: it may have moved."""
        found: list[FileChannel] = []
        if self._how.ssh:
            found.append(self._sftp(facts))
        found.append(self._folder(facts))
        return found

    def _sftp(self, facts: Facts) -> SftpFiles:
        name = ""
        if "{host}" in self._how.ssh:
            name = str(properties.read_one(self._client, facts.runtime.host, ["name"]).need("name"))
        url = self._how.ssh.replace("{host}", name)
        with self._lock:
            if url not in self._hosts:
                if self._how.connect is None or not url.startswith("ssh://"):
                    raise UsageError(f"{url!r} is no host to read disks from", fix="write --bytes ssh://root@{host}")
                host = self._how.connect(url)
                self._hosts[url] = host, Lanes(host, HABITS)
            host, lanes = self._hosts[url]
        return SftpFiles(lanes, where=host.where, stores=self._stores(facts))

    def _stores(self, facts: Facts) -> Callable[[], dict[str, Store]]:
        """The VM's datastores, asked for once when somebody wants to know."""
        return functools.cache(lambda: stores.of_vm(self._client, facts.ref))

    def _folder(self, facts: Facts) -> Folder:
        place = self._client.place
        with self._lock:
            if self._web is None:
                self._web = Web(Peer(place.host, place.port, self._client.trust, self._client))
            web = self._web
        return Folder(
            web, datacenter=self._datacenter(facts.runtime.host), twice=self._client.is_vcenter, names=self._stores(facts)
        )

    def _datacenter(self, host: Any) -> str:
        """A host stays in its datacenter; a VM need not."""
        moid = str(host._GetMoId())
        if moid not in self._datacenters:
            self._datacenters[moid] = inventory.datacenter_path(self._client, host)
        return self._datacenters[moid]

    def _held(self, facts: Facts) -> list[str]:
        """Disks whose last file cannot be opened, in words. Where a disk is no file nobody can be asked."""
        places = stores.of_vm(self._client, facts.ref)
        channel = self._channels(facts)[0]
        found = []
        for disk in facts.disks:
            top = disk.layers[0] if disk.layers else ""
            store = places.get(split_path(top, lambda: places)[0]) if top else None
            if store is None or not store.has_files:
                continue
            try:
                disks.probe(channel, top)
            except ConnectionLost:
                raise
            except SourceError as refused:
                found.append(f"{top} ({refused.what})")
        return found
