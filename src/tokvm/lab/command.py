"""tokvm's own command line as the lab calls it: a process, as an operator would start it, its events read on the way."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokvm.guest.base import Way
from tokvm.lab.errors import LabError
from tokvm.lab.home import LabRecord
from tokvm.lab.kernel import appliance_environment
from tokvm.testing import pids

log = logging.getLogger(__name__)

TAIL_LINES = 40
LIFE = "LAB-GUEST READY"
"""What every lab guest prints on its serial port when it has begun its work (a regular expression)."""


@dataclass(frozen=True, slots=True)
class Event:
    """A line of `--events`; `at` is CLOCK_MONOTONIC when it arrived, to lay beside the outside clock's times."""

    at: float
    fields: dict[str, object]

    @property
    def name(self) -> str:
        return str(self.fields.get("event", ""))


@dataclass(slots=True)
class Finished:
    """How the command ended. `document`: its JSON; empty when there was none."""

    code: int
    document: dict[str, object]
    events: list[Event] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)


def migrate_argv(record: LabRecord, folder: Path, name: str, *, passes: int) -> list[str]:
    """`--proof 0`: the guest has no agent; that it lives is the outside clock's to say."""
    return [*_begin("migrate", record, folder, name, passes=passes), "--proof", "0s"]


def sync_argv(record: LabRecord, folder: Path, name: str, *, passes: int) -> list[str]:
    return _begin("sync", record, folder, name, passes=passes)


def rehearse_argv(folder: Path, name: str, *, way: Way | None, deadline_s: float, boots: int = 1) -> list[str]:
    words = ("--sign-serial", LIFE, "--deadline", f"{deadline_s:g}s", "--boots", str(boots))
    return _go_on("rehearse", folder, name, way, *words)


def cutover_argv(folder: Path, name: str, *, way: Way | None) -> list[str]:
    return _go_on("cutover", folder, name, way, "--proof", "0s")


def _begin(verb: str, record: LabRecord, folder: Path, name: str, *, passes: int) -> list[str]:
    return [
        *(verb, record.url, name, *record.options),
        *("--to", str(target_folder(folder, name)), "--state-dir", str(folder / "state")),
        *("--ssh-config", record.ssh_config, "--libvirt", record.libvirt, "--network", "*=user"),
        *("--passes", str(passes), "--json", "--events"),
    ]


def _go_on(verb: str, folder: Path, name: str, way: Way | None, *words: str) -> list[str]:
    chosen = () if way is None else ("--way", way.value)
    return [verb, name, "--state-dir", str(folder / "state"), *chosen, *words, "--json", "--events"]


def finish_argv(folder: Path, name: str) -> list[str]:
    return ["finish", name, "--state-dir", str(folder / "state"), "--json", "--events"]


def report_argv(folder: Path, name: str, svg: Path, *, outside_s: float) -> list[str]:
    clock = ("--outside-clock", f"{outside_s:g}s")
    return ["report", name, "--state-dir", str(folder / "state"), "--svg", str(svg.absolute()), *clock, "--json"]


def target_folder(folder: Path, name: str) -> Path:
    return folder / "target" / name


def run_tokvm(
    arguments: Sequence[str], folder: Path, *, timeout_s: float, on_event: Callable[[Event], None] | None = None
) -> Finished:
    """Run `tokvm arguments…` to its end. LabError when it does not come to one. It finds the lab's kernel for libguestfs'
    appliance, and the lab's folder as its own: supermin copies what lies where it is started."""
    argv = [sys.executable, "-m", "tokvm", *arguments]
    log.info("%s", " ".join(argv))
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={**os.environ, **appliance_environment()},
    )
    note = pids.note(folder / "run", f"tokvm-{process.pid}", process.pid)
    done = Finished(-1, {})
    reader = threading.Thread(target=_read_events, args=(process, done, on_event), daemon=True)
    reader.start()
    timer = threading.Timer(timeout_s, process.kill)
    timer.start()
    try:
        output = process.stdout.read() if process.stdout is not None else b""
        done.code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        note.unlink(missing_ok=True)
    if done.code == -9:
        raise LabError(f"tokvm {arguments[0]} was killed, or did not end within {timeout_s:g} s", fix="\n".join(done.messages))
    done.document = _document(output)
    return done


def _read_events(process: subprocess.Popen[bytes], done: Finished, on_event: Callable[[Event], None] | None) -> None:
    if process.stderr is None:
        return
    for line in process.stderr:
        at = time.monotonic()
        try:
            fields = json.loads(line)
        except ValueError:
            fields = None
        if isinstance(fields, dict) and "event" in fields:
            event = Event(at, fields)
            done.events.append(event)
            if on_event is not None:
                on_event(event)
        else:
            done.messages = [*done.messages, line.decode(errors="replace").rstrip()][-TAIL_LINES:]


def _document(output: bytes) -> dict[str, object]:
    try:
        document = json.loads(output)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}
