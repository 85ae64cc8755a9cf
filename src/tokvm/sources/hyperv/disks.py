"""A frozen disk's bytes: the layers below what the VM writes, read over SFTP where they lie.

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
from collections.abc import Iterator

from tokvm.core.disk import Chunk, DiskReader
from tokvm.core.errors import ImageError, SourceError
from tokvm.core.extents import ExtentMap
from tokvm.core.machine import Disk, Snapshot
from tokvm.images.base import Layer, ReadAt
from tokvm.images.chain import Chain
from tokvm.images.open import open_image
from tokvm.images.reader import ChainReader
from tokvm.sources.hyperv import snapshots
from tokvm.sources.hyperv.files import Lanes, RemoteFile
from tokvm.sources.hyperv.machine import MERGING, RunningDisk, Stack
from tokvm.sources.hyperv.paths import same, sftp_path
from tokvm.sources.hyperv.powershell import Asking

LONG_PASS_S = 60.0
"""After a pass longer than this the host is asked for the chain again, too; the final delta is spared these seconds."""

SETTLE_S = 30.0  # a merge under way when a disk is opened is waited for so long
_FORMATS = {"VHD": "vhd", "VHDX": "vhdx"}


def open_disk(shell: Asking, lanes: Lanes, disk: Disk, at: Snapshot, since: Snapshot | None) -> DiskReader:
    paths = _Paths(shell, disk, at, since)
    wanted = paths.find()
    files: list[RemoteFile] = []
    try:
        layers: list[Layer] = []
        for path, kind in wanted.layers:
            file = lanes.open(sftp_path(path, where=shell.where), name=f"{shell.where} {path}")
            files.append(file)
            layers.append(open_image(file, expect=kind))
        chain = Chain.open(layers)
        if chain.partial != (since is not None):
            raise paths.error("the lowest layer is no base, or is one where a delta was expected", "see Get-VHD on the host")
        if wanted.below is not None:
            _check_lowest(shell, lanes, layers[0], wanted.below)
        return FrozenDisk(chain, files, paths, wanted)
    except BaseException:
        for file in files:
            file.close()
        raise


def _check_lowest(shell: Asking, lanes: Lanes, lowest: Layer, below: tuple[str, str]) -> None:
    """The delta must lie on what `since` froze, not on what somebody put there meanwhile."""
    path, kind = below
    file: ReadAt = lanes.open(sftp_path(path, where=shell.where), name=f"{shell.where} {path}")
    try:
        Chain.open([open_image(file, expect=kind), lowest])
    finally:
        file.close()


class _Wanted:
    """`layers`: (path, format), base first. `below`: what `since` froze; None for a base."""

    def __init__(self, layers: tuple[tuple[str, str], ...], below: tuple[str, str] | None) -> None:
        self.layers = layers
        self.below = below

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
        return _Wanted(tuple(reversed(layers)), below)

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


class FrozenDisk:
    """A ChainReader whose last word is whether what it read was frozen. Implements `core.disk.DiskReader`."""

    def __init__(self, chain: Chain, files: list[RemoteFile], paths: _Paths, wanted: _Wanted) -> None:
        self._reader = ChainReader(chain)
        self._files = files
        self._paths = paths
        self._wanted = wanted

    @property
    def size(self) -> int:
        return self._reader.size

    @property
    def fingerprint(self) -> str:
        return self._reader.fingerprint

    @property
    def total(self) -> int:
        return self._reader.total

    def covered(self) -> Iterator[ExtentMap]:
        return self._reader.covered()

    def chunks(self, position: int = 0) -> Iterator[Chunk]:
        begun = time.monotonic()
        try:
            yield from self._reader.chunks(position)
        except ImageError:
            self.verify_unchanged()  # torn structures of a file that is being merged are no damage
            raise
        self.verify_unchanged(ask_host=time.monotonic() - begun > LONG_PASS_S)

    def verify_unchanged(self, *, ask_host: bool = False) -> None:
        """SourceError when a layer was written to since it was opened, or the chain is another one now."""
        for file in self._files:
            if not file.is_unchanged():
                raise _changed(file.name)
        if ask_host and self._paths.find() != self._wanted:
            raise _changed(self._files[-1].name)

    def close(self) -> None:
        for file in self._files:
            file.close()


def _changed(name: str) -> SourceError:
    return SourceError(
        "the disk's layers changed while they were read: somebody removed a checkpoint, and the host merges it; what was "
        "copied of this pass does not count",
        where=name,
        fix="wait until Hyper-V Manager shows no merge, pause backup jobs, then run the same command again",
    )
