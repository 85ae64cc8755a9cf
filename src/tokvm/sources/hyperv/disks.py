"""A frozen disk's bytes: the layers below what the VM writes, read where they lie, over SFTP or SMB.

    the VM writes   d_C.avhdx                          never opened
    checkpoint 2    d_B.avhdx ┐ delta of 2 since 1      at = d_B, since = d_A: the layers above d_A, up to d_B
    checkpoint 1    d_A.avhdx ┘ base of 1: d_A, d.vhdx
    base            d.vhdx

Which files these are is asked when the disk is opened (a merge moves them), and `Chain.open` checks by DataWriteGuid that each
was made over the next. A merge that begins while we read (somebody deletes a checkpoint) rewrites layers in place. So at the
end of a pass each layer's headers are read again, before the pass may count: who opens a VHDX for writing changes one first.
"""

from __future__ import annotations

import time

from tokvm.core.disk import DiskReader
from tokvm.core.errors import SourceError
from tokvm.core.machine import Disk, Snapshot
from tokvm.images.base import Layer, ReadAt
from tokvm.images.chain import Chain
from tokvm.images.open import open_image
from tokvm.sources.frozen import FrozenDisk, FrozenFile
from tokvm.sources.hyperv import snapshots
from tokvm.sources.hyperv.frozen_file import Files
from tokvm.sources.hyperv.machine import MERGING, RunningDisk, Stack
from tokvm.sources.hyperv.paths import same
from tokvm.sources.hyperv.powershell import Asking

LONG_PASS_S = 60.0
"""After a pass longer than this the host is asked for the chain again, too; the final delta is spared these seconds."""

SETTLE_S = 30.0  # a merge under way when a disk is opened is waited for so long
_FORMATS = {"VHD": "vhd", "VHDX": "vhdx"}


def open_disk(shell: Asking, files: Files, disk: Disk, at: Snapshot, since: Snapshot | None) -> DiskReader:
    paths = _Paths(shell, disk, at, since)
    wanted = paths.find()
    opened: list[FrozenFile] = []
    try:
        layers: list[Layer] = []
        for path, kind in wanted.layers:
            file = files.open_layer(path, drive=wanted.drive, where=shell.where)
            opened.append(file)
            layers.append(open_image(file, expect=kind))
        chain = Chain.open(layers)
        if chain.partial != (since is not None):
            raise paths.error("the lowest layer is no base, or is one where a delta was expected", "see Get-VHD on the host")
        if wanted.below is not None:
            _check_lowest(files, layers[0], wanted.below, drive=wanted.drive, where=shell.where)
        return FrozenDisk(chain, opened, lambda: paths.find() == wanted, changed=_changed, long_pass_s=LONG_PASS_S)
    except BaseException:
        for file in opened:
            file.close()
        raise


def _check_lowest(files: Files, lowest: Layer, below: tuple[str, str], *, drive: str, where: str) -> None:
    """The delta must lie on what `since` froze, not on what somebody put there meanwhile."""
    path, kind = below
    file: ReadAt = files.open_layer(path, drive=drive, where=where)
    try:
        Chain.open([open_image(file, expect=kind), lowest])
    finally:
        file.close()


class _Wanted:
    """`layers`: (path, format), base first. `below`: what `since` froze; None for a base. `drive`: the VM's setting."""

    def __init__(self, layers: tuple[tuple[str, str], ...], below: tuple[str, str] | None, drive: str) -> None:
        self.layers = layers
        self.below = below
        self.drive = drive

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Wanted):
            return NotImplemented
        return [same(path) for path, _ in self.layers] == [same(path) for path, _ in other.layers]

    __hash__ = None  # type: ignore[assignment]


class _Paths:
    """Where one disk's frozen layers lie; asked of the host each time."""

    def __init__(self, shell: Asking, disk: Disk, at: Snapshot, since: Snapshot | None) -> None:
        self._shell = shell
        self._disk = disk
        self._at = at
        self._since = since

    def find(self) -> _Wanted:
        found = self._settled()
        running = found.disk(self._disk.key)
        if running is None:
            raise self.error("the VM has no such disk any more", "a disk was moved or replaced; see `tokvm check`")
        top = self._depth(found, running, self._at)
        end = len(running.layers) if self._since is None else self._depth(found, running, self._since)
        if not 0 < top < end:
            what = (
                "its frozen file is the one that the VM writes now" if top == 0 else "it is not younger than the one before it"
            )
            raise self.error(f"the snapshot {self._at.mark} is of no use: {what}", "a checkpoint was applied on the host")
        layers = [(one.path, self._format(one.format)) for one in running.layers[top : end + 1]]
        below = None if self._since is None else layers.pop()
        return _Wanted(tuple(reversed(layers)), below, running.path)

    def _settled(self) -> Stack:
        """The VM's files while no merge is at work on them."""
        vm, _ = snapshots.ids_of(self._at, self._shell.where)
        deadline = time.monotonic() + SETTLE_S
        while True:
            found = snapshots.stack(self._shell, vm)
            if MERGING not in found.operational:
                return found
            if time.monotonic() > deadline:
                raise self.error("the host is merging the VM's disks", "wait until Hyper-V Manager shows no merge, then again")
            time.sleep(snapshots.POLL_S)

    def _depth(self, found: Stack, running: RunningDisk, snapshot: Snapshot) -> int:
        _, wanted = snapshots.ids_of(snapshot, self._shell.where)
        checkpoint = found.checkpoint(wanted)
        if checkpoint is None or checkpoint.name != snapshot.mark:
            raise self.error(f"the snapshot {snapshot.mark} is gone", "run the same command again; it takes a new one")
        path = checkpoint.frozen.get(running.slot)
        depth = None if path is None else running.depth_of(path)
        if depth is None:
            raise self.error(
                f"the snapshot {snapshot.mark} holds no frozen image of disk {self._disk.index} that the VM still builds upon",
                "a disk was added, or a checkpoint was applied on the host; run the same command again for a new snapshot",
            )
        return depth

    def _format(self, said: str) -> str:
        if said not in _FORMATS:
            raise self.error(f"a layer of disk {self._disk.index} is a {said}", "only VHD and VHDX files are read")
        return _FORMATS[said]

    def error(self, what: str, fix: str) -> SourceError:
        return SourceError(what, where=f"{self._shell.where} disk {self._disk.key}", fix=fix)


def _changed(name: str) -> SourceError:
    return SourceError(
        "the disk's layers changed while they were read: somebody removed a checkpoint, and the host merges it; what was "
        "copied of this pass does not count",
        where=name,
        fix="wait until Hyper-V Manager shows no merge, pause backup jobs, then run the same command again",
    )
