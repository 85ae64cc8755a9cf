"""A Windows host's disk files over SMB. Implements `frozen_file.Files`.

    SmbFile ─┐                    ┌─ the hypervisor      C$, D$ …
    SmbFile ─┼─ one connection ──►┤
    …        ┘   for each server  └─ a file server       shares that the VM's settings name

A connection that broke is made anew when the next read needs one, as long as the file has the size it had; whether it is still
the same one its marks say at the end of the pass.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from tokvm.core.errors import ConnectionLost, SourceError, TokvmError
from tokvm.sources.hyperv.frozen_file import FrozenFile
from tokvm.sources.hyperv.smb_link import Handle, SmbAccess, SmbLink
from tokvm.sources.hyperv.smb_paths import Place, place, problem

if TYPE_CHECKING:
    from tokvm.remote.recording import Exchange, Recorder


class SmbFiles:
    """The connections of one source. Thread-safe."""

    def __init__(self, host: str, access: SmbAccess, *, recorder: Recorder | None = None) -> None:
        self._host = host
        self._access = access
        self._recorder = recorder
        self._lock = threading.Lock()
        self._links: dict[str, Linked] = {}
        self._closed = False
        self.open_files: set[SmbFile] = set()

    def problem(self, path: str) -> str:
        return problem(path)

    def open_layer(self, path: str, *, drive: str, where: str) -> SmbFile:
        made = SmbFile(self, place(path, drive=drive, where=where), path, f"{where} {path}")
        self._drop_cut(made.place.server)
        try:
            made.size = made.handle().size
            self.open_files.add(made)
            made.stamp = made.marks()
        except BaseException:
            made.close()
            raise
        return made

    def linked(self, server: str) -> Linked:
        """The server's connection, a new one if there is none that works. "": the hypervisor."""
        with self._lock:
            if self._closed:
                raise ConnectionLost("the connections to the source were closed")
            found = self._links.get(server)
            if found is None or not found.link.is_alive:
                found = self._links[server] = self._new(server or self._host)
            return found

    def _drop_cut(self, server: str) -> None:
        """A file that is opened only now need not find out that the connection broke while nothing was asked."""
        with self._lock:
            found = self._links.get(server)
            if found is not None and not found.link.is_connected:
                del self._links[server]
                found.close()

    def forget(self, file: SmbFile) -> None:
        """Close its handle, if its connection is still there."""
        self.open_files.discard(file)
        with self._lock:
            found = self._links.get(file.place.server)
        if found is not None:
            found.forget(file)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            links, self._links = self._links, {}
        for one in links.values():
            one.close()

    def _new(self, server: str) -> Linked:
        where = f"smb://{server}" + ("" if self._access.port == 445 else f":{self._access.port}")
        exchange = None if self._recorder is None else _sent(self._recorder, where)
        try:
            return Linked(SmbLink(server, self._access, where=where), exchange)
        except BaseException as error:
            if exchange is not None:
                exchange.failed(error)
            raise


class Linked:
    """A connection and what is open on it."""

    def __init__(self, link: SmbLink, exchange: Exchange | None) -> None:
        self.link = link
        self._exchange = exchange
        self._lock = threading.Lock()
        self._handles: dict[SmbFile, Handle] = {}

    def handle(self, file: SmbFile) -> Handle:
        with self._lock:
            if file not in self._handles:
                self._handles[file] = self._open(file)
            return self._handles[file]

    def forget(self, file: SmbFile) -> None:
        with self._lock:
            handle = self._handles.pop(file, None)
        if handle is not None:
            if self._exchange is not None:
                self._exchange.note("close", file.path, bytes=file.received)
            self.link.close_handle(handle)

    def refused(self, error: TokvmError, file: SmbFile) -> None:
        if self._exchange is not None:
            said = {"class": type(error).__name__, "what": error.what, "where": error.where}
            self._exchange.note("read", file.path, error=said)

    def close(self) -> None:
        self.link.close()
        if self._exchange is not None:
            self._exchange.ended()

    def _open(self, file: SmbFile) -> Handle:
        share, path = file.place.share, file.place.path
        if self._exchange is None:
            handle = self.link.open(share, path, name=file.name)
        else:
            with self._exchange.step("open", file.path) as found:
                handle = self.link.open(share, path, name=file.name)
                found["size"] = handle.size
        if file.size not in (-1, handle.size):
            self.link.close_handle(handle)
            raise file.size_changed(handle.size)
        return handle


class SmbFile(FrozenFile):
    """A file over SMB; its `path` is Windows'."""

    def __init__(self, files: SmbFiles, at: Place, path: str, name: str) -> None:
        super().__init__(path, name)
        self._files = files
        self.place = at
        self.received = 0
        self._count = threading.Lock()

    def handle(self) -> Handle:
        return self._files.linked(self.place.server).handle(self)

    def close(self) -> None:
        with contextlib.suppress(SourceError):  # a connection that is gone has no handles to close
            self._files.forget(self)

    def _fill(self, offset: int, buffer: memoryview) -> None:
        linked = self._files.linked(self.place.server)
        try:
            linked.link.read_into(linked.handle(self), offset, buffer)
        except TokvmError as error:
            linked.refused(error, self)
            raise
        with self._count:
            self.received += len(buffer)

    def _size_now(self) -> int:
        at = self.place
        return self._files.linked(at.server).link.size_of(at.share, at.path, name=self.name)


def _sent(recorder: Recorder, where: str) -> Exchange:
    from tokvm.remote.recording import Kind

    return recorder.sent(Kind.SMB, where)
