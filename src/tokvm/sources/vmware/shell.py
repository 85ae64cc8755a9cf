"""Asking and telling a host over SSH. The commands and their order of words are those of docs/esxi-commands.md.

ask      several reads in one line, `C; echo TAG $?; …`: one session; again once when the connection just broke
act      one change; never repeated: after ConnectionLost it may have worked, so whoever ordered it looks
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tokvm.core.errors import ConnectionLost, SourceError
from tokvm.core.text import readable
from tokvm.remote.errors import LoginRefused
from tokvm.remote.process import Completed, ProgramError
from tokvm.remote.sftp import SftpClient
from tokvm.remote.ssh import quote
from tokvm.sources.vmware import faults
from tokvm.sources.vmware.faults import EsxError, Fault
from tokvm.sources.vmware.fields import Fields, confused

READ_S = 90.0  # vim-cmd takes half a second, on a busy host several; esxcli may hang while vim-cmd answers
ACT_S = 120.0
_AGAIN_BELOW_S = 20.0  # a read that failed sooner than this is asked once more: the connection broke, the host is not hanging
_MOST_AT_ONCE = 40

Command = tuple[str, ...]


class Host(Protocol):
    """What is needed of `remote.ssh.SshHost`."""

    @property
    def where(self) -> str: ...

    def run_line(self, command: str, *, timeout_s: float = ..., check: bool = ...) -> Completed: ...

    def sftp(self) -> SftpClient: ...

    def fingerprint(self) -> str: ...

    def close(self) -> None: ...


def vim(verb: str, *args: str | int) -> Command:
    return ("vim-cmd", verb, *(str(arg) for arg in args))


@dataclass(frozen=True, slots=True)
class Answer:
    """What one command of a batch printed, and its exit code."""

    command: Command
    where: str
    code: int
    text: str

    @property
    def what(self) -> str:
        return quote(self.command)

    def refusal(self) -> EsxError | None:
        """The fault that it is; None when it is an answer."""
        if faults.fault_name(self.text) is not None:
            return faults.explain(self.text, command=self.what, where=self.where)
        return None

    def checked(self) -> str:
        """The text. EsxError when it is a fault, or the command failed."""
        refusal = self.refusal()
        if refusal is not None:
            raise refusal
        if self.code:
            raise faults.explain(self.text, command=self.what, where=self.where)
        return self.text

    def fields(self, *, known: Sequence[str] = ()) -> Fields:
        """The object that a dump is."""
        return Fields.of(self.checked(), self.where, self.what, known=known)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a change ended: what it printed. failed: it says so of itself, which does not mean that nothing happened."""

    command: str
    where: str
    code: int
    text: str
    failed: bool

    @property
    def fault(self) -> Fault | None:
        """Why it says that it failed; None when it does not."""
        return self.error().fault if self.failed else None

    def error(self) -> EsxError:
        return faults.explain(self.text, command=self.command, where=self.where)


class Shell:
    """One host's shell. Thread-safe."""

    def __init__(self, host: Host) -> None:
        self._host = host

    @property
    def where(self) -> str:
        return self._host.where

    def ask(self, commands: Sequence[Command]) -> list[Answer]:
        """The answers of reads, in order. ConnectionLost also while the host's management service is away."""
        found: list[Answer] = []
        for start in range(0, len(commands), _MOST_AT_ONCE):
            found += self._patiently(commands[start : start + _MOST_AT_ONCE])
        return found

    def ask_one(self, *command: str) -> str:
        return self.ask([command])[0].checked()

    def _patiently(self, commands: Sequence[Command]) -> list[Answer]:
        begun = time.monotonic()
        try:
            return self._batch(commands)
        except ConnectionLost:
            if time.monotonic() - begun > _AGAIN_BELOW_S:
                raise
            return self._batch(commands)

    def _batch(self, commands: Sequence[Command]) -> list[Answer]:
        answers, said = self._tagged(commands)
        return [self._present(answer, said) for answer in answers]

    def _tagged(self, commands: Sequence[Command]) -> tuple[list[Answer], str]:
        """(answers, what the line said on stderr)."""
        tag = f"tokvm-{secrets.token_hex(8)}"
        line = "; ".join(f"{quote(command)}; echo {tag} $?" for command in commands)
        done = self._run(line, READ_S + len(commands))
        parts = re.split(rf"{tag} ([0-9]{{1,3}})\r?\n", done.text)
        if len(parts) != 2 * len(commands) + 1 or parts[-1]:
            raise ConnectionLost(
                f"{len(parts) // 2} answers came to {len(commands)} questions, from `{readable(line, limit=160)}`",
                where=self.where,
                fix="run the same command again; if it stays so, look whether a login script of the host prints something",
            )
        found = zip(commands, parts[::2], parts[1::2], strict=False)
        answers = [Answer(command, self.where, int(code), text) for command, text, code in found]
        return answers, done.stderr.decode("utf-8", "replace")

    def _present(self, answer: Answer, said: str) -> Answer:
        """said: what the whole line said on stderr."""
        text = answer.text.strip() or said.strip()
        if answer.code and answer.command[0] in ("vim-cmd", "esxcli") and faults.is_away(text):
            raise ConnectionLost(
                f"the host's management service does not answer ({readable(text, limit=120)})",
                where=self.where,
                fix="it restarts within a minute mostly (/etc/init.d/hostd status); run the same command again",
            )
        return answer

    def act(self, command: Command, *, timeout_s: float = ACT_S) -> Outcome:
        return self.act_line(quote(command), timeout_s=timeout_s)

    def act_line(self, line: str, *, timeout_s: float = ACT_S) -> Outcome:
        """A change, as an already quoted line."""
        done = self._run(line, timeout_s)
        said = done.text + done.stderr.decode("utf-8", "replace") if done.code else done.text
        return Outcome(line, self.where, done.code, said, bool(done.code) or faults.is_failure(done.text))

    def said(self, command: Command) -> tuple[int, str]:
        """Exit code and error text of a read: for those whose words are needed, not their output."""
        (answer,), said = self._tagged([command])
        return answer.code, said

    def _run(self, line: str, timeout_s: float) -> Completed:
        try:
            return self._host.run_line(line, timeout_s=timeout_s, check=False)
        except ProgramError as failed:
            raise confused(self.where, line, failed.what) from failed
        except LoginRefused as refused:
            raise with_key_advice(refused) from refused


def with_key_advice(refused: LoginRefused) -> SourceError:
    """ESXi's sshd runs in FIPS mode: a key of type ed25519 is refused however well it is installed."""
    return LoginRefused(
        refused.what,
        where=refused.where,
        fix=f"{refused.fix}. ESXi refuses ed25519 keys (FIPS mode), even installed ones: use one made by `ssh-keygen -t rsa -b "
        "3072` or `-t ecdsa`, in /etc/ssh/keys-root/authorized_keys",
    )
