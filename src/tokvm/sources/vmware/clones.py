"""A clone of a frozen disk, made by the host beside the VM, for a base that is locked against reading (`--clone-base`).

    DIR/tokvm-clone/<mark>-<node>.vmdk     vmkfstools -i, thin: the whole disk as the snapshot froze it

Only with room for all of the disk. It is deleted when its pass was read to the end, or with its snapshot; what a lost run left
behind is never trusted, but deleted and made anew.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator

from tokvm.core.disk import Chunk, DiskReader
from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.core.machine import Disk, Snapshot
from tokvm.core.units import format_bytes
from tokvm.images.chain import Chain
from tokvm.sources.frozen import FrozenDisk
from tokvm.sources.lanes import Lanes
from tokvm.sources.vmware.layers import Layers, whole
from tokvm.sources.vmware.machines import Machines, Place
from tokvm.sources.vmware.places import Datastores
from tokvm.sources.vmware.shell import Shell
from tokvm.sources.vmware.snapshots import Stack

log = logging.getLogger(__name__)

FOLDER = "tokvm-clone"
CLONE_S = 24 * 3600.0
_MARGIN = 1 << 30  # bytes that stay free: a full datastore stops every VM on it
_NAME = re.compile(r"(tokvm-[A-Za-z0-9._-]+)-(?:ide|scsi|sata|nvme)[0-9]+-[0-9]+\.vmdk")


class Clones:
    """Of one source. `allowed`: the operator said so."""

    def __init__(self, machines: Machines, shell: Shell, lanes: Lanes, *, allowed: bool) -> None:
        self.allowed = allowed
        self._machines = machines
        self._shell = shell
        self._lanes = lanes
        self._whole: set[str] = set()

    def open(self, found: Stack, disk: Disk, at: Snapshot, frozen: str) -> DiskReader:
        """frozen: the descriptor of what `at` froze."""
        place = found.inside.seen.place
        path = place.file(f"{FOLDER}/{at.mark}-{disk.device.replace(':', '-')}.vmdk")
        if path not in self._whole:
            self._make(place, frozen, path, disk)
        layers = Layers(self._shell, self._lanes, found.inside.stores)
        try:
            chain = whole(Chain.open([layers.open(path)]), disk)
            return _ClonedDisk(chain, layers, lambda: self._delete(path))
        except BaseException:
            layers.close()
            raise

    def _make(self, place: Place, frozen: str, path: str, disk: Disk) -> None:
        stores = self._machines.stores(anew=True)
        self._check_room(stores, place, disk)
        self._act("mkdir", "-p", place.file(FOLDER))
        if path.rpartition("/")[2] in self._names(place):
            self._act("vmkfstools", "-U", path)
        log.warning("%s: %s is locked; the host clones it first", self._shell.where, frozen)
        try:
            self._act("vmkfstools", "-i", frozen, path, "-d", "thin", timeout_s=CLONE_S)
        except ConnectionLost as lost:
            raise SourceError(
                f"the connection broke while the host cloned {frozen}",
                where=self._shell.where,
                fix="wait until its vmkfstools ended (ps | grep vmkfstools), then run the same command again",
            ) from lost
        self._whole.add(path)

    def _check_room(self, stores: Datastores, place: Place, disk: Disk) -> None:
        store = stores.of(place.vmx)
        if store.free < disk.size + _MARGIN:
            raise SourceError(
                f"there is no room to clone disk {disk.index}: {format_bytes(store.free)} are free on {store.name}, its size "
                f"is {format_bytes(disk.size)}",
                where=self._shell.where,
                fix="free space there, use vpx:// (vSphere's API), or migrate the VM while it is off",
            )

    def _act(self, *command: str, timeout_s: float = 600.0) -> None:
        ended = self._shell.act(command, timeout_s=timeout_s)
        if ended.failed:
            raise ended.error()

    def _names(self, place: Place) -> list[str]:
        """Of our clones beside the VM."""
        answer = self._shell.ask([("ls", "-1", place.file(FOLDER))])[0]
        return [] if answer.code else [name for name in answer.text.split("\n") if _NAME.fullmatch(name)]

    def _delete(self, path: str) -> None:
        self._whole.discard(path)
        self._act("vmkfstools", "-U", path)
        self._shell.act(("rmdir", path.rpartition("/")[0]))  # as long as others are in it, it stays

    def remove(self, uuid: str, mark: str | None) -> None:
        """Those of one snapshot; of all when `mark` is None."""
        seen, (listed,) = self._machines.look(uuid, lambda place: [("ls", "-1", place.file(FOLDER))])
        if listed.code:
            return
        for name in listed.text.split("\n"):
            one = _NAME.fullmatch(name)
            if one is not None and mark in (None, one[1]):
                self._delete(seen.place.file(f"{FOLDER}/{name}"))


class _ClonedDisk(FrozenDisk):
    """Deletes the clone when it was read to its end."""

    def __init__(self, chain: Chain, layers: Layers, delete: Callable[[], None]) -> None:
        super().__init__(chain, layers.files, lambda: True, changed=_changed, long_pass_s=float("inf"))
        self._delete = delete
        self._done = False

    def chunks(self, position: int = 0) -> Iterator[Chunk]:
        yield from super().chunks(position)
        self._done = True

    def close(self) -> None:
        super().close()
        if self._done:
            self._delete()


def _changed(name: str) -> SourceError:
    return SourceError(
        "our clone changed while it was read", where=name, fix="somebody writes into our directory; run the same command again"
    )
