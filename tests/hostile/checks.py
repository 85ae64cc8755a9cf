"""What must hold of every command that was given a hostile image, whatever came of it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.hostile.conftest import ROOT, Done
from tests.hostile.traces import Call, calls

from tokvm.core.units import MiB

CPU_LIMIT_S = 2.0  # both beyond what a good image costs
MEMORY_LIMIT = 256 * MiB
_OURS = re.compile(
    "|".join(
        (
            *(
                re.escape(f"{folder}/")
                for folder in (sys.prefix, f"{ROOT}/src", f"{ROOT}/tests", "/usr/lib", "/lib", "/usr/share/zoneinfo")
            ),
            r"/etc/(ld\.so\.cache|localtime)$",
            r"/dev/null$",
            r"/proc/(self|\d+)/fd/\d+$",
        )
    )
)
_RESULT = re.compile(r"\) = \d+<((?:[^<>\\]|\\.)*)>$")


def check_cost(done: Done, good: Done) -> None:
    """good: the same for an image that is fine."""
    spent, memory = done.cpu_s - good.cpu_s, done.memory - good.memory
    assert spent <= CPU_LIMIT_S, f"{spent:.1f} s of CPU"
    assert memory <= MEMORY_LIMIT, f"{memory / MiB:.0f} MiB"


def check_output(done: Done) -> None:
    """Nothing that moves a cursor, no line that the image wrote; one JSON document if that was asked for."""
    for raw in (done.stdout, done.stderr):
        text = raw.decode("utf-8")
        odd = sorted({character for character in text if not character.isprintable() and character not in "\n\t"})
        assert not odd, f"{odd} in {text!r}"
        assert not re.search(r"^\s*FORGED", text, re.MULTILINE), text
    if "--json" in done.argv:
        json.loads(done.stdout)


def check_trace(done: Done, *, read: Iterable[Path], written: Iterable[Path]) -> None:
    """Only these files were opened, by their names and by where those led; no program was run and nobody was called."""
    reads, writes = {str(path) for path in read}, {str(path) for path in written}
    for call in calls(done.trace):
        if call.name in ("execve", "execveat", "connect", "bind"):
            raise AssertionError(f"{call.name}: {call.text}")
        allowed = writes if call.writes else reads | writes
        for path in (*call.paths, *_led_to(call)):
            if path not in allowed and not _OURS.match(path):
                raise AssertionError(f"{path!r} was touched: {call.text}")


def _led_to(call: Call) -> tuple[str, ...]:
    """The file that was really opened."""
    found = _RESULT.search(call.text)
    return (os.path.normpath(found[1]),) if call.opens and found is not None and "\\" not in found[1] else ()


def check_refused(done: Done, says: str) -> None:
    assert done.code == 3, f"exit code {done.code}: {done.stderr.decode()}{done.stdout.decode()[:2000]}"
    text = done.stderr.decode()
    assert re.search(says, text), f"{says!r} is not in {text}"
    assert "\n  next: " in text
    if "--json" in done.argv:
        error = json.loads(done.stdout)["error"]
        assert (error["class"], error["exit_code"]) == ("ImageError", 3)
