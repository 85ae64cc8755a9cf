"""A played host, a nursery that forks tokvm, what a guest does to its disks meanwhile, and who runs when."""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.places import SIZES, VM, Place

CUTOVER = ("cutover", VM, "--deadline", "20s", "--proof", "10s")
TIMES = {"cutover": CUTOVER[2:]}
CUT = "network cut"  # nursery.py's word
HOME = 4  # commands that it may take at most to get home from a bad day


@dataclass(frozen=True)
class Ended:
    """A command: how it ended, how many kill points it passed, what it said."""

    argv: tuple[str, ...]
    code: int
    events: int
    stderr: str


@dataclass(frozen=True)
class Meanwhile:
    """Something that happens to the host while tokvm stands still, at the `nth` time that it comes to `at` (see nursery.py)."""

    at: str
    act: Callable[[], object]
    nth: int = 1


@dataclass
class Saved:
    folder: Path
    targets: dict[Path, bytes]
    states: dict[str, bytes]


@dataclass
class Bench:
    """A place, a state directory, a target directory, and the nursery that runs tokvm. since: when `afresh` or `restore` was
    last; the source ran then."""

    folder: Path
    place: Place
    nursery: subprocess.Popen[str]
    chance: random.Random = field(default_factory=lambda: random.Random(2))
    number: int = 0
    since: float = field(default_factory=time.time)

    # tokvm

    def sync(self, *more: str, kill_at: int | None = None, **how: Any) -> Ended:
        argv = ["sync", self.place.url, VM, "--to", str(self.target), "--passes", "1", "--network", "*=user", *more]
        return self.tokvm(*argv, *self.place.options, kill_at=kill_at, **how)

    def synced(self) -> None:
        """A migration that is ready to be cut over, with writes behind its last pass."""
        self.afresh()
        self.guest_writes()
        done = self.sync()
        assert done.code == 0, done.stderr
        self.guest_writes()

    def cutover(self, *more: str, **how: Any) -> Ended:
        return self.tokvm(*CUTOVER, *more, **how)

    def tokvm(
        self, *argv: str, kill_at: int | None = None, meanwhile: Meanwhile | None = None, patience_s: float | None = None
    ) -> Ended:
        """patience_s: instead of the minutes for which a source is waited for."""
        stop = None if meanwhile is None else [meanwhile.at, meanwhile.nth]
        request = {
            "argv": [*argv, "--state-dir", str(self.state)],
            "kill_at": kill_at,
            "domains": str(self.domains),
            "calls": self.place.calls,
        }
        answer = self._say({**request, "stop": stop, "patience": patience_s})
        if "stopped" in answer:
            assert meanwhile is not None
            try:
                meanwhile.act()
            finally:
                answer = self._say("go")
        elif meanwhile is not None:
            raise AssertionError(f"tokvm never came to {meanwhile.at!r}: {answer}")
        return Ended(argv, **answer)

    def _say(self, request: object) -> dict[str, Any]:
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        self.nursery.stdin.write(json.dumps(request) + "\n")
        self.nursery.stdin.flush()
        answer: dict[str, Any] = json.loads(self.nursery.stdout.readline())
        return answer

    # Who runs

    @property
    def domains(self) -> Path:
        """The target hypervisor's domains."""
        return self.folder / f"domains{self.number}.json"

    @property
    def target_runs(self) -> bool:
        return self.domains.exists() and "running" in json.loads(self.domains.read_text()).values()

    @property
    def source_runs(self) -> bool:
        return self.place.played.is_running(VM)

    @property
    def alarms(self) -> int:
        """How often tokvm took the target off the network because both copies ran."""
        return sum(one["state"] == CUT for one in self._changes())

    def _changes(self) -> list[dict[str, Any]]:
        path = self.domains.with_suffix(".log")
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if row["time"] >= self.since]

    def timeline(self) -> list[tuple[float, str, bool]]:
        """(time, source | target, runs) since the state was put back last, in order."""
        rows = [json.loads(line) for line in (self.place.host.folder / "events.log").read_text().splitlines()]
        mine = [row for row in rows if row.get("vm") == self.place.uuid() and row["event"] in ("on", "off")]
        found = [(row["time"], "source", row["event"] == "on") for row in mine if row["time"] >= self.since]
        changes = [row for row in self._changes() if row["state"] != CUT]
        found += [(row["time"], "target", row["state"] == "running") for row in changes]
        return sorted(found)

    def assert_never_both(self, *, but_for: str = "") -> None:
        """At no moment since `afresh` or `restore`, not only now. but_for: who started the second, so that tokvm must have
        raised the alarm instead."""
        runs = {"source": True, "target": False}
        for _, who, on in self.timeline():
            runs[who] = on
            if all(runs.values()):
                assert but_for, f"two copies ran: {self.timeline()}"
                assert self.alarms, "two copies ran, and nobody was told"
        if not but_for:
            assert self.alarms == 0

    def assert_one_copy_runs(self) -> None:
        assert self.source_runs != self.target_runs, f"source {self.source_runs}, target {self.target_runs}"

    def assert_home(self, *, but_for: str = "") -> None:
        """Exactly one copy runs; if it is the target, it holds what the source held."""
        self.assert_never_both(but_for=but_for)
        self.assert_one_copy_runs()
        if self.target_runs:
            self.assert_identical()

    def go_home(self, ended: Ended, *, but_for: str = "") -> list[Ended]:
        """Do what the message says, until a command succeeds; everything that was run, the last one first said. One copy runs
        then."""
        ran = [ended]
        while ran[-1].code != 0:
            assert len(ran) <= HOME, [(one.argv, one.code, one.stderr) for one in ran]
            for argv in next_commands(ran[-1]):
                ran.append(self.sync() if argv == ("sync",) else self.tokvm(*argv))
                self.assert_never_both(but_for=but_for)
        self.assert_home(but_for=but_for)
        return ran

    # Its disks

    @property
    def state(self) -> Path:
        return self.folder / f"state{self.number}"

    @property
    def target(self) -> Path:
        return self.folder / f"target{self.number}"

    def afresh(self) -> None:
        """Another migration from nothing: new state, new targets, no snapshot and no claim on the host."""
        for old in (self.state, self.target):
            shutil.rmtree(old, ignore_errors=True)
        self.domains.unlink(missing_ok=True)
        self.number += 1
        self.target.mkdir()
        self.place.forget()
        self.since = time.time()

    def save(self) -> Saved:
        """Everything as it stands between two commands, to be put back by `restore`."""
        kept, host = self.folder / "kept", self.place.host.folder
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(self.state, kept / "state")
        for name in self.place.kept:
            shutil.copytree(host / name, kept / name)
        targets = {path: path.read_bytes() for path in self.target.iterdir()}
        return Saved(kept, targets, {name: (host / name).read_bytes() for name in self.place.states})

    def restore(self, saved: Saved) -> None:
        """Targets are written in place: they are known by their inode and mark. The source runs."""
        self.domains.unlink(missing_ok=True)
        host = self.place.host.folder
        for name, place in (("state", self.state), *((name, host / name) for name in self.place.kept)):
            shutil.rmtree(place)
            shutil.copytree(saved.folder / name, place)
        for path, held in saved.targets.items():
            with path.open("r+b") as file:
                file.write(held)
                file.truncate()
        for name, held in saved.states.items():
            (host / name).write_bytes(held)
        self.since = time.time()

    def guest_writes(self) -> None:
        """Some runs, some single sectors, some zeros; also at the very end."""
        for disk, size in enumerate(SIZES):
            for _ in range(5):
                length = 512 * self.chance.choice((1, 1, 8, 64, 700))
                offset = 512 * self.chance.randrange((size - length) // 512 + 1)
                data = bytes(length) if self.chance.random() < 0.2 else self.chance.randbytes(length)
                self.place.played.write_disk(VM, disk, offset=offset, data=data)
        self.place.guest_writes(self.chance)
        self.place.played.write_disk(VM, 1, offset=SIZES[1] - 512, data=self.chance.randbytes(512))

    def assert_identical(self) -> None:
        for disk in range(len(SIZES)):
            (target,) = self.target.glob(f"*-disk{disk}.raw")
            assert target.read_bytes() == self.place.played.read_disk(VM, disk), f"disk {disk} differs"


def start_nursery(imports: Sequence[str] = ()) -> subprocess.Popen[str]:
    program = [sys.executable, str(Path(__file__).with_name("nursery.py")), *imports]
    return subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def points(total: int, count: int) -> list[int]:
    """`count` kill points, evenly from the first event to the last."""
    return sorted({1 + round(n * (total - 1) / (count - 1)) for n in range(count)})


def advice(ended: Ended) -> str:
    """What stands behind the last `next:`, its lines joined."""
    assert "next:" in ended.stderr, f"{ended.argv} ended with {ended.code} and no advice: {ended.stderr}"
    return " ".join(ended.stderr.rpartition("next:")[2].split())


def next_commands(ended: Ended) -> list[tuple[str, ...]]:
    """The commands that an error's message tells a person to run, in order; the first way, where it offers several. The same
    command, where it names none."""
    said = advice(ended)
    written = re.search(r"tokvm ((?:rollback|cutover|sync|finish) [0-9a-z][^\s;,.)`]*(?: --[a-z-]+)?)", said)
    if written:
        argv = tuple(shlex.split(written[1]))
        return [(*argv, *TIMES.get(argv[0], ()))]
    commands: list[tuple[str, ...]] = [("sync",)] if re.search(r"\bsync\b", said) else []
    if re.search(r"\bcut over\b", said):
        commands.append(CUTOVER)
    return commands or [ended.argv]  # "again", or the host has to be mended by hand before
