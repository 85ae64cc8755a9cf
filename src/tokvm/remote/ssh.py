"""A host over ssh: commands, streams and files.

    SshHost ─┬─ control connection (one login) ── run, run_line      ssh -S socket … command
             │                                 └─ converse(command)  ssh -S socket … command, for many requests
             ├─ data connection ───────────────── stream(command)    ssh … command
             └─ data connection ───────────────── sftp()             ssh -s … sftp

Data connections are separate on purpose: channels of one connection share its window and its one core of encryption, and a
stalled copy would block the commands. The remote user's shell is taken to be a POSIX shell.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokvm.core.errors import ConnectionLost, UsageError
from tokvm.core.text import readable
from tokvm.remote import hostkeys, process
from tokvm.remote.control import ENVIRONMENT, ControlConnection
from tokvm.remote.conversation import Conversation
from tokvm.remote.errors import SSH_FAILED, RemoteCommandError, connection_error
from tokvm.remote.process import Completed
from tokvm.remote.sftp import SftpClient
from tokvm.remote.ssh_config import SshConfig, command_bytes, quote
from tokvm.remote.stream import RemoteStream

__all__ = ["RemoteCommandError", "RemoteStream", "SshConfig", "SshHost", "quote"]


class SshHost:
    """Everything we do on one host. Connects when first used; thread-safe."""

    def __init__(self, config: SshConfig) -> None:
        self.config = config
        self._control = ControlConnection(config)

    @property
    def where(self) -> str:
        return self.config.where

    def run(
        self,
        args: Sequence[str],
        *,
        timeout_s: float = 60.0,
        check: bool = True,
        input: bytes | None = None,  # noqa: A002
    ) -> Completed:
        """Run a command with exactly these arguments; see `run_line`."""
        return self.run_line(quote(args), timeout_s=timeout_s, check=check, input=input)

    def run_line(
        self,
        command: str,
        *,
        timeout_s: float = 60.0,
        check: bool = True,
        input: bytes | None = None,  # noqa: A002
    ) -> Completed:
        """Run a command line that is already quoted, over the control connection.

        RemoteCommandError when it ends with something else than 0 (unless `check` is False). ConnectionLost when its end is
        not known, at the deadline or because the connection broke: it may have run, may still run, or never have begun.
        """
        try:
            done = self._complete(command, input=input, timeout_s=timeout_s)
        except process.ProgramTimeout as exc:
            raise ConnectionLost(
                f"`{readable(command)}` did not end within {timeout_s:g} s",
                where=self.where,
                fix="run the same command again; it asks the host first how far it got",
            ) from exc
        if done.code < 0 or done.code == SSH_FAILED:
            raise connection_error(done.stderr, where=self.where, doing=f"running `{readable(command)}`")
        if check and done.code != 0:
            raise RemoteCommandError(command, done, where=self.where)
        return done

    def converse(self, command: str) -> Conversation:
        """Start an already quoted command line that answers requests on its stdin, over the control connection.

        Comes back before the command has begun: the first request shows whether it does.
        """
        return Conversation(self._talker(command), where=self.where, command=command)

    def stream(self, command: str, *, deadline_s: float | None = None, first_byte_s: float = 0.0) -> RemoteStream:
        """What an already quoted command line writes to stdout, on a data connection of its own.

        deadline_s: instead of the configured progress deadline. first_byte_s: how long the first byte may take, if longer.
        """
        child = self._data_connection(self._command(command))
        deadline_s = deadline_s or self.config.progress_deadline_s
        return RemoteStream(child, self.config, command, deadline_s=deadline_s, first_byte_s=first_byte_s)

    def sftp(self, *, deadline_s: float | None = None) -> SftpClient:
        """A reader of the host's files, on a data connection of its own."""
        child = self._data_connection(self._sftp_arguments(), stdin=process.Stdin.PIPE)
        return SftpClient(child, self.config, deadline_s=deadline_s or self.config.progress_deadline_s)

    def fingerprint(self) -> str:
        """The host key(s) by which we know the host, `SHA256:… (ED25519)`, once it proved to have one; "" if none is on file
        (a certificate or DNS vouched for it)."""
        self._control.path()
        return ", ".join(hostkeys.believed_fingerprints(self.config))

    def close(self) -> None:
        """Hang up. Streams, conversations and sftp clients are their owners' to close."""
        self._control.close()

    def _complete(self, command: str, *, input: bytes | None, timeout_s: float) -> Completed:  # noqa: A002
        """One command over the control connection, however it ends."""
        return process.run(self._over_control(command), input=input, timeout_s=timeout_s, where=self.where, env=ENVIRONMENT)

    def _talker(self, command: str) -> process.Child:
        return process.start(self._over_control(command), where=self.where, stdin=process.Stdin.PIPE, env=ENVIRONMENT)

    def _over_control(self, command: str) -> list[process.Argument]:
        return [*self._argv(f"ControlPath={self._control.path()}"), *self._command(command)]

    def _data_connection(
        self, arguments: Sequence[process.Argument], *, stdin: process.Stdin = process.Stdin.NULL
    ) -> process.Child:
        argv = [*self._argv("ControlPath=none"), *arguments]
        return process.start(argv, where=self.where, stdin=stdin, env=ENVIRONMENT)

    def _sftp_arguments(self) -> list[process.Argument]:
        return ["-s", "--", self.config.host, "sftp"]

    def _argv(self, control_path: str) -> list[str]:
        return ["ssh", "-T", "-o", "ControlMaster=no", "-o", control_path, *self.config.arguments()]

    def _command(self, command: str) -> list[str | bytes]:
        """Without `--` ssh looks for options behind the host too, and a command `-oProxyCommand=…` would run here."""
        if not command.strip():
            raise UsageError("an empty remote command would open a shell", where=self.where)
        if "\0" in command:
            raise UsageError("a remote command cannot hold a NUL byte", where=self.where)
        return ["--", self.config.host, command_bytes(command)]
