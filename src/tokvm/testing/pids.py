"""Processes that outlive the one that started them, found again without ever hitting an innocent.

A pid alone is not a name: the kernel gives it out again. A pid with the clock tick it was started at is (proc(5), field 22
of /proc/PID/stat), so both are written down and both must match before anything is killed.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing it would cost every played command 10 ms
    import subprocess

PID_SUFFIX = ".pid"


def start_tick(pid: int) -> int | None:
    """The clock tick since boot at which the process started; None when it is not there (or a zombie)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()  # the name before it may hold blanks and brackets
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def note(folder: Path, name: str, pid: int) -> Path:
    """Write down that `pid` is ours. Returns the file, which `forget` or `kill_noted` removes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{PID_SUFFIX}"
    fresh = folder / f"{name}.new"  # whoever kills what is noted must never see half a note
    fresh.write_text(f"{pid} {start_tick(pid) or 0}\n")
    fresh.replace(path)
    return path


def noted(path: Path) -> int | None:
    """The pid in the file while that very process lives, else None."""
    try:
        words = path.read_text().split()
        pid, tick = int(words[0]), int(words[1])
    except (OSError, ValueError, IndexError):
        return None
    return pid if tick and start_tick(pid) == tick else None


def disown(process: subprocess.Popen[bytes]) -> None:
    """The process outlives us: subprocess need neither wait for it nor warn that nobody did."""
    process.returncode = 0


def ancestors(pid: int) -> list[int]:
    """The process itself, its parent, and so on, as far as can be seen."""
    found = []
    while pid > 0:
        found.append(pid)
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            break
        pid = int(stat[stat.rindex(b")") + 2 :].split()[1])
    return found


def descendants(pid: int) -> list[int]:
    """Children of `pid` and theirs, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_bytes()
        except OSError:
            continue
        children.setdefault(int(stat[stat.rindex(b")") + 2 :].split()[1]), []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            found.append(child)
            waiting.append(child)
    return found


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def kill_tree(pid: int) -> None:
    """SIGKILL for the process and all it started that still hangs on it."""
    family = [pid, *descendants(pid)]
    for member in family:
        kill(member)


def kill_noted(folder: Path) -> int:
    """Kill every process written down in `folder` that still lives, with its children. Returns how many there were."""
    killed = 0
    for path in sorted(folder.glob(f"*{PID_SUFFIX}")) if folder.is_dir() else []:
        pid = noted(path)
        if pid is not None and pid != os.getpid():
            kill_tree(pid)
            killed += wait_gone(pid)
        path.unlink(missing_ok=True)
    return killed


def wait_gone(pid: int, timeout_s: float = 5.0) -> bool:
    """True once the process is gone (a zombie that waits for its parent counts as gone)."""
    until = time.monotonic() + timeout_s
    while start_tick(pid) is not None:
        if time.monotonic() > until:
            return False
        time.sleep(0.005)
    return True
