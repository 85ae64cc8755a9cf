"""What has to go on running after `lab up` has ended: the outside clock and the link, each in a process that is written down.

python -m tokvm.lab.keeper FOLDER clock                       FOLDER/clock.port says where it listens
python -m tokvm.lab.keeper FOLDER link PORT RATE RTT_S        FOLDER/link.port (RATE 0: as fast as it goes)
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from tokvm.lab.clock import OutsideClock
from tokvm.lab.errors import LabError
from tokvm.lab.link import Link
from tokvm.testing import pids

START_TIMEOUT_S = 60.0


def start_keeper(folder: Path, what: str, *words: str) -> int:
    """Start one and wait until it listens. Returns its port."""
    log_file = folder / f"{what}.log"
    with log_file.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tokvm.lab.keeper", str(folder), what, *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    pids.note(folder / "run", what, process.pid)
    port_file = folder / f"{what}.port"
    until = time.monotonic() + START_TIMEOUT_S
    while not port_file.exists():
        if process.poll() is not None or time.monotonic() > until:
            raise LabError(f"the lab's {what} did not start", where=str(log_file))
        time.sleep(0.02)
    pids.disown(process)
    return int(port_file.read_text())


def keep_clock(folder: Path) -> None:
    with OutsideClock(folder / "clock.jsonl") as clock:
        _stay(folder / "clock.port", clock.port)


def keep_link(folder: Path, port: int, rate: float, rtt_s: float) -> None:
    with Link(port, rate=rate or None, rtt_s=rtt_s) as link:
        _stay(folder / "link.port", link.port)


def _stay(port_file: Path, port: int) -> None:
    """Say where, then be there until killed."""
    fresh = port_file.with_suffix(".new")
    fresh.write_text(f"{port}\n")
    fresh.replace(port_file)
    threading.Event().wait()


def main(words: list[str]) -> None:
    folder, what, *rest = words
    if what == "clock":
        keep_clock(Path(folder))
    else:
        port, rate, rtt_s = rest
        keep_link(Path(folder), int(port), float(rate), float(rtt_s))


if __name__ == "__main__":
    main(sys.argv[1:])
