"""Runs a variant as processes of its own and says what it cost.

Ratios within one run are what counts: variants alternate (A B C, A B C, …), so that a noisy neighbour or a warming cache hits
all of them alike. CPU seconds are user + system of the process and of the children it waited for (wait4); what a server or a
kernel thread did for it is not in them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

KiB = 1024
MiB = KiB * KiB
GiB = KiB * MiB
_SLOW_S = 30.0
ROOT = Path(__file__).resolve().parent.parent


class BenchmarkError(Exception):
    """A variant failed, so its figures would mean nothing."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One run: seconds and bytes. `detail` is what a worker said about itself."""

    wall_s: float
    cpu_s: float
    peak_rss: int
    detail: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to do the job. `steps` run one after the other and are measured together; `before` and `after` are not."""

    name: str
    steps: tuple[tuple[str, ...], ...]
    before: Callable[[], None] = lambda: None
    after: Callable[[], None] = lambda: None
    stdout: str = os.devnull


@dataclass(slots=True)
class Result:
    variant: str
    payload: int
    samples: list[Sample] = field(default_factory=list)

    @property
    def best_wall_s(self) -> float:
        return min(sample.wall_s for sample in self.samples)

    @property
    def median_wall_s(self) -> float:
        return statistics.median(sample.wall_s for sample in self.samples)

    @property
    def best_cpu_s(self) -> float:
        return min(sample.cpu_s for sample in self.samples)

    @property
    def median_cpu_s(self) -> float:
        return statistics.median(sample.cpu_s for sample in self.samples)

    @property
    def rate(self) -> float:
        """MiB/s"""
        return self.payload / MiB / self.best_wall_s

    @property
    def cpu_per_gib(self) -> float:
        return self.best_cpu_s * GiB / self.payload

    @property
    def peak_rss(self) -> int:
        return max(sample.peak_rss for sample in self.samples)


def worker(*args: str) -> tuple[str, ...]:
    """The argv of a tokvm worker; see work.py."""
    return (sys.executable, "-m", "benchmarks.work", *args)


def alternate(variants: Sequence[Variant], *, repeats: int, payload: int, tell: Callable[[str], None]) -> list[Result]:
    """Every variant `repeats` times, in turns; a very slow one only once. payload: the bytes of guest data that each moves."""
    results = [Result(variant.name, payload) for variant in variants]
    for turn in range(repeats):
        for variant, result in zip(variants, results, strict=True):
            if result.samples and result.best_wall_s > _SLOW_S:
                continue
            variant.before()
            sample = run(variant)
            variant.after()
            result.samples.append(sample)
            tell(f"  {turn + 1}/{repeats} {variant.name}: {sample.wall_s:.2f} s wall, {sample.cpu_s:.2f} s CPU")
    return results


def run(variant: Variant) -> Sample:
    """Run the variant's steps once."""
    wall_s = cpu_s = 0.0
    peak_rss = 0
    detail: dict[str, float] = {}
    for argv in variant.steps:
        begun = time.monotonic()
        with open(variant.stdout, "wb") as out:
            is_worker = "benchmarks.work" in argv
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE if is_worker else out, cwd=ROOT)
            said = process.stdout.read() if process.stdout else b""
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.stdout:
                process.stdout.close()
        wall_s += time.monotonic() - begun
        if process.returncode:
            raise BenchmarkError(f"{variant.name}: {' '.join(argv)} ended with {process.returncode}")
        cpu_s += usage.ru_utime + usage.ru_stime
        if is_worker:
            detail = json.loads(said)
            # ru_maxrss of a child begins with its parent's; a worker's own VmHWM does not.
            peak_rss = max(peak_rss, int(detail["peak_rss"]))
        else:
            peak_rss = max(peak_rss, usage.ru_maxrss * KiB)
    return Sample(wall_s, cpu_s, peak_rss, detail)


P = ParamSpec("P")
T = TypeVar("T")


def apart(make: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
    """Call it in a process of its own: a measured child's peak RSS begins with its parent's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(make, args, named)


def need_room(folder: Path, count: int, what: str) -> None:
    """BenchmarkError when the filesystem of `folder` has less than `count` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < count:
        need, have = (f"{number / GiB:.1f} GiB" for number in (count, free))
        raise BenchmarkError(f"{folder}: {what} need {need}, but only {have} are free; give another place with --folder")


def evict(*paths: Path) -> Callable[[], None]:
    """Something that puts these files out of the page cache (and no others: the machine may be shared)."""

    def act() -> None:
        for path in paths:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)

    return act
