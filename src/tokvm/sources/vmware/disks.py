"""A frozen disk's bytes: the layers below what the VM writes, read over SFTP where they lie.

    the VM writes   web-000003.vmdk                       never opened
    snapshot 2      web-000002.vmdk ┐ delta of 2 since 1   at = 000002, since = 000001: the layers above 000001, up to 000002
    snapshot 1      web-000001.vmdk ┘ base of 1: web-000001, web
    base            web.vmdk

Which files these are is asked when the disk is opened: a consolidation moves them. One that begins while we read is noticed at
the end of the pass (`sources.frozen`). A base that stays locked although there is a snapshot above it (ESXi 7.0U1c, ghettoVCB
226) cannot be read while the VM runs: it is refused, or cloned on the host when the operator said so.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from tokvm.core.disk import DiskReader
from tokvm.core.errors import ImageError, SourceError
from tokvm.core.machine import Disk, Snapshot
from tokvm.core.text import readable
from tokvm.images.base import Layer
from tokvm.images.chain import Chain
from tokvm.sources.frozen import FrozenDisk
from tokvm.sources.lanes import Lanes
from tokvm.sources.vmware import snapshots
from tokvm.sources.vmware.clones import Clones
from tokvm.sources.vmware.faults import EsxError, Fault
from tokvm.sources.vmware.layers import Layers, whole
from tokvm.sources.vmware.machines import Machines
from tokvm.sources.vmware.marks import ids_of
from tokvm.sources.vmware.shell import Shell
from tokvm.sources.vmware.snapshots import Stack

LONG_PASS_S = 60.0
"""After a pass longer than this the host is asked for the chain again, too; the final delta is spared these seconds."""

SETTLE_S = 60.0  # a consolidation under way when a disk is opened is waited for so long


@dataclass(frozen=True, slots=True)
class Wanted:
    """paths: base first. below: what `since` froze; None for a base."""

    paths: tuple[str, ...]
    below: str | None


class Disks:
    """Opens disks of one host."""

    def __init__(self, machines: Machines, shell: Shell, lanes: Lanes, clones: Clones) -> None:
        self._machines = machines
        self._shell = shell
        self._lanes = lanes
        self._clones = clones

    def open(self, disk: Disk, at: Snapshot, since: Snapshot | None) -> DiskReader:
        which = _Which(self._machines, self._shell, disk, at, since)
        found, wanted = which.find()
        layers = Layers(self._shell, self._lanes, found.inside.stores)
        try:
            chain = whole(Chain.open(layers.open_all(wanted.paths, wanted.below)), disk)
            if chain.partial != (since is not None):
                raise which.error(
                    "the lowest layer is no base, or is one where a delta was expected", "see the VM's descriptors"
                )
            if wanted.below is not None:
                _check_lowest(layers, chain.layers[0], wanted.below)
            return FrozenDisk(chain, layers.files, lambda: which.find()[1] == wanted, changed=_changed, long_pass_s=LONG_PASS_S)
        except EsxError as refused:
            layers.close()
            if refused.fault is not Fault.LOCKED:
                raise
            return self._around_lock(found, disk, at, since, wanted, refused)
        except BaseException:
            layers.close()
            raise

    def _around_lock(
        self, found: Stack, disk: Disk, at: Snapshot, since: Snapshot | None, wanted: Wanted, refused: EsxError
    ) -> DiskReader:
        """The next rung of the ladder, or a refusal that says which there are."""
        if since is None and self._clones.allowed:
            return self._clones.open(found, disk, at, wanted.paths[-1])
        what = "a base that a snapshot froze" if since is None else "a layer that a snapshot froze"
        fix = (
            "give --clone-base, and the host copies the disk to the same datastore first (it needs the room); or use vpx:// "
            "(vSphere's API reads by export lease); or shut the VM down and migrate it cold"
            if since is None
            else "see who holds it: a backup, a copy. Some builds keep frozen layers locked (ESXi 7.0U1c; fixed in 7.0U1d): "
            "update the host, or migrate the VM while it is off"
        )
        raise EsxError(
            f"{what} is {refused.what.removeprefix('it is ')}", where=refused.where, fix=fix, fault=Fault.LOCKED
        ) from refused


def _check_lowest(layers: Layers, lowest: Layer, below: str) -> None:
    """The delta must lie on what `since` froze, not on what somebody put there meanwhile. Its descriptor says which that is;
    its extents may be locked."""
    parent = layers.descriptor(below)
    if not set(lowest.linkage.parents) & set(parent.linkage.ids) or lowest.size < parent.size:
        raise ImageError(
            f"it was made over {' or '.join(lowest.linkage.parents)} of {parent.size} bytes or less, but {readable(below)} is "
            f"{' and '.join(parent.linkage.ids)} of {parent.size}",
            where=lowest.name,
            fix="a layer was replaced on the host; finish this migration and begin another",
        )


class _Which:
    """Where one disk's frozen layers lie; asked of the host each time."""

    def __init__(self, machines: Machines, shell: Shell, disk: Disk, at: Snapshot, since: Snapshot | None) -> None:
        self._machines = machines
        self._shell = shell
        self._disk = disk
        self._at = at
        self._since = since

    def find(self) -> tuple[Stack, Wanted]:
        found = self._settled()
        chain = found.chain(self._disk.key)
        if not chain:
            raise self.error("the VM has no such disk any more", "a disk was moved or replaced; see `tokvm check`")
        top = self._depth(found, chain, self._at)
        end = len(chain) if self._since is None else self._depth(found, chain, self._since)
        if not 0 < top < end:
            what = (
                "its frozen file is the one that the VM writes now" if top == 0 else "it is not younger than the one before it"
            )
            raise self.error(f"the snapshot {self._at.mark} is of no use: {what}", "a snapshot was reverted to on the host")
        below = None if self._since is None else chain[end]
        return found, Wanted(tuple(reversed(chain[top:end])), below)

    def _settled(self) -> Stack:
        """The VM's files while no task changes them."""
        vm, _ = ids_of(self._at, self._shell.where)
        deadline = time.monotonic() + SETTLE_S
        while True:
            found = snapshots.stack(self._machines, self._shell, vm)
            if not found.tasks:
                return found
            if time.monotonic() > deadline:
                raise self.error(
                    f"a task of the host changes the VM's disks ({readable(found.tasks[0])})",
                    "wait until it is over, then again",
                )
            time.sleep(snapshots.POLL_S)

    def _depth(self, found: Stack, chain: tuple[str, ...], snapshot: Snapshot) -> int:
        _, uid = ids_of(snapshot, self._shell.where)
        entry = found.entry(uid)
        if entry is None or entry.name != snapshot.mark:
            raise self.error(f"the snapshot {snapshot.mark} is gone", "run the same command again; it takes a new one")
        path = found.frozen(entry).get(self._disk.device)
        if path is None or path not in chain:
            raise self.error(
                f"the snapshot {snapshot.mark} holds no frozen image of disk {self._disk.index} that the VM still builds upon",
                "a disk was added, or a snapshot was reverted to; run the same command again for a new snapshot",
            )
        return chain.index(path)

    def error(self, what: str, fix: str) -> SourceError:
        return SourceError(what, where=f"{self._shell.where} disk {self._disk.key}", fix=fix)


def _changed(name: str) -> SourceError:
    return SourceError(
        "the disk's layers changed while they were read: somebody removed a snapshot, and the host consolidates it, or moved "
        "the VM; what was copied of this pass does not count",
        where=name,
        fix="wait until the VM's tasks are over, pause backup jobs and DRS, then run the same command again",
    )
