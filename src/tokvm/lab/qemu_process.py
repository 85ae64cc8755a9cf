"""One QEMU as a daemon that outlives whoever started it, found again through files.

<dir>/qemu.pid    QEMU's own pid file; believed when that process has our `mark` among its arguments
      qmp.sock    the monitor
      intent      what was last asked for, which tells an end that was wanted from a crash
      qemu.log    what QEMU complained of
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from tokvm.lab.errors import LabError
from tokvm.lab.programs import find_program, run_program
from tokvm.lab.qmp import Qmp

log = logging.getLogger(__name__)

QUIT_S = 10.0
START_TIMEOUT_S = 60.0
DEAD_STATES = frozenset({"guest-panicked", "internal-error", "io-error"})


class VmStatus(StrEnum):
    RUNNING = "running"
    OFF = "off"
    CRASHED = "crashed"
    """QEMU ended although nobody asked for it, or it stands still after a guest's panic or an I/O error."""


class Intent(StrEnum):
    ON = "on"
    OFF = "off"


class QemuProcess:
    """The QEMU that belongs to `folder`; `mark` is the name it was started with."""

    def __init__(self, folder: Path, *, mark: str) -> None:
        self.folder = folder
        self.mark = mark

    def start(self, options: Sequence[str]) -> None:
        """Start it; back when its monitor listens. LabError with QEMU's complaint when it does not come up."""
        (self.folder / "qmp.sock").unlink(missing_ok=True)
        # Relative socket and log names: a unix socket's path may have no more than 107 bytes. QEMU opens them before it
        # leaves its working directory.
        argv = [
            "env",
            "-C",
            str(self.folder),
            find_program("qemu-system-x86_64", package="qemu-system-x86"),
            "-name",
            self.mark,
        ]
        argv += ["-daemonize", "-pidfile", str(self.folder / "qemu.pid"), "-D", "qemu.log"]
        argv += ["-qmp", "unix:qmp.sock,server=on,wait=off", *options]
        run_program(argv, package="coreutils", timeout_s=START_TIMEOUT_S)

    def pid(self) -> int | None:
        """Its process while it lives."""
        try:
            pid = int((self.folder / "qemu.pid").read_text())
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return pid if self.mark.encode() in words else None

    def qmp(self) -> Qmp:
        return Qmp(self.folder / "qmp.sock")

    def command(self, name: str) -> None:
        """A command whose success shows elsewhere; QEMU may end before it answers."""
        try:
            with self.qmp() as qmp:
                qmp.execute(name)
        except LabError as exc:
            log.debug("%s: %s", name, exc)

    def status(self) -> VmStatus:
        """What is so now: the process, and what QEMU says of the guest."""
        if self.pid() is not None:
            try:
                with self.qmp() as qmp:
                    said = str(qmp.execute("query-status")["status"])
            except LabError:
                if self.pid() is not None:  # else it ended while we asked
                    raise
            else:
                return VmStatus.CRASHED if said in DEAD_STATES else VmStatus.RUNNING
        return VmStatus.CRASHED if self._intent() is Intent.ON else VmStatus.OFF

    def intend(self, intent: Intent) -> None:
        """Note what is about to be asked for."""
        (self.folder / "intent").write_text(intent)

    def quit(self) -> None:
        """End it: the guest gets no warning, QEMU closes its files; killed when it does not. Ended already is success."""
        self.intend(Intent.OFF)
        if self.pid() is not None:
            self.command("quit")
        self.end(patience_s=QUIT_S)

    def end(self, *, patience_s: float = 0) -> None:
        """Wait that long for its end, then kill it."""
        deadline = time.monotonic() + patience_s
        while self.pid() is not None and time.monotonic() < deadline:
            time.sleep(0.02)
        if (pid := self.pid()) is not None:
            log.info("killing %s, pid %d", self.mark, pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while self.pid() is not None:
            time.sleep(0.02)

    def _intent(self) -> Intent:
        try:
            return Intent((self.folder / "intent").read_text())
        except (OSError, ValueError):
            return Intent.OFF
