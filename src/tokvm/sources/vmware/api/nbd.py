"""A disk behind an NBD server that the operator runs, for example nbdkit with VMware's own VDDK, which is no part of tokvm.

    --nbd 'nbd+unix:///?socket=/run/vddk/{uuid}-{number}.sock'

    {uuid} the VM's   {snapshot} the server's id of the snapshot to serve   {number} the disk's device key   {index} from 0

The server must serve the disk as frozen in that snapshot. What changed, or is in use, is asked of vSphere (CBT).
"""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlsplit

import numpy as np

from tokvm.core.errors import ConnectionLost, ImageError, SourceError, UsageError
from tokvm.core.extents import ExtentKind, ExtentMap
from tokvm.images.base import Linkage, MappedLayer
from tokvm.remote.nbd import NbdExport
from tokvm.sources.frozen import FrozenFile, Habits
from tokvm.sources.vmware.api.cbt import Areas

CONNECTIONS = 4
_FIELD = re.compile(r"\{([a-z]*)\}")
FIELDS = ("uuid", "snapshot", "number", "index")


def check_template(template: str) -> None:
    """UsageError for one that cannot be used."""
    unknown = [name for name in _FIELD.findall(template) if name not in FIELDS]
    if unknown:
        raise UsageError(f"--nbd knows no {{{unknown[0]}}}", fix=f"use {', '.join(f'{{{name}}}' for name in FIELDS)}")
    socket_of(_FIELD.sub("x", template))


def filled(template: str, **values: str) -> str:
    return _FIELD.sub(lambda match: values[match[1]], template)


def socket_of(uri: str) -> str:
    """The path of the socket in an `nbd+unix://` URI."""
    parts = urlsplit(uri)
    sockets = parse_qs(parts.query).get("socket", [])
    if parts.scheme != "nbd+unix" or parts.netloc or parts.path not in ("", "/") or len(sockets) != 1:
        raise UsageError(
            f"{uri!r} is no place of a disk", fix="write nbd+unix:///?socket=/PATH; the default export of that server is read"
        )
    return sockets[0]


class NbdFile(FrozenFile):
    """Implements `images.base.ReadAt`; thread-safe."""

    habits = Habits(marks=lambda _size: (), damaged="see the NBD server", changed="see the NBD server")

    def __init__(self, socket: str, name: str) -> None:
        super().__init__(socket, name)
        try:
            self._export = NbdExport(socket, most=CONNECTIONS)
        except OSError as exc:
            fix = "start the NBD server for this disk and snapshot, then run the same command again"
            raise SourceError(f"the NBD server cannot be reached: {exc}", where=name, fix=fix) from exc
        self.size = self._export.size
        self.stamp = self.marks()

    def _fill(self, offset: int, buffer: memoryview) -> None:
        try:
            buffer[:] = self._export.read(offset, len(buffer))
        except OSError as exc:
            raise ConnectionLost(f"reading over NBD failed: {exc}", where=f"{self.name}@{offset:#x}") from exc

    def _size_now(self) -> int:
        return self.size

    def close(self) -> None:
        self._export.close()


class AreasLayer(MappedLayer):
    """A disk of which areas are known. since: the change id that they changed since, then everything else is ABSENT;
    "" when they are what is in use, then everything else is ZERO."""

    format = "raw"

    def __init__(self, file: FrozenFile, areas: Areas | None, *, size: int, at: str, since: str) -> None:
        if file.size < size:
            raise ImageError(f"it has {file.size} bytes, the disk {size}", where=file.name, fix="is it another disk?")
        order = areas.digest if areas is not None else "all"  # which areas there are decides the order of reading
        super().__init__(file, size=size, linkage=Linkage((f"{at} {order}",), (since,) if since else (), unique=False))
        self._areas = areas
        self._since = since

    def map_part(self, start: int, stop: int, max_rows: int | None) -> ExtentMap:
        if self._areas is None:
            return ExtentMap.build(start, stop, [start], stop - start, int(ExtentKind.DATA), start)
        found = []
        for pair in self._areas.ranges(start, stop):
            found.append(pair)
            if max_rows is not None and len(found) >= max_rows:
                stop = sum(pair)
                break
        offset, length = np.array(found, np.int64).reshape(-1, 2).T
        data = ExtentMap.build(start, stop, offset, length, int(ExtentKind.DATA), offset)
        if self._since:
            return data
        return data.over(ExtentMap.build(start, stop, [start], stop - start, int(ExtentKind.ZERO)))

    def describe(self) -> dict[str, object]:
        return {"format": self.format, "virtual_size": self.size, "identity": self.identity, "warnings": list(self.warnings)}
