"""`python -m benchmarks.downtime [--ways none micro …] [--runs 5] [--source xenserver] [--json FILE]`: foretold and actual.

Each way moves one guest more than --runs from one lab, one after another, each rehearsed first. Of the first one's hypervisor
nothing is known yet (how long a stop takes, say), so it only teaches and is not counted. Actual is the outside clock: from the
last heartbeat of the source to the first of the target. The error is of what came: +25 % is 10 s foretold where 8 s came.
--boots: how often each rehearsal boots the guest; an emulated boot of the same disk takes 6.4 to 8.8 s on a machine at rest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, BenchmarkError

GUESTS = {
    "none": "mini",
    "micro": "mini-no-virtio",
    "kernel": "mini-no-virtio",
    "compatible": "mini-no-virtio",
    "virt-v2v": "debian-no-virtio",
}


@dataclass(frozen=True, slots=True)
class Move:
    """One guest's, in seconds. parts: of what came. foretold_s: right before the stop."""

    way: str
    guest: str
    foretold_s: float
    actual_s: float
    parts: dict[str, float]
    acknowledged: int
    lost: int

    @property
    def error_percent(self) -> float:
        return 100 * (self.foretold_s - self.actual_s) / self.actual_s


def main() -> int:
    options = _options()
    moves: list[Move] = []
    for way in options.ways:
        guest = options.guest or GUESTS[way]
        print(f"{way}: {options.runs + 1} times {guest}", file=sys.stderr, flush=True)
        try:
            moves += _moves(way, guest, options.source, options.runs + 1, options.boots)[1:]
        except BenchmarkError as exc:
            print(f"error: {way}: {exc}", file=sys.stderr)
            return 1
        if options.json:
            options.json.write_text(json.dumps([asdict(one) for one in moves], indent=1))
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    said = f"--source {options.source} --runs {options.runs} --boots {options.boots}"
    print(f"`python -m benchmarks.downtime {said}`: {os.cpu_count()} CPUs, load {load}\n")
    print(table(moves))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.downtime", description=__doc__)
    parser.add_argument("--ways", nargs="+", choices=GUESTS, default=list(GUESTS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--boots", type=int, default=3)
    parser.add_argument("--source", default="xenserver")
    parser.add_argument("--guest", help="another guest than the way's own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run here too")
    return parser.parse_args()


def _moves(way: str, guest: str, source: str, count: int, boots: int) -> list[Move]:
    """In the order in which they were made."""
    argv = [*(sys.executable, "-m", "tokvm", "lab", "run", "--json", "--source", source, "--guest", guest)]
    argv += ["--guests", str(count), "--at-once", "1", "--rehearse", "--boots", str(boots), "--way", way]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"{' '.join(argv)} ended with {done.returncode}: {done.stdout[-2000:].decode(errors='replace')}")
    return [_move(way, guest, one) for one in json.loads(done.stdout)["guests"]]


def _move(way: str, guest: str, report: dict[str, Any]) -> Move:
    return Move(
        way=way,
        guest=guest,
        foretold_s=float(report["predicted"]["total"]),
        actual_s=float(report["downtime_s"]["total"]),
        parts={part: float(seconds) for part, seconds in report["downtime_s"].items() if part != "total"},
        acknowledged=int(report["ledger"]["acknowledged"]),
        lost=int(report["ledger"]["lost"]),
    )


def table(moves: Sequence[Move]) -> str:
    """A row for each way: medians, the furthest prediction, and the writes."""
    lines = [
        "| way | guest | runs | morph in it | downtime foretold | came | furthest off | writes acknowledged / lost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way in dict.fromkeys(move.way for move in moves):
        of = [move for move in moves if move.way == way]
        lines.append(
            f"| `{way}` | {of[0].guest} | {len(of)} | {_median(move.parts.get('morph', 0.0) for move in of)} | "
            f"{_median(move.foretold_s for move in of)} | {_median(move.actual_s for move in of)} | "
            f"{max((move.error_percent for move in of), key=abs):+.0f} % | "
            f"{sum(move.acknowledged for move in of)} / {sum(move.lost for move in of)} |"
        )
    return "\n".join(lines)


def _median(values: Iterable[float]) -> str:
    return f"{statistics.median(values):.1f} s"


if __name__ == "__main__":
    raise SystemExit(main())
