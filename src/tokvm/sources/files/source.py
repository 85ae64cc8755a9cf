r"""Image files that are already here, as a Source without power control: the workflow of copying frozen layers by hand.

    1. on the hypervisor: take a snapshot, copy the frozen base here        files:web-0.vhd
       tokvm sync …   copies the base to the target
    2. take another snapshot, copy the layer that froze                    files:web-0.vhd,web-1.vhd
       tokvm sync …   copies what web-1 says, and nothing else
    3. shut the VM down, copy the last layer                               files:web-0.vhd,web-1.vhd,web-2.vhd
       tokvm sync …   the final delta; then start the target by hand

The whole chain is listed every time, base first. Exactly these paths are opened (and a VMDK descriptor's own extent files):
where an image says that its parent lies is never followed. A disk is known by the id of its lowest layer (VHD: the footer's
unique id; VHDX: the DataWriteGuid; VMDK: CID and file name). A "snapshot" is a mark on the layer that was the top at that time
(`marks.py`), so a delta is the layers above the one that was copied last. Nobody can stop, fence or start a VM that is not
known here: those methods refuse. `tokvm image convert` and `apply` do the same without a journal.
"""

from __future__ import annotations

import uuid as uuids
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokvm.core.disk import Chunk, DiskReader
from tokvm.core.errors import SourceError, UsageError
from tokvm.core.extents import ExtentMap
from tokvm.core.machine import Disk, Finding, OffEvidence, PowerState, Severity, Snapshot, VirtualMachine
from tokvm.core.units import GiB
from tokvm.images.base import Layer
from tokvm.images.chain import Chain
from tokvm.images.listed import open_layers
from tokvm.images.reader import ChainReader
from tokvm.sources.base import MachineSummary
from tokvm.sources.files import marks

# A VM's uuid must be the same each time: made from the ids of its disks.
_NAMESPACE = uuids.UUID("6f0d1b34-4c5e-5a2f-9c53-6b1f6f2f6a10")


