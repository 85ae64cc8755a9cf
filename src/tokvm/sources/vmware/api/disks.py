"""A frozen disk's bytes, by the first way that has them: a ladder, each rung tried at the last sector of each file.

    1 --nbd      a server that the operator runs, and CBT's areas                      live: base and delta
    2 --bytes    the host's SFTP: flat base, seSparse, COWD                            live: base and delta
    3 /folder    the same files over HTTPS; locked on VMFS while the VM runs           live on NFS; off: everything
    4 lease      an export of the snapshot, in order, all of it                        live: base. No delta

    the VM writes   vm-000002.vmdk                      never opened
    snapshot 2      vm-000001.vmdk ┐ delta of 2 since 1      at = vm-000001, since = vm.vmdk: the layers above, up to it
    snapshot 1      vm.vmdk        ┘ base of 1

Which files these are is asked when the disk is opened; that each was made over the next says its descriptor. Where nothing but
the lease works while the VM runs, a delta is `NoLiveDelta`: it waits for the stop, after which rung 3 has the closed layers,
without a consolidation in the downtime.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokvm.core.disk import DiskReader
from tokvm.core.errors import ConnectionLost, HostKeyError, SourceError
from tokvm.core.machine import Disk, PowerState, Snapshot
from tokvm.images.base import Layer, ReadAt
from tokvm.images.chain import Chain
from tokvm.sources.base import NoLiveDelta
from tokvm.sources.frozen import FrozenDisk, FrozenFile
from tokvm.sources.vmware.api import cbt, lease, nbd, snapshots
from tokvm.sources.vmware.api.channel import FileChannel, Locked, open_layer
from tokvm.sources.vmware.api.client import Client
from tokvm.sources.vmware.api.inventory import Facts, Machines
from tokvm.sources.vmware.api.sftp import SftpFiles
from tokvm.sources.vmware.api.vmomi import vim
from tokvm.sources.vmware.api.which import Wanted, Which
from tokvm.sources.vmware.layers import HABITS

log = logging.getLogger(__name__)

LONG_PASS_S = 60.0
"""After a pass longer than this the server is asked for the chain again, too; the final delta is spared that second."""


@dataclass(frozen=True, slots=True)
class Ways:
    """What the operator allows. channels: the ways to files, best first, for a VM as it is. nbd: the template, or "".
    cbt: the areas in use are asked for, to read no more than them."""

    channels: Callable[[Facts], list[FileChannel]]
    nbd: str = ""
    cbt: bool = False


class Opener:
    """Opens one disk's frozen content. Thread-safe."""

    def __init__(self, client: Client, machines: Machines, ways: Ways) -> None:
        self._client = client
        self._machines = machines
        self._ways = ways
        self._which = Which(client, machines)

    def open(self, disk: Disk, at: Snapshot, since: Snapshot | None) -> DiskReader:
        uuid, _ = snapshots.ids_of(at, self._client.where)
        snapshots.await_tasks(self._client, self._machines, uuid)  # one that consolidates moves the files
        facts = self._machines.facts(uuid)
        wanted = self._which.find(facts, disk, at, since)
        refusals: list[tuple[str, SourceError]] = []
        for name, way in self._rungs(facts, disk, wanted):
            try:
                found = way()
            except SourceError as refused:
                _raise_unless_next(name, refused)
                refusals.append((name, refused))
                log.info("disk %d of VM %s cannot be read by %s: %s", disk.index, uuid, name, refused.what)
                continue
            log.info("disk %d of VM %s is read by %s", disk.index, uuid, name)
            return found
        raise self._no_way(facts, disk, since, refusals)

    def why_no_live_delta(self, facts: Facts, at: Snapshot) -> str:
        """Why the files that `at` froze cannot be read while the VM runs; "" when they can. Asked before a snapshot is made for
        nothing."""
        if self._ways.nbd:
            return ""
        refusals: list[tuple[str, SourceError]] = []
        for channel in self._ways.channels(facts):
            try:
                for path in at.disks.values():
                    probe(channel, path)
            except SourceError as refused:
                _raise_unless_next(channel.kind, refused)
                refusals.append((channel.kind, refused))
                continue
            return ""
        if not _only_locked(refusals):
            raise refusals[-1][1]
        return _told(refusals)

    # ---- the rungs

    def _rungs(self, facts: Facts, disk: Disk, wanted: Wanted) -> list[tuple[str, Callable[[], DiskReader]]]:
        if self._ways.nbd:
            return [("nbd", lambda: self._over_nbd(facts, disk, wanted))]
        rungs: list[tuple[str, Callable[[], DiskReader]]] = [
            (channel.kind, functools.partial(self._from_files, facts, disk, wanted, channel))
            for channel in self._ways.channels(facts)
        ]
        if wanted.since is None:
            rungs.append(("an export lease", lambda: self._by_lease(disk, wanted)))
        return rungs

    def _from_files(self, facts: Facts, disk: Disk, wanted: Wanted, channel: FileChannel) -> DiskReader:
        view = self._view(facts, wanted)
        layers, files = _open_layers(channel, wanted.layers, view)
        try:
            chain = Chain.open(layers)
            if chain.partial != (wanted.since is not None) or chain.size != wanted.at.size:
                raise self._error(disk, "its files are not what the server says of the disk", "see its chain on the datastore")
            if wanted.below:
                below, lower = _open_layers(channel, [wanted.below])
                try:
                    Chain.open([below[0], layers[0]])
                finally:
                    _close((below, lower))
            return FrozenDisk(chain, files, lambda: self._which.still(disk, wanted), changed=_changed, long_pass_s=LONG_PASS_S)
        except BaseException:
            _close((layers, files))
            raise

    def _view(self, facts: Facts, wanted: Wanted) -> Callable[[FrozenFile], ReadAt]:
        """Of a flat base, only the areas in use, where the operator trusts CBT with that. Below other people's snapshots all of
        it is read: nobody says whose areas these are then."""
        if not self._ways.cbt or wanted.since is not None or not wanted.at.change_id or len(wanted.layers) > 1:
            return lambda file: file
        areas = self._in_use(facts, wanted)
        size = wanted.at.size
        return lambda file: _InUse(file, areas) if areas is not None and file.size >= size else file

    def _over_nbd(self, facts: Facts, disk: Disk, wanted: Wanted) -> DiskReader:
        template, number = self._ways.nbd, str(wanted.at.number)
        uri = nbd.filled(template, uuid=wanted.uuid, snapshot=wanted.snapshot, number=number, index=str(disk.index))
        areas, since = self._areas(facts, wanted)
        file = nbd.NbdFile(nbd.socket_of(uri), f"{uri} ({wanted.at.layers[0] if wanted.at.layers else disk.key})")
        try:
            at = wanted.at.change_id or f"{wanted.uuid}/{wanted.snapshot}"
            layer = nbd.AreasLayer(file, areas, size=wanted.at.size, at=f"cbt-{at}", since=since and f"cbt-{since}")
            chain = Chain.open([layer])
            return FrozenDisk(chain, [file], lambda: self._which.still(disk, wanted), changed=_changed, long_pass_s=LONG_PASS_S)
        except BaseException:
            file.close()
            raise

    def _areas(self, facts: Facts, wanted: Wanted) -> tuple[cbt.Areas | None, str]:
        """What is to be read, and since which change id; everything where that is not known."""
        if wanted.since is None:
            return (self._in_use(facts, wanted) if self._ways.cbt and wanted.at.change_id else None), ""
        before, now = wanted.since.change_id, wanted.at.change_id
        if not cbt.same_tracking(before, now):
            log.warning("VM %s: changed blocks were not tracked since the last pass; all of the disk is read", wanted.uuid)
            return cbt.Areas.of(wanted.at.size, [(0, wanted.at.size)], where=self._client.where), before or "unknown"
        snapshot = self._client.ref(vim.vm.Snapshot, wanted.snapshot)
        return cbt.changed(self._client, facts.ref, snapshot, wanted.at.number, wanted.at.size, before), before

    def _in_use(self, facts: Facts, wanted: Wanted) -> cbt.Areas | None:
        snapshot = self._client.ref(vim.vm.Snapshot, wanted.snapshot)
        return cbt.in_use(self._client, facts.ref, snapshot, wanted.at.number, wanted.at.size)

    def _by_lease(self, disk: Disk, wanted: Wanted) -> DiskReader:
        name = f"{self._client.where} export of {disk.key}"
        snapshot: Any = self._client.ref(vim.vm.Snapshot, wanted.snapshot)
        return lease.open_lease(self._client, snapshot, wanted.at, name=name, expect_size=wanted.at.size)

    def _no_way(self, facts: Facts, disk: Disk, since: Snapshot | None, refusals: list[tuple[str, SourceError]]) -> SourceError:
        told = _told(refusals)
        where = f"{self._client.where} disk {disk.key}"
        if since is not None and facts.power is not PowerState.OFF and _only_locked(refusals):
            return NoLiveDelta(f"what changed cannot be read while the VM runs ({told})", where=where)
        return SourceError(
            f"it can be read in no way ({told})",
            where=where,
            fix="give --bytes ssh://root@HOST, the ESXi host that runs the VM; or --nbd; docs/vsphere-calls.md tells of each",
        )

    def _error(self, disk: Disk, what: str, fix: str) -> SourceError:
        return SourceError(what, where=f"{self._client.where} disk {disk.key}", fix=fix)


