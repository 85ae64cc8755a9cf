"""QEMU's monitor protocol over a unix socket, one short conversation at a time.

    ◄ {"QMP": …}   ► {"execute": "qmp_capabilities"}   ◄ {"return": {}}   ► {"execute": …, "arguments": …}   ◄ {"return": …}

Events may come in between and are skipped. A monitor serves one client; the next waits in the backlog until it hangs up, so
nobody may keep the line.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tokvm.core.units import MiB
from tokvm.lab.errors import LabError

MAX_ANSWER = 16 * MiB

T = TypeVar("T")


class QmpError(LabError):
    """QEMU answered with an error; `kind` is its class."""

    def __init__(self, what: str, *, kind: str, where: str) -> None:
        super().__init__(what, where=where)
        self.kind = kind


class Qmp:
    """A conversation with the monitor at `path`. LabError when nobody answers within `timeout_s` or the line breaks."""

    def __init__(self, path: Path, *, timeout_s: float = 30) -> None:
        self._where = str(path)
        self._deadline = time.monotonic() + timeout_s
        self._rest = b""
        self._link = self._connect(path)
        try:
            self._answer()
            self.execute("qmp_capabilities")
        except BaseException:
            self._link.close()
            raise

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._link.close()

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """The command's return value; QmpError when QEMU refuses it."""
        request = {"execute": command} | ({"arguments": arguments} if arguments else {})
        self._guard(lambda: self._link.sendall(json.dumps(request).encode() + b"\n"))
        while True:
            answer = self._answer()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                error = answer["error"]
                raise QmpError(f"{command}: {error.get('desc')}", kind=str(error.get("class")), where=self._where)

    def _connect(self, path: Path) -> socket.socket:
        """Through /proc/self/fd, because a socket's path may have no more than 107 bytes and a state directory's may."""
        link = socket.socket(socket.AF_UNIX)
        folder = -1
        try:
            folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            link.settimeout(max(self._deadline - time.monotonic(), 0.1))
            link.connect(f"/proc/self/fd/{folder}/{path.name}")
        except OSError as exc:
            link.close()
            raise LabError(f"QEMU does not answer: {exc.strerror or exc}", where=self._where) from exc
        finally:
            if folder >= 0:
                os.close(folder)
        return link

    def _answer(self) -> dict[str, Any]:
        while b"\n" not in self._rest:
            data = self._guard(lambda: self._link.recv(65536))
            if not data or len(self._rest) > MAX_ANSWER:
                raise LabError("QEMU broke the conversation off", where=self._where)
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError as exc:
            raise LabError("QEMU's answer is no JSON", where=self._where) from exc
        if not isinstance(answer, dict):
            raise LabError("QEMU's answer is no JSON object", where=self._where)
        return answer

    def _guard(self, act: Callable[[], T]) -> T:
        try:
            self._link.settimeout(max(self._deadline - time.monotonic(), 0.1))
            return act()
        except OSError as exc:
            raise LabError(f"QEMU does not answer: {exc.strerror or exc}", where=self._where) from exc
