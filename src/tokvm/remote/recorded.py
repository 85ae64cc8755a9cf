"""A host whose every command, stream and file request is written into a transcript.

    SshHost        ◄── RecordedHost       commands with all they said
    Conversation   ◄── RecordedTalk       each request with its answer
    RemoteStream   ◄── RecordedStream     how much came, when the first byte did, how it ended
    SftpClient     ◄── RecordedSftp       each request with its path; of a file's content only how much was read

Who uses them sees no difference; who does not record makes none of these objects.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from tokvm.core.errors import TokvmError
from tokvm.remote.conversation import Conversation, IsWhole, Reply
from tokvm.remote.process import Child, Completed, Stdin
from tokvm.remote.recording import Exchange, Kind, Recorder
from tokvm.remote.sftp import Attributes, DirectoryEntry, SftpClient
from tokvm.remote.sftp_file import IN_FLIGHT, SftpFile
from tokvm.remote.ssh import SshHost
from tokvm.remote.ssh_config import SshConfig
from tokvm.remote.stream import RemoteStream

_LISTED = 1000
"""Names of one directory that are written down; of the others the number."""


class RecordedHost(SshHost):
    """An SshHost that writes down what it does."""

    def __init__(self, config: SshConfig, recorder: Recorder) -> None:
        super().__init__(config)
        self._recorder = recorder

    def _complete(self, command: str, *, input: bytes | None, timeout_s: float) -> Completed:  # noqa: A002
        exchange = self._recorder.sent(Kind.COMMAND, self.where, command, stdin=input)
        try:
            done = super()._complete(command, input=input, timeout_s=timeout_s)
        except BaseException as error:
            exchange.failed(error)
            raise
        exchange.completed(done)
        return done

    def converse(self, command: str) -> Conversation:
        """What cannot even be started stands there as a request that was not sent."""
        try:
            child = self._talker(command)
        except BaseException as error:
            self._recorder.sent(Kind.REQUEST, self.where, command).failed(error)
            raise
        return RecordedTalk(self._recorder, child, where=self.where, command=command)

    def stream(self, command: str, *, deadline_s: float | None = None, first_byte_s: float = 0.0) -> RemoteStream:
        exchange = self._recorder.sent(Kind.STREAM, self.where, command)
        child = self._started(exchange, lambda: self._data_connection(self._command(command)))
        deadline_s = deadline_s or self.config.progress_deadline_s
        return RecordedStream(exchange, child, self.config, command, deadline_s=deadline_s, first_byte_s=first_byte_s)

    def sftp(self, *, deadline_s: float | None = None) -> SftpClient:
        exchange = self._recorder.sent(Kind.SFTP, self.where)
        child = self._started(exchange, lambda: self._data_connection(self._sftp_arguments(), stdin=Stdin.PIPE))
        return RecordedSftp(exchange, child, self.config, deadline_s=deadline_s or self.config.progress_deadline_s)

    @staticmethod
    def _started(exchange: Exchange, start: Callable[[], Child]) -> Child:
        try:
            return start()
        except BaseException as error:
            exchange.failed(error)
            raise


class RecordedTalk(Conversation):
    def __init__(self, recorder: Recorder, child: Child, *, where: str, command: str) -> None:
        super().__init__(child, where=where, command=command)
        self._recorder = recorder

    def request(self, data: bytes, is_whole: IsWhole, *, timeout_s: float) -> Reply:
        exchange = self._recorder.sent(Kind.REQUEST, self._where, self._command, stdin=data)
        try:
            reply = super().request(data, is_whole, timeout_s=timeout_s)
        except BaseException as error:
            exchange.failed(error, stdout=bytes(self._said))
            raise
        exchange.ended(code=reply.code, stdout=reply.stdout, stderr=reply.stderr)
        return reply


class RecordedStream(RemoteStream):
    def __init__(
        self, exchange: Exchange, child: Child, config: SshConfig, command: str, *, deadline_s: float, first_byte_s: float
    ) -> None:
        super().__init__(child, config, command, deadline_s=deadline_s, first_byte_s=first_byte_s)
        self._exchange = exchange
        self._begun = time.monotonic()
        self._first_s: float | None = None

    def read_into(self, buffer: memoryview) -> int:
        try:
            count = super().read_into(buffer)
        except BaseException as error:
            self._exchange.failed(error, **self._facts())
            raise
        if self._first_s is None:
            self._first_s = round(time.monotonic() - self._begun, 6)
        return count

    def finish(self) -> None:
        try:
            super().finish()
        except BaseException as error:
            self._exchange.failed(error, code=self._child.poll(), **self._facts())
            raise
        self._exchange.ended(code=self._child.poll(), **self._facts())

    def close(self) -> None:
        """A stream that is closed before its end was given up by us."""
        self._exchange.ended(code=self._child.poll(), given_up=True, **self._facts())
        super().close()

    def _facts(self) -> dict[str, object]:
        return {"received": self.received, "first_byte_s": self._first_s, "stderr": self._child.stderr_tail()}


class RecordedSftp(SftpClient):
    def __init__(self, exchange: Exchange, child: Child, config: SshConfig, *, deadline_s: float) -> None:
        self._exchange = exchange
        try:
            super().__init__(child, config, deadline_s=deadline_s)
        except BaseException as error:
            exchange.failed(error, stderr=child.stderr_tail())
            raise
        exchange.note("limits", "", read_size=self.read_size)

    def open(self, path: str) -> SftpFile:
        with self._exchange.step("open", path) as found:
            file = super().open(path)
            found["size"] = file.size
        return file

    def stat(self, path: str) -> Attributes:
        with self._exchange.step("stat", path) as found:
            said = super().stat(path)
            found |= {"size": said.size, "mode": said.mode, "mtime_s": said.mtime_s}
        return said

    def listdir(self, path: str) -> list[DirectoryEntry]:
        with self._exchange.step("listdir", path) as found:
            entries = super().listdir(path)
            listed = [[entry.name, entry.attributes.size] for entry in entries[:_LISTED]]
            found |= {"count": len(entries), "entries": listed}
        return entries

    def close(self) -> None:
        if hasattr(self, "read_size"):  # else it never came up, and why is written down by whoever sees it
            self._exchange.ended()
        super().close()

    def _file(self, *, name: str, handle: bytes, size: int) -> SftpFile:
        return RecordedFile(self._exchange, self._pipe, name=name, handle=handle, size=size, read_size=self.read_size)


class RecordedFile(SftpFile):
    """How much was read is told when it is closed; what the server refuses is told at once."""

    def __init__(self, exchange: Exchange, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self._exchange = exchange
        self._count = threading.Lock()
        self._bytes = 0
        self._reads = 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        try:
            super().read_into(offset, buffer)
        except TokvmError as error:
            self._refused(error, offset=offset, length=len(buffer))
            raise
        self._add(len(buffer))

    def read_ranges(
        self, ranges: Iterable[tuple[int, int]], sink: Callable[[int, memoryview], None], *, in_flight: int = IN_FLIGHT
    ) -> None:
        def counted(at: int, piece: memoryview) -> None:
            self._add(len(piece))
            sink(at, piece)

        try:
            super().read_ranges(ranges, counted, in_flight=in_flight)
        except TokvmError as error:
            self._refused(error)
            raise

    def close(self) -> None:
        super().close()
        self._exchange.note("close", self.name, bytes=self._bytes, reads=self._reads)

    def _add(self, count: int) -> None:
        with self._count:
            self._bytes += count
            self._reads += 1

    def _refused(self, error: TokvmError, **facts: object) -> None:
        found = {"class": type(error).__name__, "what": error.what, "where": error.where}
        self._exchange.note("read", self.name, **facts, error={**found, "status": getattr(error, "status", None)})
