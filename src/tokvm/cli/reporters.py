"""How long work shows: bars on a terminal, a line every few seconds off it, JSON lines with --events. All on stderr."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from tokvm.core.text import printable
from tokvm.core.units import format_bytes, format_duration, format_rate
from tokvm.transfer.progress import Meter

PLAIN_INTERVAL_S = 5.0
EVENT_INTERVAL_S = 1.0


class PlainReporter:
    """Lines for a log: one when something begins or ends, one every few seconds while bytes move."""

    def __init__(self, out: TextIO | None = None, interval_s: float = PLAIN_INTERVAL_S) -> None:
        self._out = out or sys.stderr
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._passes: dict[int, _Moving] = {}

    def phase(self, phase: str) -> None:
        self._line(f"phase {phase}")

    def step(self, name: str) -> None:
        self._line(name)

    def note(self, text: str) -> None:
        self._line(text)

    def downtime(self, part: str, seconds: float) -> None:
        self._line(f"downtime: {part} took {format_duration(seconds)}")

    def pass_begin(self, n: int, kind: str, disk: int, total: int) -> None:
        with self._lock:
            self._passes[disk] = _Moving(n, kind, total)
        self._line(f"pass {n} ({kind}) of disk {disk}: up to {format_bytes(total)}")

    def advance(self, disk: int, count: int) -> None:
        with self._lock:
            moving = self._passes.get(disk)
            if moving is None:
                return
            moving.meter.advance(count)
            now = time.monotonic()
            if now - moving.shown < self._interval_s:
                return
            moving.shown = now
            text = moving.text(disk)
        self._line(text)

    def pass_end(self, n: int, kind: str, moved: int, seconds: float) -> None:
        rate = f", {format_rate(moved / seconds)}" if seconds > 0 else ""
        self._line(f"pass {n} ({kind}) done: {format_bytes(moved)} in {format_duration(seconds)}{rate}")

    def close(self) -> None:
        self._out.flush()

    def _line(self, text: str) -> None:
        with self._lock:
            print(f"{time.strftime('%H:%M:%S')} {printable(text)}", file=self._out, flush=True)


class _Moving:
    """A pass on one disk, as far as it has come."""

    def __init__(self, n: int, kind: str, total: int) -> None:
        self.n, self.kind = n, kind
        self.meter = Meter(total)
        self.shown = time.monotonic()

    def text(self, disk: int) -> str:
        meter = self.meter
        eta = f", {format_duration(meter.left_s)} left at most" if meter.left_s else ""
        return (
            f"pass {self.n} ({self.kind}) of disk {disk}: {format_bytes(meter.done)} of {format_bytes(meter.total)}, "
            f"{format_rate(meter.rate)}{eta}"
        )


class EventReporter:
    """One JSON object a line. Every object has `event` and `time` (seconds since 1970); the rest depends on the event."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._lock = threading.Lock()
        self._done: dict[int, int] = {}
        self._shown: dict[int, float] = {}

    def phase(self, phase: str) -> None:
        self._emit("phase", phase=str(phase))

    def step(self, name: str) -> None:
        self._emit("step", step=name)

    def note(self, text: str) -> None:
        self._emit("note", text=text)

    def downtime(self, part: str, seconds: float) -> None:
        self._emit("downtime", part=part, seconds=round(seconds, 3))

    def pass_begin(self, n: int, kind: str, disk: int, total: int) -> None:
        self._done[disk] = 0
        self._emit("pass_begin", number=n, kind=kind, disk=disk, total=total)

    def advance(self, disk: int, count: int) -> None:
        with self._lock:
            self._done[disk] = self._done.get(disk, 0) + count
            now = time.monotonic()
            if now - self._shown.get(disk, 0.0) < EVENT_INTERVAL_S:
                return
            self._shown[disk] = now
            done = self._done[disk]
        self._emit("progress", disk=disk, bytes=done)

    def pass_end(self, n: int, kind: str, moved: int, seconds: float) -> None:
        self._emit("pass_end", number=n, kind=kind, bytes=moved, seconds=round(seconds, 3))

    def close(self) -> None:
        self._out.flush()

    def _emit(self, event: str, **fields: object) -> None:
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields})
        with self._lock:
            print(line, file=self._out, flush=True)


class TerminalReporter:
    """A bar for each disk on the move; lines above it for what begins and ends."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[int, TaskID] = {}
        self._progress.start()

    def phase(self, phase: str) -> None:
        self._say(f"[bold]{phase}[/bold]", markup=True)

    def step(self, name: str) -> None:
        self._say(name)

    def note(self, text: str) -> None:
        self._say(text)

    def downtime(self, part: str, seconds: float) -> None:
        self._say(f"downtime: {part} took {format_duration(seconds)}")

    def pass_begin(self, n: int, kind: str, disk: int, total: int) -> None:
        self._forget(disk)
        self._tasks[disk] = self._progress.add_task(f"pass {n} ({kind}) disk {disk}", total=total or None)

    def advance(self, disk: int, count: int) -> None:
        if disk in self._tasks:
            self._progress.advance(self._tasks[disk], count)

    def pass_end(self, n: int, kind: str, moved: int, seconds: float) -> None:
        for disk in list(self._tasks):
            self._forget(disk)
        rate = f", {format_rate(moved / seconds)}" if seconds > 0 else ""
        self._say(f"pass {n} ({kind}): {format_bytes(moved)} in {format_duration(seconds)}{rate}")

    def close(self) -> None:
        self._progress.stop()

    def _forget(self, disk: int) -> None:
        task = self._tasks.pop(disk, None)
        if task is not None:
            self._progress.remove_task(task)

    def _say(self, text: str, *, markup: bool = False) -> None:
        self._console.print(text if markup else printable(text), markup=markup)


Reporter = PlainReporter | EventReporter | TerminalReporter


def choose_reporter(*, events: bool) -> Reporter:
    if events:
        return EventReporter()
    if sys.stderr.isatty():
        return TerminalReporter()
    return PlainReporter()
