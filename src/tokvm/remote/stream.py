"""A remote command's output as a stream of bytes, on a connection of its own.

Three things can go wrong without an error from read(2), and each is made one here: the peer is silent though its sshd still
answers keepalives (the progress deadline), the connection breaks (ssh's exit code 255), the command fails after a plausible
beginning (its exit code). So a stream has been read only when `finish()` returned.
"""

from __future__ import annotations

import os
import select

from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.core.text import readable
from tokvm.remote import hostkeys
from tokvm.remote.errors import SSH_FAILED, RemoteCommandError, connection_error, is_host_key_refusal
from tokvm.remote.process import Child, Completed, ProgramTimeout
from tokvm.remote.ssh_config import SshConfig


class RemoteStream:
    """stdout of one remote command. One thread at a time.

    first_byte_s: how long the first byte may take where that is longer than the progress deadline.
    """

    def __init__(self, child: Child, config: SshConfig, command: str, *, deadline_s: float, first_byte_s: float = 0.0) -> None:
        self._child = child
        self._config = config
        self._command = command
        self._deadline_s = deadline_s
        self._first_byte_s = max(deadline_s, first_byte_s)
        self._poll = select.poll()
        self._poll.register(child.stdout, select.POLLIN)
        self.received = 0

    @property
    def where(self) -> str:
        return f"{self._config.where} `{readable(self._command, limit=120)}`"

    @property
    def pid(self) -> int:
        """The local ssh process."""
        return self._child.pid

    def read_into(self, buffer: memoryview) -> int:
        """Bytes read into the front of `buffer`, as many as were there; 0 at the end. ConnectionLost at the deadline."""
        deadline_s = self._deadline_s if self.received else self._first_byte_s
        if not self._poll.poll(deadline_s * 1000):
            self._child.kill()
            raise ConnectionLost(
                f"no byte came for {deadline_s:g} s, after {self.received}; the connection was given up",
                where=self.where,
                fix="run the same command again; if this repeats, look whether the host's storage hangs",
            )
        count = os.readv(self._child.stdout, [buffer])
        self.received += count
        return count

    def finish(self) -> None:
        """The stream ended and the command says all went well. RemoteCommandError or ConnectionLost when not.

        A stream that goes on where its reader thought it was over is an error too.
        """
        if self.read_into(memoryview(bytearray(1))):
            raise SourceError(f"the stream goes on behind byte {self.received - 1}, where it should end", where=self.where)
        try:
            code = self._child.wait(self._deadline_s)
        except ProgramTimeout as exc:
            self._child.kill()
            raise ConnectionLost("the stream ended but its command did not", where=self.where) from exc
        if code != 0:
            raise self._failure(code)

    def _failure(self, code: int) -> SourceError:
        said = self._child.stderr_tail()
        if code != SSH_FAILED and code > 0:
            return RemoteCommandError(self._command, Completed(code, b"", said), where=self._config.where)
        if not self.received and is_host_key_refusal(said):
            return hostkeys.host_key_error(self._config, said)
        if not self.received:
            return connection_error(said, where=self.where, doing="opening the stream")
        lost = connection_error(b"", where=self.where, doing=f"reading, after {self.received} bytes")
        lost.add_note(said.decode("utf-8", "backslashreplace"))
        return lost

    def close(self) -> None:
        """Stop the transfer, wherever it is."""
        self._child.close()