def _raise_unless_next(name: str, refused: SourceError) -> None:
    """The next rung is for files that are locked or missing here; not for a peer that is gone, or another one, nor for a host
    that the operator named and that will not have us."""
    if isinstance(refused, ConnectionLost | HostKeyError) or (name == SftpFiles.kind and not isinstance(refused, Locked)):
        raise refused


def _only_locked(refusals: list[tuple[str, SourceError]]) -> bool:
    """It will be better when the VM is off."""
    return bool(refusals) and all(isinstance(refused, Locked) for _, refused in refusals)


def _told(refusals: list[tuple[str, SourceError]]) -> str:
    return "; ".join(f"{name}: {refused.what}" for name, refused in refusals) or "there is no way to its files"


class _InUse:
    """A flat extent of which the areas in use are known; what is not in use reads as zeros, and is not read."""

    def __init__(self, file: FrozenFile, areas: cbt.Areas) -> None:
        self._file = file
        self.name = file.name
        self.size = file.size
        self.stamp = f"{file.stamp} in use {areas.digest}"  # which areas there are decides the order of reading
        self.data_ranges = areas.ranges

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._file.read_into(offset, buffer)

    def close(self) -> None:
        self._file.close()


def _open_layers(
    channel: FileChannel, paths: tuple[str, ...] | list[str], view: Callable[[FrozenFile], ReadAt] = lambda file: file
) -> tuple[list[Layer], list[FrozenFile]]:
    """The layers with these descriptors, base first, and their extent files. view: of the base's."""
    layers: list[Layer] = []
    files: list[FrozenFile] = []
    try:
        for index, path in enumerate(paths):
            layers.append(open_layer(channel, path, files, view if index == 0 else lambda file: file))
    except BaseException:
        _close((layers, files))
        raise
    return layers, files


def probe(channel: FileChannel, path: str) -> None:
    """That each file of this layer can be read, at its last sector."""
    _close(_open_layers(channel, [path]))


def _close(opened: tuple[list[Layer], list[FrozenFile]]) -> None:
    for file in opened[1]:
        file.close()


def _changed(name: str) -> SourceError:
    return SourceError(
        "the disk's layers changed while they were read: a snapshot was removed, or the VM reverted or moved; what was copied "
        "of this pass does not count",
        where=name,
        fix=HABITS.changed,
    )
