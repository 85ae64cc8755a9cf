"""A clean process that has imported tokvm and forks a tokvm for each request: start-up costs nothing, and any may be killed.

    stdin:  {"argv": [...], "kill_at": N | null}      one JSON object a line; "domains": FILE puts a DomainHost in that file
                                                      in libvirt's place
    stdout: {"code": exit code or -signal, "events": how many kill points were passed, "stderr": "…"}

A kill point is right before each write, flush, size change, journal transaction (and right after it is committed), and start of
a program: in the copying and in all that is recorded around it. At the Nth the child kills itself with SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokvm.app.workshop
import tokvm.cli.main
from tokvm.core.errors import DomainError
from tokvm.core.machine import Finding
from tokvm.domain.base import Accel, DomainPlan, DomainState
from tokvm.domain.xml import domain_xml
from tokvm.migration.journal import Journal
from tokvm.remote import process
from tokvm.transfer.checkpoint import PassLimits

CALLS = ("pwrite", "pwritev", "fdatasync", "fsync", "ftruncate")


class KillPoints:
    def __init__(self, kill_at: int | None, counter: Path) -> None:
        self.kill_at = kill_at
        self.counter = counter
        self.passed = 0
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.passed += 1
            if self.passed == self.kill_at:
                self.save()
                os.kill(os.getpid(), signal.SIGKILL)

    def save(self) -> None:
        self.counter.write_text(str(self.passed))

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self()
            return call(*args, **kwargs)

        return wrapped

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self.before(getattr(os, name)))
        process.run = self.before(process.run)
        process.start = self.before(process.start)
        transaction = Journal.transaction

        @contextlib.contextmanager
        def watched(journal: Journal) -> Iterator[sqlite3.Connection]:
            self()
            with transaction(journal) as connection:
                yield connection
                self()
            self()

        type.__setattr__(Journal, "transaction", watched)


class FileDomainHost:
    """A DomainHost whose domains are rows of a JSON file: what a libvirtd is to tokvm, it outlives each process."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.url = f"file:{file}"

    def _states(self) -> dict[str, str]:
        return dict(json.loads(self._file.read_text())) if self._file.exists() else {}

    def _set(self, uuid: str, state: DomainState) -> None:
        states = {**self._states(), uuid: state}
        beside = self._file.with_suffix(".new")
        beside.write_text(json.dumps({name: kept for name, kept in states.items() if kept != DomainState.ABSENT}))
        beside.replace(self._file)

    def check(self, _plan: DomainPlan) -> list[Finding]:
        return []

    def domain_xml(self, plan: DomainPlan) -> str:
        return domain_xml(plan, accel=Accel.TCG)

    def define(self, plan: DomainPlan) -> None:
        if self.state(plan.vm.uuid) is DomainState.ABSENT:
            self._set(plan.vm.uuid, DomainState.OFF)

    def state(self, uuid: str) -> DomainState:
        return DomainState(self._states().get(uuid, DomainState.ABSENT))

    def start(self, uuid: str) -> None:
        if self.state(uuid) is DomainState.ABSENT:
            raise DomainError("no such domain", where=uuid)
        self._set(uuid, DomainState.RUNNING)

    def stop(self, uuid: str) -> None:
        if self.state(uuid) is DomainState.RUNNING:
            self._set(uuid, DomainState.OFF)

    def undefine(self, uuid: str) -> None:
        self._set(uuid, DomainState.ABSENT)

    def cut_network(self, uuid: str) -> None:
        raise AssertionError(f"both copies of {uuid} run")

    def alive(self, uuid: str) -> bool:
        return self.state(uuid) is DomainState.RUNNING

    def close(self) -> None: ...


def child(argv: list[str], kill_at: int | None, folder: Path, domains: str | None) -> None:
    out = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    points = KillPoints(kill_at, folder / "passed")
    PassLimits.__init__.__defaults__ = small_checkpoints()
    points.install()
    if domains is not None:
        host = FileDomainHost(Path(domains))
        for name in ("define", "start", "stop", "undefine"):
            setattr(host, name, points.before(getattr(host, name)))
        vars(tokvm.app.workshop)["LibvirtHost"] = lambda _url: host
    sys.argv = ["tokvm", *argv]
    code = 0
    try:
        tokvm.cli.main.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    points.save()
    os._exit(code)


def small_checkpoints() -> tuple[object, ...]:
    """Checkpoints every 256 KiB instead of every 32 MiB, so that a small disk has many of them."""
    defaults = dict(zip(PassLimits.__init__.__annotations__, PassLimits.__init__.__defaults__ or (), strict=False))
    return tuple({**defaults, "checkpoint_bytes": 512 << 10}.values())


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for line in sys.stdin:
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                child(request["argv"], request["kill_at"], folder, request.get("domains"))
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            said = (folder / "stderr").read_text(errors="replace")[-4000:]
            print(json.dumps({"code": code, "events": int((folder / "passed").read_text()), "stderr": said}), flush=True)


if __name__ == "__main__":
    main()
