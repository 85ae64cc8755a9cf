"""Transcripts read back (`remote/recording.py` draws them), and a host that answers from one: a real host as a golden file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokvm.images.base import ByteStream
from tokvm.remote.process import Completed
from tokvm.remote.ssh import RemoteCommandError, quote

FORMAT = 1


@dataclass(slots=True)
class Exchange:
    """One command, stream or sftp session, with what it answered. `end` is None when the run was over before it."""

    number: int
    kind: str
    host: str
    command: str
    time: str
    stdin: str | None = None
    end: dict[str, Any] | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def code(self) -> int | None:
        return None if self.end is None else self.end.get("code")

    @property
    def stdout(self) -> str:
        return "" if self.end is None else self.end.get("stdout", "")

    @property
    def stderr(self) -> str:
        return "" if self.end is None else self.end.get("stderr", "")

    @property
    def error(self) -> dict[str, Any] | None:
        return None if self.end is None else self.end.get("error")


@dataclass(slots=True)
class Transcript:
    """One run. `end` is None when it was killed or the recording ended early; `torn`: its last line is not whole."""

    begin: dict[str, Any]
    exchanges: list[Exchange]
    end: dict[str, Any] | None
    torn: bool

    @property
    def commands(self) -> list[str]:
        return [one.command for one in self.exchanges]


def read_transcript(path: Path) -> Transcript:
    """ValueError, with the line's number, when it is no transcript."""
    *lines, rest = path.read_bytes().split(b"\n")
    events = [_event(number, line) for number, line in enumerate(lines, 1)]
    if not events or events[0].get("event") != "begin" or events[0].get("format") != FORMAT:
        raise ValueError(f"{path}: line 1 does not begin a transcript of format {FORMAT}")
    found = Transcript(events[0], [], None, bool(rest))
    open_ones: dict[int, Exchange] = {}
    for number, event in enumerate(events[1:], 2):
        if found.end is not None:
            raise ValueError(f"{path}: line {number} comes after the end")
        try:
            _take(found, open_ones, event)
        except (KeyError, TypeError) as exc:
            raise ValueError(f"{path}: line {number} does not fit: {exc!r}") from exc
    return found


def _event(number: int, line: bytes) -> dict[str, Any]:
    event = json.loads(line.decode("ascii"))
    if not isinstance(event, dict):
        raise TypeError(f"line {number} is no JSON object")
    return event


def _take(found: Transcript, open_ones: dict[int, Exchange], event: dict[str, Any]) -> None:
    match event:
        case {"event": "sent", "n": n, "kind": kind, "host": host, "command": command, "time": time}:
            open_ones[n] = Exchange(n, kind, host, command, time, event.get("stdin"))
            found.exchanges.append(open_ones[n])
        case {"event": "step", "n": n}:
            open_ones[n].steps.append(event)
        case {"event": "ended", "n": n}:
            open_ones.pop(n).end = event
        case {"event": "end"}:
            found.end = event
        case _:
            raise KeyError(event.get("event"))


class ReplayHost:
    """Answers each command line as the recorded host did: in the same order where it was asked more than once, and the last
    answer for ever. A command that was not recorded is an AssertionError."""

    def __init__(self, transcript: Transcript) -> None:
        self.where = transcript.exchanges[0].host if transcript.exchanges else "ssh://nobody"
        self._answers: dict[str, list[Exchange]] = {}
        for exchange in transcript.exchanges:
            if exchange.kind == "command" and exchange.code is not None:
                self._answers.setdefault(exchange.command, []).append(exchange)

    def run(self, args: Sequence[str], *, timeout_s: float = 60.0, check: bool = True) -> Completed:
        return self.run_line(quote(args), timeout_s=timeout_s, check=check)

    def run_line(self, command: str, *, timeout_s: float = 60.0, check: bool = True) -> Completed:
        answers = self._answers.get(command)
        if answers is None:
            raise AssertionError(f"the transcript has no answer to {command!r}, within {timeout_s:g} s or ever")
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        stdout, stderr = (text.encode("utf-8", "surrogateescape") for text in (answer.stdout, answer.stderr))
        done = Completed(answer.code or 0, stdout, stderr)
        if check and done.code:
            raise RemoteCommandError(command, done, where=self.where)
        return done

    def stream(self, command: str, *, first_byte_s: float = 0.0) -> ByteStream:
        raise AssertionError(f"a transcript holds no disks: {command!r} ({first_byte_s:g} s)")

    def fingerprint(self) -> str:
        return ""

    def close(self) -> None: ...
