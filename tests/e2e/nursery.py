"""A clean process that has imported tokvm and forks a tokvm for each request: start-up costs nothing, and any may be killed.

    arguments: modules to import beforehand, too

    stdin:  {"argv": [...], "kill_at": N, "stop": [moment, nth], "domains": FILE, "patience": seconds,
             "calls": {name: method}}
                      one JSON object a line, each but argv may be null; "domains" puts a DomainHost in that file in libvirt's
                      place, "patience" instead of all the minutes for which a source is waited for; "calls" names those
                      of vSphere's API that change something, {} where there is none
    stdout: {"stopped": moment}      tokvm stands still, all its threads, until a line comes
            {"code": exit code or -signal, "events": how many kill points were passed, "stderr": "…"}

A kill point is right before each write, flush, size change, journal transaction (and right after it is committed), start of a
program, change of a domain, and before and after each script that a Hyper-V host runs and each change that an ESXi host is told
to make: in the copying and in all that is recorded around it. At the Nth the child kills itself with SIGKILL.

A moment is the name of a kill point, or of a phase that was just recorded:

    target:pwrite …     pwrite …     program     journal     define start stop undefine     script:NAME did:NAME     phase:NAME

NAME of an ESXi's change is vim-cmd's, without what stands before the slash: `snapshot.create`. What vSphere's API is told has
the same names; `did` is when its answer came: a task may go on.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokvm.app.workshop
import tokvm.cli.main
import tokvm.sources.hyperv.power
import tokvm.sources.vmware.power
from tokvm.core.errors import DomainError
from tokvm.core.machine import Finding
from tokvm.domain.base import Accel, DomainPlan, DomainState
from tokvm.domain.xml import domain_xml
from tokvm.migration.book import Book
from tokvm.migration.journal import Journal
from tokvm.migration.phases import Phase
from tokvm.migration.runner import Migration
from tokvm.remote import process
from tokvm.sources.hyperv.powershell import Asking, Value
from tokvm.sources.hyperv.source import HyperVSource
from tokvm.sources.vmware.shell import Outcome, Shell
from tokvm.transfer.checkpoint import PassLimits

CALLS = ("pwrite", "pwritev", "fdatasync", "fsync", "ftruncate")


class KillPoints:
    """stop: the moment at which to stand still, and at which time of coming there. out: where that is told."""

    def __init__(self, kill_at: int | None, counter: Path, stop: tuple[str, int] | None, out: int) -> None:
        self.kill_at = kill_at
        self.counter = counter
        self.passed = 0
        self._moment, self._left = stop or ("", 0)
        self._out = out
        self._lock = threading.Lock()

    def __call__(self, name: str) -> None:
        with self._lock:
            self.passed += 1
            if self.passed == self.kill_at:
                self.save()
                os.kill(os.getpid(), signal.SIGKILL)
            self._stand_still_at(name)

    def phase(self, phase: str) -> None:
        with self._lock:
            self._stand_still_at(f"phase:{phase}")

    def _stand_still_at(self, name: str) -> None:
        if name != self._moment:
            return
        self._left -= 1
        if self._left == 0:
            os.write(self._out, json.dumps({"stopped": name}).encode() + b"\n")
            while os.read(0, 1) != b"\n":
                pass

    def save(self) -> None:
        self.counter.write_text(str(self.passed))

    def before(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self(name)
            return call(*args, **kwargs)

        return wrapped

    def before_a_write(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(fd: int, *args: Any) -> Any:
            to_target = Path(f"/proc/self/fd/{fd}").readlink().suffix == ".raw"
            self(f"target:{name}" if to_target else name)
            return call(fd, *args)

        return wrapped

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self.before_a_write(getattr(os, name), name))
        process.run = self.before(process.run, "program")
        process.start = self.before(process.start, "program")
        transaction, advance = Journal.transaction, Book.advance

        @contextlib.contextmanager
        def watched(journal: Journal) -> Iterator[sqlite3.Connection]:
            self("journal")
            with transaction(journal) as connection:
                yield connection
                self("journal")
            self("journal")

        def advanced(book: Book, *args: Any, **kwargs: Any) -> Phase:
            phase = advance(book, *args, **kwargs)
            self.phase(phase)
            return phase

        type.__setattr__(Journal, "transaction", watched)
        type.__setattr__(Book, "advance", advanced)


class WatchedShell:
    """The scripts of a Hyper-V host, however they get there."""

    def __init__(self, inner: Asking, points: KillPoints, patience_s: float | None) -> None:
        self._inner = inner
        self._points = points
        self._patience_s = patience_s

    @property
    def where(self) -> str:
        return self._inner.where

    def ask(self, script: str, data: Value, **how: float) -> Value:
        return self._watched(self._inner.ask, script, data, how)

    def act(self, script: str, data: Value, **how: float) -> Value:
        return self._watched(self._inner.act, script, data, how)

    def _watched(self, send: Callable[..., Value], script: str, data: Value, how: dict[str, float]) -> Value:
        self._points(f"script:{script}")
        if self._patience_s is not None:
            how = {"timeout_s": min(self._patience_s, how.get("timeout_s", self._patience_s))}
        try:
            return send(script, data, **how)
        finally:
            self._points(f"did:{script}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @classmethod
    def install(cls, points: KillPoints, patience_s: float | None) -> None:
        made = HyperVSource.__init__

        def init(source: HyperVSource, *args: Any, **kwargs: Any) -> None:
            made(source, *args, **kwargs)
            vars(source)["_shell"] = cls(vars(source)["_shell"], points, patience_s)

        type.__setattr__(HyperVSource, "__init__", init)


def watch_esx(points: KillPoints, patience_s: float | None) -> None:
    """The changes that an ESXi host is told to make."""
    act_line, run = Shell.act_line, vars(Shell)["_run"]

    def watched(shell: Shell, line: str, **how: float) -> Outcome:
        words = line.split()
        name = words[1].rpartition("/")[2] if words[0] == "vim-cmd" else words[0]
        points(f"script:{name}")
        try:
            return act_line(shell, line, **how)
        finally:
            points(f"did:{name}")

    def impatient(shell: Shell, line: str, timeout_s: float) -> process.Completed:
        done: process.Completed = run(shell, line, timeout_s if patience_s is None else min(patience_s, timeout_s))
        return done

    type.__setattr__(Shell, "act_line", watched)
    type.__setattr__(Shell, "_run", impatient)


def watch_vsphere(points: KillPoints, patience_s: float | None, calls: dict[str, str]) -> None:
    """The changes that a vCenter or an ESXi is told to make by its API, which is looked at more often than in earnest."""
    from tokvm.sources.vmware.api import client, lease, power, snapshots, tasks
    from tokvm.sources.vmware.api.vmomi import SoapStubAdapter

    names = {call: name for name, call in calls.items()}
    invoke = SoapStubAdapter.InvokeMethod

    def watched(stub: Any, mo: Any, info: Any, args: Any, *more: Any) -> Any:
        name = names.get(str(info.wsdlName))
        if name is None:
            return invoke(stub, mo, info, args, *more)
        points(f"script:{name}")
        try:
            return invoke(stub, mo, info, args, *more)
        finally:
            points(f"did:{name}")

    SoapStubAdapter.InvokeMethod = watched
    for module in (lease, power, snapshots, tasks):
        vars(module)["POLL_S"] = 0.05
    if patience_s is not None:
        limits = ("CALL_S", "LANDS_S", "LANDING_S", "START_S", "FORCED_S", "TAKE_S", "BUSY_S")
        for module in (client, power, snapshots, tasks):
            vars(module).update({name: patience_s for name in limits if name in vars(module)})
        (tasks.run.__kwdefaults__ or {})["busy_s"] = patience_s


class FileDomainHost:
    """A DomainHost whose domains are rows of a JSON file: what a libvirtd is to tokvm, it outlives each process."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.url = f"file:{file}"

    def _states(self) -> dict[str, str]:
        return dict(json.loads(self._file.read_text())) if self._file.exists() else {}

    def _set(self, uuid: str, state: DomainState) -> None:
        states = {**self._states(), uuid: state}
        self._log(state)
        beside = self._file.with_suffix(".new")
        beside.write_text(json.dumps({name: kept for name, kept in states.items() if kept != DomainState.ABSENT}))
        beside.replace(self._file)

    def _log(self, state: str) -> None:
        with self._file.with_suffix(".log").open("a") as log:
            log.write(json.dumps({"time": time.time(), "state": state}) + "\n")

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

    def cut_network(self, _uuid: str) -> None:
        self._log("network cut")

    def alive(self, uuid: str) -> bool:
        return self.state(uuid) is DomainState.RUNNING

    def close(self) -> None: ...


