"""Opening the files of a frozen disk over SFTP: descriptors, and beside each the extents that bear its name.

    [ds] web/web.vmdk            descriptor ── web-flat.vmdk             raw
    [ds] web/web-000001.vmdk     descriptor ── web-000001-sesparse.vmdk  (or -delta.vmdk)    hint: web.vmdk
    [ds] web/web-000002.vmdk     …

Which descriptors these are is what the host says of the running VM. Each one's parentFileNameHint must name the one below,
because a CID does not tell layers of a running VM apart. A layer is known by its path, sizes, the descriptor's text and the
header that whoever opens it for writing changes; of a flat file, its first and last sectors. The last sector of each file is
read when it is opened, through the very connection that will copy it: a lock shows there, as SFTP's `Failure`, which one
remote `dd` explains.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from tokvm.core.errors import ImageError, SourceError
from tokvm.core.machine import Disk
from tokvm.core.text import readable
from tokvm.core.units import SECTOR, KiB
from tokvm.images.base import Layer
from tokvm.images.chain import Chain
from tokvm.images.vmdk.descriptor import Descriptor, read_descriptor
from tokvm.images.vmdk.layer import VmdkLayer, open_vmdk
from tokvm.remote.sftp import RemoteFileError
from tokvm.remote.sftp_wire import Status
from tokvm.sources.frozen import Habits, Places
from tokvm.sources.lanes import Lanes, RemoteFile
from tokvm.sources.vmware.faults import EsxError, Fault
from tokvm.sources.vmware.places import Datastores, folder_of
from tokvm.sources.vmware.shell import Shell

_HEAD = 4 * KiB  # a descriptor; the headers of seSparse and COWD; a boot sector


def _marks(size: int) -> Places:
    return (0, min(_HEAD, size)), (max(0, size - SECTOR), min(SECTOR, size))


HABITS = Habits(
    marks=_marks,
    damaged="the image is damaged on the host; look at it with vmkfstools -x check",
    changed="a consolidation or a person changes the VM's files; run the same command again",
    lanes=4,
)


def whole(chain: Chain, disk: Disk) -> Chain:
    """The chain, if it is as large as the host says that the disk is: what descriptors leave out would stay on the target as it
    was. (A disk with snapshots does not grow.)"""
    if chain.size != disk.size:
        raise ImageError(
            f"its descriptor speaks of {chain.size} bytes, the host of {disk.size}",
            where=chain.name,
            fix="see the disk's size in the host's client and in its descriptor; `vmkfstools -x check` looks at it",
        )
    return chain


class Layers:
    """Opens the layers of one disk; `files` are all that it opened, the caller's to close."""

    def __init__(self, shell: Shell, lanes: Lanes, stores: Datastores) -> None:
        self._shell = shell
        self._lanes = lanes
        self._stores = stores
        self.files: list[RemoteFile] = []

    def open_all(self, paths: Sequence[str], below: str | None) -> list[Layer]:
        """Layers, base first, whose hints name each the one before it; the first one's names `below`, if anything."""
        found: list[Layer] = []
        for path in paths:
            layer = self.open(path)
            self._check_hint(layer, path, below)
            found.append(layer)
            below = path
        return found

    def open(self, path: str) -> VmdkLayer:
        return open_vmdk(self.file(path), _Beside(self, path))

    def touch(self, path: str) -> None:
        """Read the ends of all files of a layer, whatever is in them: EsxError LOCKED when somebody holds one."""
        beside = _Beside(self, path)
        for name in self.descriptor(path).extent_names:
            if beside.open(name) is None:
                raise ImageError(
                    f"its extent {readable(name)} does not bear its name", where=path, fix="see the VM's descriptors"
                )

    def descriptor(self, path: str) -> Descriptor:
        return read_descriptor(self.file(path))

    def file(self, path: str) -> RemoteFile:
        """EsxError LOCKED when somebody holds it."""
        name = f"{self._shell.where}{path}"
        try:
            opened = self._lanes.open(path, name=name)
        except RemoteFileError as refused:
            if refused.status != Status.FAILURE:
                raise
            raise self._explained(path, refused) from refused
        self.files.append(opened)
        return opened

    def _explained(self, path: str, refused: RemoteFileError) -> SourceError:
        """SFTP has no code for a lock; `dd` has words."""
        code, said = self._shell.said(("dd", f"if={path}", "of=/dev/null", "bs=512", "count=1"))
        if "busy" in said.lower() or "lock" in said.lower():
            return EsxError(f"it is locked: {readable(said.strip(), limit=160)}", where=refused.where, fault=Fault.LOCKED)
        why = f"dd says: {readable(said.strip(), limit=160)}" if code else "dd reads it"
        return EsxError(f"{refused.what}; {why}", where=refused.where, fix="look at the file on the host, then again")

    def _check_hint(self, layer: VmdkLayer, path: str, below: str | None) -> None:
        hint = layer.descriptor.parent_hint if layer.descriptor is not None else ""
        named = self._stores.beside(hint, folder_of(path)) if hint else None
        if named != below:
            raise ImageError(
                f"its parentFileNameHint is {readable(repr(hint), limit=160)}, but the host says that it lies on "
                f"{readable(below or 'nothing')}",
                where=layer.name,
                fix="the VM's files were changed by hand, or are being consolidated; run the same command again",
            )

    def close(self) -> None:
        with ExitStack() as all_of_them:
            for file in self.files:
                all_of_them.callback(file.close)


class _Beside:
    """Implements `images.base.ExtentFiles`: in the descriptor's directory, under names that begin with its own."""

    def __init__(self, layers: Layers, descriptor: str) -> None:
        self._layers = layers
        self._folder = folder_of(descriptor)
        self._stem = descriptor.rpartition("/")[2].removesuffix(".vmdk")

    def open(self, name: str) -> RemoteFile | None:
        if "/" in name or not name.startswith(f"{self._stem}-") or not name.endswith(".vmdk"):
            return None
        return self._layers.file(f"{self._folder}/{name}")