class FilesSource:
    """One VM of one or more disks; each disk is a chain of files, base first. Implements `sources.base.Source`."""

    def __init__(self, disks: Sequence[Sequence[str | Path]]) -> None:
        if not disks or any(not chain or any(str(path) == "" for path in chain) for chain in disks):
            raise UsageError("no image files are given", fix="write files:BASE.vhd,CHILD.vhd: the whole chain, base first")
        self._disks = tuple(tuple(Path(path) for path in chain) for chain in disks)
        self._taken: dict[str, Snapshot] = {}

    @classmethod
    def from_paths(cls, paths: Sequence[str]) -> FilesSource:
        """One disk: its base, then its children."""
        return cls([paths])

    @property
    def url(self) -> str:
        return "files:" + ",".join(str(path) for chain in self._disks for path in chain)

    @property
    def name(self) -> str:
        """The VM is called like the first disk's base."""
        return self._disks[0][0].stem

    def list_machines(self) -> list[MachineSummary]:
        vm = self._look()
        return [MachineSummary(vm.uuid, vm.name, vm.power)]

    def find(self, name_or_uuid: str) -> str:
        vm = self._look()
        if name_or_uuid not in (vm.uuid, vm.name):
            raise UsageError(
                f"these files are the VM {vm.name!r}, not {name_or_uuid!r}", where=self.url, fix=f"name it {vm.name}"
            )
        return vm.uuid

    def inspect(self, uuid: str) -> VirtualMachine:
        vm = self._look()
        if uuid != vm.uuid:
            raise SourceError(
                f"these files are another VM ({vm.uuid}) than {uuid}",
                where=self.url,
                fix="list the same base files again, in the same order, with the new layers behind each",
            )
        return vm

    def check(self, vm: VirtualMachine, *, owner: str = "") -> list[Finding]:
        found = [
            Finding(
                Severity.WARNING,
                "there is no VM behind image files: tokvm cannot stop, fence or start it, so there is no cutover",
                "use sync; stop the VM yourself before you copy its last layer, and start the target yourself",
                self.url,
            )
        ]
        for disk, paths in zip(vm.disks, self._disks, strict=True):
            with _Opened(paths) as chain:
                if chain.partial:
                    what = f"its lowest layer was made over {chain.parent_identity}, which is not listed"
                    found.append(Finding(Severity.BLOCKER, what, "list the whole chain, base first", f"disk {disk.index}"))
        return found

    def claim(self, uuid: str, owner: str) -> str:
        """Files have no place for a mark; the journal's and the target's locks keep others out."""
        self.inspect(uuid)
        return owner

    def release(self, uuid: str, owner: str) -> None:
        """Nothing was marked."""

    def snapshot(self, vm: VirtualMachine, mark: str) -> Snapshot:
        """The files as they are listed are frozen already: the mark goes to their top layers, unless it is there."""
        now = self._look()
        if [disk.key for disk in now.disks] != [disk.key for disk in vm.disks]:
            raise SourceError("the files are other disks than before", where=self.url, fix="list the same base files again")
        made = {disk.key: self._mark(paths, disk.key, mark) for disk, paths in zip(now.disks, self._disks, strict=True)}
        return self._taken.setdefault(mark, Snapshot(f"files:{mark}", mark, made))

    def _mark(self, paths: Sequence[Path], key: str, mark: str) -> str:
        """The id of the layer that has this mark of a disk, or gets it now."""
        before = self._taken.get(mark)
        with _Opened(paths) as chain:
            for layer in chain.layers:
                if mark in marks.of(layer.file):
                    return _id(layer)
            if before is None:
                marks.add(chain.layers[-1].file, mark)
            return _id(chain.layers[-1]) if before is None else before.disks[key]

    def snapshots(self, uuid: str, mark_prefix: str) -> list[Snapshot]:
        """Those whose marks the files bear, and those of this object where files cannot bear marks."""
        found: dict[str, dict[str, str]] = {mark: dict(taken.disks) for mark, taken in self._taken.items()}
        for paths in self._disks:
            with _Opened(paths) as chain:
                for layer in chain.layers:
                    for mark in marks.of(layer.file):
                        found.setdefault(mark, {})[_id(chain.layers[0])] = _id(layer)
        wanted = sorted((mark for mark in found if mark.startswith(mark_prefix)), key=marks.order)
        return [Snapshot(f"files:{mark}", mark, found[mark]) for mark in wanted]

    def remove_snapshot(self, uuid: str, snapshot: Snapshot) -> None:
        """The files are the operator's; only the mark goes."""
        self._taken.pop(snapshot.mark, None)
        for paths in self._disks:
            with _Opened(paths) as chain:
                for layer in chain.layers:
                    marks.remove(layer.file, snapshot.mark)

    def open_disk(self, disk: Disk, at: Snapshot, since: Snapshot | None) -> DiskReader:
        """The chain up to `at`'s top layer: all of it, or the layers above `since`'s."""
        chain = _open_chain(self._paths(disk))
        try:
            stop = self._layer(chain, disk, at) + 1
            start = 0 if since is None else self._layer(chain, disk, since) + 1
            if start >= stop:  # no layer was added since: nothing changed
                size, identity = chain.layers[stop - 1].size, _id(chain.layers[stop - 1])
                _close(chain.layers)
                return _Unchanged(size, identity)
            wanted = Chain.open(chain.layers[start:stop])
        except BaseException:
            _close(chain.layers)
            raise
        _close([layer for layer in chain.layers if layer not in wanted.layers])
        return ChainReader(wanted)

    def power(self, uuid: str) -> PowerState:
        return PowerState.UNKNOWN

    def shut_down(self, uuid: str, *, deadline_s: float, force: bool) -> None:
        raise self._no_vm("stop")

    def stop_pending(self, uuid: str) -> bool:
        raise self._no_vm("stop")

    def off_evidence(self, uuid: str) -> OffEvidence:
        raise self._no_vm("prove off")

    def fence(self, uuid: str, reason: str) -> None:
        raise self._no_vm("fence")

    def is_fenced(self, uuid: str) -> bool:
        raise self._no_vm("fence")

    def unfence(self, uuid: str) -> None:
        raise self._no_vm("unfence")

    def start(self, uuid: str) -> None:
        raise self._no_vm("start")

    def close(self) -> None:
        """Nothing is kept open between calls."""

    def _look(self) -> VirtualMachine:
        disks: list[Disk] = []
        for index, paths in enumerate(self._disks):
            with _Opened(paths) as chain:
                key = _id(chain.layers[0])
                disks.append(Disk(index, key, chain.size, bootable=index == 0, storage="file", label=paths[0].name))
        keys = [disk.key for disk in disks]
        if len(set(keys)) != len(keys):
            raise UsageError("the same disk is listed twice", where=self.url, fix="list each disk's chain once")
        return VirtualMachine(
            uuid=str(uuids.uuid5(_NAMESPACE, ",".join(keys))),
            name=self.name,
            vcpus=1,
            memory=GiB,
            disks=tuple(disks),
            hypervisor="files",
        )

    def _paths(self, disk: Disk) -> Sequence[Path]:
        if disk.index >= len(self._disks):
            raise SourceError(f"disk {disk.index} is not listed", where=self.url, fix="list every disk's chain")
        return self._disks[disk.index]

    def _layer(self, chain: Chain, disk: Disk, snapshot: Snapshot) -> int:
        """The place in the chain of what was the top when `snapshot` was marked."""
        identities = [_id(layer) for layer in chain.layers]
        wanted = snapshot.disks.get(disk.key, "")
        if disk.key != identities[0] or wanted not in identities:
            raise SourceError(
                f"the layer {wanted or 'of disk ' + disk.key}, which was the top at {snapshot.mark}, is not among the files",
                where=self.url,
                fix="list the whole chain, base first, with the layers that were copied before",
            )
        return identities.index(wanted)

    def _no_vm(self, action: str) -> UsageError:
        return UsageError(
            f"image files have no VM behind them that tokvm could {action}",
            where=self.url,
            fix="use `tokvm sync` for the bytes and do this by hand on the hypervisor, or migrate from xenserver://…",
        )


class _Unchanged:
    """A delta that says nothing. Implements `core.disk.DiskReader`."""

    total = 0

    def __init__(self, size: int, identity: str) -> None:
        self.size = size
        self.fingerprint = f"unchanged-{identity}"

    def covered(self) -> Iterator[ExtentMap]:
        yield ExtentMap.empty(0, self.size)

    def chunks(self, position: int = 0) -> Iterator[Chunk]:
        return iter(())

    def close(self) -> None:
        """Nothing is open."""


class _Opened:
    """A chain for as long as it is looked at."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __enter__(self) -> Chain:
        self._chain = _open_chain(self._paths)
        return self._chain

    def __exit__(self, *_: object) -> None:
        _close(self._chain.layers)


def _open_chain(paths: Sequence[Path]) -> Chain:
    layers = open_layers(paths)
    try:
        return Chain.open(layers)
    except BaseException:
        _close(layers)
        raise


def _id(layer: Layer) -> str:
    """By what a layer is known from run to run: its id; a VMDK's CID is not its own, so with the file's name."""
    return layer.identity if layer.linkage.unique else f"{layer.identity}:{Path(layer.name).name}"


def _close(layers: Sequence[Layer]) -> None:
    for layer in layers:
        layer.file.close()
