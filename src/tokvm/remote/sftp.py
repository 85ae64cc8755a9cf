"""Reading the host's files over SFTP, with enough requests in flight that the link and not the round trip sets the pace.

    SftpClient ── open(path) ──► SftpFile ─┬─ read_into(offset, buffer)        random access, from several threads
                                           └─ read_ranges(ranges, sink)        bulk: 64 requests of at most 255 KiB in flight

OpenSSH's window is 2 MiB per connection, so a connection moves at most 2 MiB per round trip; more needs more connections.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass

from tokvm.core.errors import SourceError
from tokvm.core.text import readable
from tokvm.remote.process import Child
from tokvm.remote.sftp_file import SftpFile
from tokvm.remote.sftp_pipe import SftpPipe
from tokvm.remote.sftp_replies import RemoteFileError, attributes_of, expect, handle_of, is_eof, protocol
from tokvm.remote.sftp_wire import (
    DEFAULT_READ,
    LARGEST_READ,
    LIMITS,
    READ_ONLY,
    Attributes,
    Body,
    Kind,
    request,
    string,
    u32,
)
from tokvm.remote.ssh_config import SshConfig

__all__ = ["Attributes", "DirectoryEntry", "RemoteFileError", "SftpClient", "SftpFile"]

log = logging.getLogger(__name__)

_MOST_NAMES = 1_000_000


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    """A name in a directory; bytes that are no UTF-8 are kept as surrogates, so it can be opened."""

    name: str
    attributes: Attributes


class SftpClient:
    """One sftp session on a connection of its own. Thread-safe. `read_size`: bytes that one request asks for at most."""

    def __init__(self, child: Child, config: SshConfig, *, deadline_s: float) -> None:
        self.where = config.where
        self.pid = child.pid
        self._pipe = SftpPipe(child, config, deadline_s=deadline_s)
        try:
            self.read_size = self._negotiate(self._pipe.greet())
        except BaseException:
            self.close()
            raise

    def _negotiate(self, extensions: dict[bytes, bytes]) -> int:
        if LIMITS not in extensions:
            return DEFAULT_READ
        reply = self._pipe.ask(lambda n: request(Kind.EXTENDED, n, string(LIMITS)))
        if reply.kind != Kind.EXTENDED_REPLY:
            return DEFAULT_READ
        body = Body(reply.body)
        with protocol(self.where):
            _largest_packet, largest_read = body.u64(), body.u64()
        log.debug("%s reads at most %d bytes at once", self.where, largest_read)
        # 0 means "no limit told". Less than 4 KiB makes no sense; asking for more than is allowed costs only short reads.
        return min(max(largest_read or DEFAULT_READ, 4096), LARGEST_READ)

    def open(self, path: str) -> SftpFile:
        """The file, open for reading. RemoteFileError when the server refuses."""
        name, raw = self._place(path), self._encode(path)
        handle = handle_of(self._pipe.ask(lambda n: request(Kind.OPEN, n, string(raw), u32(READ_ONLY), u32(0))), where=name)
        try:
            reply = self._pipe.ask(lambda n: request(Kind.FSTAT, n, string(handle)))
            size = attributes_of(reply, where=name).size
            if size is None:
                raise SourceError("the server does not tell the file's size", where=name)
        except SourceError:
            self._close_handle(handle)
            raise
        return self._file(name=name, handle=handle, size=size)

    def stat(self, path: str) -> Attributes:
        """What the server says about a path, symbolic links followed."""
        raw = self._encode(path)
        reply = self._pipe.ask(lambda n: request(Kind.STAT, n, string(raw)))
        return attributes_of(reply, where=self._place(path))

    def listdir(self, path: str) -> list[DirectoryEntry]:
        """The names in a directory, in the server's order, without `.` and `..`."""
        name, raw = self._place(path), self._encode(path)
        handle = handle_of(self._pipe.ask(lambda n: request(Kind.OPENDIR, n, string(raw))), where=name)
        found: list[DirectoryEntry] = []
        try:
            while entries := self._entries(handle, name):
                found += entries
                if len(found) > _MOST_NAMES:
                    raise SourceError(f"the directory lists more than {_MOST_NAMES} names", where=name)
        finally:
            self._close_handle(handle)
        return [entry for entry in found if entry.name not in {".", ".."}]

    def close(self) -> None:
        """End the session. Reads still under way in other threads end with ConnectionLost."""
        self._pipe.close()

    def __enter__(self) -> SftpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _file(self, *, name: str, handle: bytes, size: int) -> SftpFile:
        return SftpFile(self._pipe, name=name, handle=handle, size=size, read_size=self.read_size)

    def _entries(self, handle: bytes, name: str) -> list[DirectoryEntry]:
        reply = self._pipe.ask(lambda n: request(Kind.READDIR, n, string(handle)))
        if is_eof(reply):
            return []
        body = expect(reply, Kind.NAME, where=name)
        with protocol(name):
            return [DirectoryEntry(raw.decode("utf-8", "surrogateescape"), said) for raw, said in body.names()]

    def _close_handle(self, handle: bytes) -> None:
        with contextlib.suppress(SourceError):  # nothing is lost with a handle
            self._pipe.ask(lambda n: request(Kind.CLOSE, n, string(handle)))

    def _place(self, path: str) -> str:
        return f"{self.where}{'' if path.startswith('/') else '/~/'}{readable(path)}"

    def _encode(self, path: str) -> bytes:
        """A path's bytes. SFTP's strings can hold NUL, files' names cannot: the server would see another name."""
        if "\0" in path:
            raise SourceError("a path cannot hold a NUL byte", where=self._place(path))
        return path.encode("utf-8", "surrogateescape")
