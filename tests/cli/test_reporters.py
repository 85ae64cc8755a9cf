"""What a log, a machine and a terminal see of long work."""

from __future__ import annotations

import io
import json

from hypothesis import given
from hypothesis import strategies as st

from tokvm.cli.reporters import EventReporter, PlainReporter
from tokvm.core.text import printable


@given(st.text())
def test_nothing_from_outside_reaches_the_terminal_as_a_control(text: str) -> None:
    assert printable(text).isprintable()


def test_plain_lines_name_the_pass_the_bytes_and_the_rate() -> None:
    out = io.StringIO()
    reporter = PlainReporter(out, interval_s=0.0)
    reporter.pass_begin(1, "base", 0, 4 << 20)
    reporter.advance(0, 1 << 20)
    reporter.pass_end(1, "base", 4 << 20, 2.0)
    lines = out.getvalue().splitlines()
    assert "pass 1 (base) of disk 0: up to 4 MiB" in lines[0]
    assert "1 MiB of 4 MiB" in lines[1]
    assert "left at most" in lines[1]
    assert lines[2].endswith("4 MiB in 2.00 s, 2 MiB/s")


def test_plain_lines_are_seconds_apart() -> None:
    out = io.StringIO()
    reporter = PlainReporter(out, interval_s=60.0)
    reporter.pass_begin(1, "base", 0, 1 << 30)
    for _ in range(1000):
        reporter.advance(0, 1 << 20)
    assert len(out.getvalue().splitlines()) == 1


def test_every_event_is_one_json_object() -> None:
    out = io.StringIO()
    reporter = EventReporter(out)
    reporter.phase("COPY")
    reporter.note("a\nb \x1b[31m")
    reporter.pass_begin(1, "delta", 2, 10)
    reporter.advance(2, 10)
    reporter.pass_end(1, "delta", 10, 0.5)
    reporter.downtime("stop", 1.25)
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["phase", "note", "pass_begin", "progress", "pass_end", "downtime"]
    assert events[3] == {"event": "progress", "time": events[3]["time"], "disk": 2, "bytes": 10}