def child(request: dict[str, Any], folder: Path) -> None:
    told = os.dup(1)
    out = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    points = KillPoints(request["kill_at"], folder / "passed", request["stop"], told)
    PassLimits.__init__.__defaults__ = small_checkpoints()
    points.install()
    WatchedShell.install(points, request["patience"])
    watch_esx(points, request["patience"])
    if request["calls"]:
        watch_vsphere(points, request["patience"], request["calls"])
    if request["patience"] is not None:
        have_less_patience(request["patience"])
    host = FileDomainHost(Path(request["domains"]))
    for name in ("define", "start", "stop", "undefine"):
        setattr(host, name, points.before(getattr(host, name), name))
    vars(tokvm.app.workshop)["LibvirtHost"] = lambda _url: host
    sys.argv = ["tokvm", *request["argv"]]
    code = 0
    try:
        tokvm.cli.main.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    points.save()
    os._exit(code)


def have_less_patience(seconds: float) -> None:
    """A guest's late stop, and a source that cannot be reached, are waited for not for minutes but for seconds."""
    for power in (tokvm.sources.hyperv.power, tokvm.sources.vmware.power):
        vars(power)["LANDS_S"] = seconds
    vars(Migration)["cutover"].__kwdefaults__.update(rescue_s=2 * seconds, late_stop_s=4 * seconds)


def small_checkpoints() -> tuple[object, ...]:
    """Checkpoints every 256 KiB instead of every 32 MiB, so that a small disk has many of them."""
    defaults = dict(zip(PassLimits.__init__.__annotations__, PassLimits.__init__.__defaults__ or (), strict=False))
    return tuple({**defaults, "checkpoint_bytes": 512 << 10}.values())


def main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for line in sys.stdin:
            pid = os.fork()
            if pid == 0:
                child(json.loads(line), folder)
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            said = (folder / "stderr").read_text(errors="replace")[-4000:]
            print(json.dumps({"code": code, "events": int((folder / "passed").read_text()), "stderr": said}), flush=True)


if __name__ == "__main__":
    main()
