"""A played host from outside: its folder, its real sshd, the launcher of its commands, its logs."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import tokvm
from tokvm.testing.persona.store import Store
from tokvm.testing.sshd import Lifetime, Sshd

Record = dict[str, object]


class PlayedHost:
    """A host in a folder. persona: the module whose `main(folder)` answers a command; subsystem: how it is asked for sftp."""

    scheme: ClassVar[str]
    persona: ClassVar[str]
    launcher_name: ClassVar[str]
    subsystem: ClassVar[str] = ""

    def __init__(self, folder: Path, *, lifetime: Lifetime = Lifetime.WITH_US) -> None:
        self.folder = folder.absolute()
        self.store: Store[Any] = Store(self.folder)
        self._lifetime = lifetime
        self._sshd: Sshd | None = None

    @property
    def launcher(self) -> Path:
        """The program to give as a forced command."""
        return self.folder / self.launcher_name

    def write_launcher(self, *, site: bool) -> None:
        """A script that starts the persona with as little of Python as it needs (20 ms, not 100)."""
        source = str(Path(tokvm.__file__).parents[1])
        folder = str(self.folder)
        code = f"import sys; sys.path.insert(0, {source!r}); from {self.persona} import main; main({folder!r})"
        flags = ["-s"] if site else ["-I", "-S"]
        self.launcher.write_text(f"#!/bin/sh\nexec {shlex.join([sys.executable, *flags, '-c', code])}\n")
        self.launcher.chmod(0o755)

    @property
    def sshd(self) -> Sshd:
        """Its real sshd, running; `user`, `port`, `config_file`, `netloc` lead to it."""
        if self._sshd is None:
            self._sshd = self._make_sshd()
        return self._sshd.start(self._lifetime)

    def _make_sshd(self) -> Sshd:
        return Sshd(self.folder / "sshd", forced_command=[str(self.launcher)], sftp=self.subsystem)

    @property
    def url(self) -> str:
        """`scheme://user@127.0.0.1:port`"""
        return f"{self.scheme}://{self.sshd.netloc}"

    def reach(self, netloc: str) -> tuple[str, list[str]]:
        """(URL, no options) for where its sshd is, or what stands before it."""
        return f"{self.scheme}://{netloc}", []

    def execute(self, line: str, stdin: bytes | None = None, *, timeout_s: float) -> subprocess.CompletedProcess[bytes]:
        """A command line without SSH in between."""
        environment = {**os.environ, "SSH_ORIGINAL_COMMAND": line}
        return subprocess.run(
            [str(self.launcher)], env=environment, input=stdin, capture_output=True, timeout=timeout_s, check=False
        )

    def close(self) -> None:
        """Stop sshd. The folder stays."""
        (self._sshd or self._make_sshd()).stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def violations(self) -> list[Record]:
        """Commands that no row of the contract allows. Any at all is a bug in who sent it."""
        return self._log("violations")

    def commands(self) -> list[str]:
        """Every command line, in the order of arrival."""
        return [str(row["command"]) for row in self._log("commands.log") if "command" in row]

    def _log(self, name: str) -> list[Record]:
        try:
            lines = (self.folder / name).read_text(encoding="ascii").splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]
