"""Files of a datastore over the SSH of a host that mounts it: bytes by SFTP, everything else by the API.

    [Store 1] web/web-flat.vmdk  ─► /vmfs/volumes/<uuid>/web/web-flat.vmdk      <uuid>: of the datastore's url, from the API

A running VM's frozen files can be read there, which `/folder` refuses on VMFS. SFTP has one word for all that goes wrong with a
locked file, `Failure`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from tokvm.core.errors import ImageError, SourceError
from tokvm.core.units import SECTOR
from tokvm.images.vmdk.descriptor import MAX_DESCRIPTOR
from tokvm.remote.sftp import RemoteFileError
from tokvm.remote.sftp_wire import Status
from tokvm.sources.frozen import FrozenFile
from tokvm.sources.lanes import Lanes
from tokvm.sources.vmware.api.channel import Locked
from tokvm.sources.vmware.api.datastores import split_path
from tokvm.sources.vmware.api.stores import Store

_URL = re.compile(r"(?:ds://)?(/vmfs/volumes/[^/\x00-\x1f]{1,256})/*")


class SftpFiles:
    """Implements `channel.FileChannel`. stores: those of the VM, by name."""

    kind = "sftp"

    def __init__(self, lanes: Lanes, *, where: str, stores: Callable[[], dict[str, Store]]) -> None:
        self._lanes = lanes
        self._where = where
        self._stores = stores

    def open(self, path: str) -> FrozenFile:
        try:
            file = self._lanes.open(self._path(path), name=f"{self._where} {path}")
        except RemoteFileError as failed:
            raise self._explained(path, failed) from failed
        try:
            size = min(SECTOR, file.size)
            file.read_into(file.size - size, memoryview(bytearray(size)))
        except RemoteFileError as failed:
            file.close()
            raise self._explained(path, failed) from failed
        except BaseException:
            file.close()
            raise
        return file

    def read_text(self, path: str) -> bytes:
        file = self._lanes.open(self._path(path), name=f"{self._where} {path}")
        try:
            if file.size > MAX_DESCRIPTOR:
                raise ImageError(f"it is larger than a descriptor may be ({MAX_DESCRIPTOR} bytes)", where=file.name)
            raw = bytearray(file.size)
            file.read_into(0, memoryview(raw))
            return bytes(raw)
        finally:
            file.close()

    def _path(self, path: str) -> str:
        stores = self._stores()
        datastore, inner = split_path(path, lambda: stores)
        match = _URL.fullmatch(stores[datastore].url) if datastore in stores else None
        if match is None:
            raise SourceError(f"the datastore {datastore!r} is mounted nowhere under /vmfs/volumes", where=self._where)
        return f"{match[1]}/{inner}"

    def _explained(self, path: str, failed: RemoteFileError) -> SourceError:
        if failed.status == Status.FAILURE:
            return Locked(
                f"it cannot be read over SFTP ({failed.what}): most likely another host, or a process of this one, holds it",
                where=f"{self._where} {path}",
                fix="give the host that runs the VM to --bytes; or see: dd if=FILE of=/dev/null bs=512 count=1",
            )
        return failed
