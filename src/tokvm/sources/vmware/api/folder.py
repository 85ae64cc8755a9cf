"""Files of a datastore over HTTPS, `/folder`, as `images.base.ReadAt`.

    GET /folder/vm/vm-flat.vmdk?dcPath=…&dsName=…     Range: bytes=a-b
    206, Content-Range: bytes a-b/size                these very bytes
    200                                               the Range was not seen: the file's start would land in its middle. Refused
    500, HTML, NFC_FILE_LOCKED                        a running VM's process holds it
    401                                               the session expired: a new login, and once more

A running VM's files on VMFS are locked, its frozen ones too (`Locked`); on NFS, and of a VM that is off, they are not. So the
last sector is read before a file is believed: the datastore's own listing gives a descriptor the size of its disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse

from tokvm.core.errors import ConnectionLost, ImageError, SourceError
from tokvm.core.text import readable
from tokvm.core.units import SECTOR, MiB
from tokvm.images.vmdk.descriptor import MAX_DESCRIPTOR
from tokvm.sources.frozen import FrozenFile
from tokvm.sources.vmware.api.channel import Locked
from tokvm.sources.vmware.api.datastores import Names, folder_target
from tokvm.sources.vmware.api.web import BUSY, Web, reason_of
from tokvm.sources.vmware.layers import HABITS

_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")
_LARGEST = 4 * MiB  # of one request, so that a lost connection costs little
_LOCKED = re.compile(r"NFC_FILE_LOCKED|locked|being used by|Device or resource busy|Failed to open disk", re.IGNORECASE)


class Folder:
    """The datastores of one datacenter. Implements `channel.FileChannel`."""

    kind = "/folder"

    def __init__(self, web: Web, *, datacenter: str, twice: bool, names: Names = tuple) -> None:
        """twice: as vCenter wants dcPath and dsName to be encoded. names: of the datastores."""
        self._web = web
        self._datacenter = datacenter
        self._twice = twice
        self._names = names

    def open(self, path: str) -> FolderFile:
        """The file at this datastore path. Its last sector was read: `Locked`, or SourceError, when it cannot be."""
        file = FolderFile(self._web, self._target(path), path, f"{self._web.peer.where} {path}")
        file.probe()
        return file

    def read_text(self, path: str) -> bytes:
        """All of a small file: a descriptor."""
        name = f"{self._web.peer.where} {path}"
        with self._web.get(self._target(path)) as answer:
            if answer.status != 200:
                raise refused(answer, name)
            raw = answer.read(MAX_DESCRIPTOR + 1)
            if len(raw) > MAX_DESCRIPTOR:
                raise ImageError(f"it is larger than a descriptor may be ({MAX_DESCRIPTOR} bytes)", where=name)
            return raw

    def _target(self, path: str) -> str:
        return folder_target(path, datacenter=self._datacenter, twice=self._twice, names=self._names)


class FolderFile(FrozenFile):
    """One file, by ranges. Implements `images.base.ReadAt`; thread-safe."""

    habits = HABITS

    def __init__(self, web: Web, target: str, path: str, name: str) -> None:
        super().__init__(path, name)
        self._web = web
        self._target = target

    def probe(self) -> None:
        """Learn the size, that the last sector can be read, and what must not change meanwhile."""
        self.size = self._size_now()
        if self.size:
            self._fill(max(0, self.size - SECTOR), memoryview(bytearray(min(SECTOR, self.size))))
        self.stamp = self.marks()

    def _fill(self, offset: int, buffer: memoryview) -> None:
        for at in range(0, len(buffer), _LARGEST):
            self._read(offset + at, buffer[at : at + _LARGEST])

    def _size_now(self) -> int:
        with self._range(0, SECTOR, learning=True) as (answer, total):
            answer.read(SECTOR)
            self._ended(answer)
        return total

    def _read(self, offset: int, view: memoryview) -> None:
        with self._range(offset, len(view)) as (answer, total):
            if total != self.size:
                raise self.size_changed(total)
            done = 0
            while done < len(view):
                count = answer.readinto(view[done:])
                if not count:
                    raise ConnectionLost(
                        f"the connection ended {len(view) - done} bytes early", where=f"{self.name}@{offset + done:#x}"
                    )
                done += count
            self._ended(answer)

    def _ended(self, answer: HTTPResponse) -> None:
        """The answer is over, so that the connection can be used again; what never ends is not waited for."""
        if answer.read(1):
            raise SourceError("the server sent more than the part that was asked for", where=self.name)

    @contextmanager
    def _range(self, offset: int, length: int, *, learning: bool = False) -> Iterator[tuple[HTTPResponse, int]]:
        """The answer to one range, checked but for its body, and the file's size as it says."""
        with self._web.get(self._target, {"Range": f"bytes={offset}-{offset + length - 1}"}) as answer:
            if answer.status == 200:
                raise SourceError(
                    "the server sent the whole file where a part was asked for, so parts cannot be told apart",
                    where=self.name,
                    fix="is a proxy between us and the server? Reach it directly",
                )
            if answer.status != 206:
                raise refused(answer, self.name)
            yield answer, self._checked(answer, offset, length, learning=learning)

    def _checked(self, answer: HTTPResponse, offset: int, length: int, *, learning: bool) -> int:
        said = answer.getheader("Content-Range", "")
        match = _RANGE.fullmatch(said.strip())
        if match is None or int(match[1]) != offset or not _ends_right(match, offset + length - 1, learning=learning):
            raise SourceError(
                f"the server answered bytes {offset}-{offset + length - 1} with {readable(said, limit=80)!r}", where=self.name
            )
        return int(match[3])

    def close(self) -> None:
        """The connections are the server's, not the file's."""


def _ends_right(match: re.Match[str], last: int, *, learning: bool) -> bool:
    """The last byte is the one asked for; or the file's own, while its size is being learnt."""
    end, total = int(match[2]), int(match[3])
    return end < total and (end == last or (learning and end == total - 1))


def refused(answer: HTTPResponse, name: str) -> SourceError:
    """The error for an answer that is no success, with the reason its body names."""
    reason = reason_of(answer)
    if answer.status in BUSY:
        return ConnectionLost(
            f"the server is too busy ({answer.status} {reason})", where=name, fix="run the same command again"
        )
    what = f"the server refused it: {answer.status} {readable(answer.reason, limit=60)}" + (f": {reason}" if reason else "")
    if answer.status == 500 and _LOCKED.search(reason):
        return Locked(f"the file is locked ({reason})", where=name, fix="it can be read when the VM is off")
    fix = {
        401: "give the user's role Datastore.Browse and Datastore.FileManagement (Low level file operations)",
        403: "give the user's role Datastore.Browse and Datastore.FileManagement (Low level file operations)",
        404: "the file was moved or removed (a storage migration?); run the same command again",
    }
    return SourceError(what, where=name, fix=fix.get(answer.status, "see the VM's recent tasks and the host's hostd.log"))
