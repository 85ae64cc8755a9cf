"""A child that does something and is killed at its Nth write (or in the middle of it), flush, rename, removal or program."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokvm.core.units import SECTOR
from tokvm.remote import process

WRITES = ("write", "pwrite")
CALLS = (*WRITES, "fsync", "fdatasync", "replace", "unlink", "mkdir", "ftruncate")
KILLED = -signal.SIGKILL


def run_child(act: Callable[[], None], *, kill_at: int | None, seed: int = 0, counter: Path | None = None) -> int:
    """Exit code of a fork that does `act` (0, 1 for an exception, -9). counter: gets how many kill points were passed."""
    pid = os.fork()
    if pid == 0:
        points = _Points(kill_at, random.Random(seed))
        points.install()
        code = 0
        try:
            act()
        except BaseException:  # noqa: BLE001 - a child of a fork must not go on into pytest
            traceback.print_exc()
            code = 1
        if counter is not None:
            counter.write_text(str(points.passed))
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(act: Callable[[], None], seconds: float) -> int:
    """The same for a fork that is killed after so many seconds, whatever it does then."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except BaseException:  # noqa: BLE001 - a child of a fork must not go on into pytest
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class _Points:
    def __init__(self, kill_at: int | None, rng: random.Random) -> None:
        self.kill_at = kill_at
        self.passed = 0
        self._rng = rng

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self._watched(getattr(os, name), torn=name in WRITES))
        process.run = self._watched(process.run, torn=False)

    def _watched(self, call: Callable[..., Any], *, torn: bool) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.passed += 1
            if self.passed == self.kill_at:
                if torn and self._rng.random() < 0.5:
                    fd, data, *rest = args
                    call(fd, bytes(data[: len(data) // 2 // SECTOR * SECTOR]), *rest)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return watched
